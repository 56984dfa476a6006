"""MNIST and the data sets that look like it: IDX files, packed by gzip or not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from leap_dist.datasets.bounded import Missing, Unusable, first, read_within
from leap_dist.datasets.splits import Split

_BYTES = 0x08
"""IDX's type code of unsigned bytes."""
SIZE = 28


def mnist(folder: Path, train: int, test: int) -> tuple[Split, Split]:
    """Both splits, of 28 × 28 pixels and one channel. Raises Unusable."""
    if _file(folder, "train", "images") is None and _file(folder, "train", "labels") is None:
        raise Missing(f"{folder / 'train-images-idx3-ubyte'} is not there, nor the same with .gz")
    return _split(folder, "train", train), _split(folder, "t10k", test)


def test_alone(folder: Path, test: int) -> Split | None:
    """The test images; None where those are not there either. Raises Unusable."""
    return _split(folder, "t10k", test) if _file(folder, "t10k", "images") else None


def _split(folder: Path, part: str, count: int) -> Split:
    images, labels = _file(folder, part, "images"), _file(folder, part, "labels")
    if images is None or labels is None:
        lacking = "images-idx3-ubyte" if images is None else "labels-idx1-ubyte"
        raise Unusable(f"{folder / f'{part}-{lacking}'} is not there, though other files of the data set are")
    return Split(read(images, (count, SIZE, SIZE))[..., None], read(labels, (count,)).astype(np.int64))


def _file(folder: Path, part: str, kind: str) -> Path | None:
    """Packed or not, under the name that it was published by, or the one with a point that archives give it."""
    dimensions = 3 if kind == "images" else 1
    stems = (f"{part}-{kind}-idx{dimensions}-ubyte", f"{part}-{kind}.idx{dimensions}-ubyte")
    return first(folder, *(f"{place}{stem}{end}" for place in ("", "raw/") for stem in stems for end in ("", ".gz")))


def read(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """An array of bytes of exactly this shape. Raises Unusable."""
    size, start = math.prod(shape), 4 + 4 * len(shape)
    data = read_within(path, start + size + 1)
    if data[:4] != bytes([0, 0, _BYTES, len(shape)]):
        kind = "labels" if len(shape) == 1 else "images"
        raise Unusable(f"{path} is not an IDX file of {kind}: it begins with {data[:4].hex() or 'nothing'}")
    found = tuple(int(size) for size in np.frombuffer(data[4:start].ljust(start - 4, b"\0"), ">u4"))
    if found != shape:
        raise Unusable(f"{path} holds an array of {_times(found)}, not {_times(shape)}")
    if len(data) != start + size:
        raise Unusable(f"{path} is {'cut short' if len(data) < start + size else 'longer than its header says'}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(f"{size:,}" for size in shape)
