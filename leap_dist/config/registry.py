"""Registry of task names (games, alphabets, data sets, and sets of them), and of the metric of each kind of tasks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from leap_dist.config.settings import ENVIRONMENTS, Config
from leap_dist.envs import games as atari

ALPHABETS = (
    "alphabet_of_the_magi", "angelic", "anglo_saxon_futhorc", "arcadian", "armenian", "asomtavruli_georgian",
    "atemayar_qelisayer", "atlantean", "aurek_besh", "avesta", "balinese", "bengali", "braille", "burmese_myanmar",
    "cyrillic", "early_aramaic", "futurama", "ge_ez", "glagolitic", "grantha", "greek", "gujarati", "gurmukhi",
    "hebrew", "japanese_hiragana", "japanese_katakana", "kannada", "keble", "korean", "latin", "malay_jawi_arabic",
    "malayalam", "manipuri", "mkhedruli_georgian", "mongolian", "n_ko", "old_church_slavonic_cyrillic", "oriya",
    "sanskrit", "sylheti", "syriac_estrangelo", "syriac_serto", "tengwar", "tibetan", "tifinagh", "ulog",
)  # fmt: skip
"""Omniglot alphabets with at least the 20 characters that a task needs, in the order of their published names."""

DATA_SETS = ("cifar10", "cifar100", "mnist", "svhn", "fashion_mnist", "gtsrb", "facescrub", "notmnist")
"""The data sets of Multi-CV."""

HELD_OUT, VALIDATION = 10, 10
"""Number of alphabets held out for the final evaluation, and largest number for early stopping."""


@dataclass(frozen=True)
class Partition:
    """A division of alphabets into disjoint sets."""

    pretraining: tuple[str, ...]
    validation: tuple[str, ...]
    held_out: tuple[str, ...]


def partition(alphabets: tuple[str, ...], pretraining: int, seed: int) -> Partition:
    """Divide alphabets at random; the result depends on the arguments alone.

    The seed determines one order. The first 10 alphabets are held out, the next `pretraining` ones are for training,
    and up to 10 at the end for validation. So the held-out alphabets of a seed do not depend on `pretraining`, and a
    larger training set contains the smaller ones: arms are compared on equal terms. (In the authors' code the held-out
    alphabets follow the training alphabets, and change with their number.)

    Raises ValueError if too few alphabets remain.
    """
    import numpy as np  # only needed here, and the command line starts faster without it

    most = len(alphabets) - HELD_OUT - 1
    if not 1 <= pretraining <= most:
        raise ValueError(f"{pretraining} is not a valid number of pretraining alphabets; choose 1 to {most}")
    order = [alphabets[position] for position in np.random.default_rng(seed).permutation(len(alphabets))]
    end = HELD_OUT + pretraining
    return Partition(tuple(order[HELD_OUT:end]), tuple(order[end:][-VALIDATION:]), tuple(order[:HELD_OUT]))


def normalize(name: str) -> str:
    """Return a published name in the form used on the command line and for folders: lower case, words joined by "_"."""
    return re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")


def expand(tasks: str, names: tuple[str, ...], *, seed: int, pretraining: int) -> tuple[str, ...]:
    """Replace the names of sets by their members and drop repetitions.

    Args:
        tasks: the kind of tasks, a value of the setting `tasks`.
        names: names of games, environments, alphabets or data sets, or of sets of them.
        seed: seed of the partition of alphabets.
        pretraining: number of alphabets in the training set.

    Raises:
        ValueError: a name is unknown; the message has the nearest names.
    """
    if tasks == "atari":
        _refuse_foreign_games(names)
        return atari.expand(names)
    if tasks == "omniglot":
        drawn = partition(ALPHABETS, pretraining, seed)
        return _expand("alphabet", names, ALPHABETS, {**vars(drawn), "all": ALPHABETS})
    if tasks in OWN:
        return _own(tasks, names)
    return _expand("data set", names, DATA_SETS, {"all": DATA_SETS})


OWN = {"gymnasium": "environments, such as Catch-v0", "images": "data sets, such as fruits for fruits.npz"}
"""Kinds of tasks that the user provides, and what their names refer to."""


def _own(tasks: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the user's own tasks in the spelling of ledgers and folders. Raises ValueError."""
    if names in ((), Config.games):
        raise ValueError(f"name your {OWN[tasks]}")
    if wrong := [name for name in names if not re.fullmatch("[a-z0-9_]{1,80}", normalize(name))]:
        raise ValueError(f"{wrong[0][:80]!r} has no letter or digit, or is longer than 80 characters")
    spelled: dict[str, str] = {}
    for name in names:
        if _joined(first := spelled.setdefault(normalize(name), name)) != _joined(name):
            why = "only letters from a to z and digits count"
            raise ValueError(f"{first[:80]!r} and {name[:80]!r} are the same name, because {why}; rename one")
    return tuple(spelled)


def _joined(name: str) -> str:
    """Return a name as `normalize` does, but with the letters of all alphabets."""
    return re.sub(r"[\W_]+", "_", name.lower()).strip("_")


_OTHER_SPELLING = re.compile(r"^(?:ALE/)?(.+?)(?:-ram)?(?:NoFrameskip|Deterministic)?(?:-v\d+)?$", re.IGNORECASE)


def _refuse_foreign_games(names: tuple[str, ...]) -> None:
    """Raise ValueError for a game spelled as in other programs, such as `PongNoFrameskip-v4` or `ms pacman`."""
    known = {game.replace("_", ""): game for game in atari.available()}
    for first, name in enumerate(names):
        if name in atari.SETS or name in known.values():
            continue
        for end in range(min(len(names), first + 4), first, -1):  # a name with spaces was split into several
            written = " ".join(names[first:end])
            match = _OTHER_SPELLING.match(written[:80])
            game = known.get(re.sub("[^a-z0-9]", "", match[1].lower())) if match else None
            if game is not None:
                raise ValueError(f"no game {written[:80]!r}; did you mean {game}?")


def _expand(
    kind: str, names: tuple[str, ...], known: tuple[str, ...], sets: dict[str, tuple[str, ...]]
) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for name in names:
        for one in sets.get(name, (normalize(name),)):
            if one not in known:
                near = difflib.get_close_matches(one, (*known, *sets), n=3, cutoff=0.4)
                hint = f"the nearest are {', '.join(near)}" if near else f"others are {', '.join(known[:3])}"
                raise ValueError(f"no {kind} {name[:80]!r}; {hint}")
            found[one] = None
    return tuple(found)


@dataclass(frozen=True)
class Metric:
    """A score of tasks, with everything that tables and figures need to present it."""

    name: str
    """Name in summaries, TensorBoard tags and table columns."""
    axis_label: str
    """Label of a figure's axis, with the unit."""
    step_unit: str
    """Unit in which the length of a task is counted, in the plural, such as "agent steps"."""
    rate_unit: str
    """Unit of the training speed."""
    task_noun: str
    """Noun for the source of a task, such as "game"."""
    no_score_text: str
    """Text about tasks without a score; {steps} stands for the length of the longest."""
    scale: int
    """Factor from a stored score to the number that is displayed."""
    unit: str
    """Unit printed after the displayed number."""
    minimum: float | None
    """Smallest possible score; None if scores have no lower bound."""
    counted_from: float
    """Fraction of a task after which its scores start to count.

    Returns count from the second half on. For classifiers the whole task counts: late in a task they make no errors.
    """

    def format(self, score: float) -> str:
        """Return a stored score as text for display."""
        return f"{self.scale * score:,.1f}{self.unit}"

    def task_score(self, curve: list[dict[str, Any]]) -> float | None:
        """Return one score for a whole task, computed from its curve.

        For returns: the mean over the episodes that ended in the second half of the curve, or in all of it if none
        ended there. For errors: the mean over all batches, which is the area under the training-error curve. None if
        the curve has no score.
        """
        ended = [point for point in curve if point["score"] is not None]
        start = self.counted_from * curve[-1]["steps"] if curve else 0
        chosen = [point for point in ended if point["steps"] > start] or ended
        episodes = sum(point["episodes"] for point in chosen)
        return sum(point["score"] * point["episodes"] for point in chosen) / episodes if episodes else None


RETURN = Metric(
    "return",
    "return (points)",
    "agent steps",
    "steps/s",
    "game",
    "no episode ended\nwithin {steps:,} steps",
    1,
    "",
    None,
    0.5,
)
ERROR = Metric(
    "error",
    "training error (%)",
    "examples",
    "examples/s",
    "data set",
    "no batch yet",
    100,
    "%",
    0.0,
    0.0,
)  # an alphabet is a data set too

_BY_NAME = {metric.name: metric for metric in (RETURN, ERROR)}


def for_config(config: Config) -> Metric:
    """Return the metric of a run with this configuration."""
    return for_tasks(config.tasks)


def for_tasks(tasks: str) -> Metric:
    """Return the metric of tasks of this kind, as the setting `tasks` names it."""
    return RETURN if tasks in ENVIRONMENTS else ERROR


def for_summary(summary: dict[str, Any]) -> Metric:
    """Return the metric of the run that a summary describes. Summaries of old runs, all of games, do not name it."""
    return _BY_NAME[summary.get("measure", RETURN.name)]


def for_point(point: dict[str, Any]) -> Metric:
    """Return the metric of one point of a curve: only a classifier's points have a mean error."""
    return ERROR if ERROR.name in point["means"] else RETURN


def for_ledger(lines: Iterable[dict[str, Any]]) -> Metric:
    """Return the metric of the run that wrote these ledger lines."""
    return next((for_point(point) for line in lines for point in line["curve"]), RETURN)
