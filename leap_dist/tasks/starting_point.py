"""The parameters that a task starts from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from leap_dist.protocol.seeds import derived_seed


class StartingPoint(NamedTuple):
    """The parameters that a task starts from: shared ones from the server, its own ones from a seed."""

    vector: np.ndarray
    """Snapshot φ of the shared parameters, flat float32."""
    scope: str
    """Name of the set of parameters that `vector` holds: "convolutions", "encoder" or "model"."""
    head_seed: int | None
    """Seed of the task's own parameters if they persist from task to task; None to derive it from the task's seed."""
    head_change: np.ndarray | None
    """Sum of what earlier tasks added to those parameters, flat float32; None if there is nothing to add."""
    learning_rate: float | None = None
    """Learning rate of the task, if an evaluation gives an arm its own; None for the configured one."""

    def of_part(self, name: str) -> StartingPoint:
        """Return the start of one game or data set of a joint learner: a head of its own, which has not trained yet."""
        return self._replace(head_seed=derived_seed(self.head_seed or 0, name), head_change=None)
