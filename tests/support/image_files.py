"""Small data sets in the true formats of the large ones."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from leap_dist.datasets import multicv
from leap_dist.datasets.multicv import Source

PEOPLE, PICTURES, CLASSES_OF_SIGNS = 5, 20, 4


class Raw(NamedTuple):
    """What was written: images as the files have them, and labels as they are to be read."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def small(name: str) -> Source:
    """The data set as it is, but with fewer images, and of signs and people fewer classes too."""
    source = multicv.SOURCES[name]
    if name == "facescrub":
        return replace(source, classes=PEOPLE)
    if name == "gtsrb":
        return replace(source, classes=CLASSES_OF_SIGNS, train=80, test=40)
    return replace(source, train=400, test=200)


def lay_out(folder: Path, name: str, seed: int = 0) -> Raw:
    """Writes the data set `name` of `small` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = drawn(small(name), seed)
    _WRITERS[name](folder, raw)
    return raw


def drawn(source: Source, seed: int = 0) -> Raw:
    """Images of the published brightness, each class as often as any other."""
    rng = np.random.default_rng(seed)
    shape = (32, 32, 3) if source.enlarge is None else (28, 28)
    brightness = float(np.mean(source.mean)) * (32 * 32 / (28 * 28) if source.enlarge is multicv.pad else 1)
    parts = []
    for count in (source.train, source.test):
        parts.append(rng.integers(0, round(2 * brightness * 255), (count, *shape)).astype(np.uint8))
        parts.append(rng.permutation(np.arange(count) % source.classes))
    return Raw(*parts)


# --- IDX -------------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def _mnist(folder: Path, raw: Raw) -> None:
    for part, images, labels in (("train", *raw[:2]), ("t10k", *raw[2:])):
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images), 1))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))


# --- CIFAR -----------------------------------------------------------------------------------------------------------


def cifar(images: np.ndarray, *labels: np.ndarray) -> bytes:
    columns = [column.astype(np.uint8)[:, None] for column in labels]
    return np.concatenate([*columns, images.transpose(0, 3, 1, 2).reshape(len(images), -1)], axis=1).tobytes()


def _cifar10(folder: Path, raw: Raw) -> None:
    folder = folder / "cifar-10-batches-bin"
    folder.mkdir()
    rows = len(raw.train_labels) // 5
    for number in range(5):
        part = slice(number * rows, (number + 1) * rows)
        data = cifar(raw.train_images[part], raw.train_labels[part])
        (folder / f"data_batch_{number + 1}.bin").write_bytes(data)
    (folder / "test_batch.bin").write_bytes(cifar(raw.test_images, raw.test_labels))


def _cifar100(folder: Path, raw: Raw) -> None:
    for name, images, labels in (("train", *raw[:2]), ("test", *raw[2:])):
        (folder / f"{name}.bin").write_bytes(cifar(images, labels // 5, labels))


# --- SVHN ------------------------------------------------------------------------------------------------------------


def element(kind: int, data: bytes) -> bytes:
    """A MATLAB 5 data element; short ones sit inside their tag, as MATLAB writes them."""
    if 0 < len(data) <= 4:
        return struct.pack("<I", len(data) << 16 | kind) + data.ljust(4, b"\0")
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def matrix(name: str, array: np.ndarray, *, flags: int = 0, kind: int | None = None) -> bytes:
    """An array of bytes or doubles as MATLAB 5 has it, not packed."""
    mat_class, stored = {"uint8": (9, 2), "float64": (6, 9)}[str(array.dtype)]
    parts = [
        element(6, struct.pack("<II", (kind or mat_class) | flags << 8, 0)),
        element(5, struct.pack(f"<{array.ndim}i", *array.shape)),
        element(1, name.encode()),
        element(stored, array.tobytes(order="F")),
    ]
    body = b"".join(parts)
    return struct.pack("<II", 14, len(body)) + body


def packed(data: bytes) -> bytes:
    data = zlib.compress(data, 1)
    return struct.pack("<II", 15, len(data)) + data


def mat(*elements: bytes, text: bytes = b"MATLAB 5.0 MAT-file", end: bytes = b"\x00\x01IM") -> bytes:
    return text.ljust(124) + end + b"".join(elements)


def svhn(images: np.ndarray, labels: np.ndarray, pack: Callable[[bytes], bytes] = packed) -> bytes:
    """The digit 0 has the label 10."""
    digits = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
    return mat(pack(matrix("X", images.transpose(1, 2, 3, 0))), pack(matrix("y", digits)))


def _svhn(folder: Path, raw: Raw) -> None:
    (folder / "train_32x32.mat").write_bytes(svhn(*raw[:2]))
    (folder / "test_32x32.mat").write_bytes(svhn(*raw[2:]))


# --- pictures --------------------------------------------------------------------------------------------------------


HEADER = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"


def sign(name: str, label: int, size: tuple[int, int] = (32, 32)) -> str:
    return f"{name};{size[0]};{size[1]};5;5;{size[0] - 5};{size[1] - 5};{label}"


def _gtsrb(folder: Path, raw: Raw) -> None:
    """Pictures have 32 × 32 pixels already, so that they can be compared with what is read."""
    for label in range(CLASSES_OF_SIGNS):
        place = folder / "GTSRB" / "Final_Training" / "Images" / f"{label:05d}"
        place.mkdir(parents=True)
        lines = [HEADER]
        for number, image in enumerate(raw.train_images[raw.train_labels == label]):
            lines.append(sign(f"00000_{number:05d}.ppm", label))
            Image.fromarray(image).save(place / f"00000_{number:05d}.ppm")
        (place / f"GT-{label:05d}.csv").write_text("\r\n".join(lines) + "\r\n")
    place = folder / "GTSRB" / "Final_Test" / "Images"
    place.mkdir(parents=True)
    lines = [HEADER]
    for number, (image, label) in enumerate(zip(raw.test_images, raw.test_labels, strict=True)):
        lines.append(sign(f"{number:05d}.ppm", label))
        Image.fromarray(image).save(place / f"{number:05d}.ppm")
    (folder / "GT-final_test.csv").write_text("\n".join(lines) + "\n")


def _facescrub(folder: Path, raw: Raw) -> None:
    """One colour for each person, and one more than are taken: person 2 has fewest pictures, person 4 has most."""
    for person in range(PEOPLE + 1):
        place = folder / f"Person {person}"
        place.mkdir()
        for number in range(PICTURES + (0, 1, 2)[(person != 2) + (person == 4)]):
            image = Image.new("RGB", (40, 50), (40 * person, number, 0))
            image.save(place / (f"{number}.png" if number % 2 else f"{number}.jpg"))


_WRITERS: dict[str, Callable[[Path, Raw], None]] = {
    "mnist": _mnist,
    "fashion_mnist": _mnist,
    "notmnist": _mnist,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "svhn": _svhn,
    "gtsrb": _gtsrb,
    "facescrub": _facescrub,
}
