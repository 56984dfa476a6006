"""What differs between the kinds of tasks: Atari games, alphabets and data sets of images, and the user's own.

A `TaskFamily` provides the network, its fresh initialization, the data and the learner. The worker's loop, the server,
the modes, the ledger and the evaluation are the same for all families.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from leap_dist.config.settings import Config
from leap_dist.leap.learner import Learner
from leap_dist.nn.flat_vector import Manifest
from leap_dist.nn.profiling import Stopwatch
from leap_dist.protocol.messages import Lease
from leap_dist.tasks.atari.family import Atari
from leap_dist.tasks.gymnasium.family import Gymnasium
from leap_dist.tasks.images.family import MultiCV, Omniglot, OwnImages
from leap_dist.tasks.starting_point import StartingPoint


class Network(Protocol):
    """A network whose parameters are divided into shared ones and the task's own."""

    def parameters_of(self, scope: str) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Return the shared parameters and the task's own, by name. `scope` names the shared ones."""


class TaskFamily(Protocol):
    """A kind of task. `Learner` (leap_dist/leap/learner.py) is the other half of the interface."""

    sections: tuple[str, ...]
    """Sections of the settings that determine the learner."""

    def check(self, config: Config) -> None:
        """Check, before anything is started, that the data of all tasks is there. Raises ConfigError if it is not."""

    def initialization(self, config: Config, seed: int, scope: str) -> tuple[Manifest, np.ndarray]:
        """Return a fresh random φ₀, flat float32, and its manifest. The same seed gives the same φ₀.

        `scope` says which parameters are shared: "convolutions", "encoder" or "model".
        """

    def identity(self, config: Config, game: str) -> dict[str, Any]:
        """Return, as plain data, everything that determines what and how a learner learns on the task `game`.

        An evaluation reuses the result of an earlier run only if this is equal.
        """

    def preprocessing(self, config: Config) -> dict[str, Any]:
        """Return the description of the network's input that is stored in init.safetensors."""

    def check_preprocessing(self, given: Any) -> None:
        """Check such a description from a file. Raises ValueError if no network of this family has such an input."""

    def network(self, given: dict[str, Any]) -> Network:
        """Return a network, with a head that all tasks share, for the input that `given` describes."""

    def learner(
        self, config: Config, lease: Lease, start: StartingPoint, stopwatch: Stopwatch, beat: Callable[[], None]
    ) -> Learner:
        """Make the learner for the task of a lease. Raises ConfigError if its data is not there.

        If that takes long, calls `beat` about once a second, so that the lease can be renewed.
        """


_FAMILIES: dict[str, TaskFamily] = {
    "atari": Atari(),
    "omniglot": Omniglot(),
    "multi-cv": MultiCV(),
    "gymnasium": Gymnasium(),
    "images": OwnImages(),
}
"""By the value of the setting `tasks`."""


def family_of(config: Config) -> TaskFamily:
    """Return the family of a run's tasks."""
    return _FAMILIES[config.tasks]


def family_named(tasks: str) -> TaskFamily:
    """Return a family by the value of the setting `tasks`. Raises ValueError if there is none of that name."""
    if tasks not in _FAMILIES:
        raise ValueError(f"tasks is {tasks[:40]!r}, which this version does not support")
    return _FAMILIES[tasks]
