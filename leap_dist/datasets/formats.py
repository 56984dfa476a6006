"""File formats of MNIST (IDX), CIFAR (binary rows) and SVHN (MATLAB): a reader for each data set.

Every reader takes the numbers of training and test images that the files must hold, and returns both splits. It raises
DatasetMissing if no part of the data set is there, and DatasetError if a file is missing or damaged.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from leap_dist.datasets.folders import DatasetError, DatasetMissing, first_existing, inflate, open_regular, read_bounded
from leap_dist.datasets.splits import Split

MNIST_SIZE = 28
"""Height and width in pixels of MNIST, Fashion-MNIST and notMNIST."""
_IDX_BYTES = 0x08
"""Type code of unsigned bytes in IDX files."""
_CIFAR_IMAGE = 3 * 32 * 32
"""Bytes of an image."""
_CIFAR_ROWS = 10_000
"""Number of rows to read at once, so that reordering the bytes needs no second copy of all images."""


def mnist(folder: Path, train: int, test: int) -> tuple[Split, Split]:
    """Read MNIST, or a data set in its format: 28 × 28 pixels and one channel."""
    if _idx_file(folder, "train", "images") is None and _idx_file(folder, "train", "labels") is None:
        raise DatasetMissing(f"{folder / 'train-images-idx3-ubyte'} is missing, with and without .gz")
    return _mnist_split(folder, "train", train), _mnist_split(folder, "t10k", test)


def mnist_test(folder: Path, test: int) -> Split | None:
    """Read only the test images; return None if these are missing too."""
    return _mnist_split(folder, "t10k", test) if _idx_file(folder, "t10k", "images") else None


def _mnist_split(folder: Path, part: str, count: int) -> Split:
    images, labels = _idx_file(folder, part, "images"), _idx_file(folder, part, "labels")
    if images is None or labels is None:
        lacking = "images-idx3-ubyte" if images is None else "labels-idx1-ubyte"
        raise DatasetError(f"{folder / f'{part}-{lacking}'} is missing, though other files of the data set are")
    pixels = _read_idx(images, (count, MNIST_SIZE, MNIST_SIZE))
    return Split(pixels[..., None], _read_idx(labels, (count,)).astype(np.int64))


def _idx_file(folder: Path, part: str, kind: str) -> Path | None:
    """Return the path of an IDX file, compressed or not, under the published name or with "." in place of "-"."""
    dimensions = 3 if kind == "images" else 1
    stems = (f"{part}-{kind}-idx{dimensions}-ubyte", f"{part}-{kind}.idx{dimensions}-ubyte")
    names = (f"{place}{stem}{end}" for place in ("", "raw/") for stem in stems for end in ("", ".gz"))
    return first_existing(folder, *names)


def _read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read an IDX file that holds an array of bytes of exactly this shape."""
    size, start = math.prod(shape), 4 + 4 * len(shape)
    data = read_bounded(path, start + size + 1)
    if data[:4] != bytes([0, 0, _IDX_BYTES, len(shape)]):
        kind = "labels" if len(shape) == 1 else "images"
        raise DatasetError(f"{path} is not an IDX file of {kind}: it begins with {data[:4].hex() or 'nothing'}")
    found = tuple(int(size) for size in np.frombuffer(data[4:start].ljust(start - 4, b"\0"), ">u4"))
    if found != shape:
        raise DatasetError(f"{path} holds an array of {_times(found)}, not {_times(shape)}")
    if len(data) != start + size:
        raise DatasetError(f"{path} is {'cut short' if len(data) < start + size else 'longer than its header says'}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(f"{size:,}" for size in shape)


def cifar10(folder: Path, train: int, test: int) -> tuple[Split, Split]:
    """Read CIFAR-10: five training batches of equal size and one test batch."""
    place = _cifar_folder(folder, "data_batch_1.bin", "cifar-10-batches")
    batches = [place / f"data_batch_{number}.bin" for number in range(1, 6)]
    return _read_cifar(batches, train // len(batches), (10,)), _read_cifar([place / "test_batch.bin"], test, (10,))


def cifar100(folder: Path, train: int, test: int) -> tuple[Split, Split]:
    """Read CIFAR-100 with its 100 fine labels. The 20 coarse labels are only checked."""
    place = _cifar_folder(folder, "train.bin", "cifar-100")
    return _read_cifar([place / "train.bin"], train, (20, 100)), _read_cifar([place / "test.bin"], test, (20, 100))


def _cifar_folder(folder: Path, name: str, prefix: str) -> Path:
    """Return the folder of the binary version. Raises DatasetMissing, which mentions the pickled version if present."""
    path = first_existing(folder, name, f"{prefix}-bin/{name}", f"{prefix}-binary/{name}")
    if path is not None:
        return path.parent
    pickled = name.removesuffix(".bin")
    if other := first_existing(folder, pickled, f"{prefix}-batches-py", f"{prefix}-py", f"{prefix}-python"):
        raise DatasetMissing(
            f"{other} is the Python version (a pickle), which is not supported; get the binary version"
        )
    raise DatasetMissing(f"{folder / name} is missing")


def _read_cifar(paths: Sequence[Path], rows: int, limits: tuple[int, ...]) -> Split:
    """Read all images of all files, `rows` in each, with the last of each row's labels.

    A row consists of as many labels as `limits` has entries, each below its limit, and 3 × 32 × 32 bytes.
    """
    images = np.empty((len(paths) * rows, 32, 32, 3), np.uint8)
    labels = np.empty(len(paths) * rows, np.int64)
    for number, path in enumerate(paths):
        part = slice(number * rows, (number + 1) * rows)
        _fill_from_cifar(images[part], labels[part], path, limits)
    return Split(images, labels)


def _fill_from_cifar(images: np.ndarray, labels: np.ndarray, path: Path, limits: tuple[int, ...]) -> None:
    """Read a file into the arrays, whose length is the number of images that it must hold."""
    rows, width = len(labels), len(limits) + _CIFAR_IMAGE
    with open_regular(path) as file:
        if file.read(1) == b"\x80":
            raise DatasetError(f"{path} is a pickle, which is not supported; get the binary version")
        size = file.seek(0, 2)
        if size != rows * width:
            raise DatasetError(f"{path} has {size:,} bytes, not the {rows * width:,} of {rows:,} images")
        file.seek(0)
        for start in range(0, rows, _CIFAR_ROWS):
            count = min(_CIFAR_ROWS, rows - start)
            data = file.read(count * width)
            if len(data) != count * width:
                raise DatasetError(f"{path} was cut short while it was read")
            block = np.frombuffer(data, np.uint8).reshape(count, width)
            for column, limit in enumerate(limits):
                if block[:, column].max() >= limit:
                    raise DatasetError(f"{path} has the label {block[:, column].max()}; labels end at {limit - 1}")
            labels[start : start + count] = block[:, len(limits) - 1]
            images[start : start + count] = block[:, len(limits) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def svhn(folder: Path, train: int, test: int) -> tuple[Split, Split]:
    """Read the cropped digits ("format 2") of SVHN: train_32x32.mat and test_32x32.mat."""
    if not (folder / "train_32x32.mat").exists():
        raise DatasetMissing(f"{folder / 'train_32x32.mat'} is missing")
    return _svhn_split(folder / "train_32x32.mat", train), _svhn_split(folder / "test_32x32.mat", test)


def _svhn_split(path: Path, count: int) -> Split:
    size = 32 * 32 * 3 * count
    arrays = read(path, {"X": (32, 32, 3, count), "y": (count, 1)}, most=size)
    images, labels = arrays["X"], arrays["y"][:, 0]
    if images.dtype != np.uint8:
        raise DatasetError(f"{path}: X holds {images.dtype}, not bytes")
    if not np.isin(labels, np.arange(1, 11)).all():
        raise DatasetError(f"{path}: labels are not whole numbers from 1 to 10")
    # The label of digit 0 is 10.
    return Split(np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels.astype(np.int64) % 10)


_HEADER = 128
_OVERHEAD = 256
"""Upper bound on the bytes of an array's tags, flags, dimensions and name."""
_MATRIX, _COMPRESSED = 14, 15
_STORED = {1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8"}
_CLASSES = range(6, 14)
"""Array classes: double, single, and integers of 8 to 32 bits. MATLAB may store any of them in fewer bytes."""


def read(path: Path, shapes: Mapping[str, tuple[int, ...]], most: int) -> dict[str, np.ndarray]:
    """Return the arrays of these names and shapes, in MATLAB's order of axes, and skip all others.

    Raises DatasetError if one is missing or damaged, or if any array has more than `most` bytes.
    """
    with open_regular(path) as file:
        head = file.read(_HEADER)
        if head.startswith(b"MATLAB 7.3"):
            raise DatasetError(f"{path} is a MATLAB 7.3 file (HDF5), not a MATLAB 5 one")
        if len(head) < _HEADER or head[124:] != b"\x00\x01IM":
            raise DatasetError(f"{path} is not a MATLAB 5 file")
        try:
            return _arrays(file, shapes, most + _OVERHEAD)
        except (ValueError, struct.error) as error:
            raise DatasetError(f"{path} is damaged, or holds other data: {error}") from None


def _arrays(file: IO[bytes], shapes: Mapping[str, tuple[int, ...]], most: int) -> dict[str, np.ndarray]:
    """Read the arrays. Raises ValueError or struct.error if the file is damaged."""
    end = file.seek(0, 2)
    found: dict[str, np.ndarray] = {}
    position = _HEADER
    while position < end and len(found) < len(shapes):
        file.seek(position)
        kind, size = struct.unpack("<II", file.read(8))
        position += 8 + size
        if position > end:
            raise ValueError("it is cut short")
        if kind == _COMPRESSED:
            content = memoryview(inflate(file, size, most))
            kind, size = struct.unpack_from("<II", content)
            content = content[8:]
            if len(content) != size:
                raise ValueError(f"an array of {size:,} bytes unpacks to {len(content):,}")
        elif size > most:
            raise ValueError(f"an array has {size:,} bytes, more than any that is expected")
        else:
            content = memoryview(file.read(size))
        if kind != _MATRIX:
            raise ValueError(f"it has an element of type {kind} where an array should be")
        name, array = _array(content, shapes)
        if array is not None:
            found[name] = array
    if missing := sorted(set(shapes) - set(found)):
        raise ValueError(f"it has no array {missing[0]}")
    return found


def _array(content: memoryview, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, np.ndarray | None]:
    """Return an array's name, and the array if it is wanted. Raises ValueError or struct.error."""
    parts = _Parts(content)
    flags = parts.next(6, 8)
    shape = tuple(int(size) for size in parts.next(5))
    name = bytes(parts.next(1)).decode("ascii", "replace")
    if name not in shapes:
        return name, None
    if shape != shapes[name]:
        raise ValueError(f"{name} is {' × '.join(map(str, shape))}, not {' × '.join(map(str, shapes[name]))}")
    kind, bits = int(flags[0]) & 0xFF, int(flags[0]) >> 8 & 0xFF
    if kind not in _CLASSES or bits & 0x08:
        raise ValueError(f"{name} is not an array of real numbers")
    values = parts.next()
    if values.size != int(np.prod(shape)):
        raise ValueError(f"{name} holds {values.size:,} numbers, not {int(np.prod(shape)):,}")
    return name, values.reshape(shape, order="F")


class _Parts:
    """Reads the elements of a MATLAB array one after the other."""

    def __init__(self, content: memoryview) -> None:
        self._content = content
        self._position = 0

    def next(self, wanted: int | None = None, size: int | None = None) -> np.ndarray:
        """Return the next element's numbers. Raises ValueError if it has another type or size than given."""
        kind, length = struct.unpack_from("<II", self._content, self._position)
        start, after = self._position + 8, self._position + 8 + length + -length % 8
        if kind >> 16:  # elements of up to four bytes are inside the tag
            kind, length = kind & 0xFFFF, kind >> 16
            start, after = self._position + 4, self._position + 8
        if kind not in _STORED or (wanted is not None and kind != wanted) or (size is not None and length != size):
            raise ValueError(f"it has an element of type {kind} and {length} bytes, which does not belong there")
        if start + length > len(self._content) or length % np.dtype(_STORED[kind]).itemsize:
            raise ValueError("an array is cut short")
        self._position = after
        return np.frombuffer(self._content, _STORED[kind], length // np.dtype(_STORED[kind]).itemsize, start)
