"""Presets: named sets of changes to the defaults. The default agent is that of the paper's appendix E."""

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

_ALGORITHM_1: dict[str, Any] = {"mode": "sync", "meta.contribution_clip": 0.0}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {**_ALGORITHM_1},
    "paper-5m": {**_ALGORITHM_1, "task_steps": 5_000_000},
    "paper-async": {},
    "fast": {**_FAST},
    "quick": {
        **_FAST,
        "games": ("assault", "asterix", "ms_pacman"),  # fast to emulate, with episodes that end within a task
        "workers": 2,  # so that duration and results hardly depend on the machine
        "meta_updates": 10,
        "meta.batch_size": 3,
        "task_steps": 10_000,
        "worker.push_interval": 2_000,
    },
    "smoke": {
        **_FAST,
        "agent.envs": 4,
        "games": ("pong", "freeway"),
        "workers": 2,
        "meta_updates": 2,
        "meta.batch_size": 2,
        "task_steps": 400,
        "fomaml.rollouts": 4,
        "worker.push_interval": 100,
        "server.lease_seconds": 20.0,
    },
}
"""Presets of Atari games, by name."""

_OMNIGLOT: dict[str, Any] = {
    "tasks": "omniglot",
    "games": ("pretraining",),
    "task_steps": 2_000,  # 100 updates
    "mode": "sync",
    "sampling": "replacement",
    "leap.metric": "length",  # the authors' code
    "fomaml.rollouts": 5,  # all 100 held-out images if there are no rotations, 100 of 3,600 with 36
    "meta.shared": "model",
    "meta.batch_size": 20,
    "meta.optimizer": "sgd",
    "meta.learning_rate": 0.1,
    "supervised.batch": 20,
    "worker.push_interval": 2_000,
    "telemetry.gif_interval": 0,
}
_MULTI_CV: dict[str, Any] = {
    "tasks": "multi-cv",
    "games": ("all",),
    "task_steps": 740_000,  # ten epochs of SVHN, the largest
    "meta.batch_size": 10,
    "meta.learning_rate": 0.01,
    "supervised.batch": 32,
    "supervised.epochs": 10,
    "supervised.patience": 2,
    "server.lease_seconds": 300.0,  # each process decodes tens of thousands of images before its first step
    "telemetry.gif_interval": 0,
}

_OWN_AGENT: dict[str, Any] = {
    "tasks": "gymnasium",
    "agent.envs": 16,
    "agent.learning_rate": 7e-4,
    "agent.epsilon": 1e-5,
    "agent.epsilon_form": "outside",
    "agent.value_cost": 0.25,
    "agent.reward_clip": "none",
    "telemetry.gif_interval": 0,
}
_OWN_IMAGES: dict[str, Any] = {
    **{name: value for name, value in _MULTI_CV.items() if name != "games"},  # only the user knows their names
    "tasks": "images",
    "server.lease_seconds": 60.0,
}

TASKS: dict[str, dict[str, dict[str, Any]]] = {
    "omniglot": {
        "paper": {
            **_OMNIGLOT,
            **_ALGORITHM_1,
            "meta_updates": 1000,
            "task_steps": 10_000,  # at most 500 updates, the axis of figure 3
            "supervised.rotations": 36,
            "supervised.network": "norm-pool",
            "supervised.patience_steps": 100,
            "early_stopping.interval": 50,
            "worker.push_interval": 10_000,
        },
        "authors": {
            **_OMNIGLOT,
            **_ALGORITHM_1,
            "meta_updates": 1000,
            "sampling": "shuffled",
            "supervised.augmentation": "affine",
            "supervised.shuffle": "task",
            "supervised.split": "first",
            "supervised.polarity": "black-ink",
            "supervised.resampling": "nearest",
            "supervised.network": "authors",
        },
        "quick": {**_OMNIGLOT, "workers": 2, "meta_updates": 20, "meta.batch_size": 5},
        "smoke": {
            **_OMNIGLOT,
            "workers": 2,
            "meta_updates": 2,
            "meta.batch_size": 2,
            "task_steps": 200,
            "supervised.pretraining": 2,
            "fomaml.rollouts": 2,
            "worker.push_interval": 100,
            "server.lease_seconds": 20.0,
        },
    },
    "multi-cv": {
        "paper": {**_MULTI_CV, **_ALGORITHM_1, "supervised.test_epochs": 100},
        "quick": {**_MULTI_CV, "workers": 2, "meta_updates": 10, "meta.batch_size": 2, "task_steps": 8_000},
        "smoke": {
            **_MULTI_CV,
            "workers": 2,
            "meta_updates": 2,
            "meta.batch_size": 2,
            "task_steps": 640,
            "fomaml.rollouts": 2,
            "worker.push_interval": 320,
            "server.lease_seconds": 60.0,
        },
    },
    "gymnasium": {
        "paper": {**_ALGORITHM_1, "tasks": "gymnasium", "telemetry.gif_interval": 0},
        "fast": _OWN_AGENT,
        "quick": {
            **_OWN_AGENT,
            "workers": 2,
            "meta_updates": 10,
            "meta.batch_size": 4,
            "task_steps": 10_000,
            "worker.push_interval": 2_000,
        },
        "smoke": {
            **_OWN_AGENT,
            "workers": 2,
            "agent.envs": 4,
            "meta_updates": 2,
            "meta.batch_size": 2,
            "task_steps": 400,
            "fomaml.rollouts": 4,
            "worker.push_interval": 100,
            "server.lease_seconds": 20.0,
        },
    },
    "images": {
        "paper": {**_OWN_IMAGES, **_ALGORITHM_1},
        "quick": {**_OWN_IMAGES, "workers": 2, "meta_updates": 10, "meta.batch_size": 2, "task_steps": 8_000},
        "smoke": {
            **_OWN_IMAGES,
            "workers": 2,
            "meta_updates": 2,
            "meta.batch_size": 2,
            "task_steps": 640,
            "fomaml.rollouts": 2,
            "worker.push_interval": 320,
        },
    },
}
"""Presets of tasks other than Atari games: `paper` follows appendices C to E and `authors` the published code; `quick`
is shorter, and `smoke` the shortest. docs/studies.md gives the source of each setting."""

_LEAP_ON_GAMES: dict[str, Any] = {
    "leap.metric": "length",
    "leap.loss_warmup": 0.1,
    "meta.optimizer": "sgd",
    "meta.learning_rate": 0.01,
    "meta.max_norm": 10.0,
    "meta.contribution_clip": 1.0,
}
"""Settings with which the units of φ stay alive (docs/results-atari.md). With Adam, most of them die."""
_LEAP_ON_OWN_GAMES: dict[str, Any] = {
    "leap.loss_warmup": 0.1,
    "meta.optimizer": "sgd",
    "meta.learning_rate": 1.0,
    "meta.contribution_clip": 1.0,
}
"""The best of the settings that were tried on variants of a small game (docs/results-catch.md)."""

_REPTILE_ON_GAMES: dict[str, Any] = {
    "meta.optimizer": "sgd",
    "meta.learning_rate": 1.0,
    "meta.contribution_clip": 0.0,
}
"""φ becomes the mean of the encoders with which the tasks ended (docs/results-atari.md, docs/results-catch.md)."""

OF_META_LEARNERS: dict[tuple[str, str], dict[str, dict[str, Any]]] = {
    ("omniglot", "paper"): {
        "reptile": {"meta.learning_rate": 0.01},
        "finetune-multi": {"supervised.learning_rate": 0.01, "supervised.test_learning_rate": 0.01},
        "finetune-single": {"supervised.learning_rate": 0.01, "supervised.test_learning_rate": 0.01},
        "multitask": {"supervised.learning_rate": 0.01, "supervised.test_learning_rate": 0.01},
    },
    # The encoder and the heads are both plain averages, without weighting or clipping.
    **{
        (tasks, preset): {
            "finetune-multi": {"meta.contribution_clip": 0.0, "meta.staleness": "constant"},
            **({"leap": leap} if preset in ("fast", "quick") else {}),
            **({"reptile": _REPTILE_ON_GAMES} if preset == "fast" else {}),
        }
        for tasks, presets, leap in (
            ("atari", PRESETS, _LEAP_ON_GAMES),
            ("gymnasium", TASKS["gymnasium"], _LEAP_ON_OWN_GAMES),
        )
        for preset in presets
    },
}
"""Settings of individual meta-learners in a preset, by tasks and preset. They take precedence over DEFAULTS. Those
with a meta-optimizer do not apply to the modes of OPTIMIZERS. A rate for the mean of a batch does not apply to modes
whose DEFAULTS have a lower one for single contributions."""

OPTIMIZERS = ("fedasync", "delayed-nesterov")
"""Modes that are optimizers in their own right."""

DEFAULTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    # Adam and momentum are a known hazard with stale gradients, so single contributions are applied with plain SGD.
    ("mode", "async", {"meta.optimizer": "sgd", "meta.learning_rate": 0.1}),
    # The pushes of a stream are in φ already, so its task cannot be undone and trained again.
    ("mode", "stream", {"meta.optimizer": "sgd", "meta.learning_rate": 0.1, "server.on_lost": "keep"}),
    # Arrivals are neither weighted nor clipped in arXiv 2102.07215.
    ("meta.shift", "trajectory", {"meta.contribution_clip": 0.0, "meta.staleness": "constant"}),
    # Meta-optimizers of the baselines (appendix C); finetuning adds the mean change to φ.
    ("meta_learner", "reptile", {"meta.optimizer": "sgd", "meta.learning_rate": 0.1}),
    ("meta_learner", "fomaml", {"meta.optimizer": "sgd", "meta.learning_rate": 0.5}),
    ("meta_learner", "finetune-multi", {"meta.optimizer": "sgd", "meta.learning_rate": 1.0}),
    ("meta_learner", "finetune-single", {"meta.optimizer": "sgd", "meta.learning_rate": 1.0}),
    # A single learner continues where it stopped: φ becomes θ_K, and no two tasks run at the same time.
    (
        "meta_learner",
        "multitask",
        {
            "mode": "sync",
            "workers": 1,
            "meta.optimizer": "sgd",
            "meta.learning_rate": 1.0,
            "meta.contribution_clip": 0.0,
        },
    ),
    ("meta_learner", "none", {"meta.optimizer": "sgd"}),
    # The modes of OPTIMIZERS: α of arXiv 1903.03934; ε and β of arXiv 2401.09135.
    ("mode", "fedasync", {"meta.optimizer": "sgd", "meta.learning_rate": 0.6, "meta.contribution_clip": 0.0}),
    (
        "mode",
        "delayed-nesterov",
        {"meta.optimizer": "sgd", "meta.learning_rate": 0.7, "meta.momentum": 0.9, "meta.nesterov": True},
    ),
)
"""Defaults that depend on a choice: (field, value, settings). Later entries win, and explicit settings win over all."""

PRESET_HELP = {
    "smoke": "under a minute: checks that everything runs",
    "quick": "minutes on a laptop, to see how it works: three games, short tasks",
    "fast": "to try ideas: A2C settings that learn, 24 games, hours to days",
    "paper": "to repeat the paper (Algorithm 1, appendix E) on a cluster",
    "paper-5m": "the camera-ready version: five million steps per task",
    "paper-async": "as paper, with asynchronous meta-updates: no worker waits",
}
"""One line about the purpose of each preset, for the help."""
