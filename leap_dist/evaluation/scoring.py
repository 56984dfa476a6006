"""Scores of single runs: returns for games, errors for image classifiers.

A `Scoring` describes everything that differs between the two kinds of evaluations. All errors and areas are fractions
of 1 here; reports show them in percent.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from leap_dist.config.registry import ERROR, RETURN, Metric, for_tasks
from leap_dist.envs.games import human_normalized
from leap_dist.evaluation import statistics
from leap_dist.evaluation.runs import RunResult
from leap_dist.evaluation.statistics import Statistic

POINTS = 50
"""Maximum number of points of an error curve."""
_LONG = 1000
"""Runs with more batches than this get a logarithmic axis, because their error falls early."""
_EVEN = 100
"""Number of initial batches in which the segments of such a curve are about equally long, some 10 batches each."""


class Points(NamedTuple):
    """Steps at which the curves of several runs are compared."""

    at: np.ndarray
    """Agent steps or examples, of shape (points,)."""
    logarithmic: bool


class Curve(NamedTuple):
    """Learning curve of a run."""

    at: np.ndarray
    """Agent steps or examples, of shape (points,)."""
    values: np.ndarray
    """Return or error, of shape (points,)."""
    end: int
    """Step at which the run ended."""
    logarithmic: bool
    """Whether the distance between points grows, instead of being constant."""


@dataclass(frozen=True)
class Row:
    """A run with its scores."""

    run: RunResult
    group: str
    """Group of a study; empty elsewhere."""
    seed: int
    """Seed of the meta-training in a study; elsewhere the seed of the run."""
    values: Mapping[str, float]
    """Value of each metric. NaN if no episode ended."""
    scores: Mapping[str, float | None]
    """Values that can be averaged over games: human-normalized returns, or errors. None if a game has no reference."""
    curve: Curve
    test_loss: float = math.nan
    """Loss on held-out images; NaN for games, and for a network that diverged."""
    steps_to_baseline: float | None = None
    """Agent steps until the curve reaches the mean final return of the baseline; infinite if it never does."""

    @property
    def silent(self) -> bool:
        """Whether no episode ended, so that there is nothing to compare."""
        return any(math.isnan(value) for value in self.values.values())

    def at(self, points: Points) -> np.ndarray:
        """Return the curve at `points`. A run that ended earlier keeps its last value."""
        return np.asarray(np.interp(points.at, self.curve.at, self.curve.values))


@dataclass(frozen=True)
class Scoring:
    """How the runs of one kind of task are scored and compared."""

    metric: Metric
    """Names and units of the learning curve."""
    values: Mapping[str, str]
    """Titles of the compared values, by name. The first one decides between classifiers, `conclusion.DECISIVE` between
    agents."""
    aggregates: Mapping[str, Statistic]
    """Aggregates over all games, by name."""
    summary: Statistic
    """Statistic of curves over all games, and of paired differences."""
    human_normalized: bool
    """Whether scores over all games are human-normalized returns.

    If so, performance profiles, probabilities of improvement and steps to the baseline are compared as well.
    """
    score: Callable[[RunResult, int], Row]
    """Scores a run over the given budget. Raises ValueError if the run is of another kind."""
    points: Callable[[Sequence[Curve]], Points]
    """Chooses the points at which curves are compared."""

    def of_game(self, game: str, value: float) -> float | None:
        """Return the score for a value of a metric; None for a game without reference scores."""
        return human_normalized(game, value) if self.human_normalized else value

    def score_all(
        self, runs: Sequence[RunResult], group: str = "", seed: int | None = None
    ) -> tuple[list[Row], list[str]]:
        """Return the scored runs, and a warning of one line for each run that cannot be scored.

        The runs of a game are scored over the smallest of their budgets. `group` and `seed` are those of a study.
        """
        budgets: dict[str, int] = {}
        for run in runs:
            budgets[run.game] = min(run.budget, budgets.get(run.game, run.budget))
        rows, warnings = [], []
        for run in runs:
            try:
                row = self.score(run, budgets[run.game])
            except ValueError as error:
                warnings.append(f"left out: {error}")
            else:
                rows.append(dataclasses.replace(row, group=group, seed=run.seed if seed is None else seed))
        return rows, warnings


def of_tasks(tasks: str) -> Scoring:
    """Return the scoring for the setting `tasks`."""
    return RETURNS if for_tasks(tasks) is RETURN else ERRORS


def _score_returns(run: RunResult, budget: int) -> Row:
    """Score a game: the *final* return is the last value of the learning curve, *auc* its mean height."""
    grid = statistics.grid(budget)
    curve = statistics.moving_average(run.ended, run.returns, grid)
    values = {"final": float(curve[-1]), "auc": statistics.area(curve)}
    scores = {name: human_normalized(run.game, value) for name, value in values.items()}
    return Row(run, "", run.seed, values, scores, Curve(grid, curve, budget, logarithmic=False))


def _score_errors(run: RunResult, budget: int) -> Row:
    """Score a classifier: its errors after training, and the area under the training-error curve (*auc*)."""
    last: dict[str, Any] = run.curve[-1] if run.curve else {}
    values = {name: float(last.get(name, math.nan)) for name in ("test_error", "train_error")}
    if not all(0 <= error <= 1 for error in values.values()):
        raise ValueError(f"{run.name} has no error of a trained classifier")
    if not (len(run.returns) and run.ended[0] > 0 and run.returns.min() >= 0 and run.returns.max() <= 1):
        raise ValueError(f"{run.name} has no training errors")
    values["auc"] = statistics.trapezoids(run.returns)
    return Row(run, "", run.seed, values, values, _error_curve(run), float(last.get("test_loss", math.nan)))


def _error_curve(run: RunResult) -> Curve:
    """Return the means of the batches' errors over up to POINTS segments."""
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


def _error_points(curves: Sequence[Curve]) -> Points:
    """Return POINTS points, from the earliest point of any curve to the end of the longest run."""
    start, end = min(curve.at[0] for curve in curves), max(curve.end for curve in curves)
    logarithmic = any(curve.logarithmic for curve in curves)
    return Points((np.geomspace if logarithmic else np.linspace)(start, end, POINTS), logarithmic)


RETURNS = Scoring(
    metric=RETURN,
    values={"final": "final return", "auc": "area under the curve"},
    aggregates={
        "median": statistics.median,
        "iqm": statistics.iqm,
        "mean": statistics.mean,
        "optimality_gap": statistics.optimality_gap,
    },
    summary=statistics.iqm,
    human_normalized=True,
    score=_score_returns,
    points=lambda curves: Points(curves[0].at, logarithmic=False),
)
"""Scoring of Atari games."""

ERRORS = Scoring(
    metric=ERROR,
    values={"test_error": "test error (%)", "train_error": "train error (%)", "auc": "area (0–100)"},
    aggregates={"mean": statistics.mean},
    summary=statistics.mean,
    human_normalized=False,
    score=_score_errors,
    points=_error_points,
)
"""Scoring of image classifiers."""
