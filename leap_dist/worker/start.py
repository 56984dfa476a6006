"""What a task starts from, and the learner that starts from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from leap_dist.config.settings import Config
from leap_dist.leap.learner import Learner
from leap_dist.nn.profiling import Stopwatch
from leap_dist.protocol.messages import Lease
from leap_dist.protocol.seeds import derived_seed
from leap_dist.tasks.starting_point import StartingPoint
from leap_dist.tasks.task import family_of
from leap_dist.worker.heartbeat import no_heartbeat


@dataclass(frozen=True)
class Start:
    """What the server gives to a task along with its lease."""

    vector: np.ndarray
    """Snapshot φ of the lease's version, flat float32."""
    head: np.ndarray | None = None
    """Sum of what earlier tasks of the game added to its head; None if heads do not persist or nothing was added."""
    scope: str | None = None
    """Name of the set of parameters in `vector`; None for the configured one."""
    evaluation: bool = False
    """Whether the task only evaluates: then there is no meta-learning, and the final push lists every episode."""
    state: bytes | None = None
    """State that the task continues from, see `leap_dist.worker.task_state`; None to start from the beginning."""
    learning_rate: float | None = None
    """Learning rate that an evaluation gives this arm; None for the configured one."""


def make_learner(
    config: Config,
    lease: Lease,
    start: Start,
    stopwatch: Stopwatch | None = None,
    beat: Callable[[], None] = no_heartbeat,
) -> Learner:
    """Make the learner for a lease's task, and call `beat` meanwhile, so that the lease can be renewed.

    Raises ConfigError if the task's data is not there, and whatever `beat` raises.
    """
    # A persistent head starts from the same values, whichever task of the game comes first.
    head_seed = derived_seed(config.seed, lease.task.game)
    point = StartingPoint(
        start.vector,
        start.scope or config.scope,
        head_seed=head_seed if config.keeps_heads else None,
        head_change=start.head,
        learning_rate=start.learning_rate,
    )
    return family_of(config).learner(config, lease, point, stopwatch or Stopwatch(), beat)
