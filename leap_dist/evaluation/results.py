"""Results of an evaluation: every arm on every game, over all games, and against the baseline."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from leap_dist.evaluation import statistics
from leap_dist.evaluation.caveats import caveats
from leap_dist.evaluation.scoring import Points, Row, Scoring
from leap_dist.evaluation.statistics import Band, Interval, generator

NO_HUMAN_SCORE = "no published human score"
"""Reason for leaving a game out of the scores over all games: it has no published human score."""

_BASELINE = "scratch"


class Reached(NamedTuple):
    """Describes how the runs of an arm reached the mean final return of the baseline."""

    median_steps: float
    """Infinite if half of the runs or more did not reach it."""
    reached: int
    runs: int


@dataclass(frozen=True)
class Cell:
    """One arm on one game, alphabet or data set."""

    seeds: tuple[int, ...]
    intervals: dict[str, Interval]
    """Mean over runs of each value."""
    curve: Band
    """Mean over runs, at the game's points."""
    steps_to_baseline: Reached | None


@dataclass(frozen=True)
class Overall:
    """One arm over all games that count."""

    runs: int
    aggregates: dict[str, dict[str, Interval]]
    """By value and aggregate."""
    profiles: dict[str, Band]
    """Performance profiles by value, at `Results.thresholds`; empty for errors."""
    curve: Band
    """Summary of the runs, at `Results.all_points`."""


@dataclass(frozen=True)
class Difference:
    """One arm minus another, over pairs of runs of the same game with the same seed."""

    intervals: dict[str, Interval]
    """By value; empty if there are no pairs."""
    by_seed: dict[int, float]
    """Mean difference of the first value over the pairs of each seed, by seed."""
    pairs: int
    seeds_in_common: int
    """Smallest number of seeds of any game of the arm that have a pair."""


@dataclass(frozen=True)
class Against(Difference):
    """One arm against the baseline, on the games that count."""

    improvement: dict[str, Interval]
    """Probability that a run of the arm beats a run of the baseline on the ranked games, by value; empty for errors."""
    ratios: dict[str, Interval | None]
    """The summary of the arm's scores divided by that of the baseline's, over the pairs, by value; empty for
    errors, and if no game counts.

    None if the baseline's summary may be 0 or below."""


@dataclass(frozen=True)
class Results:
    """Everything that a report shows, in its order."""

    scoring: Scoring
    arms: tuple[str, ...]
    baseline: str
    budgets: dict[str, int]
    """Length of the shortest run of each game, over which its runs are compared."""
    rows: tuple[Row, ...]
    targets: dict[str, float]
    """Mean final return of the baseline, by game; empty for errors."""
    cells: dict[str, dict[str, Cell]]
    """By game and arm, if there are runs."""
    points: dict[str, Points]
    """Points of the curves, by game."""
    counted: tuple[str, ...]
    """Games included in the scores over all games: those with runs of all arms and, if needed, reference scores."""
    ranked: tuple[str, ...]
    """Games over which probabilities of improvement are taken: those that count, or, if none does, all with runs of
    every arm. Which of two runs of a game is better can be said without reference scores."""
    excluded: dict[str, str]
    """The games that do not count, with the reason."""
    thresholds: dict[str, np.ndarray]
    """Thresholds of the performance profiles, by value."""
    all_points: Points | None
    """Points of the curves over all games: percentages of a run if games are compared over different lengths."""
    overall: dict[str, Overall]
    against: dict[str, Against]
    improvements: dict[str, dict[tuple[str, str], Interval]]
    """Probability that a run of the first arm beats a run of the second one, by value; empty for errors."""
    warnings: tuple[str, ...]

    @property
    def budget(self) -> int:
        """Length of the shortest run."""
        return min(self.budgets.values())

    @property
    def by_share(self) -> bool:
        """Whether games are compared over different lengths, so that only shares of a run can be compared."""
        return _differ(self.scoring, self.budgets)


_ByArm = dict[str, dict[str, list[Row]]]
"""Rows by game and arm."""


def compute(
    scored: Sequence[Row],
    scoring: Scoring,
    warnings: Iterable[str] = (),
    repetitions: int = statistics.REPETITIONS,
) -> Results:
    """Compare scored runs, at least one, in the order of their arms. `warnings` come before those of the results."""
    arms = tuple(dict.fromkeys(row.run.arm for row in scored))
    baseline = _BASELINE if _BASELINE in arms else arms[-1]
    targets = _targets(scored, baseline) if scoring.human_normalized else {}
    rows = [_with_target(row, targets) for row in scored]
    found: _ByArm = {game: {} for game in sorted({row.run.game for row in rows})}
    for row in rows:
        if not row.silent:
            found[row.run.game].setdefault(row.run.arm, []).append(row)
    points = {
        game: points_of([row for rows_of_arm in of_arms.values() for row in rows_of_arm], scoring)
        for game, of_arms in found.items()
        if of_arms
    }
    excluded = {g: why for g, of_arms in found.items() if (why := _why_excluded(g, of_arms, arms, scoring))}
    counted = {game: of_arms for game, of_arms in found.items() if game not in excluded}
    ranked = counted or {game: of_arms for game, of_arms in found.items() if excluded[game] == NO_HUMAN_SCORE}
    of_arm = {arm: [row for of_arms in ranked.values() for row in of_arms[arm]] for arm in arms}
    everything = [row for rows_of_arm in of_arm.values() for row in rows_of_arm] if counted else []
    thresholds = {name: _thresholds(everything, name) for name in scoring.values} if scoring.human_normalized else {}
    compared = _Comparison(scoring, thresholds if everything else {}, repetitions)
    budgets = {game: min(row.run.budget for row in rows if row.run.game == game) for game in found}
    all_points = None
    if everything:
        all_points = (
            Points(statistics.grid(100), logarithmic=False)
            if _differ(scoring, budgets)
            else points_of(everything, scoring)
        )
    return Results(
        scoring=scoring,
        arms=arms,
        baseline=baseline,
        budgets=budgets,
        rows=tuple(rows),
        targets=targets,
        cells={
            game: {arm: compared.cell(of_arms[arm], points[game]) for arm in arms if arm in of_arms}
            for game, of_arms in found.items()
        },
        points=points,
        counted=tuple(counted),
        ranked=tuple(ranked),
        excluded=excluded,
        thresholds=compared.thresholds,
        all_points=all_points,
        overall={arm: compared.overall(of_arm[arm], all_points) for arm in arms} if all_points else {},
        against={arm: compared.against(of_arm[arm], of_arm[baseline]) for arm in arms if arm != baseline}
        if ranked or not scoring.human_normalized
        else {},
        improvements={
            name: {
                (first, second): compared.improvement(of_arm[first], of_arm[second], name)
                for first, second in itertools.permutations(arms, 2)
            }
            for name in (scoring.values if ranked and scoring.human_normalized else ())
        },
        warnings=(*warnings, *caveats(rows, scoring, excluded, counts_any=bool(counted))),
    )


# Groups of runs ---------------------------------------------------------------------------------------------------

Stratum = Callable[[Row], Hashable]
"""Function that returns the stratum within which a run is resampled. All strata have the same weight."""
Cluster = Callable[[Row], Hashable]
"""Function that returns the cluster of a run: the runs of a cluster vary together, so a resample draws all or none."""


def by_game(row: Row) -> str:
    """Return the game, alphabet or data set of a run."""
    return row.run.game


def by_initialization(row: Row) -> Hashable:
    """Return what the initialization of a run was meta-trained with, in a study; the same for all runs elsewhere."""
    return (row.group, row.seed) if row.group else None


def points_of(rows: Sequence[Row], scoring: Scoring) -> Points:
    """Return the points at which the curves of these rows are compared."""
    return scoring.points([row.curve for row in rows])


def stratified(rows: Sequence[Row], values: Iterable[float | np.ndarray | None], stratum: Stratum) -> list[np.ndarray]:
    """Return the rows' values for each stratum, (runs,) or (runs, points), in order of first appearance."""
    strata: defaultdict[Hashable, list[float | np.ndarray | None]] = defaultdict(list)
    for row, value in zip(rows, values, strict=True):
        strata[stratum(row)].append(value)
    return [np.array(found, float) for found in strata.values()]


def scores_of(rows: Sequence[Row], name: str, stratum: Stratum) -> list[np.ndarray]:
    """Return the rows' scores for each stratum, of shape (runs,)."""
    return stratified(rows, [row.scores[name] for row in rows], stratum)


def interval(rows: Sequence[Row], name: str, stratum: Stratum, cluster: Cluster | None, repetitions: int) -> Interval:
    """Return the mean over strata of the mean score over runs, with its bootstrap interval."""
    scores, clusters = scores_of(rows, name, stratum), clusters_of(rows, stratum, cluster)
    return statistics.interval(statistics.mean, scores, generator(), repetitions, clusters)


def clusters_of(rows: Sequence[Row], stratum: Stratum, cluster: Cluster | None) -> list[np.ndarray] | None:
    """Return the number of each run's cluster for each stratum; None if there are not two, so that runs are drawn."""
    names = {cluster(row): float(index) for index, row in enumerate(rows)} if cluster else {}
    if cluster is None or len(names) < 2:
        return None
    return [one.astype(int) for one in stratified(rows, [names[cluster(row)] for row in rows], stratum)]


def difference(
    ours: Sequence[Row],
    theirs: Sequence[Row],
    scoring: Scoring,
    stratum: Stratum,
    cluster: Cluster | None,
    repetitions: int,
) -> Difference:
    """Return the summary of our scores minus that of theirs, over pairs of runs, which are resampled as pairs."""
    x, y = _pairs(ours, theirs, stratum)
    seeds = {game: {row.seed for row in x if row.run.game == game} for game in {row.run.game for row in ours}}
    in_common = min(map(len, seeds.values()), default=0)
    if not x:
        return Difference({}, {}, 0, 0)
    first = next(iter(scoring.values))
    of_seeds: defaultdict[int, list[float]] = defaultdict(list)
    for our, their in zip(x, y, strict=True):
        of_seeds[our.seed].append((our.scores[first] or 0.0) - (their.scores[first] or 0.0))
    clusters = clusters_of(x, stratum, cluster)
    ours_of, theirs_of = ({name: scores_of(side, name, stratum) for name in scoring.values} for side in (x, y))
    intervals = {
        name: statistics.paired_difference(
            scoring.summary, ours_of[name], theirs_of[name], generator(), repetitions, clusters
        )
        for name in scoring.values
    }
    return Difference(intervals, {seed: float(np.mean(found)) for seed, found in of_seeds.items()}, len(x), in_common)


def ratio(ours: Sequence[Row], theirs: Sequence[Row], name: str, scoring: Scoring, repetitions: int) -> Interval | None:
    """Return the summary of our scores divided by that of theirs, over pairs of runs; None if it has no meaning."""
    pairs = _pairs(ours, theirs, by_game)
    x, y = (scores_of(side, name, by_game) for side in pairs)
    clusters = clusters_of(pairs[0], by_game, by_initialization)
    return statistics.paired_ratio(scoring.summary, x, y, generator(), repetitions, clusters) if x else None


def _pairs(ours: Sequence[Row], theirs: Sequence[Row], stratum: Stratum) -> tuple[list[Row], list[Row]]:
    """Return the rows of either side for which the other has one of the same game and seed, in the same order."""
    sides = [{(row.group, row.seed, row.run.game, row.run.seed): row for row in side} for side in (ours, theirs)]
    shared = sorted(sides[0].keys() & sides[1].keys(), key=lambda key: (stratum(sides[0][key]), *key))
    return [sides[0][key] for key in shared], [sides[1][key] for key in shared]


# Parts of the results ---------------------------------------------------------------------------------------------


class _Comparison(NamedTuple):
    """Makes the parts of the results that need bootstrap samples."""

    scoring: Scoring
    thresholds: dict[str, np.ndarray]
    repetitions: int

    def cell(self, rows: list[Row], points: Points) -> Cell:
        intervals = {}
        clusters = clusters_of(rows, by_game, by_initialization)
        for name in self.scoring.values:
            values = [np.array([row.values[name] for row in rows])]
            intervals[name] = statistics.interval(statistics.mean, values, generator(), self.repetitions, clusters)
        steps = [row.steps_to_baseline for row in rows if row.steps_to_baseline is not None]
        curves = [np.stack([row.at(points) for row in rows])]
        return Cell(
            seeds=tuple(row.seed for row in rows),
            intervals=intervals,
            curve=statistics.band(statistics.mean, curves, generator(), self.repetitions, clusters),
            steps_to_baseline=Reached(float(np.median(steps)), sum(map(math.isfinite, steps)), len(steps))
            if steps
            else None,
        )

    def overall(self, rows: list[Row], points: Points) -> Overall:
        scores = {name: scores_of(rows, name, by_game) for name in self.scoring.values}
        clusters = clusters_of(rows, by_game, by_initialization)
        return Overall(
            runs=len(rows),
            aggregates={
                name: {
                    title: statistics.interval(aggregate, found, generator(), self.repetitions, clusters)
                    for title, aggregate in self.scoring.aggregates.items()
                }
                for name, found in scores.items()
            },
            profiles={
                name: statistics.performance_profile(scores[name], thresholds, generator(), self.repetitions, clusters)
                for name, thresholds in self.thresholds.items()
            },
            curve=statistics.band(
                self.scoring.summary,
                stratified(rows, [self._score_curve(row, points) for row in rows], by_game),
                generator(),
                self.repetitions,
                clusters,
            ),
        )

    def against(self, ours: list[Row], theirs: list[Row]) -> Against:
        has_scores = bool(self.thresholds) or not self.scoring.human_normalized
        found = Difference({}, {}, 0, 0)
        if has_scores:
            found = difference(ours, theirs, self.scoring, by_game, by_initialization, self.repetitions)
        ranked = self.scoring.values if self.scoring.human_normalized else ()
        return Against(
            **vars(found),
            improvement={name: self.improvement(ours, theirs, name) for name in ranked},
            ratios={name: ratio(ours, theirs, name, self.scoring, self.repetitions) for name in self.thresholds},
        )

    def improvement(self, ours: list[Row], theirs: list[Row], name: str) -> Interval:
        # Raw returns rank the runs of a game as their human-normalized scores do.
        x, y = (stratified(rows, [row.values[name] for row in rows], by_game) for rows in (ours, theirs))
        of_x, of_y = (clusters_of(rows, by_game, by_initialization) for rows in (ours, theirs))
        return statistics.probability_of_improvement(x, y, generator(), self.repetitions, (of_x, of_y))

    def _score_curve(self, row: Row, points: Points) -> np.ndarray:
        # All curves of games have their points at the same shares of the budget.
        values = row.curve.values if self.scoring.human_normalized else row.at(points)
        return np.array([self.scoring.of_game(row.run.game, float(value)) for value in values], float)


def _differ(scoring: Scoring, budgets: dict[str, int]) -> bool:
    """Return whether games are compared over different lengths."""
    return scoring.human_normalized and len(set(budgets.values())) > 1


def _targets(rows: Sequence[Row], baseline: str) -> dict[str, float]:
    finals: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.run.arm == baseline and not row.silent:
            finals[row.run.game].append(row.values["final"])
    return {game: float(np.mean(finals[game])) for game in sorted(finals)}


def _with_target(row: Row, targets: dict[str, float]) -> Row:
    target = targets.get(row.run.game)
    steps = None if target is None else statistics.steps_to(row.curve.values, row.curve.at, target)
    return dataclasses.replace(row, steps_to_baseline=steps)


def _why_excluded(game: str, of_arms: dict[str, list[Row]], arms: tuple[str, ...], scoring: Scoring) -> str:
    """Return why a game does not count over all games, or "". All arms are compared on the same games."""
    if lacking := [arm for arm in arms if arm not in of_arms]:
        return f"no run of {', '.join(lacking)} in which an episode ended"
    return NO_HUMAN_SCORE if scoring.of_game(game, 0.0) is None else ""


def _thresholds(rows: list[Row], name: str) -> np.ndarray:
    """Return 101 thresholds from the lowest score, or 0, to the highest: there, profiles fall from 1 to 0."""
    scores = [score for row in rows if (score := row.scores[name]) is not None]
    return np.linspace(min([0.0, *scores]), max([0.01, *scores]), 101)
