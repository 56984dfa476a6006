"""Omniglot (Lake et al. 2015): 50 alphabets, 1,623 characters, each drawn once by 20 people.

A task is an alphabet, as in the paper's appendix C: 20 classes, five of each character's 20 drawings held out.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from leap_dist.config.loading import ConfigError
from leap_dist.datasets.folders import (
    DatasetError,
    DatasetMissing,
    decode_image,
    first_existing,
    read_bounded,
    read_npz,
    resize,
)
from leap_dist.datasets.splits import ClassificationProblem, Split

ALPHABETS, CHARACTERS, DRAWINGS = {"images_background": 30, "images_evaluation": 20}, 1623, 20
ORIGINAL, SIZE = 105, 28
CLASSES, HELD_OUT_DRAWINGS = 20, 5
ROTATIONS = 36

HELP = (
    "Omniglot comes from https://github.com/brendenlake/omniglot (python/images_background.zip and "
    "images_evaluation.zip, unpacked): {folder} must hold images_background/ALPHABET/characterNN/NNNN_NN.png and "
    "images_evaluation/… like it, or omniglot.npz with alphabets.json"
)

Resampling = Literal["lanczos", "nearest"]
"""Filter that resizes drawings from 105 × 105 to 28 × 28. The authors' script asks Pillow for Lanczos, but for images
with one bit per pixel, Pillow always takes the nearest pixel: that is what they trained on."""


@dataclass(frozen=True)
class Omniglot:
    """Drawings by alphabet, in the order of names: uint8 (characters, 20, 28, 28) with ink 255 and paper 0."""

    drawings: Mapping[str, np.ndarray]

    @property
    def alphabets(self) -> tuple[str, ...]:
        """Names of the alphabets with enough characters for a task: 46 of the 50."""
        return tuple(name for name, drawings in self.drawings.items() if len(drawings) >= CLASSES)

    def task(self, alphabet: str, seed: int, *, first: bool = False) -> ClassificationProblem:
        """Return a task of 20 classes: a pure function of the arguments. Raises KeyError for an unknown alphabet.

        The seed draws 20 of the characters, their order, and which five drawings of each are held out; with `first` the
        first five are held out.
        """
        drawings = self.drawings[alphabet]
        rng = np.random.default_rng((seed, zlib.crc32(alphabet.encode())))  # independent of other alphabets
        characters = rng.permutation(len(drawings))[:CLASSES]
        order = np.tile(np.arange(DRAWINGS), (CLASSES, 1))
        order = order if first else rng.permuted(order, axis=1)
        parts = np.split(order, [HELD_OUT_DRAWINGS], axis=1)
        test, train = (
            Split(
                drawings[characters[:, None], part].reshape(-1, SIZE, SIZE, 1),
                np.repeat(np.arange(CLASSES), part.shape[1]),
            )
            for part in parts
        )
        return ClassificationProblem(f"omniglot/{alphabet}", CLASSES, train, test, mean=(0.0,), std=(1.0,))


def find(data_dir: Path, resampling: Resampling = "lanczos", only: Container[str] | None = None) -> Omniglot:
    """Decode and check Omniglot in `data_dir/omniglot`. Raises ConfigError if it is missing or damaged.

    `only` restricts the result to some alphabets, by their published names; all must be present nevertheless.
    """
    folder = data_dir / "omniglot"
    try:
        if not folder.is_dir():
            raise DatasetMissing(f"{folder} is not a folder")
        archive = first_existing(folder, "omniglot.npz")
        if archive is not None:
            return _from_archive(archive, folder / "alphabets.json", resampling, only)
        place = first_existing(folder, "images_background", "omniglot-py/images_background", "python/images_background")
        if place is None:
            raise DatasetMissing(f"{folder / 'images_background'} is missing")
        return _from_folders(place.parent, resampling, only)
    except (DatasetError, OSError) as error:
        raise ConfigError(f"data_dir: {error}. {HELP.format(folder=folder)}") from None


def _from_archive(archive: Path, table: Path, resampling: Resampling, only: Container[str] | None) -> Omniglot:
    """Read an archive of packed bits, one row for each character, and the table of alphabets. Raises DatasetError."""
    bits = ORIGINAL * ORIGINAL
    ink = read_npz(archive, {"ink": (np.uint8, (CHARACTERS, DRAWINGS, (bits + 7) // 8))})["ink"]
    rows = _rows(table)
    drawings = {}
    for name in (name for name in sorted(rows) if only is None or name in only):
        packed = ink[rows[name].start : rows[name].stop]
        inked = np.unpackbits(packed, axis=2, count=bits).reshape(len(packed), DRAWINGS, ORIGINAL, ORIGINAL)
        drawings[name] = np.stack([_shrink(character, resampling) for character in inked.astype(bool)])
    return _checked(drawings, {name: len(found) for name, found in rows.items()}, archive)


def _rows(table: Path) -> dict[str, range]:
    """Read the rows of each alphabet from alphabets.json. Raises DatasetError."""
    try:
        entries = json.loads(read_bounded(table, 2**20))
        rows = {entry["alphabet"]: range(entry["first"], entry["last"] + 1) for entry in entries}
        ordered = sorted(rows.values(), key=lambda found: found.start)
        borders = [0, *(found.stop for found in ordered)]
        if [found.start for found in ordered] != borders[:-1] or borders[-1] != CHARACTERS or not all(ordered):
            raise ValueError(f"its alphabets do not cover each of the {CHARACTERS:,} rows exactly once")
        if len(entries) != len(rows) or not all(map(_is_name, rows)):
            raise ValueError("its alphabets do not have valid, distinct names")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, MemoryError) as error:
        reason = ascii(" ".join(str(error).split())[:160])[1:-1]
        raise DatasetError(f"{table} is not the table of {CHARACTERS:,} rows: {reason}") from None
    return rows


def _is_name(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w().-]{1,80}", name) is not None


def _from_folders(place: Path, resampling: Resampling, only: Container[str] | None) -> Omniglot:
    """Read the published folders of PNG files. Raises DatasetError."""
    drawings, counts = {}, {}
    for part, count in ALPHABETS.items():
        if not (place / part).is_dir():
            raise DatasetError(f"{place / part} is not a folder")
        alphabets = _folders(place / part)
        if len(alphabets) != count:
            raise DatasetError(f"{place / part} has {len(alphabets)} alphabets, not {count}")
        for alphabet in alphabets:
            characters = _folders(alphabet)
            if not characters:
                raise DatasetError(f"{alphabet} has no characters")
            counts[alphabet.name] = len(characters)
            if only is None or alphabet.name in only:
                drawings[alphabet.name] = np.stack([_shrink(_drawn(folder), resampling) for folder in characters])
    return _checked({name: drawings[name] for name in sorted(drawings)}, counts, place)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _drawn(folder: Path) -> np.ndarray:
    """Read a character's 20 drawings, bool (20, 105, 105), with True for ink. Raises DatasetError."""
    paths = sorted(path for path in folder.iterdir() if path.suffix == ".png" and not path.name.startswith("."))
    if [path.stem[-3:] for path in paths] != [f"_{number:02d}" for number in range(1, DRAWINGS + 1)]:
        raise DatasetError(
            f"{folder} does not hold drawings NNNN_01.png to NNNN_{DRAWINGS}.png, but {len(paths)} others"
        )
    inked = np.empty((DRAWINGS, ORIGINAL, ORIGINAL), bool)
    for drawing, path in zip(inked, paths, strict=True):
        image = decode_image(path, ("PNG",), ORIGINAL)
        if image.size != (ORIGINAL, ORIGINAL):
            raise DatasetError(f"{path} has {image.width} × {image.height} pixels, not {ORIGINAL} × {ORIGINAL}")
        drawing[:] = np.asarray(image.convert("L")) < 128
    return inked


def _shrink(inked: np.ndarray, resampling: Resampling) -> np.ndarray:
    """Resize drawings, bool (20, 105, 105), to uint8 (20, 28, 28) with ink 255."""
    return resize(inked.astype(np.uint8) * 255, SIZE, Image.Resampling[resampling.upper()])


def _checked(drawings: dict[str, np.ndarray], counts: Mapping[str, int], source: Path) -> Omniglot:
    """Check the numbers of characters by alphabet, and that ink and paper are not swapped. Raises DatasetError."""
    alphabets, characters = len(counts), sum(counts.values())
    if (alphabets, characters) != (sum(ALPHABETS.values()), CHARACTERS):
        wanted = f"{sum(ALPHABETS.values())} and {CHARACTERS:,}"
        raise DatasetError(f"{source} has {alphabets} alphabets and {characters:,} characters, not {wanted}")
    for name, images in drawings.items():
        share = float(images.mean()) / 255
        if not 0.01 < share < 0.25:  # the alphabets have from 0.03 to 0.13
            raise DatasetError(f"{source}: {share:.0%} of {name} is ink, which is implausible for drawings")
    return Omniglot(drawings)


def rotated(split: Split, seed: int, count: int = ROTATIONS) -> Split:
    """Return every image rotated by `count` angles, drawn for it from 0° to 360°, as appendix C describes.

    Images (N, H, W, C) become (count · N, H, W, C), with the rotations of an image in a row. Interpolation is bilinear,
    with zeros outside. (The authors' code draws a new affine transform for every image and visit instead.)
    """
    angles = np.random.default_rng(seed).uniform(0, 360, (len(split), count))
    images = np.empty((len(split), count, *split.images.shape[1:]), np.uint8)
    for row, image in enumerate(split.images):
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        for column, angle in enumerate(angles[row]):
            turned = np.asarray(picture.rotate(angle, Image.Resampling.BILINEAR))
            images[row, column] = turned.reshape(image.shape)
    return Split(images.reshape(-1, *images.shape[2:]), np.repeat(split.labels, count))
