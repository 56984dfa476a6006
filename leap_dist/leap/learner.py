"""What is being learned on a task, behind the one interface that the worker's loop knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Progress:
    """What a learner has seen since its last report, as means over that stretch.

    `scores` holds the figure that people compare (Atari: raw returns of the episodes that ended); the others are
    losses and diagnostics by name.
    """

    scores: tuple[float, ...]
    means: dict[str, float]
    ended: tuple[int, ...] = ()
    """For each score, the agent steps since the task's start at which it was made."""


class Learner(Protocol):
    """A model that trains on one task. The worker calls `backward` and `step` in turn and watches it move."""

    shared: Mapping[str, Tensor]
    """The meta-learned parameters, by name."""

    local: Mapping[str, Tensor]
    """The task's own parameters, such as its head."""

    descent: float | None
    """α, where a step is θ_{i+1} = θ_i − α ∇f(θ_i) and nothing else, so that the gradient tells the path; or None."""

    steps_per_update: int
    """Agent steps (or examples) that one `backward` consumes."""

    def backward(self) -> Tensor:
        """Gathers data, computes f(θ_i) and leaves ∇f(θ_i) in the parameters' `.grad`. Returns the loss, shape ()."""

    def step(self) -> None:
        """Clips and applies the gradient: θ_i → θ_{i+1}. Must not write into `.grad`; may drop it."""

    @property
    def done(self) -> bool:
        """Training on is of no use, whatever is left of the task."""

    def measure(self) -> Tensor:
        """Like `backward`, but on data that training does not see, where the task has such data."""

    def evaluate(self) -> Tensor:
        """f(θ_K) on fresh data, without a gradient, shape (); consumes as much of it as `backward`."""

    def progress(self) -> Progress:
        """Reports what happened since the last call, and starts afresh."""

    def conclude(self, beat: Callable[[], None]) -> dict[str, float]:
        """What shows only once training is over, by name; for evaluations. Calls `beat` every second or so."""

    def show(self, see: Callable[[np.ndarray], None]) -> None:
        """From now on calls `see` with each picture of what it is learning from, uint8 (C, H, W), where it has any.

        The picture may be a view into memory that is used again.
        """

    def close(self) -> None:
        """Frees what the task holds."""
