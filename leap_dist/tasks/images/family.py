"""The families of image classification tasks: Omniglot alphabets, the data sets of Multi-CV, and the user's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from leap_dist.config.image_settings import SupervisedSettings
from leap_dist.config.loading import ConfigError
from leap_dist.config.registry import normalize
from leap_dist.config.settings import ALL_GAMES, Config
from leap_dist.datasets import multicv, omniglot, own
from leap_dist.datasets.splits import ClassificationProblem, Split
from leap_dist.nn import convnet
from leap_dist.nn.flat_vector import Manifest
from leap_dist.nn.profiling import Stopwatch
from leap_dist.protocol import schema
from leap_dist.protocol.messages import Lease
from leap_dist.protocol.seeds import derived_seed
from leap_dist.tasks.images.classifier import Classifier
from leap_dist.tasks.images.division import divided, relabeled
from leap_dist.tasks.images.examples import Dataset
from leap_dist.tasks.images.joint import JointClassifier
from leap_dist.tasks.starting_point import StartingPoint

_LARGEST = 4096
"""Largest credible number of channels, pixels or classes in a file; more is damage."""
_MAX_ROTATED = 35
"""Number of alphabets whose rotated images a process keeps; with 36 rotations, each takes 11 MB."""


class Images:
    """Base class of these families. Implements `leap_dist.tasks.task.TaskFamily`.

    Args:
        channels: number of channels of the images.
        size: height and width of the images in pixels.
        classes: number of outputs of a head that all tasks share.
    """

    sections: tuple[str, ...] = ("supervised",)

    def __init__(self, channels: int, size: int, classes: int) -> None:
        self._channels = channels
        self._size = size
        self._classes = classes

    def data(self, config: Config, name: str) -> ClassificationProblem:
        """Return the data called `name`. Raises ConfigError if it is not in `config.data_dir`."""
        raise NotImplementedError

    def task_data(self, config: Config, lease: Lease) -> ClassificationProblem:
        """Return the data that the lease's task learns from. Raises ConfigError as `data` does."""
        return self.data(config, lease.task.game)

    def dataset(self, config: Config, lease: Lease) -> Dataset:
        """Return the images of the lease's task, divided and rotated as configured. Raises ConfigError likewise."""
        return divided(self.task_data(config, lease), config.supervised, config.seed)

    def check(self, config: Config) -> None:
        """Read the data of all tasks once. Raises ConfigError if some is missing or damaged."""
        for name in config.games:
            self.data(config, name)

    def initialization(self, config: Config, seed: int, scope: str) -> tuple[Manifest, np.ndarray]:
        """Return a fresh φ₀ of the convolutional network."""
        network = config.supervised.network
        return convnet.initialization(self._channels, self._size, self._classes, seed, scope, network)

    def identity(self, config: Config, game: str) -> dict[str, Any]:
        """Return the settings of supervised tasks, and the run's seed: it determines which images are held out.

        `test_epochs` is not among them, because in a test it is the value of `epochs`.
        """
        settings = {f"supervised.{name}": value for name, value in dataclasses.asdict(config.supervised).items()}
        del settings["supervised.pretraining"], settings["supervised.test_epochs"]
        return settings | {"seed": config.seed}

    def preprocessing(self, config: Config) -> dict[str, Any]:
        """Return the shape of the images, the size of a shared head, and the network unless it is the usual one."""
        network = config.supervised.network
        more = {} if network == SupervisedSettings.network else {"network": network}
        return {"channels": self._channels, "size": self._size, "classes": self._classes, **more}

    def check_preprocessing(self, given: Any) -> None:
        """Raise ValueError if `given` does not describe images that a network can classify."""
        numbers = {"channels": int, "size": int, "classes": int}
        schema.check(given, numbers, "preprocessing")
        if not all(1 <= given[name] <= _LARGEST for name in numbers) or given["size"] < convnet.SMALLEST:
            raise ValueError("its images are not of a valid shape")
        if given.get("network", SupervisedSettings.network) not in convnet.NETWORKS:
            raise ValueError(f"its network is not one of {', '.join(convnet.NETWORKS)}")

    def network(self, given: dict[str, Any]) -> convnet.ConvNet:
        """Return a convolutional network."""
        network = given.get("network", SupervisedSettings.network)
        return convnet.ConvNet(given["channels"], given["size"], given["classes"], network)

    def learner(
        self, config: Config, lease: Lease, start: StartingPoint, stopwatch: Stopwatch, beat: Callable[[], None]
    ) -> Classifier | JointClassifier:
        """Make a classifier for the lease's alphabet or data set, or one for all of them with a `beat` before each.

        Raises ConfigError if the data is not there.
        """
        updates = max(1, lease.task.steps // config.steps_per_update)
        if lease.task.game != ALL_GAMES:
            return self._classifier(config, lease, start, updates, stopwatch)
        share = -(-updates // len(config.games))  # the data sets take turns
        classifiers: dict[str, Classifier] = {}
        for number, name in enumerate(config.games):
            beat()
            task = dataclasses.replace(lease.task, game=name, seed=derived_seed(lease.task.seed, number))
            part = dataclasses.replace(lease, task=task)
            classifiers[name] = self._classifier(config, part, start.of_part(name), share, stopwatch)
        return JointClassifier(classifiers, derived_seed(lease.task.seed, ALL_GAMES), start.head_change)

    def _classifier(
        self, config: Config, lease: Lease, start: StartingPoint, updates: int, stopwatch: Stopwatch
    ) -> Classifier:
        """Make a classifier for the lease's alphabet or data set, which learns from `updates` batches."""
        settings = config.supervised
        if start.learning_rate is not None:
            settings = dataclasses.replace(settings, learning_rate=start.learning_rate)
        return Classifier(
            self.dataset(config, lease),
            start.vector,
            seed=lease.task.seed,
            settings=settings,
            worker=config.worker,
            scope=start.scope,
            head_seed=start.head_seed,
            head_change=start.head_change,
            updates=updates,
            stopwatch=stopwatch,
        )


class Omniglot(Images):
    """The alphabets of Omniglot. The run's seed draws the 20 characters of each, and which drawings are held out.

    A head that all tasks share can learn the alphabets by heart as long as a character has the same label at every
    visit: then nothing is left to learn on a task, and its path has no length. Labels drawn anew prevent that.
    """

    def __init__(self) -> None:
        super().__init__(channels=1, size=omniglot.SIZE, classes=omniglot.CLASSES)
        self._rotated: dict[tuple[Any, ...], Dataset] = {}

    def data(self, config: Config, name: str) -> ClassificationProblem:
        """Return the alphabet called `name`. Raises ConfigError if it is not in `config.data_dir`."""
        found = _omniglot(config.data_dir, config.supervised.resampling, config.games)
        published = {normalize(alphabet): alphabet for alphabet in found.alphabets}
        if name not in published:
            raise ConfigError(f"data_dir: the Omniglot in {config.data_dir} has no alphabet {name}")
        return found.task(published[name], config.seed, first=config.supervised.split in ("first", "training"))

    def task_data(self, config: Config, lease: Lease) -> ClassificationProblem:
        """Return the alphabet with its labels, permuted by the task's seed unless the labels are fixed."""
        found = super().task_data(config, lease)
        if config.supervised.labels == "fixed":
            return found
        classes = np.random.default_rng(lease.task.seed).permutation(found.classes)
        train, test = (Split(part.images, classes[part.labels]) for part in (found.train, found.test))
        return dataclasses.replace(found, train=train, test=test)

    def dataset(self, config: Config, lease: Lease) -> Dataset:
        """Return the images of the lease's task. Rotations are made once in a process: that takes half a second."""
        settings, name = config.supervised, lease.task.game
        if not settings.rotations:
            return super().dataset(config, lease)
        key = (config.data_dir, config.seed, settings, name)
        if key not in self._rotated:
            while len(self._rotated) >= _MAX_ROTATED:
                del self._rotated[next(iter(self._rotated))]
            self._rotated[key] = divided(self.data(config, name), settings, config.seed)
        if settings.labels == "fixed":
            return self._rotated[key]
        return relabeled(self._rotated[key], np.random.default_rng(lease.task.seed).permutation(self._classes))


class MultiCV(Images):
    """The data sets of Multi-CV, one task each."""

    def __init__(self) -> None:
        super().__init__(channels=3, size=multicv.SIZE, classes=10)

    def check(self, config: Config) -> None:
        """Read all data sets once. Raises ConfigError, which names the data sets that are there."""
        try:
            super().check(config)
        except ConfigError as error:
            there = [name for name in multicv.at_hand(Path(config.data_dir)) if name in config.games]
            hint = f". There are folders of {', '.join(there)}: choose with --games" if there else ""
            raise ConfigError(f"{error}{hint}") from None

    def data(self, config: Config, name: str) -> ClassificationProblem:
        """Return the data set called `name`. Raises ConfigError if it is not in `config.data_dir`."""
        return _data_set(config.data_dir, name)

    def identity(self, config: Config, game: str) -> dict[str, Any]:
        """Return the same and which data was found, because only a part of a data set may be there."""
        data = self.data(config, game)
        found = f"{data.name}, {len(data.train)} + {len(data.test)} images"
        return super().identity(config, game) | {"data": found}


class OwnImages(Images):
    """The user's own data sets, one task each: files NAME.npz in `config.data_dir` (docs/own-tasks.md)."""

    def __init__(self) -> None:
        super().__init__(channels=3, size=multicv.SIZE, classes=10)

    def data(self, config: Config, name: str) -> ClassificationProblem:
        """Return the data set in NAME.npz. Raises ConfigError if there is none, or it holds something else."""
        return _own_data_set(config.data_dir, name)

    def check(self, config: Config) -> None:
        """Read and divide the data of all tasks once. Raises ConfigError if some is missing, damaged, or too little."""
        for name in config.games:
            data = self.data(config, name)
            try:
                divided(data, config.supervised, config.seed)
            except ValueError as error:
                raise ConfigError(f"data_dir: {name} cannot be used: {error}") from None

    def identity(self, config: Config, game: str) -> dict[str, Any]:
        """Return the same and the numbers of images."""
        data = self.data(config, game)
        return super().identity(config, game) | {"data": f"{game}, {len(data.train)} + {len(data.test)} images"}


# Each process decodes its data once and keeps it as bytes.


@lru_cache(maxsize=1)
def _omniglot(data_dir: str, resampling: omniglot.Resampling, games: tuple[str, ...]) -> omniglot.Omniglot:
    return omniglot.find(Path(data_dir), resampling, only=_PublishedNames(games))


class _PublishedNames(Container[str]):
    """The published names of the alphabets that are typed as `games`."""

    def __init__(self, games: tuple[str, ...]) -> None:
        self._games = games

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and normalize(name) in self._games


@lru_cache(maxsize=8)
def _data_set(data_dir: str, name: str) -> ClassificationProblem:
    return multicv.find(Path(data_dir), name)


@lru_cache(maxsize=8)
def _own_data_set(data_dir: str, name: str) -> ClassificationProblem:
    return own.find(Path(data_dir), name)
