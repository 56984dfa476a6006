"""Modes and meta-learners with state of their own, on a real Ray, with server and driver killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from service import SYNC, Launch, playing, same_result

from leap_dist.config.settings import Config
from leap_dist.envs import atari_vector
from leap_dist.nn.actor_critic import initialization
from leap_dist.protocol.messages import Idle
from leap_dist.server.meta_server import MetaServer
from leap_dist.storage import run_directory
from leap_dist.worker.run_task import run_task
from leap_dist.worker.start import Start

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]


def in_process(settings: Config, run_dir: Path) -> MetaServer:
    """What the run must give, with neither Ray nor a second process. The server, closed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        run_dir.mkdir()
        manifest, initial = initialization(atari_vector.channels(settings.atari.frames), settings.seed, settings.scope)
        server = MetaServer(settings, run_dir, manifest=manifest, initial=initial)
        while not isinstance(lease := server.lease("w0", "i0"), Idle):
            run_task(lease, Start(server.snapshot()[1], server.head(lease.task.game)), settings, server)
        server.close()
        return server
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_persistent_heads_survive_the_death_of_server_and_driver(launch: Callable[..., Launch], tmp_path: Path) -> None:
    run = launch("heads", *SYNC, "--workers", "2", "--meta-learner", "finetune-multi", "--worker.wire", "int8")
    run.wait_for(playing)
    os.kill(run.summary()["server_pid"], signal.SIGKILL)
    run.wait_for(lambda summary: summary["server_restarts"])
    run.process.kill()
    run.process.wait()
    assert run.summary()["meta_updates"] < 5, "killed in the middle"
    resumed = launch("heads", "--resume")
    assert resumed.end() == 0, resumed.log.read_text()

    expected = in_process(run_directory.load_config(run.run_dir, {}), tmp_path / "plain")
    assert all(np.abs(expected.head(game)).max() > 0 for game in ("pong", "freeway"))
    same_result(run.run_dir, tmp_path / "plain")
    for name in ("heads.safetensors", "init.safetensors"):
        file = Path("checkpoints", "000005", name)
        assert (run.run_dir / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_with_trajectory_shifting_staleness_falls_from_the_task_to_the_push_interval(
    launch: Callable[..., Launch],
) -> None:
    """And what was streamed counts once, though the server is killed in between."""
    run = launch(
        "stream", "--preset", "smoke", "--mode", "stream", "--meta.shift", "yes", "--meta-updates", "3",
        "--task-steps", "1000", "--worker.push-interval", "100", "--workers", "2", "--worker.cpus", "0.5",
        "--server.busy-share", "1",
    )  # fmt: skip
    run.wait_for(lambda summary: summary["meta_updates"] >= 15)
    os.kill(run.summary()["server_pid"], signal.SIGKILL)
    assert run.end() == 0, run.log.read_text()
    assert run.summary()["server_restarts"] >= 1
    lines = [json.loads(line) for line in (run.run_dir / "ledger.jsonl").read_text().splitlines()]
    assert [line["version_before"] for line in lines] == list(range(60))
    for lease in {line["lease"] for line in lines}:
        own = [line for line in lines if line["lease"] == lease]
        assert [(line["seq"], line["new_steps"]) for line in own] == [(k + 1, 100) for k in range(10)]
        assert [line["final"] for line in own] == [False] * 9 + [True]
    assert len({line["worker"] for line in lines}) == 2
    since_lease = [line["version_before"] - line["lease_version"] for line in lines]
    assert sum(since_lease) / len(lines) >= 4.5, "a task's own ten pushes alone"
    # Between two pushes of a worker each version counts once, and its own do not: at most the other worker's.
    assert sum(line["staleness"] for line in lines) / len(lines) <= 1
    assert run.summary()["agent_steps"] == 6 * 1000
