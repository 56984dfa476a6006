"""What a supervised data set is: images as they were decoded, labels, and how they divide."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Split:
    """Images, uint8 (N, H, W, C), and their classes, int64 (N,). Raises ValueError where they are anything else.

    Grey images that are shown as three channels hold one in memory: a view with a stride of 0, which is read-only.
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
        """The rows of these numbers, copied; of grey images still the one channel only."""
        grey = self.images.shape[3] > 1 and self.images.strides[3] == 0
        return Split(repeat_channel(self.images[rows, ..., :1]) if grey else self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class Supervised:
    """A classification problem.

    Args:
        name: the data set's, with what part of it this is: `mnist`, `mnist_t10k`, `omniglot/Greek`.
        classes: labels are 0 … classes − 1, and each of them occurs in both splits.
        mean, std: by channel, of images / 255, to normalize by; 0 and 1 where the images are to stay as they are.
        part: in words what of the data set this is; empty where it is whole.
    """

    name: str
    classes: int
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    part: str = ""


def repeat_channel(images: np.ndarray) -> np.ndarray:
    """(N, H, W, 1) as (N, H, W, 3), without a copy."""
    return np.broadcast_to(images, (*images.shape[:3], 3))


def divide(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers for training and for testing, both ascending: a pure function of the arguments.

    Of each class `fraction` is drawn for testing, rounded, and at least one row; at least one stays for training.
    Raises ValueError where a class has a single row.
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
    """What stays for training, and what is held out, by class: for validation (Serrà et al. 2018 take 0.15)."""
    kept, held = divide(split.labels, fraction, seed)
    return split.take(kept), split.take(held)
