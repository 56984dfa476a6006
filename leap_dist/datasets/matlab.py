"""MATLAB 5 files, as far as SVHN's cropped digits need them: real numeric arrays, compressed by zlib or not.

SciPy reads them, too, but it is a dependency of 140 MB, decompresses whatever a file contains, and crashes the process
on some damaged headers. This reader is told the shapes to expect.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from leap_dist.datasets.reading import DatasetError, inflate, open_regular

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
            raise DatasetError(f"{path} is damaged or something else: {error}") from None


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
    """Iterates over the elements of an array."""

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
