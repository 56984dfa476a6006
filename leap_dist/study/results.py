"""What a study found: every arm in every group, what Leap gains over the others, and what is missing."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from leap_dist.evaluation import statistics
from leap_dist.evaluation.results import measures
from leap_dist.evaluation.results.measures import MEASURES, Difference, Outcome, Points, Spread
from leap_dist.evaluation.results.runs import load_all
from leap_dist.evaluation.statistics import Band, Interval
from leap_dist.study.meta_training import Evolution
from leap_dist.study.spec import Study, evaluation_of

REFERENCE = "leap"
"""The arm that all others are compared with."""


class Value(NamedTuple):
    """Of one arm in one group, by one measure."""

    over_seeds: Spread
    interval: Interval


@dataclasses.dataclass(frozen=True)
class Cell:
    """One arm in one group."""

    runs: int
    seeds: int
    values: dict[str, Value]
    """By measure."""
    curve: Band
    """Training error at the group's points: mean, and a standard deviation over seeds to both sides."""


class Comparison(NamedTuple):
    """The reference less another arm; below 0 the reference is better."""

    group: str | None
    """None where it is over all groups."""
    arm: str
    difference: Difference


@dataclasses.dataclass(frozen=True)
class Results:
    """All of it, in the order in which it is shown."""

    study: Study
    outcomes: tuple[Outcome, ...]
    cells: dict[str, dict[str, Cell]]
    """By group and arm, where there are runs."""
    points: dict[str, Points]
    """By group: where curves are compared."""
    comparisons: tuple[Comparison, ...]
    evolution: Evolution | None
    warnings: tuple[str, ...]


def load(out: Path, study: Study) -> tuple[list[Outcome], list[str]]:
    """Every run of the study's evaluations, by group, seed and arm; and what is wrong, on one line each."""
    found: list[Outcome] = []
    warnings: list[str] = []
    for group in study.groups:
        for seed in study.seeds:
            folder = evaluation_of(out, group, seed)
            runs, wrong = load_all(folder)
            outcomes, more = measures.measure_all((run for run in runs if run.arm in study.arms), group, seed)
            wrong += more
            if others := sorted({run.arm for run in runs} - set(study.arms)):
                wrong.append(f"left out, because the study does not name them: {', '.join(others)}")
            if study.tasks == "multi-cv" and (seen := sorted({o.game for o in outcomes} - {group})):
                wrong.append(f"left out, because they were not held out: {', '.join(seen)}")
                outcomes = [outcome for outcome in outcomes if outcome.game == group]
            found += outcomes
            warnings += [f"{folder.relative_to(out)}: {warning}" for warning in wrong]
    place = {arm: index for index, arm in enumerate(study.arms)}
    found.sort(key=lambda o: (study.groups.index(o.group), study.seeds.index(o.seed), place[o.arm], o.game))
    return found, warnings


def compute(
    study: Study,
    outcomes: list[Outcome],
    evolution: Evolution | None = None,
    warnings: tuple[str, ...] = (),
    repetitions: int = statistics.REPETITIONS,
) -> Results:
    """Puts together what there is, which may be nothing."""
    by_group: dict[str, dict[str, list[Outcome]]] = {}
    for outcome in outcomes:
        by_group.setdefault(outcome.group, {}).setdefault(outcome.arm, []).append(outcome)
    by_group = {group: by_group[group] for group in study.groups if group in by_group}
    points = {
        group: measures.points_of([o for found in arms.values() for o in found]) for group, arms in by_group.items()
    }
    cells = {
        group: {arm: _cell(arms[arm], points[group], study, repetitions) for arm in study.arms if arm in arms}
        for group, arms in by_group.items()
    }
    return Results(
        study=study,
        outcomes=tuple(outcomes),
        cells=cells,
        points=points,
        comparisons=tuple(_compare(study, by_group, repetitions)),
        evolution=evolution,
        warnings=(*warnings, *_missing(study, outcomes)),
    )


def _cell(outcomes: list[Outcome], points: Points, study: Study, repetitions: int) -> Cell:
    return Cell(
        runs=len(outcomes),
        seeds=len({outcome.seed for outcome in outcomes}),
        values={
            measure: Value(
                measures.spread(outcomes, measure),
                measures.interval(outcomes, measure, _stratum(study), repetitions),
            )
            for measure in MEASURES
        },
        curve=measures.curve_over_seeds(outcomes, points),
    )


def _stratum(study: Study) -> measures.Stratum:
    """With Omniglot a seed draws the held-out alphabets; with Multi-CV each group has but one data set, many seeds."""
    return (lambda outcome: outcome.seed) if study.tasks == "omniglot" else (lambda outcome: outcome.group)


def _compare(study: Study, by_group: dict[str, dict[str, list[Outcome]]], repetitions: int) -> list[Comparison]:
    if REFERENCE not in study.arms:
        return []
    found = []
    stratum = _stratum(study)
    others = [arm for arm in study.arms if arm != REFERENCE]
    for group, arms in by_group.items():
        for arm in others:
            difference = measures.difference(arms.get(REFERENCE, []), arms.get(arm, []), stratum, repetitions)
            found.append(Comparison(group, arm, difference))
    # Data sets are a sample of such; numbers of pretraining alphabets are not.
    if study.tasks == "multi-cv" and len(by_group) > 1:
        everything: defaultdict[str, list[Outcome]] = defaultdict(list)
        for arms in by_group.values():
            for arm, outcomes in arms.items():
                everything[arm] += outcomes
        for arm in others:
            difference = measures.difference(everything[REFERENCE], everything[arm], stratum, repetitions)
            found.append(Comparison(None, arm, difference))
    return found


def _missing(study: Study, outcomes: list[Outcome]) -> list[str]:
    """What the study names and has no run of; and where arms lack tasks that others have."""
    games: defaultdict[tuple[str, int, str], set[str]] = defaultdict(set)
    wanted: defaultdict[int, set[str]] = defaultdict(set)  # alphabets of a seed, which are the same in all groups
    for outcome in outcomes:
        games[outcome.group, outcome.seed, outcome.arm].add(outcome.game)
        wanted[outcome.seed].add(outcome.game)
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
        found.append(f"no run yet of {absent} of {total} tested initializations: {'; '.join(places)}")
    if partial:
        found.append(f"held-out alphabets that an arm lacks, so that its means are of others: {'; '.join(partial)}")
    if outcomes and len({outcome.seed for outcome in outcomes}) == 1:
        found.append("there is one seed only: nothing is known of how results vary with it")
    return found
