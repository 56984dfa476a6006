"""The learner: what is trained on a task, behind the only interface that the worker's loop uses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Progress:
    """What happened in a learner since its last report."""

    scores: tuple[float, ...]
    """Scores to be compared; for Atari, the raw returns of the episodes that ended."""
    means: dict[str, float]
    """Mean losses and diagnostics, by name."""
    ended: tuple[int, ...] = ()
    """Agent steps from the start of the task at which each score was reached."""


@dataclass(frozen=True)
class LearnerState:
    """Everything that the rest of a learner's training depends on."""

    arrays: dict[str, np.ndarray]
    """Arrays by name."""
    values: dict[str, Any]
    """JSON-compatible values by name."""


class OtherDevice(ValueError):
    """A state was saved on another kind of device, whose random numbers cannot be continued on this one."""


class Learner(Protocol):
    """A model that trains on one task. The worker calls `backward` and `step` in turn."""

    shared: Mapping[str, Tensor]
    """The meta-learned parameters, by name."""

    local: Mapping[str, Tensor]
    """The task's own parameters, such as its head, by name."""

    descent: float | None
    """α, if a step is exactly θ_{i+1} = θ_i − α ∇f(θ_i), so that the gradient determines the path; otherwise None."""

    steps_per_update: int
    """Agent steps (or examples) that one `backward` consumes."""

    def backward(self) -> Tensor:
        """Collect data, compute f(θ_i) and leave ∇f(θ_i) in the parameters' `.grad`. Return the loss, shape ()."""

    def step(self) -> None:
        """Clip and apply the gradient, θ_i → θ_{i+1}. Must not write into `.grad`, but may drop it."""

    @property
    def done(self) -> bool:
        """Whether further training would be useless, however much of the task is left."""

    def backward_held_out(self) -> Tensor:
        """Do the same as `backward`, but on data held out from training if the task has such data."""

    def evaluate(self) -> Tensor:
        """Return f(θ_K) on new data, without a gradient, shape (). Consumes as much data as `backward`."""

    def progress(self) -> Progress:
        """Return what happened since the last call."""

    def interim(self, beat: Callable[[], None]) -> dict[str, float]:
        """Return the metrics that are due at this point of an evaluation, by name; usually none.

        This is called at the points of the curve. It calls `beat` about once a second.
        """

    def conclude(self, beat: Callable[[], None]) -> dict[str, float]:
        """Return metrics that can only be computed after training, by name; for evaluations.

        Calls `beat` about once a second, so that the lease can be renewed.
        """

    def state(self) -> LearnerState | None:
        """Return the state between two updates, from which `load_state` continues, or None if that is not possible."""

    def load_state(self, state: LearnerState) -> None:
        """Continue from the state of an identically constructed learner, bit for bit on a CPU. Call before training.

        Raises OtherDevice, before anything has changed, if the state was saved on another kind of device; KeyError,
        ValueError or RuntimeError if it is that of another learner.
        """

    def show(self, see: Callable[[np.ndarray], None]) -> None:
        """From now on, call `see` with each picture that the learner trains on, uint8 (C, H, W), if there are any.

        The picture may be a view of memory that will be overwritten.
        """

    def close(self) -> None:
        """Release the task's resources."""


class EndlessLearner(ABC):
    """Base class of learners for which every batch is new data, as when an agent plays.

    Nothing needs to be held out, no task ends early, and training itself gives all metrics.
    """

    @abstractmethod
    def backward(self) -> Tensor:
        """See `Learner.backward`."""

    @property
    def done(self) -> bool:
        """Return False: further training is always useful."""
        return False

    def backward_held_out(self) -> Tensor:
        """Call `backward`, whose data is always new to training."""
        return self.backward()

    def state(self) -> LearnerState | None:
        """Return None: most learners can only start from the beginning."""
        return None

    def load_state(self, state: LearnerState) -> None:
        """Raise RuntimeError, because there is no such state."""
        raise RuntimeError("this learner has no state to continue from")

    def interim(self, beat: Callable[[], None]) -> dict[str, float]:
        """Return nothing: training itself gives all metrics."""
        return {}

    def conclude(self, beat: Callable[[], None]) -> dict[str, float]:
        """Return nothing: training itself gives all metrics."""
        return {}
