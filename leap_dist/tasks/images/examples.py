"""What a supervised task learns from: images that stay bytes, and the order in which batches of them come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from leap_dist.config.settings import SupervisedSettings
from leap_dist.tasks.images.augmentation import FAMILIES, draw, look_up


@dataclass(frozen=True)
class Examples:
    """Images uint8 (M, S, S, C), and their classes int64 (M,).

    Grey images that are shown as several channels may hold one in memory: a view with a stride of 0, as
    `numpy.broadcast_to` makes it. Then one is kept here, too.
    """

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """What a task learns from, and what it is tested on."""

    train: Examples
    test: Examples
    """Held out."""
    classes: int
    mean: tuple[float, ...] = (0.0,)
    """Of a channel, pixels counting from 0 to 1; one for all or one for each."""
    std: tuple[float, ...] = (1.0,)
    validation: Examples | None = None
    """Held out too: to tell when training has nothing more to gain."""


class Seeds(NamedTuple):
    """What one task's seed determines, each by a seed of its own."""

    head: int
    order: int
    maps: int
    test: int

    @classmethod
    def of(cls, seed: int) -> Seeds:
        """Of a task."""
        return cls(*(int(s) for s in np.random.SeedSequence(seed).generate_state(4)))


class Draws:
    """Which images come next, by number, and through which affine map each goes. Always drawn on a CPU.

    Each image comes once, in an order of its own, before any comes again; a batch may reach from one pass over them
    into the next. Augmentation does not change the order.
    """

    def __init__(self, examples: int, settings: SupervisedSettings, seeds: Seeds) -> None:
        self._examples = examples
        self._batch = settings.batch
        self._family = FAMILIES.get(settings.augmentation)
        self._order = torch.Generator().manual_seed(seeds.order)
        self._maps = torch.Generator().manual_seed(seeds.maps)
        self._waiting = torch.empty(0, dtype=torch.int64)

    def next(self) -> tuple[Tensor, Tensor | None]:
        """(batch,) and (batch, 2, 3)."""
        while len(self._waiting) < self._batch:
            following = torch.randperm(self._examples, generator=self._order)
            self._waiting = torch.cat([self._waiting, following])
        index, self._waiting = self._waiting[: self._batch], self._waiting[self._batch :]
        return index, None if self._family is None else draw(self._family, self._batch, self._maps)


class Source:
    """Images where the network is, from which batches are looked up.

    Args:
        images: uint8 (M, S, S, C), or (M, S, S, 1) where all channels are alike.
        labels: int64 (M,).
        data: how their pixels are to be normalized.
    """

    def __init__(self, images: Tensor, labels: Tensor, data: Dataset, device: torch.device) -> None:
        self.count = len(labels)
        self._images = images.to(device)
        self._labels = labels.to(device)
        self._channels = data.train.images.shape[3]
        mean, deviation = (
            torch.tensor(part, dtype=torch.float32, device=device).view(-1, 1, 1) for part in (data.mean, data.std)
        )
        self._scale = 1 / (255 * deviation)
        self._offset = -mean / deviation

    def take(self, index: Tensor, maps: Tensor | None) -> tuple[Tensor, Tensor]:
        """Bytes (N, C, S, S), and classes (N,)."""
        device = self._images.device
        index = index.to(device, non_blocking=True)
        if maps is None:
            images = self._images.index_select(0, index)
        else:
            images = look_up(self._images, index, maps.to(device, non_blocking=True))
        return images.permute(0, 3, 1, 2).expand(-1, self._channels, -1, -1), self._labels.index_select(0, index)

    def normalized(self, images: Tensor) -> Tensor:
        """The network's input, laid out channels last."""
        normal = torch.addcmul(self._offset, images.float(), self._scale)
        return normal.contiguous(memory_format=torch.channels_last)


def tensors_of(examples: Examples, settings: SupervisedSettings, seeds: Seeds) -> tuple[Tensor, Tensor]:
    """Images and labels of a task; where a task is turned as a whole, they are turned here, once."""
    grey = examples.images.strides[3] == 0
    needed = (examples.images[..., :1] if grey else examples.images, examples.labels)
    images, labels = (torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in needed)
    if settings.augmentation == "turned":
        turn = draw(FAMILIES["rotations"], 1, torch.Generator().manual_seed(seeds.maps))
        images = look_up(images, torch.arange(len(images)), turn.expand(len(images), 2, 3))
    return images, labels


def draws_for_test(count: int, settings: SupervisedSettings, seeds: Seeds) -> Tensor | None:
    """The map of each of `count` held-out images, the same at every call; they are augmented as in training."""
    family = FAMILIES.get(settings.augmentation)
    return None if family is None else draw(family, count, torch.Generator().manual_seed(seeds.test))
