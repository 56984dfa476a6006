"""Reading image files and archives within bounds, and the data sets that are folders of them: GTSRB and FaceScrub.

Both readers raise DatasetMissing if no part of the data set is there, and DatasetError if a part is missing or
damaged. Images are resized as a whole, as Serrà et al. (2018) did.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import re
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image

from leap_dist.datasets.splits import Split, divide

_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    OverflowError,
    IndexError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""Exceptions of Pillow for image files that are damaged or too large."""
MOST_BYTES = 32 * 2**20
"""Largest size of an image file."""


def decode_image(path: Path, formats: Sequence[str], largest: int) -> Image.Image:
    """Decode an image file in one of these formats.

    Raises DatasetError if it is something else, damaged, or more than `largest` pixels wide or high.
    """
    data = read_bounded(path, MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise DatasetError(f"{path} has more than {MOST_BYTES:,} bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=list(formats))
            if max(image.size) > largest:
                raise ValueError(f"{image.width} × {image.height} pixels are more than {largest} × {largest}")
            image.load()
    except _DECODE_ERRORS as error:
        reason = ascii(" ".join(str(error).split())[:160])[1:-1]
        # Pillow's message names the memory buffer, which tells the user nothing.
        reason = "it has another format" if "cannot identify" in reason else reason
        raise DatasetError(f"{path} cannot be read as {' or '.join(formats)}: {reason}") from None
    return image


def to_rgb(image: Image.Image, size: int) -> np.ndarray:
    """Return the whole image in color, uint8 (size, size, 3). Its aspect ratio is not kept."""
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def pad(images: np.ndarray, size: int) -> np.ndarray:
    """Pad images (N, H, H) with a border of zeros to (N, size, size)."""
    before = (size - images.shape[1]) // 2
    after = size - images.shape[1] - before
    return np.pad(images, ((0, 0), (before, after), (before, after)))


def resize(images: np.ndarray, size: int, how: Image.Resampling = Image.Resampling.LANCZOS) -> np.ndarray:
    """Resize gray images, uint8 (N, H, W), to (N, size, size)."""
    resized = np.empty((len(images), size, size), np.uint8)
    for row, image in enumerate(images):
        resized[row] = np.asarray(Image.fromarray(image).resize((size, size), how))
    return resized


_GZIP = b"\x1f\x8b"
_CHUNK = 2**20
_UNPACK_ERRORS = (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError)
"""Exceptions of the unpackers for files that are damaged, encrypted, or compressed by an unknown method."""


class DatasetError(ValueError):
    """A file or folder is missing, damaged, or not what its name says. The message is one line that names it."""


class DatasetMissing(DatasetError):
    """The data set is missing altogether."""


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
            raise DatasetError(f"{path} is damaged, or not a usable .npz file: {_reason(error)}") from None


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


_GTSRB_COLUMNS = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
_LARGEST_SIGN = 1000
"""Largest width and height in pixels; the images of the benchmark have 15 to 250."""
_LARGEST_TABLE = 4 * 2**20
"""Largest size of a table in bytes; the largest of the benchmark has half a megabyte."""
_LARGEST_FACE = 8192
"""Largest width and height in pixels."""
_FACE_SUFFIXES = {".png", ".jpg", ".jpeg"}
_FEWEST_FACES = 20
"""Smallest number of images of a person, so that some can be held out."""
FACES_TEST_FRACTION = 0.1
"""Fraction of a person's images that is held out."""


class _Sign(NamedTuple):
    """A row of a GTSRB table."""

    path: Path
    width: int
    height: int
    label: int


def gtsrb(folder: Path, train: int, test: int, *, classes: int, size: int) -> tuple[Split, Split]:
    """Read GTSRB, with images at `size` × `size`. The tables' regions of interest are only checked."""
    training = first_existing(folder, "Final_Training/Images", "GTSRB/Final_Training/Images")
    if training is None:
        raise DatasetMissing(f"{folder / 'GTSRB' / 'Final_Training' / 'Images'} is missing")
    testing = training.parents[1] / "Final_Test" / "Images"
    # The labels of the test set are a separate download without a fixed place.
    places = ("Final_Test/Images/GT-final_test.csv", "Final_Test/GT-final_test.csv", "GT-final_test.csv")
    table = first_existing(training.parents[1], *places) or first_existing(folder, *places)
    if table is None:
        raise DatasetError(f"{testing / 'GT-final_test.csv'} is missing; it holds the labels of the test set")
    signs: list[_Sign] = []
    for label in range(classes):
        name = f"{label:05d}"
        signs += _table(training / name / f"GT-{name}.csv", training / name, range(label, label + 1))
    tested = _table(table, testing, range(classes))
    for found, wanted, place in ((len(signs), train, training), (len(tested), test, table)):
        if found != wanted:
            raise DatasetError(f"{place} lists {found:,} pictures, not {wanted:,}")
    return _decode_signs(signs, size), _decode_signs(tested, size)


def _table(path: Path, folder: Path, labels: range) -> list[_Sign]:
    """Read a GT-*.csv table, whose images are in `folder`."""
    data = read_bounded(path, _LARGEST_TABLE + 1)
    lines = data.decode("ascii", "replace").splitlines()
    if len(data) > _LARGEST_TABLE or not lines or lines[0].strip() != _GTSRB_COLUMNS:
        raise DatasetError(f"{path} is not a table with the columns {_GTSRB_COLUMNS}")
    signs = []
    for number, line in enumerate(lines[1:], 2):
        name, *rest = line.strip().split(";")
        try:
            width, height, left, top, right, bottom, label = (int(item) for item in rest)
        except ValueError:
            raise DatasetError(f"{path}:{number} is not a name and seven whole numbers") from None
        if Path(name).name != name or not name.endswith(".ppm"):
            raise DatasetError(f"{path}:{number} names {name[:80]!a}, which is not a .ppm file beside it")
        if label not in labels:
            raise DatasetError(f"{path}:{number} has class {label}, not {labels.start}…{labels.stop - 1}")
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise DatasetError(f"{path}:{number} has a region that is not inside its picture")
        signs.append(_Sign(folder / name, width, height, label))
    return signs


def _decode_signs(signs: list[_Sign], size: int) -> Split:
    images = np.empty((len(signs), size, size, 3), np.uint8)
    for row, sign in enumerate(signs):
        picture = decode_image(sign.path, ("PPM",), _LARGEST_SIGN)
        if picture.size != (sign.width, sign.height):
            raise DatasetError(
                f"{sign.path} has {picture.size} pixels, not the ({sign.width}, {sign.height}) of its table"
            )
        images[row] = to_rgb(picture, size)
    return Split(images, np.array([sign.label for sign in signs], np.int64))


def facescrub(folder: Path, seed: int, *, people: int, size: int) -> tuple[Split, Split]:
    """Read FaceScrub: the `people` with the most images (ties by name), at `size` × `size`.

    Classes are in the order of names. The seed draws which tenth of each person's images is held out.
    """
    if (folder / "facescrub_aligned").is_dir():
        folder = folder / "facescrub_aligned"
    pictures = {
        person.name: sorted(path for path in person.iterdir() if path.suffix.lower() in _FACE_SUFFIXES)
        for person in sorted(folder.iterdir())
        if person.is_dir()
    }
    enough = [name for name, paths in pictures.items() if len(paths) >= _FEWEST_FACES]
    if not any(pictures.values()):
        raise DatasetMissing(f"{folder} has no folder of pictures for each person")
    if len(enough) < people:
        raise DatasetError(f"{folder} has {len(enough)} people with at least {_FEWEST_FACES} pictures, not {people}")
    chosen = sorted(sorted(enough, key=lambda name: -len(pictures[name]))[:people])
    paths = [path for name in chosen for path in pictures[name]]
    labels = np.repeat(np.arange(people), [len(pictures[name]) for name in chosen])
    images = np.empty((len(paths), size, size, 3), np.uint8)
    for row, path in enumerate(paths):
        images[row] = to_rgb(decode_image(path, ("PNG", "JPEG"), _LARGEST_FACE), size)
    everything = Split(images, labels)
    kept, held = divide(labels, FACES_TEST_FRACTION, seed)
    return everything.take(kept), everything.take(held)
