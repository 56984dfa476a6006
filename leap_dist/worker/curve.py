"""The learning curve of one task, as it is sent to the server with every contribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from leap_dist.leap.learner import Learner
from leap_dist.protocol.messages import CurvePoint, Episode


class LearningCurve:
    """Collects a learner's progress as points of a curve and, for evaluations, as single episodes.

    Args:
        learner: the learner whose progress is recorded.
        interval: number of agent steps (or examples) between two points.
        keeps_episodes: whether to record every episode as well.
    """

    def __init__(self, learner: Learner, interval: int, *, keeps_episodes: bool) -> None:
        self._learner = learner
        self._interval = interval
        self._keeps_episodes = keeps_episodes
        self._steps = 0
        self.points: list[CurvePoint] = []
        self.episodes: list[Episode] = []

    def load(self, steps: int, points: Sequence[CurvePoint], episodes: Sequence[Episode]) -> None:
        """Continue a curve that another process has recorded up to `steps` steps."""
        self._steps = steps
        self.points, self.episodes = list(points), list(episodes)

    def is_due(self, steps: int) -> bool:
        """Return whether `steps` has reached the next multiple of the interval since the last due point."""
        if steps // self._interval == self._steps // self._interval:
            return False
        self._steps = steps
        return True

    def add(self, steps: int, more: Mapping[str, float] = MappingProxyType({})) -> None:
        """Add a point for the progress since the last one, with `more` means; add none if nothing happened."""
        progress = self._learner.progress()
        if self._keeps_episodes:
            self.episodes += map(Episode, progress.ended, progress.scores)
        if means := {**progress.means, **more}:
            score = float(np.mean(progress.scores)) if progress.scores else None
            self.points.append(CurvePoint(steps, len(progress.scores), score, means))
