"""What tells people how training goes, and the words for it: an agent's return, a classifier's error."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from leap_dist.config.settings import Config


@dataclass(frozen=True)
class Metric:
    """Of a run's tasks."""

    name: str
    """In summaries and tags, and of the column in the table."""
    title: str
    """Of an axis."""
    steps: str
    """What a task's steps are."""
    rate: str
    source: str
    """What a task learns from."""
    nothing: str
    """Said where a game has no score."""
    scale: int
    """Of a score that people read."""
    unit: str
    lowest: float | None
    """That a score can be; None: there is no such limit."""
    counts_from: float
    """Part of a task after which its scores count. Of classifiers the whole: most of a task, they make no error."""

    def shown(self, score: float) -> str:
        """A score, for people."""
        return f"{self.scale * score:,.1f}{self.unit}"

    def of_task(self, curve: list[dict[str, Any]]) -> float | None:
        """Mean raw return of the episodes that ended in the second half of a task's curve.

        Of the whole curve where none ended there, None where none ended at all. Of a supervised task, mean error of all
        its batches, which is the area under its training-error curve.
        """
        ended = [point for point in curve if point["score"] is not None]
        start = self.counts_from * curve[-1]["steps"] if curve else 0
        chosen = [point for point in ended if point["steps"] > start] or ended
        episodes = sum(point["episodes"] for point in chosen)
        return sum(point["score"] * point["episodes"] for point in chosen) / episodes if episodes else None


RETURN = Metric("return", "return", "agent steps", "steps/s", "game", "no episode finished yet", 1, "", None, 0.5)
ERROR = Metric(
    "error", "training error (%)", "examples", "examples/s", "data set", "no batch yet", 100, "%", 0.0, 0.0
)  # an alphabet is a data set too

_MEASURES = {measure.name: measure for measure in (RETURN, ERROR)}


def of_config(config: Config) -> Metric:
    """Of a run."""
    return ERROR if config.is_supervised else RETURN


def of_summary(summary: dict[str, Any]) -> Metric:
    """Of the run that a summary is of. Older ones do not name it: there were games only."""
    return _MEASURES[summary.get("measure", RETURN.name)]


def of_point(point: dict[str, Any]) -> Metric:
    """Of a curve's point: a classifier's has a mean error."""
    return ERROR if ERROR.name in point["means"] else RETURN


def of_lines(lines: Iterable[dict[str, Any]]) -> Metric:
    """Of the run whose ledger lines these are."""
    return next((of_point(point) for line in lines for point in line["curve"]), RETURN)
