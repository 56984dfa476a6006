"""A whole run of training in this process, with real games but without Ray."""

from __future__ import annotations

from pathlib import Path

import torch

from leap_dist.config.settings import Config
from leap_dist.envs import atari_vector
from leap_dist.nn.actor_critic import initialization
from leap_dist.protocol.messages import Idle
from leap_dist.server.meta_server import MetaServer
from leap_dist.tasks.task import family_of
from leap_dist.worker.run_task import run_task
from leap_dist.worker.start import Start


def train(settings: Config, run_dir: Path) -> MetaServer:
    """Continue a run, or begin it, with neither Ray nor a second process. Return the server, closed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        run_dir.mkdir(exist_ok=True)
        manifest, initial = initialization(atari_vector.channels(settings.atari.frames), settings.seed, settings.scope)
        server = MetaServer(
            settings, run_dir, manifest=manifest, initial=initial, session="another",
            preprocessing=family_of(settings).preprocessing(settings),
        )  # fmt: skip
        while not isinstance(lease := server.lease("w0", "i0"), Idle):
            run_task(lease, Start(server.snapshot()[1], server.head(lease.task.game)), settings, server)
        assert lease.finished
        server.close()
        return server
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
