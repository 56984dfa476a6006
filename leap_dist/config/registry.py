"""What can be learned, by name: Atari games, alphabets of Omniglot, data sets of Multi-CV. Names only, no data."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

import numpy as np

from leap_dist.envs import games as atari

ALPHABETS = (
    "alphabet_of_the_magi", "angelic", "anglo_saxon_futhorc", "arcadian", "armenian", "asomtavruli_georgian",
    "atemayar_qelisayer", "atlantean", "aurek_besh", "avesta", "balinese", "bengali", "braille", "burmese_myanmar",
    "cyrillic", "early_aramaic", "futurama", "ge_ez", "glagolitic", "grantha", "greek", "gujarati", "gurmukhi",
    "hebrew", "japanese_hiragana", "japanese_katakana", "kannada", "keble", "korean", "latin", "malay_jawi_arabic",
    "malayalam", "manipuri", "mkhedruli_georgian", "mongolian", "n_ko", "old_church_slavonic_cyrillic", "oriya",
    "sanskrit", "sylheti", "syriac_estrangelo", "syriac_serto", "tengwar", "tibetan", "tifinagh", "ulog",
)  # fmt: skip
"""Of Omniglot, those with the 20 characters that a task has, in the order of the names as they are published."""

DATA_SETS = ("cifar10", "cifar100", "mnist", "svhn", "fashion_mnist", "gtsrb", "facescrub", "notmnist")
"""Of Multi-CV."""

HELD_OUT, VALIDATION = 10, 10
"""Alphabets for the final evaluation, and at most for early stopping; training has the others."""


@dataclass(frozen=True)
class Partition:
    """Which alphabets are for what."""

    pretraining: tuple[str, ...]
    validation: tuple[str, ...]
    held_out: tuple[str, ...]


def partition(alphabets: tuple[str, ...], pretraining: int, seed: int) -> Partition:
    """Draws who is for what: a pure function of the arguments.

    One order is drawn by seed. Its first 10 are held out, the next ones are for pretraining, up to 10 of the last for
    validation. So for one seed the held-out alphabets are the same whatever the number of pretraining tasks, and more
    of these include the fewer: arms are compared on equal terms. (The authors' held-out ones follow after the
    pretraining ones of the order, so that they change with their number.) Raises ValueError.
    """
    most = len(alphabets) - HELD_OUT - 1
    if not 1 <= pretraining <= most:
        raise ValueError(f"{pretraining} alphabets are not from 1 to {most}")
    order = [alphabets[position] for position in np.random.default_rng(seed).permutation(len(alphabets))]
    end = HELD_OUT + pretraining
    return Partition(tuple(order[HELD_OUT:end]), tuple(order[end:][-VALIDATION:]), tuple(order[:HELD_OUT]))


def short(name: str) -> str:
    """An alphabet's published name as it is typed, and as folders are called: lower case, words joined by "_"."""
    return re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")


def expand(tasks: str, names: tuple[str, ...], *, seed: int, pretraining: int) -> tuple[str, ...]:
    """Replaces names of sets by what is in them, and drops repetitions.

    Args:
        tasks: what kind of task: "atari", "omniglot" or "multi-cv".
        names: of games, alphabets or data sets, or of sets of them.
        seed: draws which alphabets are for what.
        pretraining: number of alphabets that are for pretraining.

    Raises ValueError that names the nearest choices.
    """
    if tasks == "atari":
        return atari.expand(names)
    if tasks == "omniglot":
        drawn = partition(ALPHABETS, pretraining, seed)
        return _expand("alphabet", names, ALPHABETS, {**vars(drawn), "all": ALPHABETS})
    return _expand("data set", names, DATA_SETS, {"all": DATA_SETS})


def _expand(
    kind: str, names: tuple[str, ...], known: tuple[str, ...], sets: dict[str, tuple[str, ...]]
) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for name in names:
        for one in sets.get(name, (short(name),)):
            if one not in known:
                near = difflib.get_close_matches(one, (*known, *sets), n=3, cutoff=0.4)
                raise ValueError(f"no {kind} {name[:80]!r}" + (f"; the nearest are {', '.join(near)}" if near else ""))
            found[one] = None
    return tuple(found)
