"""Data sets that are folders of image files: GTSRB (traffic signs) and FaceScrub (faces).

Both readers raise DatasetMissing if nothing of the data set is there, and DatasetError if something is missing or
damaged. Images are resized as a whole, as Serrà et al. (2018) did.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from leap_dist.datasets.images import decode_image, to_rgb
from leap_dist.datasets.reading import DatasetError, DatasetMissing, first_existing, read_bounded
from leap_dist.datasets.splits import Split, divide

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
        raise DatasetMissing(f"{folder / 'GTSRB' / 'Final_Training' / 'Images'} is not there")
    testing = training.parents[1] / "Final_Test" / "Images"
    # The labels of the test set are a separate download without a fixed place.
    places = ("Final_Test/Images/GT-final_test.csv", "Final_Test/GT-final_test.csv", "GT-final_test.csv")
    table = first_existing(training.parents[1], *places) or first_existing(folder, *places)
    if table is None:
        raise DatasetError(f"{testing / 'GT-final_test.csv'} is not there, which holds the labels of the test set")
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
