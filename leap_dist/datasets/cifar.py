"""CIFAR-10 and CIFAR-100, the binary version: rows of one or two labels and an image of 3 × 32 × 32 bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from leap_dist.datasets.bounded import Missing, Unusable, first, open_regular
from leap_dist.datasets.splits import Split

_IMAGE = 3 * 32 * 32
_ROWS = 10_000
"""Rows that are read at once: the images are turned from planes into pixels in pieces, not in a second copy of all."""


def read(paths: Sequence[Path], rows: int, limits: tuple[int, ...]) -> Split:
    """The images of all files, `rows` in each, with the last of each row's labels.

    `limits` says for each label of a row below what it has to be. Raises Unusable.
    """
    images = np.empty((len(paths) * rows, 32, 32, 3), np.uint8)
    labels = np.empty(len(paths) * rows, np.int64)
    for number, path in enumerate(paths):
        part = slice(number * rows, (number + 1) * rows)
        _fill(images[part], labels[part], path, limits)
    return Split(images, labels)


def _fill(images: np.ndarray, labels: np.ndarray, path: Path, limits: tuple[int, ...]) -> None:
    """Reads a file of as many images into the arrays. Raises Unusable."""
    rows, width = len(labels), len(limits) + _IMAGE
    with open_regular(path) as file:
        if file.read(1) == b"\x80":
            raise Unusable(f"{path} is a pickle, which is not read: the binary version is needed")
        size = file.seek(0, 2)
        if size != rows * width:
            raise Unusable(f"{path} has {size:,} bytes, not the {rows * width:,} of {rows:,} images")
        file.seek(0)
        for start in range(0, rows, _ROWS):
            count = min(_ROWS, rows - start)
            data = file.read(count * width)
            if len(data) != count * width:
                raise Unusable(f"{path} was cut short while it was read")
            block = np.frombuffer(data, np.uint8).reshape(count, width)
            for column, limit in enumerate(limits):
                if block[:, column].max() >= limit:
                    raise Unusable(f"{path} has the label {block[:, column].max()}; labels end at {limit - 1}")
            labels[start : start + count] = block[:, len(limits) - 1]
            images[start : start + count] = block[:, len(limits) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def cifar10(folder: Path, train: int, test: int) -> tuple[Split, Split]:
    """Five batches of the same size for training, and one to test. Raises Unusable."""
    place = _place(folder, "data_batch_1.bin", "cifar-10-batches")
    batches = [place / f"data_batch_{number}.bin" for number in range(1, 6)]
    return read(batches, train // len(batches), (10,)), read([place / "test_batch.bin"], test, (10,))


def cifar100(folder: Path, train: int, test: int) -> tuple[Split, Split]:
    """Labels are the 100 fine ones; the 20 coarse ones before them are only checked. Raises Unusable."""
    place = _place(folder, "train.bin", "cifar-100")
    return read([place / "train.bin"], train, (20, 100)), read([place / "test.bin"], test, (20, 100))


def _place(folder: Path, name: str, prefix: str) -> Path:
    """Where the files of the binary version are. Raises Missing, which tells of the pickled one where that is there."""
    path = first(folder, name, f"{prefix}-bin/{name}", f"{prefix}-binary/{name}")
    if path is not None:
        return path.parent
    pickled = name.removesuffix(".bin")
    if other := first(folder, pickled, f"{prefix}-batches-py", f"{prefix}-py", f"{prefix}-python"):
        raise Missing(f"{other} is the Python version, a pickle, which is not read: the binary version is needed")
    raise Missing(f"{folder / name} is not there")
