"""The metric that shows how training goes, and the words for it: an agent's return or a classifier's error."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from leap_dist.config.settings import Config


@dataclass(frozen=True)
class Metric:
    """A score of tasks, with everything that tables and figures need to present it."""

    name: str
    """Name in summaries, TensorBoard tags and table columns."""
    axis_label: str
    """Label of a figure's axis, with the unit."""
    step_unit: str
    """What one step of a task is, in the plural."""
    rate_unit: str
    """Unit of the training speed."""
    task_noun: str
    """What a task is learned from."""
    no_score_text: str
    """Text shown while a task has no score."""
    scale: int
    """Factor from a stored score to the number that is displayed."""
    unit: str
    """Unit printed after the displayed number."""
    minimum: float | None
    """Smallest possible score; None if scores have no lower bound."""
    counted_from: float
    """Fraction of a task after which its scores count.

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


RETURN = Metric("return", "return", "agent steps", "steps/s", "game", "no episode finished yet", 1, "", None, 0.5)
ERROR = Metric(
    "error", "training error (%)", "examples", "examples/s", "data set", "no batch yet", 100, "%", 0.0, 0.0
)  # an alphabet is a data set too

_BY_NAME = {metric.name: metric for metric in (RETURN, ERROR)}


def for_config(config: Config) -> Metric:
    """Return the metric of a run with this configuration."""
    return ERROR if config.is_supervised else RETURN


def for_summary(summary: dict[str, Any]) -> Metric:
    """Return the metric of the run that a summary describes. Summaries of old runs, all of games, do not name it."""
    return _BY_NAME[summary.get("measure", RETURN.name)]


def for_point(point: dict[str, Any]) -> Metric:
    """Return the metric of one point of a curve: only a classifier's points have a mean error."""
    return ERROR if ERROR.name in point["means"] else RETURN


def for_ledger(lines: Iterable[dict[str, Any]]) -> Metric:
    """Return the metric of the run that wrote these ledger lines."""
    return next((for_point(point) for line in lines for point in line["curve"]), RETURN)
