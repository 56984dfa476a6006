"""Returns of the episodes that end while an agent plays."""

from __future__ import annotations

import numpy as np


class EpisodeTracker:
    """Adds up the raw rewards of N parallel environments and collects the returns of finished episodes."""

    def __init__(self, envs: int) -> None:
        self._running = np.zeros(envs)
        self._steps = 0
        self._returns: list[float] = []
        self._ends: list[int] = []

    def add(self, rewards: np.ndarray, done: np.ndarray) -> None:
        """Add one step: raw rewards (N,), and which episodes it ended, bool (N,)."""
        self._running += rewards
        self._steps += len(done)
        if done.any():
            self._returns.extend(self._running[done].tolist())
            self._ends.extend([self._steps] * int(done.sum()))
            self._running[done] = 0.0

    def take(self) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Return the returns collected since the last call, and the agent steps of the task at which they ended."""
        returns, ends = tuple(self._returns), tuple(self._ends)
        self._returns, self._ends = [], []
        return returns, ends
