"""Reading of untrusted files within bounds: regular files only, and never more data than the file should hold.

Pickles are never read, not even inside of NumPy's files: of their headers only those of plain numbers are accepted.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

_GZIP = b"\x1f\x8b"
_CHUNK = 2**20
_UNPACK_ERRORS = (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError)
"""Exceptions of the unpackers for files that are damaged, encrypted, or compressed by an unknown method."""


class DatasetError(ValueError):
    """A file or folder is missing, damaged, or not what its name says. The message is one line that names it."""


class DatasetMissing(DatasetError):
    """No file of the data set is there."""


def first_existing(folder: Path, *names: str) -> Path | None:
    """Return the first of these files or folders that exists, following links; None if there is none."""
    return next((path for path in (folder / name for name in names) if path.exists()), None)


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading. Raises DatasetError if it is missing or not regular: a pipe might never end."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise DatasetError(f"{path} is not a regular file")
    return os.fdopen(handle, "rb")


def read_bounded(path: Path, most: int) -> bytes:
    """Return the first `most` bytes of a file, decompressed if it is gzip. Raises DatasetError if it is damaged."""
    with open_regular(path) as file:
        try:
            packed = file.read(2) == _GZIP
            file.seek(0)
            if not packed:
                return file.read(min(most, os.fstat(file.fileno()).st_size))
            with gzip.GzipFile(fileobj=file) as unpacked:
                return unpacked.read(most)
        except _UNPACK_ERRORS as error:
            raise DatasetError(f"{path} is damaged or cut short: {_reason(error)}") from None


def inflate(file: IO[bytes], size: int, most: int) -> bytearray:
    """Decompress the next `size` bytes of `file`, which are zlib data.

    Raises ValueError if they are damaged, or decompress to more than `most` bytes.
    """
    stream, unpacked, left = zlib.decompressobj(), bytearray(), size
    while not stream.eof:
        packed = stream.unconsumed_tail
        if not packed:
            packed = file.read(min(_CHUNK, left))
            left -= len(packed)
        if not packed:
            raise ValueError("it is cut short")
        try:
            unpacked += stream.decompress(packed, most + 1 - len(unpacked))
        except zlib.error as error:
            raise ValueError(_reason(error)) from None
        if len(unpacked) > most:
            raise ValueError(f"it unpacks to more than the {most:,} bytes that it should hold")
    return unpacked


ArraySpec = tuple[type[np.generic], Sequence[int | range]]
"""Type and shape of an array; a dimension is a size or a range of sizes."""


def read_npz(path: Path, wanted: Mapping[str, ArraySpec]) -> dict[str, np.ndarray]:
    """Return arrays of an .npz file, by name. Raises DatasetError if one is missing or has another type or shape.

    An array is decompressed only if it is wanted and its header states the wanted type and shape.
    """
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return {name: _member(archive, name, *description) for name, description in wanted.items()}
        except KeyError as error:
            raise DatasetError(f"{path}: {_reason(error)}") from None
        except _UNPACK_ERRORS as error:
            raise DatasetError(f"{path} is damaged or something else: {_reason(error)}") from None


# The header that NumPy writes for plain numbers. An array of objects, which is a pickle, has another `descr`.
_HEADER = re.compile(
    rb"\{'descr': '([|<][a-z]\d)', 'fortran_order': False, 'shape': \((\d{1,9}(?:, \d{1,9})*),?\), \} *\n"
)
_NPY = b"\x93NUMPY\x01\x00"


def _member(archive: zipfile.ZipFile, name: str, kind: type[np.generic], shape: Sequence[int | range]) -> np.ndarray:
    """Read one array. Raises KeyError if there is none of that name, and ValueError if it is not as specified."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is packed in a way that NumPy does not use")
    with archive.open(entry) as member:
        start = member.read(len(_NPY) + 2)
        header = _HEADER.fullmatch(member.read(int.from_bytes(start[-2:], "little")))
        if start[: len(_NPY)] != _NPY or header is None:
            raise ValueError(f"{name} is not an array of plain numbers")
        found = tuple(int(size) for size in header[2].split(b", "))
        dtype = np.dtype(kind)
        if header[1].decode() != dtype.str or not _fits(found, shape):
            raise ValueError(f"{name} is {header[1].decode()} {found}, not {dtype.str} {_described(shape)}")
        size = math.prod(found) * dtype.itemsize
        data = member.read(size + 1)
    if len(data) != size:
        raise ValueError(f"{name} holds {'fewer' if len(data) < size else 'more'} bytes than its header says")
    return np.frombuffer(data, dtype).reshape(found)


def _fits(found: Sequence[int], wanted: Sequence[int | range]) -> bool:
    return len(found) == len(wanted) and all(
        size in limits if isinstance(limits, range) else size == limits
        for size, limits in zip(found, wanted, strict=True)
    )


def _described(shape: Sequence[int | range]) -> str:
    sizes = (f"{size.start} to {size.stop - 1}" if isinstance(size, range) else str(size) for size in shape)
    return f"({', '.join(sizes)})"


def _reason(error: BaseException) -> str:
    """Return an error's message as one short ASCII line, since it may quote the content of the file."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return ascii(" ".join(text.split())[:200])[1:-1] or type(error).__name__
