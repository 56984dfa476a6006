"""The data of a supervised task: images that stay bytes, and the order of its batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from leap_dist.config.image_settings import SupervisedSettings
from leap_dist.tasks.images.augmentation import DISTRIBUTIONS, draw_maps, transform


@dataclass(frozen=True)
class Examples:
    """Images, uint8 (M, S, S, C), and their classes, int64 (M,).

    Gray images with several channels may be a view with stride 0, as `numpy.broadcast_to` makes it; then only one
    channel is kept in memory.
    """

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """Training and held-out images of a task."""

    train: Examples
    test: Examples
    """Held-out images, used to measure the test error."""
    classes: int
    mean: tuple[float, ...] = (0.0,)
    """Mean of pixels scaled to [0, 1]: one number for all channels, or one for each."""
    std: tuple[float, ...] = (1.0,)
    """Standard deviation of the same."""
    validation: Examples | None = None
    """Further held-out images, used for early stopping; None if it is off."""


class Seeds(NamedTuple):
    """Independent seeds, derived from the seed of a task."""

    head: int
    order: int
    maps: int
    test: int

    @classmethod
    def of(cls, seed: int) -> Seeds:
        """Derive the seeds from a task's seed."""
        return cls(*(int(s) for s in np.random.SeedSequence(seed).generate_state(4)))


class BatchSampler:
    """Draws the indices of the images in each batch, and an affine map for each image. It always runs on a CPU.

    With shuffle "epoch", every epoch is a new permutation of all images, and a batch may span the end of one epoch and
    the start of the next. With "task", the visits of all epochs of a task are permuted together, as in the authors'
    code (amzn/metalearn-leap, src/omniglot/data.py, `RandomSampler`): over the whole task, the images are visited
    equally often, give or take one, but an image may come back before others were seen. Visits beyond that begin
    another such order. Augmentation does not change the order.

    Args:
        examples: number of images.
        settings: settings of the classifier.
        seeds: seeds of the task.
        updates: number of batches in the task. Only needed for shuffle "task".

    Raises:
        ValueError: if shuffle is "task" and `updates` is missing.
    """

    def __init__(self, examples: int, settings: SupervisedSettings, seeds: Seeds, updates: int | None = None) -> None:
        self._examples = self._visits = examples
        self._batch = settings.batch
        if settings.shuffle == "task":
            if updates is None:
                raise ValueError("supervised.shuffle: task needs the number of batches of the task")
            self._visits = max(updates * settings.batch, examples)  # a shorter task is part of one epoch
        self._distribution = DISTRIBUTIONS.get(settings.augmentation)
        self._order = torch.Generator().manual_seed(seeds.order)
        self._maps = torch.Generator().manual_seed(seeds.maps)
        self._waiting = torch.empty(0, dtype=torch.int64)

    def next(self) -> tuple[Tensor, Tensor | None]:
        """Return image numbers, int64 (batch,), and maps, float32 (batch, 2, 3), or None without augmentation."""
        while len(self._waiting) < self._batch:
            following = torch.randperm(self._visits, generator=self._order) % self._examples
            self._waiting = torch.cat([self._waiting, following])
        index, self._waiting = self._waiting[: self._batch], self._waiting[self._batch :]
        return index, None if self._distribution is None else draw_maps(self._distribution, self._batch, self._maps)


class ImageStore:
    """Images on the network's device, from which batches are taken.

    Args:
        images: uint8 (M, S, S, C), or (M, S, S, 1) if all channels are equal.
        labels: int64 (M,).
        data: determines the number of channels and how pixels are normalized.
        device: the network's device.
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
        """Return images by number, uint8 (N, C, S, S), each transformed by its map, and their classes (N,)."""
        device = self._images.device
        index = index.to(device, non_blocking=True)
        if maps is None:
            images = self._images.index_select(0, index)
        else:
            images = transform(self._images, index, maps.to(device, non_blocking=True))
        return images.permute(0, 3, 1, 2).expand(-1, self._channels, -1, -1), self._labels.index_select(0, index)

    def normalized(self, images: Tensor) -> Tensor:
        """Return the network's input, float32 (N, C, S, S) in channels-last layout."""
        normal = torch.addcmul(self._offset, images.float(), self._scale)
        return normal.contiguous(memory_format=torch.channels_last)


def tensors_of(examples: Examples, settings: SupervisedSettings, seeds: Seeds) -> tuple[Tensor, Tensor]:
    """Return images and labels of a task as tensors. Augmentation "turned" rotates all of them once by one angle."""
    gray = examples.images.strides[3] == 0
    needed = (examples.images[..., :1] if gray else examples.images, examples.labels)
    images, labels = (torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in needed)
    if settings.augmentation == "turned":
        turn = draw_maps(DISTRIBUTIONS["rotations"], 1, torch.Generator().manual_seed(seeds.maps))
        images = transform(images, torch.arange(len(images)), turn.expand(len(images), 2, 3))
    return images, labels


def maps_for_test(count: int, settings: SupervisedSettings, seeds: Seeds) -> Tensor | None:
    """Return maps for `count` held-out images, augmented as in training, or None. They are the same at every call."""
    distribution = DISTRIBUTIONS.get(settings.augmentation)
    return None if distribution is None else draw_maps(distribution, count, torch.Generator().manual_seed(seeds.test))
