"""How learning itself changes while an initialization is meta-learned, from a ledger: the left panel of figure 3."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from leap_dist.storage.ledger import Ledger
from leap_dist.study.spec import Study, training_of

ARM = "leap"
STRETCHES = 12
"""Of meta-updates, at most; one line for each is what can be told apart."""


class Stretch(NamedTuple):
    """Training curve of the tasks that went into the meta-updates from `first` to `last`."""

    first: int
    last: int
    updates: np.ndarray
    """(points,), inner steps."""
    loss: np.ndarray
    """(points,), training loss, mean over tasks."""


class Evolution(NamedTuple):
    """Training curves from the beginning of meta-training to its end."""

    group: str
    tasks: int
    stretches: tuple[Stretch, ...]


class _Learned(NamedTuple):
    """What a task's line in the ledger says of its training."""

    version: int
    steps: np.ndarray
    loss: np.ndarray
    batch: float
    """Steps per update."""


def read(out: Path, study: Study) -> tuple[Evolution | None, list[str]]:
    """Of Leap in the largest group that has any meta-update, over all seeds; and what is wrong, on one line each."""
    warnings: list[str] = []
    for group in sorted(study.groups, key=int, reverse=True) if ARM in study.arms else ():
        lines: list[dict[str, Any]] = []
        for seed in study.seeds:
            folder = training_of(out, group, seed, ARM)
            try:
                lines += Ledger(folder / "ledger.jsonl").read(0)[0]
            except OSError as error:
                warnings.append(f"{folder.relative_to(out)}/ledger.jsonl is left out: {error}")
        if found := evolution(lines, group):
            return found, warnings
    if ARM in study.arms:
        warnings.append("no meta-update of leap yet: how its training curves evolve is not shown")
    return None, warnings


def evolution(lines: list[dict[str, Any]], group: str, stretches: int = STRETCHES) -> Evolution | None:
    """Of a ledger's lines, or several ledgers'. None where no task has ended."""
    tasks = [task for line in lines if line["final"] and (task := _learned(line))]
    if not tasks:
        return None
    versions = 1 + max(task.version for task in tasks)
    count = min(stretches, versions)
    of_stretch: defaultdict[int, list[_Learned]] = defaultdict(list)
    for task in tasks:
        of_stretch[task.version * count // versions].append(task)
    ends = [-(-index * versions // count) for index in range(count + 1)]  # ceil: a stretch's first version
    found = (
        _stretch(of_stretch[index], first + 1, after)
        for index, (first, after) in enumerate(itertools.pairwise(ends))
        if index in of_stretch
    )
    return Evolution(group, len(tasks), tuple(found))


def _learned(line: dict[str, Any]) -> _Learned | None:
    """None where a line says too little."""
    points = [(point["steps"], point["means"].get("loss", math.nan)) for point in line["curve"]]
    points = [(step, loss) for step, loss in points if math.isfinite(loss)]
    updates = line.get("updates")
    if not points or not isinstance(updates, int) or updates < 1 or line["steps"] < updates:
        return None
    steps, loss = np.array(points, float).T
    return _Learned(line["version_before"], steps, loss, line["steps"] / updates)


def _stretch(tasks: list[_Learned], first: int, last: int) -> Stretch:
    """Means over tasks, at as many points as the longest curve has; where a task had ended, it does not count."""
    longest = max(tasks, key=lambda task: float(task.steps[-1]))
    points = longest.steps
    curves = [np.interp(points, task.steps, task.loss, right=np.nan) for task in tasks]
    # A point is the mean since the one before it: it belongs in the middle.
    middle = points - np.diff(points, prepend=0) / 2
    return Stretch(first, last, middle / longest.batch, np.nanmean(np.stack(curves), axis=0))
