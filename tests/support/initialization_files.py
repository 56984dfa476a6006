"""An init.safetensors as a real run writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leap_dist.config.loading import resolve
from leap_dist.nn.actor_critic import initialization
from leap_dist.server.meta_server import MetaServer
from leap_dist.storage import run_directory
from leap_dist.tasks.task import family_of

CHANNELS = {"gray4": 4, "rgb1": 3, "rgb4": 12}


def written(folder: Path, frames: str = "gray4", **settings: Any) -> Path:
    """The file of a run directory `folder`, which a server has begun with the initialization of seed 3."""
    config = resolve("smoke", {"atari.frames": frames, **settings})
    run_directory.prepare(folder, config)
    manifest, initial = initialization(CHANNELS[frames], 3, config.scope)
    preprocessing = family_of(config).preprocessing(config)
    MetaServer(config, folder, manifest=manifest, initial=initial, preprocessing=preprocessing).close()
    return folder / "init.safetensors"
