"""Statistics for comparing few runs on several games: learning curves, aggregates, bootstrap intervals. NumPy only.

The aggregates, the stratified bootstrap, performance profiles and the probability of improvement are those of Agarwal
et al. (2021), "Deep Reinforcement Learning at the Edge of the Statistical Precipice".

*Scores* are one array per game (or other stratum) of shape (runs,) or (runs, points). All games have the same weight,
whatever their numbers of runs: as if the runs of each were repeated until all games had equally many. A NaN in the
scores makes the result NaN.

A resample is represented by its *counts*, of shape (repetitions, runs) for each game: how often it has drawn each run.
The point estimate is then the resample that draws every run once, means of resamples are matrix products, and the
scores are sorted once instead of once per resample.

Runs that start from the same meta-learned initialization vary together. `clusters` name the initialization of each run,
as arrays like the scores of a single value; a resample then draws clusters, each with all of its runs in all games.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Scores = Sequence[np.ndarray]
Counts = Sequence[np.ndarray]
Clusters = Sequence[np.ndarray] | None
"""Cluster of each run, integers of shape (runs,) for each game; None if every run is drawn by itself."""
Statistic = Callable[[Scores, Counts], np.ndarray]
"""Function from scores and counts of the same games to an array of shape (repetitions,) or (repetitions, points)."""

WINDOW = 100
"""Number of episodes in the moving average of a learning curve."""
REPETITIONS = 10_000
"""Number of bootstrap samples."""
LEVEL = 0.95
"""Confidence level of all intervals."""
SEED = 0
"""Seed of the bootstrap; see `generator`."""
_CHUNK = 2**17
"""Size of the array for a chunk of resamples, chosen to fit into the processor's cache."""
_CHUNK_RESAMPLES = 32
"""Minimum number of resamples in a chunk, so that the work per chunk, such as sorting the scores, is negligible."""


class Interval(NamedTuple):
    """An estimate and the percentile interval of its bootstrap distribution."""

    point: float
    low: float
    high: float


class Band(NamedTuple):
    """An estimate and its pointwise interval at several points: arrays of shape (points,)."""

    point: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Spread(NamedTuple):
    """How a value varies over seeds."""

    mean: float
    deviation: float
    """Sample standard deviation, √(Σ (x − x̄)² / (n − 1)); NaN for a single seed."""
    by_seed: dict[int, float]


def generator() -> np.random.Generator:
    """Return a new generator with the seed of the bootstrap.

    Every interval of a report has its own generator, so that it does not depend on what else is in the report.
    """
    return np.random.default_rng(SEED)


# One run ----------------------------------------------------------------------------------------------------------


def grid(budget: int, points: int = 100) -> np.ndarray:
    """Return the steps at which curves are compared: (points,), evenly spaced, ending with the budget."""
    return budget * np.arange(1, points + 1) / points


def moving_average(ended: np.ndarray, returns: np.ndarray, at: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Return the mean return of the last `window` episodes that had ended by each of the agent steps `at`.

    Args:
        ended: ascending agent steps at which an episode ended, of shape (episodes,).
        returns: returns of these episodes, of shape (episodes,).
        at: agent steps, of shape (points,).
        window: number of episodes.

    Returns:
        Means of shape (points,): over all episodes while there are fewer than `window`, NaN while there are none.
    """
    assert ended.shape == returns.shape, (ended.shape, returns.shape)
    total = np.concatenate([[0.0], np.cumsum(returns)])
    last = np.searchsorted(ended, at, side="right")
    first = np.maximum(last - window, 0)
    return np.where(last > 0, total[last] - total[first], np.nan) / np.maximum(last - first, 1)


def area(curve: np.ndarray) -> float:
    """Return the area under a curve on an even grid, divided by its width: its mean height.

    The values before the first known one are taken to be equal to it, which favors no run. NaN if no value is known.
    """
    known = np.flatnonzero(~np.isnan(curve))
    if not len(known):
        return math.nan
    return float(np.concatenate([np.full(known[0], curve[known[0]]), curve[known[0] :]]).mean())


def trapezoids(curve: np.ndarray) -> float:
    """Return the sum of the trapezoids between the T points of a curve, over T: (Σ_{i<T} (x_i + x_{i−1})/2) / T.

    This is the area under the training error curve of supervised tasks: Leap's authors divide by T, not by the number
    T − 1 of trapezoids (amzn/metalearn-leap, src/omniglot). NaN for a curve without points.
    """
    return float((curve[1:] + curve[:-1]).sum() / 2 / len(curve)) if len(curve) else math.nan


def steps_to(curve: np.ndarray, at: np.ndarray, target: float) -> float:
    """Return the first of the steps `at` at which the curve is `target` or more; infinity if it never is."""
    reached = np.flatnonzero(curve >= target)
    return float(at[reached[0]]) if len(reached) else math.inf


def spread(by_seed: dict[int, float]) -> Spread:
    """Return the mean and the deviation of one value per seed, at least one."""
    values = np.array(list(by_seed.values()))
    return Spread(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else math.nan, by_seed)


# Aggregates -------------------------------------------------------------------------------------------------------


def mean(scores: Scores, counts: Counts) -> np.ndarray:
    """Return the mean over games of the mean over runs."""
    return np.asarray(_game_means(scores, counts).mean(axis=1))


def median(scores: Scores, counts: Counts) -> np.ndarray:
    """Return the median over games of the mean over runs."""
    return np.asarray(np.median(_game_means(scores, counts), axis=1))


def optimality_gap(scores: Scores, counts: Counts) -> np.ndarray:
    """Return the mean amount by which scores fall short of 1, where scores above 1 count as 1."""
    return 1.0 - mean([np.minimum(score, 1.0) for score in scores], counts)


def iqm(scores: Scores, counts: Counts) -> np.ndarray:
    """Return the interquartile mean: the mean of the middle N − 2⌊N/4⌋ of the N runs of all games."""
    each = math.lcm(*(len(score) for score in scores))  # runs per game, once all games have equally many
    total = each * len(scores)
    cut = total // 4
    pooled = np.concatenate(list(scores))
    weights = np.concatenate([c.T * (each // len(s)) for s, c in zip(scores, counts, strict=True)])
    order = np.argsort(pooled, axis=0)
    ranked = np.take_along_axis(pooled, order, axis=0)
    # Number of runs of a resample up to each rank: (runs of all games, ..., repetitions).
    up_to = np.cumsum(weights[order], axis=0)
    kept = np.diff(np.clip(up_to, cut, total - cut), axis=0, prepend=cut)
    return np.asarray(np.einsum("i...,i...r->r...", ranked, kept) / (total - 2 * cut))


def estimate(statistic: Statistic, scores: Scores) -> np.ndarray:
    """Return the statistic of the scores themselves, of shape () or (points,)."""
    return np.asarray(statistic(scores, _once([len(score) for score in scores]))[0])


def _game_means(scores: Scores, counts: Counts) -> np.ndarray:
    """Return the mean over runs, of shape (repetitions, games) or (repetitions, games, points)."""
    return np.stack([c @ s / len(s) for s, c in zip(scores, counts, strict=True)], axis=1)


# Intervals --------------------------------------------------------------------------------------------------------


def band(
    statistic: Statistic,
    scores: Scores,
    rng: np.random.Generator,
    repetitions: int = REPETITIONS,
    clusters: Clusters = None,
) -> Band:
    """Return the statistic of scores (runs, points) with its interval at each point; resamples runs within games."""
    return _bootstrap(lambda counts: statistic(scores, counts), [_Side.of(scores, clusters)], rng, repetitions)


def interval(
    statistic: Statistic,
    scores: Scores,
    rng: np.random.Generator,
    repetitions: int = REPETITIONS,
    clusters: Clusters = None,
) -> Interval:
    """Return the statistic of scores (runs,) with its interval, which has no width if every game has a single run."""
    return _one(band(statistic, scores, rng, repetitions, clusters))


def performance_profile(
    scores: Scores,
    thresholds: np.ndarray,
    rng: np.random.Generator,
    repetitions: int = REPETITIONS,
    clusters: Clusters = None,
) -> Band:
    """Return the fraction of runs with a score above each threshold (section 4.3), with equal weights for all games."""
    return band(mean, [(score[:, None] > thresholds).astype(float) for score in scores], rng, repetitions, clusters)


def probability_of_improvement(
    x: Scores,
    y: Scores,
    rng: np.random.Generator,
    repetitions: int = REPETITIONS,
    clusters: tuple[Clusters, Clusters] = (None, None),
) -> Interval:
    """Return the probability that a run of X beats a run of Y on the same game, averaged over games (section 4.3).

    Ties count half. X and Y have the same games in the same order; their runs are resampled independently.
    """
    wins = [(a[:, None] > b) + 0.5 * (a[:, None] == b) for a, b in zip(x, y, strict=True)]

    def mean_share(counts: Counts) -> np.ndarray:
        of_x, of_y = counts[: len(wins)], counts[len(wins) :]
        shares = [((cx @ won) * cy).sum(axis=1) / won.size for won, cx, cy in zip(wins, of_x, of_y, strict=True)]
        return np.asarray(np.mean(shares, axis=0))

    sides = [_Side.of(scores, of_side) for scores, of_side in zip((x, y), clusters, strict=True)]
    return _one(_bootstrap(mean_share, sides, rng, repetitions))


def paired_difference(
    statistic: Statistic,
    x: Scores,
    y: Scores,
    rng: np.random.Generator,
    repetitions: int = REPETITIONS,
    clusters: Clusters = None,
) -> Interval:
    """Return the statistic of X minus that of Y, where run i of a game has the same seed in both.

    A resample draws seeds, and with each seed both of its runs, so that the effect of a seed on both cancels.
    """
    assert [len(score) for score in x] == [len(score) for score in y], "pairs need equally many runs on both sides"
    pairs = [_Side.of(x, clusters)]
    return _one(_bootstrap(lambda counts: statistic(x, counts) - statistic(y, counts), pairs, rng, repetitions))


def paired_ratio(
    statistic: Statistic,
    x: Scores,
    y: Scores,
    rng: np.random.Generator,
    repetitions: int = REPETITIONS,
    clusters: Clusters = None,
) -> Interval | None:
    """Return the statistic of X divided by that of Y, over pairs as in `paired_difference`.

    Returns None if the statistic of Y is not above 0 in every resample: a ratio would mean nothing then.
    """
    divisors: list[float] = []

    def ratio(counts: Counts) -> np.ndarray:
        below = statistic(y, counts)
        divisors.append(float(below.min()))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(statistic(x, counts) / below)

    found = _bootstrap(ratio, [_Side.of(x, clusters)], rng, repetitions)
    return _one(found) if min(divisors) > 0 else None


class _Side(NamedTuple):
    """Runs that are resampled together, independently of those of other sides."""

    sizes: list[int]
    """Number of runs of each game."""
    clusters: Clusters

    @classmethod
    def of(cls, scores: Scores, clusters: Clusters) -> _Side:
        sizes = [len(score) for score in scores]
        assert clusters is None or sizes == [len(one) for one in clusters], "each run needs a cluster"
        return cls(sizes, clusters)

    def draw(self, rng: np.random.Generator, repetitions: int) -> list[np.ndarray]:
        """Return the counts for drawing as many runs, or clusters, as there are, with replacement.

        Clusters may have different numbers of runs of a game, if runs are missing. Counts are scaled so that each game
        keeps its number of runs, and where no drawn cluster has a run of a game, all of its runs count once.
        """
        if self.clusters is None:
            return [rng.multinomial(size, [1 / size] * size, size=repetitions).astype(float) for size in self.sizes]
        names, members = np.unique(np.concatenate(self.clusters), return_inverse=True)
        drawn = rng.multinomial(len(names), [1 / len(names)] * len(names), size=repetitions).astype(float)
        counts = []
        for of_game in np.split(members, np.cumsum(self.sizes)[:-1]):
            found = drawn[:, of_game]
            totals = found.sum(axis=1, keepdims=True)
            counts.append(np.where(totals > 0, found * (len(of_game) / np.maximum(totals, 1.0)), 1.0))
        return counts


def _bootstrap(
    of: Callable[[Counts], np.ndarray], sides: Sequence[_Side], rng: np.random.Generator, repetitions: int
) -> Band:
    """Return the point estimate and the percentile interval of a function of the counts of all sides, in order."""
    sizes = [size for side in sides for size in side.sizes]
    point = np.asarray(of(_once(sizes))[0])
    chunk = max(_CHUNK_RESAMPLES, _CHUNK // (sum(sizes) * point.size))
    samples = [
        of([counts for side in sides for counts in side.draw(rng, min(chunk, repetitions - done))])
        for done in range(0, repetitions, chunk)
    ]
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(np.concatenate(samples), (tail, 100 - tail), axis=0)
    return Band(point, low, high)


def _once(sizes: Sequence[int]) -> list[np.ndarray]:
    return [np.ones((1, size)) for size in sizes]


def _one(band: Band) -> Interval:
    return Interval(*(float(value) for value in band))
