"""SVHN, street view house numbers: the cropped digits, "format 2"."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from leap_dist.datasets import matlab
from leap_dist.datasets.bounded import Missing, Unusable
from leap_dist.datasets.splits import Split


def read(folder: Path, train: int, test: int) -> tuple[Split, Split]:
    """train_32x32.mat and test_32x32.mat. Raises Unusable."""
    if not (folder / "train_32x32.mat").exists():
        raise Missing(f"{folder / 'train_32x32.mat'} is not there")
    return _split(folder / "train_32x32.mat", train), _split(folder / "test_32x32.mat", test)


def _split(path: Path, count: int) -> Split:
    size = 32 * 32 * 3 * count
    arrays = matlab.read(path, {"X": (32, 32, 3, count), "y": (count, 1)}, most=size)
    images, labels = arrays["X"], arrays["y"][:, 0]
    if images.dtype != np.uint8:
        raise Unusable(f"{path}: X holds {images.dtype}, not bytes")
    if not np.isin(labels, np.arange(1, 11)).all():
        raise Unusable(f"{path}: labels are not whole numbers from 1 to 10")
    # The digit 0 has the label 10.
    return Split(np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels.astype(np.int64) % 10)
