"""What a task is, by kind: the network, where it starts, what it learns from, and what others have to know of both.

Everything else (worker's loop, server, modes, ledger, evaluation) is the same for Atari games, alphabets and data sets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from leap_dist.config.loading import ConfigError
from leap_dist.config.registry import normalize
from leap_dist.config.settings import Config
from leap_dist.datasets import multicv, omniglot
from leap_dist.datasets.splits import Split, Supervised, hold_out
from leap_dist.envs import atari_vector
from leap_dist.leap.learner import Learner
from leap_dist.nn import actor_critic, convnet
from leap_dist.nn.actor_critic import FRAME_SIZE, SCALE
from leap_dist.nn.flat_vector import Manifest
from leap_dist.nn.profiling import Stopwatch
from leap_dist.protocol.messages import Lease
from leap_dist.tasks.atari.a2c import A2C
from leap_dist.tasks.images.classifier import Classifier
from leap_dist.tasks.images.examples import Dataset, Examples


class StartingPoint(NamedTuple):
    """What a task's parameters start from."""

    vector: np.ndarray
    """φ, flat float32."""
    scope: str
    """Which parameters `vector` is of."""
    head_seed: int | None
    """Determines the task's own parameters instead of the task's seed, where they last from task to task."""
    head_change: np.ndarray | None
    """What earlier tasks have added to those, flat float32."""


class Family(Protocol):
    """A kind of task."""

    sections: tuple[str, ...]
    """Of the settings, those that make a learner."""

    def check(self, config: Config) -> None:
        """Before Ray starts: raises ConfigError where what tasks learn from is not here."""

    def initialization(self, config: Config, seed: int, scope: str) -> tuple[Manifest, np.ndarray]:
        """A fresh random φ₀, float32, with its manifest; the same for the same seed."""

    def identity(self, config: Config, game: str) -> dict[str, Any]:
        """All that determines what a learner learns from, and how, as plain data."""

    def preprocessing(self, config: Config) -> dict[str, Any]:
        """What an encoder is given, for init.safetensors."""

    def learner(self, config: Config, lease: Lease, start: StartingPoint, stopwatch: Stopwatch) -> Learner:
        """Of a lease's task. Raises ConfigError where what it learns from is not here."""


def of(config: Config) -> Family:
    """The family of a run's tasks."""
    return _FAMILIES[config.tasks]


def sections(tasks: str) -> tuple[str, ...]:
    """Of the settings, those that make a learner of such tasks."""
    return _FAMILIES[tasks].sections


class Atari:
    """A2C on games."""

    sections: tuple[str, ...] = ("agent", "atari")

    def check(self, config: Config) -> None:
        """Games come with ale-py."""

    def initialization(self, config: Config, seed: int, scope: str) -> tuple[Manifest, np.ndarray]:
        """See Family."""
        return actor_critic.initialization(atari_vector.channels(config.atari.frames), seed, scope)

    def identity(self, config: Config, game: str) -> dict[str, Any]:
        """See Family."""
        return _section(config, "agent") | _section(config, "atari")

    def preprocessing(self, config: Config) -> dict[str, Any]:
        """See Family."""
        return {
            "frames": config.atari.frames,
            "size": FRAME_SIZE,
            "frame_skip": config.atari.frame_skip,
            "scale": SCALE,
        }

    def learner(self, config: Config, lease: Lease, start: StartingPoint, stopwatch: Stopwatch) -> A2C:
        """See Family."""
        return A2C(
            lease.task.game,
            start.vector,
            seed=lease.task.seed,
            agent=config.agent,
            settings=config.atari,
            worker=config.worker,
            scope=start.scope,
            head_seed=start.head_seed,
            head_change=start.head_change,
            stopwatch=stopwatch,
        )


class Images:
    """A classifier of small images. Subclasses say which.

    Args:
        channels: of the images.
        size: their side in pixels.
        classes: of the head that a run's tasks share, where they do.
    """

    sections: tuple[str, ...] = ("supervised",)

    def __init__(self, channels: int, size: int, classes: int) -> None:
        self._channels = channels
        self._size = size
        self._classes = classes

    def data(self, config: Config, name: str) -> Supervised:
        """What is called `name`. Raises ConfigError where it is not in `config.data_dir`."""
        raise NotImplementedError

    def task(self, config: Config, lease: Lease) -> Supervised:
        """What a lease's task learns from."""
        return self.data(config, lease.task.game)

    def check(self, config: Config) -> None:
        """Reads everything once."""
        for name in config.games:
            self.data(config, name)

    def initialization(self, config: Config, seed: int, scope: str) -> tuple[Manifest, np.ndarray]:
        """See Family."""
        return convnet.initialization(self._channels, self._size, self._classes, seed, scope)

    def identity(self, config: Config, game: str) -> dict[str, Any]:
        """See Family. The run's seed says which images are for what."""
        settings = _section(config, "supervised")
        del settings["supervised.pretraining"]
        return settings | {"seed": config.seed}

    def preprocessing(self, config: Config) -> dict[str, Any]:
        """See Family."""
        return {"channels": self._channels, "size": self._size, "classes": self._classes}

    def learner(self, config: Config, lease: Lease, start: StartingPoint, stopwatch: Stopwatch) -> Classifier:
        """See Family."""
        return Classifier(
            _dataset(self.task(config, lease), config),
            start.vector,
            seed=lease.task.seed,
            settings=config.supervised,
            worker=config.worker,
            scope=start.scope,
            head_seed=start.head_seed,
            head_change=start.head_change,
            stopwatch=stopwatch,
        )


class Omniglot(Images):
    """An alphabet's characters: which 20, and which of their drawings are held out, the run's seed says.

    A head that all tasks share can learn alphabets by heart while a character is the same class at every visit: then
    there is nothing left to learn on a task, nor to be pulled forward along. With labels drawn anew there is.
    """

    def __init__(self) -> None:
        super().__init__(channels=1, size=omniglot.SIZE, classes=omniglot.CLASSES)

    def data(self, config: Config, name: str) -> Supervised:
        """See Images."""
        found = _omniglot(config.data_dir, config.supervised.resampling, config.games)
        published = {normalize(alphabet): alphabet for alphabet in found.alphabets}
        if name not in published:
            raise ConfigError(f"data_dir: the Omniglot in {config.data_dir} has no alphabet {name}")
        return found.task(published[name], config.seed)

    def task(self, config: Config, lease: Lease) -> Supervised:
        """See Images."""
        found = super().task(config, lease)
        if config.supervised.labels == "fixed":
            return found
        classes = np.random.default_rng(lease.task.seed).permutation(found.classes)
        train, test = (Split(part.images, classes[part.labels]) for part in (found.train, found.test))
        return dataclasses.replace(found, train=train, test=test)


class MultiCV(Images):
    """A data set's classes."""

    def check(self, config: Config) -> None:
        """Reads everything once."""
        try:
            super().check(config)
        except ConfigError as error:
            there = [name for name in multicv.at_hand(Path(config.data_dir)) if name in config.games]
            hint = f". There are folders of {', '.join(there)}: choose with --games" if there else ""
            raise ConfigError(f"{error}{hint}") from None

    def __init__(self) -> None:
        super().__init__(channels=3, size=multicv.SIZE, classes=10)

    def data(self, config: Config, name: str) -> Supervised:
        """See Images."""
        return _data_set(config.data_dir, name)

    def identity(self, config: Config, game: str) -> dict[str, Any]:
        """See Family. Of a data set there may be a part only."""
        data = self.data(config, game)
        found = f"{data.name}, {len(data.train)} + {len(data.test)} images"
        return super().identity(config, game) | {"data": found}


_FAMILIES: dict[str, Family] = {"atari": Atari(), "omniglot": Omniglot(), "multi-cv": MultiCV()}


def _section(config: Config, name: str) -> dict[str, Any]:
    return {f"{name}.{field}": value for field, value in dataclasses.asdict(getattr(config, name)).items()}


# A process decodes once what it learns from, and keeps it as bytes.


@lru_cache(maxsize=1)
def _omniglot(data_dir: str, resampling: omniglot.Resampling, games: tuple[str, ...]) -> omniglot.Omniglot:
    return omniglot.find(Path(data_dir), resampling, only=_Typed(games))


class _Typed(Container[str]):
    """The published names that are typed as `games`."""

    def __init__(self, games: tuple[str, ...]) -> None:
        self._games = games

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and normalize(name) in self._games


@lru_cache(maxsize=8)
def _data_set(data_dir: str, name: str) -> Supervised:
    return multicv.find(Path(data_dir), name)


def _dataset(data: Supervised, config: Config) -> Dataset:
    """With images for validation of its own, where they are asked for."""
    train, validation = data.train, None
    if config.supervised.patience:
        train, validation = hold_out(data.train, config.supervised.validation, config.seed)
    return Dataset(
        _examples(train),
        _examples(data.test),
        data.classes,
        mean=data.mean,
        std=data.std,
        validation=None if validation is None else _examples(validation),
    )


def _examples(split: Split) -> Examples:
    return Examples(split.images, split.labels)
