"""Named settings to start from: what each changes from the defaults, which are the paper's appendix E."""

from __future__ import annotations

from typing import Any

_FAST: dict[str, Any] = {
    "agent.envs": 16,
    "agent.learning_rate": 7e-4,
    "agent.epsilon": 1e-5,
    "agent.epsilon_form": "outside",
    "agent.value_cost": 0.25,
    "agent.reward_clip": "sign",
    "atari.frames": "gray4",
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper-5m": {"task_steps": 5_000_000},
    "fast": {**_FAST},
    "quick": {
        **_FAST,
        "games": ("assault", "asterix", "ms_pacman"),  # episodes short enough to end within a task, and fast to emulate
        "meta_updates": 10,
        "meta.batch_size": 3,
        "task_steps": 10_000,
        "worker.push_interval": 2_000,
    },
    "smoke": {
        **_FAST,
        "agent.envs": 4,
        "games": ("pong", "freeway"),
        "meta_updates": 2,
        "meta.batch_size": 2,
        "task_steps": 400,
        "worker.push_interval": 100,
        "server.lease_seconds": 20.0,
    },
}

PRESET_HELP = {
    "smoke": "seconds; checks that everything runs",
    "quick": "a few minutes on a laptop: three real games, ten meta-updates, a picture",
    "fast": "practical A2C settings: 16 environments, sign rewards, four gray frames",
    "paper": "the paper's appendix E: a million steps per task, batches of 16 tasks",
    "paper-5m": "the same with five million steps per task, as in the camera-ready",
}
