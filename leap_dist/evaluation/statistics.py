"""Statistics for comparing few runs on several games: learning curves, aggregates, bootstrap intervals. NumPy only.

The aggregates, the stratified bootstrap, performance profiles and the probability of improvement are those of Agarwal
et al. (2021), "Deep Reinforcement Learning at the Edge of the Statistical Precipice".

*Scores* are one array per game, (runs,) or (runs, points). Games may have different numbers of runs and weigh the same
all the same: as if the runs of each were repeated until all games have equally many. Scores with a NaN give NaN.

A resample is told by its *counts*: how often it drew each run, (repetitions, runs) for each game. So a point estimate
is the resample that draws every run once, means of resamples are products of matrices, and no resample is sorted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Scores = Sequence[np.ndarray]
Counts = Sequence[np.ndarray]
Statistic = Callable[[Scores, Counts], np.ndarray]
"""Scores and counts of the same games to (repetitions,) or (repetitions, points)."""

WINDOW = 100
"""Episodes in the moving average of a learning curve."""
REPETITIONS = 10_000
"""Of the bootstrap."""
LEVEL = 0.95
"""Of all intervals."""
_CHUNK = 2**17
"""Numbers in an array of a chunk of resamples, so that it fits into the processor's cache."""
_CHUNK_RESAMPLES = 32
"""At least, so that what is done once per chunk, such as ordering the scores, does not count."""


class Interval(NamedTuple):
    """An estimate and the percentile interval of its bootstrap distribution."""

    point: float
    low: float
    high: float


class Band(NamedTuple):
    """The same at several points, each interval for itself: arrays of shape (points,)."""

    point: np.ndarray
    low: np.ndarray
    high: np.ndarray


# One run ----------------------------------------------------------------------------------------------------------


def grid(budget: int, points: int = 100) -> np.ndarray:
    """Agent steps at which curves are compared: (points,), evenly spaced, ending with the budget."""
    return budget * np.arange(1, points + 1) / points


def moving_average(ended: np.ndarray, returns: np.ndarray, at: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Mean return of the last `window` episodes that had ended by each of the agent steps `at`.

    Args:
        ended: (episodes,), ascending, agent steps at which an episode ended.
        returns: (episodes,).
        at: (points,), agent steps.

    Returns:
        (points,); of all episodes where there were fewer yet, NaN where there was none.
    """
    assert ended.shape == returns.shape, (ended.shape, returns.shape)
    total = np.concatenate([[0.0], np.cumsum(returns)])
    last = np.searchsorted(ended, at, side="right")
    first = np.maximum(last - window, 0)
    return np.where(last > 0, total[last] - total[first], np.nan) / np.maximum(last - first, 1)


def area(curve: np.ndarray) -> float:
    """Area under a curve on an even grid over its width: its mean height.

    Before its first known value a curve is taken to have had that value: nothing is known that would favour a run. NaN
    where no value is known.
    """
    known = np.flatnonzero(~np.isnan(curve))
    if not len(known):
        return math.nan
    return float(np.concatenate([np.full(known[0], curve[known[0]]), curve[known[0] :]]).mean())


def trapezoids(curve: np.ndarray) -> float:
    """Trapezoids between the T points of a curve, over T: (Σ_{i<T} (x_i + x_{i−1})/2) / T. NaN where there is no point.

    What the area under a training error curve means for supervised tasks: Leap's authors divide by T, not by the T − 1
    trapezoids (amzn/metalearn-leap, src/omniglot).
    """
    return float((curve[1:] + curve[:-1]).sum() / 2 / len(curve)) if len(curve) else math.nan


def steps_to(curve: np.ndarray, at: np.ndarray, target: float) -> float:
    """The first of the agent steps `at` at which the curve is `target` or more; infinite where it never is."""
    reached = np.flatnonzero(curve >= target)
    return float(at[reached[0]]) if len(reached) else math.inf


# Aggregates -------------------------------------------------------------------------------------------------------


def mean(scores: Scores, counts: Counts) -> np.ndarray:
    """Mean over games of the mean over runs."""
    return np.asarray(_game_means(scores, counts).mean(axis=1))


def median(scores: Scores, counts: Counts) -> np.ndarray:
    """Median over games of the mean over runs."""
    return np.asarray(np.median(_game_means(scores, counts), axis=1))


def optimality_gap(scores: Scores, counts: Counts) -> np.ndarray:
    """By how much scores fall short of 1 on average, where what lies above 1 counts as 1."""
    return 1.0 - mean([np.minimum(score, 1.0) for score in scores], counts)


def iqm(scores: Scores, counts: Counts) -> np.ndarray:
    """Interquartile mean: of the middle half of all games' runs, N − 2⌊N/4⌋ of N."""
    each = math.lcm(*(len(score) for score in scores))  # runs of a game, once all have equally many
    total = each * len(scores)
    cut = total // 4
    pooled = np.concatenate(list(scores))
    weights = np.concatenate([c.T * (each // len(s)) for s, c in zip(scores, counts, strict=True)])
    order = np.argsort(pooled, axis=0)
    ranked = np.take_along_axis(pooled, order, axis=0)
    up_to = np.cumsum(
        weights[order], axis=0
    )  # runs of a resample up to each rank: (runs of all games, ..., repetitions)
    kept = np.diff(np.clip(up_to, cut, total - cut), axis=0, prepend=cut)
    return np.asarray(np.einsum("i...,i...r->r...", ranked, kept) / (total - 2 * cut))


def estimate(statistic: Statistic, scores: Scores) -> np.ndarray:
    """The statistic of the scores themselves: () or (points,)."""
    return np.asarray(statistic(scores, _once([len(score) for score in scores]))[0])


def _game_means(scores: Scores, counts: Counts) -> np.ndarray:
    """(repetitions, games) or (repetitions, games, points)."""
    return np.stack([c @ s / len(s) for s, c in zip(scores, counts, strict=True)], axis=1)


# Intervals --------------------------------------------------------------------------------------------------------


def band(statistic: Statistic, scores: Scores, rng: np.random.Generator, repetitions: int = REPETITIONS) -> Band:
    """The statistic of scores (runs, points) with its interval at each point; runs are resampled within each game."""
    return _bootstrap(lambda counts: statistic(scores, counts), [len(s) for s in scores], rng, repetitions)


def interval(
    statistic: Statistic, scores: Scores, rng: np.random.Generator, repetitions: int = REPETITIONS
) -> Interval:
    """The same of scores (runs,). Of one run per game, the interval is its point: nothing is known of the spread."""
    return _one(band(statistic, scores, rng, repetitions))


def performance_profile(
    scores: Scores, thresholds: np.ndarray, rng: np.random.Generator, repetitions: int = REPETITIONS
) -> Band:
    """Fraction of runs with a score above each threshold (section 4.3), games weighing the same."""
    return band(mean, [(score[:, None] > thresholds).astype(float) for score in scores], rng, repetitions)


def probability_of_improvement(
    x: Scores, y: Scores, rng: np.random.Generator, repetitions: int = REPETITIONS
) -> Interval:
    """Probability that a run of X beats a run of Y on the same game, mean over games; ties count half (section 4.3).

    Runs of X and Y are resampled independently of each other. Both have the same games, in the same order.
    """
    wins = [(a[:, None] > b) + 0.5 * (a[:, None] == b) for a, b in zip(x, y, strict=True)]

    def mean_share(counts: Counts) -> np.ndarray:
        of_x, of_y = counts[: len(wins)], counts[len(wins) :]
        shares = [((cx @ won) * cy).sum(axis=1) / won.size for won, cx, cy in zip(wins, of_x, of_y, strict=True)]
        return np.asarray(np.mean(shares, axis=0))

    return _one(_bootstrap(mean_share, [len(s) for s in (*x, *y)], rng, repetitions))


def paired_difference(
    statistic: Statistic, x: Scores, y: Scores, rng: np.random.Generator, repetitions: int = REPETITIONS
) -> Interval:
    """The statistic of X less that of Y, where run i of a game has the same seed in both.

    A resample draws seeds, and with a seed both of its runs: what a seed makes easy or hard for both cancels.
    """
    sizes = [len(score) for score in x]
    assert sizes == [len(score) for score in y], "pairs need as many runs on both sides"
    return _one(_bootstrap(lambda counts: statistic(x, counts) - statistic(y, counts), sizes, rng, repetitions))


def _bootstrap(
    of: Callable[[Counts], np.ndarray], sizes: Sequence[int], rng: np.random.Generator, repetitions: int
) -> Band:
    """The point and the percentile interval of what `of` makes of the counts; `sizes` are the numbers of runs."""
    point = np.asarray(of(_once(sizes))[0])
    chunk = max(_CHUNK_RESAMPLES, _CHUNK // (sum(sizes) * point.size))
    samples = [of(_draw(sizes, rng, min(chunk, repetitions - done))) for done in range(0, repetitions, chunk)]
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(np.concatenate(samples), (tail, 100 - tail), axis=0)
    return Band(point, low, high)


def _once(sizes: Sequence[int]) -> list[np.ndarray]:
    return [np.ones((1, size)) for size in sizes]


def _draw(sizes: Sequence[int], rng: np.random.Generator, repetitions: int) -> list[np.ndarray]:
    """Counts of drawing as many runs as there are, with replacement, in each game."""
    return [rng.multinomial(size, [1 / size] * size, size=repetitions).astype(float) for size in sizes]


def _one(band: Band) -> Interval:
    return Interval(*(float(value) for value in band))
