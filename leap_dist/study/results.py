"""Results of a study: every arm in every group, and what Leap gains over the others."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from leap_dist.evaluation import statistics
from leap_dist.evaluation.early_stopping import History
from leap_dist.evaluation.results import Cluster, Difference, Stratum, by_game, difference, interval, points_of
from leap_dist.evaluation.runs import load_all
from leap_dist.evaluation.scoring import ERRORS, Points, Row
from leap_dist.evaluation.statistics import Band, Interval, Spread
from leap_dist.storage.atomic import CorruptFile, one_line
from leap_dist.storage.ledger import Ledger
from leap_dist.study.spec import Study, evaluation_of, progress_of, training_of

REFERENCE = "leap"
"""The arm that all others are compared with."""
STRETCHES = 12
"""Maximum number of curves: more lines could not be distinguished."""


class Stretch(NamedTuple):
    """Mean training curve of the tasks in the meta-updates from `first` to `last`."""

    first: int
    last: int
    updates: np.ndarray
    """Inner steps, of shape (points,)."""
    loss: np.ndarray
    """Training loss, mean over tasks, of shape (points,)."""


class Evolution(NamedTuple):
    """Training curves from the beginning of meta-training to its end."""

    group: str
    tasks: int
    stretches: tuple[Stretch, ...]


class Value(NamedTuple):
    """An error or area of one arm in one group."""

    over_seeds: Spread
    interval: Interval


Validation = dict[str, dict[str, dict[int, list[float]]]]
"""Errors on the validation alphabets during meta-training, by group, arm and meta-updates.

All lists of an arm have the errors of the same seeds, so that a curve of their means does not jump where a run ends.
"""


@dataclass(frozen=True)
class Cell:
    """One arm in one group."""

    runs: int
    seeds: int
    values: dict[str, Value]
    """By name, as in `ERRORS.values`."""
    curve: Band
    """Training error at the points of the group: mean, and one standard deviation over seeds to both sides."""


class Comparison(NamedTuple):
    """The reference minus another arm; if it is below 0, the reference is better."""

    group: str | None
    """None for a comparison over all groups."""
    arm: str
    difference: Difference


@dataclass(frozen=True)
class Results:
    """Everything that a report shows, in its order."""

    study: Study
    rows: tuple[Row, ...]
    cells: dict[str, dict[str, Cell]]
    """By group and arm, if there are runs."""
    points: dict[str, Points]
    """Points of the curves, by group."""
    comparisons: tuple[Comparison, ...]
    evolution: Evolution | None
    validation: Validation
    warnings: tuple[str, ...]


def load(out: Path, study: Study) -> tuple[list[Row], list[str]]:
    """Return every run of the study's evaluations by group, seed and arm, and warnings of one line each."""
    found: list[Row] = []
    warnings: list[str] = []
    for group, seed in study.comparisons():
        folder = evaluation_of(out, group, seed)
        runs, wrong = load_all(folder)
        rows, more = ERRORS.score_all([run for run in runs if run.arm in study.arms], group, seed)
        wrong += more
        if others := sorted({run.arm for run in runs} - set(study.arms)):
            wrong.append(f"left out, because the study does not name them: {', '.join(others)}")
        if study.tasks == "multi-cv" and (seen := sorted({row.run.game for row in rows} - {group})):
            wrong.append(f"left out, because they were not held out: {', '.join(seen)}")
            rows = [row for row in rows if row.run.game == group]
        found += rows
        warnings += [f"{folder.relative_to(out)}: {warning}" for warning in wrong]
    groups, seeds, arms = study.groups.index, study.seeds.index, study.arms.index
    found.sort(key=lambda row: (groups(row.group), seeds(row.seed), arms(row.run.arm), row.run.game))
    return found, warnings


def compute(
    study: Study,
    rows: list[Row],
    evolution: Evolution | None = None,
    warnings: tuple[str, ...] = (),
    repetitions: int = statistics.REPETITIONS,
    validation: Validation | None = None,
) -> Results:
    """Compare the arms of a study. There may be no rows at all."""
    by_group: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        by_group.setdefault(row.group, {}).setdefault(row.run.arm, []).append(row)
    by_group = {group: by_group[group] for group in study.groups if group in by_group}
    points = {
        group: points_of([row for found in arms.values() for row in found], ERRORS) for group, arms in by_group.items()
    }
    return Results(
        study=study,
        rows=tuple(rows),
        cells={
            group: {arm: _cell(arms[arm], points[group], study, repetitions) for arm in study.arms if arm in arms}
            for group, arms in by_group.items()
        },
        points=points,
        comparisons=tuple(_comparisons(study, by_group, repetitions)),
        evolution=evolution,
        validation=validation or {},
        warnings=(*warnings, *_missing(study, rows)),
    )


def curve_over_seeds(rows: list[Row], points: Points) -> Band:
    """Return the mean over seeds, and one standard deviation over seeds to both sides, which is 0 for one seed."""
    by_seed: defaultdict[int, list[np.ndarray]] = defaultdict(list)
    for row in rows:
        by_seed[row.seed].append(row.at(points))
    curves = np.stack([np.mean(of_seed, axis=0) for of_seed in by_seed.values()])
    mean = curves.mean(axis=0)
    deviation = curves.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros_like(mean)
    return Band(mean, mean - deviation, mean + deviation)


def _cell(rows: list[Row], points: Points, study: Study, repetitions: int) -> Cell:
    values = {}
    for name in ERRORS.values:
        of_seeds = defaultdict(list)
        for row in rows:
            of_seeds[row.seed].append(row.values[name])
        over_seeds = statistics.spread({seed: float(np.mean(of_seeds[seed])) for seed in sorted(of_seeds)})
        values[name] = Value(over_seeds, interval(rows, name, *_resampled(study), repetitions))
    return Cell(len(rows), len({row.seed for row in rows}), values, curve_over_seeds(rows, points))


def _resampled(study: Study) -> tuple[Stratum, Cluster | None]:
    """Return the strata and the clusters for resampling.

    In Omniglot, a seed draws the held-out alphabets, and several seeds may draw the same one, which is as hard for each
    of them: a resample draws alphabets, each with its runs of all seeds. In Multi-CV, a group has a single data set,
    but many seeds.
    """
    return ((lambda row: row.seed), by_game) if study.tasks == "omniglot" else ((lambda row: row.group), None)


def _comparisons(study: Study, by_group: dict[str, dict[str, list[Row]]], repetitions: int) -> list[Comparison]:
    if REFERENCE not in study.arms:
        return []
    compared: list[tuple[str | None, dict[str, list[Row]]]] = list(by_group.items())
    # Data sets are a sample from all data sets; numbers of pretraining alphabets are not a sample.
    if study.tasks == "multi-cv" and len(by_group) > 1:
        everything: defaultdict[str, list[Row]] = defaultdict(list)
        for arms in by_group.values():
            for arm, rows in arms.items():
                everything[arm] += rows
        compared.append((None, everything))
    return [
        Comparison(
            group,
            arm,
            difference(arms.get(REFERENCE, []), arms.get(arm, []), ERRORS, *_resampled(study), repetitions),
        )
        for group, arms in compared
        for arm in study.arms
        if arm != REFERENCE
    ]


def _missing(study: Study, rows: list[Row]) -> list[str]:
    """Return a warning about parts of the study without runs, and one about tasks that only some arms have."""
    games: defaultdict[tuple[str, int, str], set[str]] = defaultdict(set)
    wanted: defaultdict[int, set[str]] = defaultdict(set)  # alphabets of a seed, which are the same in all groups
    for row in rows:
        games[row.group, row.seed, row.run.arm].add(row.run.game)
        wanted[row.seed].add(row.run.game)
    places, absent, partial = [], 0, []
    for group in study.groups:
        for seed in study.seeds:
            without = [arm for arm in study.arms if (group, seed, arm) not in games]
            absent += len(without)
            if without:
                arms = "all arms" if len(without) == len(study.arms) else ", ".join(without)
                places.append(f"{group}/seed{seed} {arms}")
            for arm in study.arms if study.tasks == "omniglot" else ():
                lacking = wanted[seed] - games.get((group, seed, arm), wanted[seed])
                if lacking:
                    partial.append(f"{group}/seed{seed}/{arm} {', '.join(sorted(lacking))}")
    found = []
    if places:
        total = len(study.groups) * len(study.seeds) * len(study.arms)
        found.append(f"{absent} of {total} initializations have no test runs yet: {'; '.join(places)}")
    if partial:
        found.append(
            f"runs missing for some held-out alphabets, so that means cover fewer of them: {'; '.join(partial)}"
        )
    if rows and len({row.seed for row in rows}) == 1:
        found.append("there is only one seed: nothing is known about how results vary with the seed")
    return found


# Meta-training ----------------------------------------------------------------------------------------------------


class _Task(NamedTuple):
    """The training of one task, from its line in the ledger."""

    version: int
    steps: np.ndarray
    loss: np.ndarray
    batch: float
    """Examples per inner step."""


def load_evolution(out: Path, study: Study) -> tuple[Evolution | None, list[str]]:
    """Return the curves of Leap in the largest group with a meta-update, over all seeds, and one-line warnings."""
    warnings: list[str] = []
    for group in sorted(study.groups, key=int, reverse=True) if REFERENCE in study.arms else ():
        lines: list[dict[str, Any]] = []
        for seed in study.seeds:
            folder = training_of(out, group, seed, REFERENCE)
            try:
                lines += Ledger(folder / "ledger.jsonl").lines()
            except OSError as error:
                warnings.append(f"{folder.relative_to(out)}/ledger.jsonl is left out: {error}")
        if found := evolution(lines, group):
            return found, warnings
    if REFERENCE in study.arms:
        warnings.append("no meta-update of leap yet: how its training curves evolve is not shown")
    return None, warnings


def load_validation(out: Path, study: Study) -> tuple[Validation, list[str]]:
    """Return what early stopping has measured so far, and one-line warnings.

    Runs in progress do not count beside those that have ended. A run that was stopped early keeps its last value.
    """
    runs: defaultdict[tuple[str, str], list[_Measured]] = defaultdict(list)
    warnings: list[str] = []
    for group, seed in study.comparisons():
        for arm in study.arms:
            folder = training_of(out, group, seed, arm)
            try:
                measurements = History.read(folder).measurements
            except (CorruptFile, OSError) as error:
                warnings.append(f"{folder.relative_to(out)}: its validation errors are left out: {one_line(error)}")
                continue
            if measurements:
                errors = {one.meta_updates: one.error for one in measurements}
                runs[group, arm].append(_Measured(errors, progress_of(folder)["state"] == "done"))
    found: Validation = {}
    for (group, arm), of_seeds in runs.items():
        found.setdefault(group, {})[arm] = _of_equal_seeds(of_seeds)
    return found, warnings


class _Measured(NamedTuple):
    """The validation errors of a run by meta-updates, at least one, and whether it has ended."""

    errors: dict[int, float]
    ended: bool


def _of_equal_seeds(runs: list[_Measured]) -> dict[int, list[float]]:
    """Return the errors of runs that have ended, or, if none has, of all runs as far as each of them has come."""
    ended = [run.errors for run in runs if run.ended]
    errors = ended or [run.errors for run in runs]
    first = max(min(one) for one in errors)
    last = (max if ended else min)(max(one) for one in errors)
    points = [at for at in sorted(set[int]().union(*errors)) if first <= at <= last]
    return {at: [one[max(before for before in one if before <= at)] for one in errors] for at in points}


def evolution(lines: list[dict[str, Any]], group: str, stretches: int = STRETCHES) -> Evolution | None:
    """Return the curves in the lines of one or several ledgers; None if no task has ended."""
    tasks = [task for line in lines if line["final"] and (task := _parse(line))]
    if not tasks:
        return None
    versions = 1 + max(task.version for task in tasks)
    count = min(stretches, versions)
    of_stretch: defaultdict[int, list[_Task]] = defaultdict(list)
    for task in tasks:
        of_stretch[task.version * count // versions].append(task)
    ends = [-(-index * versions // count) for index in range(count + 1)]  # ceil: a stretch's first version
    found = (
        _stretch(of_stretch[index], first + 1, after)
        for index, (first, after) in enumerate(itertools.pairwise(ends))
        if index in of_stretch
    )
    return Evolution(group, len(tasks), tuple(found))


def _parse(line: dict[str, Any]) -> _Task | None:
    """Return the training of a task; None if its line has no losses or no updates."""
    points = [(point["steps"], point["means"].get("loss", math.nan)) for point in line["curve"]]
    points = [(step, loss) for step, loss in points if math.isfinite(loss)]
    updates = line.get("updates")
    if not points or not isinstance(updates, int) or updates < 1 or line["steps"] < updates:
        return None
    steps, loss = np.array(points, float).T
    return _Task(line["version_before"], steps, loss, line["steps"] / updates)


def _stretch(tasks: list[_Task], first: int, last: int) -> Stretch:
    """Return the mean over tasks at the points of the longest curve. A task does not count after its end."""
    longest = max(tasks, key=lambda task: float(task.steps[-1]))
    points = longest.steps
    curves = [np.interp(points, task.steps, task.loss, right=np.nan) for task in tasks]
    # A point is the mean since the point before it, so it belongs in the middle between them.
    middle = points - np.diff(points, prepend=0) / 2
    return Stretch(first, last, middle / longest.batch, np.nanmean(np.stack(curves), axis=0))
