"""FaceScrub: a folder of pictures for each person, of the people with most pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from leap_dist.datasets.bounded import Missing, Unusable
from leap_dist.datasets.pictures import colour, open_picture
from leap_dist.datasets.splits import Split, divide

_SUFFIXES = {".png", ".jpg", ".jpeg"}
_LARGEST = 8192
"""Pixels, wide or high."""
_FEWEST = 20
"""Pictures that a person has to have, so that some can be held out."""
TEST_FRACTION = 0.1


def read(folder: Path, seed: int, *, people: int, size: int) -> tuple[Split, Split]:
    """The `people` with most pictures (equal ones by name), a tenth of each person's drawn for testing.

    Classes are in the order of names. Pictures are brought to `size` × `size` whole. Raises Unusable.
    """
    if (folder / "facescrub_aligned").is_dir():
        folder = folder / "facescrub_aligned"
    pictures = {
        person.name: sorted(path for path in person.iterdir() if path.suffix.lower() in _SUFFIXES)
        for person in sorted(folder.iterdir())
        if person.is_dir()
    }
    enough = [name for name, paths in pictures.items() if len(paths) >= _FEWEST]
    if not any(pictures.values()):
        raise Missing(f"{folder} has no folder of pictures for each person")
    if len(enough) < people:
        raise Unusable(f"{folder} has {len(enough)} people with at least {_FEWEST} pictures, not {people}")
    chosen = sorted(sorted(enough, key=lambda name: -len(pictures[name]))[:people])
    paths = [path for name in chosen for path in pictures[name]]
    labels = np.repeat(np.arange(people), [len(pictures[name]) for name in chosen])
    images = np.empty((len(paths), size, size, 3), np.uint8)
    for row, path in enumerate(paths):
        images[row] = colour(open_picture(path, ("PNG", "JPEG"), _LARGEST), size)
    everything = Split(images, labels)
    kept, held = divide(labels, TEST_FRACTION, seed)
    return everything.take(kept), everything.take(held)
