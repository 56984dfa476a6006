"""GTSRB, the German traffic sign recognition benchmark: .ppm pictures, and tables that say what is on them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from leap_dist.datasets.bounded import Missing, Unusable, first, read_within
from leap_dist.datasets.pictures import colour, open_picture
from leap_dist.datasets.splits import Split

_COLUMNS = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
_LARGEST = 1000
"""Pixels; those of the benchmark are 15 to 250 wide and high."""
_MOST_BYTES = 4 * 2**20
"""Of a table; the largest has half a megabyte."""


class _Sign(NamedTuple):
    path: Path
    width: int
    height: int
    label: int


def read(folder: Path, train: int, test: int, *, classes: int, size: int) -> tuple[Split, Split]:
    """Whole pictures at `size` × `size`, as Serrà et al. (2018) had them; the sign's region is only checked.

    Raises Unusable.
    """
    training = first(folder, "Final_Training/Images", "GTSRB/Final_Training/Images")
    if training is None:
        raise Missing(f"{folder / 'GTSRB' / 'Final_Training' / 'Images'} is not there")
    testing = training.parents[1] / "Final_Test" / "Images"
    # The labels of the test set are a download of their own, and people put them where they like.
    places = ("Final_Test/Images/GT-final_test.csv", "Final_Test/GT-final_test.csv", "GT-final_test.csv")
    table = first(training.parents[1], *places) or first(folder, *places)
    if table is None:
        raise Unusable(f"{testing / 'GT-final_test.csv'} is not there, which holds the labels of the test set")
    signs: list[_Sign] = []
    for label in range(classes):
        name = f"{label:05d}"
        signs += _table(training / name / f"GT-{name}.csv", training / name, range(label, label + 1))
    tested = _table(table, testing, range(classes))
    for found, wanted, place in ((len(signs), train, training), (len(tested), test, table)):
        if found != wanted:
            raise Unusable(f"{place} lists {found:,} pictures, not {wanted:,}")
    return _decode(signs, size), _decode(tested, size)


def _table(path: Path, folder: Path, labels: range) -> list[_Sign]:
    """The pictures of a GT-*.csv file. Raises Unusable where a line is not what it should be."""
    data = read_within(path, _MOST_BYTES + 1)
    lines = data.decode("ascii", "replace").splitlines()
    if len(data) > _MOST_BYTES or not lines or lines[0].strip() != _COLUMNS:
        raise Unusable(f"{path} is not a table with the columns {_COLUMNS}")
    signs = []
    for number, line in enumerate(lines[1:], 2):
        name, *rest = line.strip().split(";")
        try:
            width, height, left, top, right, bottom, label = (int(item) for item in rest)
        except ValueError:
            raise Unusable(f"{path}:{number} is not a name and seven whole numbers") from None
        if Path(name).name != name or not name.endswith(".ppm"):
            raise Unusable(f"{path}:{number} names {name[:80]!a}, which is not a .ppm file beside it")
        if label not in labels:
            raise Unusable(f"{path}:{number} has class {label}, not {labels.start}…{labels.stop - 1}")
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise Unusable(f"{path}:{number} has a region that is not inside its picture")
        signs.append(_Sign(folder / name, width, height, label))
    return signs


def _decode(signs: list[_Sign], size: int) -> Split:
    images = np.empty((len(signs), size, size, 3), np.uint8)
    for row, sign in enumerate(signs):
        picture = open_picture(sign.path, ("PPM",), _LARGEST)
        if picture.size != (sign.width, sign.height):
            raise Unusable(f"{sign.path} has {picture.size} pixels, not the ({sign.width}, {sign.height}) of its table")
        images[row] = colour(picture, size)
    return Split(images, np.array([sign.label for sign in signs], np.int64))
