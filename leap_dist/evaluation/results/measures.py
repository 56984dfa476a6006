"""What trained classifiers are measured by, and what several of them say together.

All errors and areas are parts of 1 here; reports show them in %, and areas scaled to 0–100.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from leap_dist.evaluation import statistics
from leap_dist.evaluation.results.runs import TransferRun
from leap_dist.evaluation.statistics import Band, Interval

MEASURES = ("test_error", "train_error", "auc")
SEED = 0
"""Of the bootstrap. Every interval starts from it anew, so none depends on what else is in a report."""
POINTS = 50
"""Of a curve that is shown, at most."""
_LONG = 1000
"""Batches from which on a curve is shown over the logarithm of examples: it falls within the first few percent."""
_EVEN = 100
"""Batches over which stretches of such a curve are about as long as the first: some 10 batches."""


class Curve(NamedTuple):
    """Training error while a network learned, in up to POINTS stretches of batches."""

    at: np.ndarray
    """(points,), examples seen in the middle of a stretch."""
    error: np.ndarray
    """(points,), mean over its batches."""
    end: int
    """Examples seen at the end."""
    logarithmic: bool
    """Whether stretches get longer and longer, or all are of the same length."""


class Points(NamedTuple):
    """Where curves are compared."""

    at: np.ndarray
    """(points,), examples."""
    logarithmic: bool


@dataclass(frozen=True)
class Outcome:
    """One network, trained on one task from one arm's initialization."""

    group: str
    """Of a study; "" elsewhere."""
    seed: int
    """Of a study, which its meta-training had; elsewhere the run's own."""
    arm: str
    game: str
    """The alphabet or the data set."""
    run_seed: int
    test_error: float
    """On held-out images, as trained."""
    train_error: float
    """On all training images, as trained."""
    auc: float
    """Area under the curve of the batches' errors during training: their mean, but for the ends."""
    test_loss: float
    """NaN where it is unknown or diverged."""
    seconds: float
    curve: Curve


def measure(run: TransferRun, group: str = "", seed: int | None = None) -> Outcome:
    """A run of an evaluation, measured. Raises ValueError where it does not say how a classifier did."""
    last: dict[str, Any] = run.curve[-1] if run.curve else {}
    errors = [float(last.get(name, math.nan)) for name in ("test_error", "train_error")]
    if not all(0 <= error <= 1 for error in errors):
        raise ValueError(f"{run.arm}/{run.game}/{run.seed} has no error of a trained classifier")
    if not (len(run.returns) and run.ended[0] > 0 and run.returns.min() >= 0 and run.returns.max() <= 1):
        raise ValueError(f"{run.arm}/{run.game}/{run.seed} has no training errors")
    return Outcome(
        group=group,
        seed=run.seed if seed is None else seed,
        arm=run.arm,
        game=run.game,
        run_seed=run.seed,
        test_error=errors[0],
        train_error=errors[1],
        auc=statistics.trapezoids(run.returns),
        test_loss=float(last.get("test_loss", math.nan)),
        seconds=run.seconds,
        curve=_curve(run),
    )


def measure_all(
    runs: Iterable[TransferRun], group: str = "", seed: int | None = None
) -> tuple[list[Outcome], list[str]]:
    """Those that can be measured, and what is wrong with the others, on one line each."""
    found, warnings = [], []
    for run in runs:
        try:
            found.append(measure(run, group, seed))
        except ValueError as error:
            warnings.append(f"left out: {error}")
    return found, warnings


def _curve(run: TransferRun) -> Curve:
    batches = len(run.returns)
    logarithmic = batches > _LONG
    cuts = (
        (_EVEN * (np.geomspace(1, 1 + batches / _EVEN, POINTS + 1)[1:-1] - 1)).astype(int)
        if logarithmic
        else np.arange(1, min(POINTS, batches)) * batches // min(POINTS, batches)
    )
    at, error = (
        np.array([part.mean() for part in np.split(values, cuts)], float) for values in (run.ended, run.returns)
    )
    return Curve(at, error, int(run.ended[-1]), logarithmic)


# Several together -------------------------------------------------------------------------------------------------

Stratum = Callable[[Outcome], Hashable]
"""What a run is resampled within."""


def values(outcomes: list[Outcome], measure: str, stratum: Stratum) -> list[np.ndarray]:
    """One array (runs,) per stratum, in the order in which strata come first."""
    strata: defaultdict[Hashable, list[float]] = defaultdict(list)
    for outcome in outcomes:
        strata[stratum(outcome)].append(getattr(outcome, measure))
    return [np.array(found) for found in strata.values()]


def interval(outcomes: list[Outcome], measure: str, stratum: Stratum, repetitions: int) -> Interval:
    """Mean over strata of the mean over runs, with its bootstrap interval."""
    return statistics.interval(statistics.mean, values(outcomes, measure, stratum), _rng(), repetitions)


class Spread(NamedTuple):
    """Over seeds. A seed's value is the mean over its runs."""

    mean: float
    deviation: float
    """Sample standard deviation, √(Σ (x − x̄)² / (n − 1)); NaN of one seed."""
    by_seed: dict[int, float]


def spread(outcomes: list[Outcome], measure: str) -> Spread:
    """How a measure varies over seeds; of at least one run."""
    seeds = sorted({outcome.seed for outcome in outcomes})
    by_seed = {seed: float(np.mean([getattr(o, measure) for o in outcomes if o.seed == seed])) for seed in seeds}
    return Spread(*_mean_and_deviation(np.array(list(by_seed.values()))), by_seed)


class Difference(NamedTuple):
    """One arm less another, over pairs of runs that differ in nothing else."""

    intervals: dict[str, Interval]
    """By measure; empty where there is no pair."""
    by_seed: dict[int, float]
    """Of the test error: the mean over a seed's pairs."""
    pairs: int


def difference(ours: list[Outcome], theirs: list[Outcome], stratum: Stratum, repetitions: int) -> Difference:
    """Mean over strata of the paired differences, with bootstrap intervals; pairs are resampled as pairs."""
    sides = [{(o.group, o.seed, o.game, o.run_seed): o for o in side} for side in (ours, theirs)]
    shared = sorted(sides[0].keys() & sides[1].keys())
    if not shared:
        return Difference({}, {}, 0)
    x, y = ([side[key] for key in shared] for side in sides)
    of_seeds: defaultdict[int, list[float]] = defaultdict(list)
    for our, their in zip(x, y, strict=True):
        of_seeds[our.seed].append(our.test_error - their.test_error)
    return Difference(
        {
            measure: statistics.paired_difference(
                statistics.mean, values(x, measure, stratum), values(y, measure, stratum), _rng(), repetitions
            )
            for measure in MEASURES
        },
        {seed: float(np.mean(found)) for seed, found in of_seeds.items()},
        len(shared),
    )


# Curves -----------------------------------------------------------------------------------------------------------


def points_of(outcomes: list[Outcome]) -> Points:
    """POINTS points, from the first that any of these curves has to the end of the longest."""
    curves = [outcome.curve for outcome in outcomes]
    start, end = min(curve.at[0] for curve in curves), max(curve.end for curve in curves)
    logarithmic = any(curve.logarithmic for curve in curves)
    return Points((np.geomspace if logarithmic else np.linspace)(start, end, POINTS), logarithmic)


def at_points(outcome: Outcome, points: Points) -> np.ndarray:
    """Training error at these numbers of examples. A run that ended earlier keeps its last value: its network stays."""
    return np.asarray(np.interp(points.at, outcome.curve.at, outcome.curve.error))


def curve_over_seeds(outcomes: list[Outcome], points: Points) -> Band:
    """Mean over seeds, and one standard deviation over seeds to both sides; none of one seed."""
    by_seed: defaultdict[int, list[np.ndarray]] = defaultdict(list)
    for outcome in outcomes:
        by_seed[outcome.seed].append(at_points(outcome, points))
    curves = np.stack([np.mean(of_seed, axis=0) for of_seed in by_seed.values()])
    mean = curves.mean(axis=0)
    deviation = curves.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros_like(mean)
    return Band(mean, mean - deviation, mean + deviation)


def curve_with_interval(outcomes: list[Outcome], points: Points, stratum: Stratum, repetitions: int) -> Band:
    """Mean over strata of the mean over runs, with its bootstrap interval at each point."""
    strata: defaultdict[Hashable, list[np.ndarray]] = defaultdict(list)
    for outcome in outcomes:
        strata[stratum(outcome)].append(at_points(outcome, points))
    curves = [np.stack(found) for found in strata.values()]
    return statistics.band(statistics.mean, curves, _rng(), repetitions)


def _mean_and_deviation(of_seeds: np.ndarray) -> tuple[float, float]:
    return float(of_seeds.mean()), float(of_seeds.std(ddof=1)) if len(of_seeds) > 1 else math.nan


def _rng() -> np.random.Generator:
    return np.random.default_rng(SEED)
