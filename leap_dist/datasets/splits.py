"""Labeled images and how they are divided into splits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Split:
    """Images, uint8 (N, H, W, C), and their classes, int64 (N,). Raises ValueError if they are anything else.

    Gray images with three channels keep only one in memory: they are a read-only view with stride 0.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != np.uint8:
            raise ValueError(f"images are {self.images.dtype} {self.images.shape}, not uint8 (N, H, W, C)")
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != np.int64:
            raise ValueError(f"labels are {self.labels.dtype} {self.labels.shape}, not int64 {self.images.shape[:1]}")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> Split:
        """Return a copy of the rows with these numbers. Gray images keep only one channel in memory."""
        gray = self.images.shape[3] > 1 and self.images.strides[3] == 0
        return Split(repeat_channel(self.images[rows, ..., :1]) if gray else self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class ClassificationProblem:
    """A classification problem.

    Args:
        name: name of the data set, and of the part if it is not whole: `mnist`, `mnist_t10k`, `omniglot/Greek`.
        classes: number of classes. Labels are 0 … classes − 1, and each occurs in both splits.
        train: training images.
        test: held-out images.
        mean: mean of images / 255 by channel, used for normalization.
        std: standard deviation of the same.
        part: description of the part of the data set; empty if it is whole.
    """

    name: str
    classes: int
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    part: str = ""


def repeat_channel(images: np.ndarray) -> np.ndarray:
    """Return images (N, H, W, 1) as a view (N, H, W, 3)."""
    return np.broadcast_to(images, (*images.shape[:3], 3))


def divide(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return row numbers for training and for testing, both ascending: a pure function of the arguments.

    Of each class, `fraction` of the rows (rounded) are drawn for testing: at least one, and at most all but one.
    Raises ValueError if a class has a single row.
    """
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < 2:
            raise ValueError(f"class {label} has a single image, which cannot be divided")
        count = min(max(1, math.floor(fraction * len(rows) + 0.5)), len(rows) - 1)
        chosen[rng.permutation(rows)[:count]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Hold out a fraction of each class for validation (0.15 in Serrà et al. 2018). Return both parts."""
    kept, held = divide(split.labels, fraction, seed)
    return split.take(kept), split.take(held)
