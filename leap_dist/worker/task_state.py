"""The state of a running task, from which another process can continue it with the same result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from leap_dist.leap.learner import Learner, LearnerState, OtherDevice
from leap_dist.protocol.messages import Ack, CurvePoint, Episode, Lease
from leap_dist.storage.atomic import DECODE_ERRORS, CorruptFile, one_line, pack, unpack
from leap_dist.testing.failpoints import failpoint
from leap_dist.worker.curve import LearningCurve
from leap_dist.worker.start import Start

log = logging.getLogger(__name__)

_LEARNER = "learner."
_ENDED, _SCORES = "episodes.ended", "episodes.scores"


@dataclass(frozen=True)
class TaskState:
    """A task of an evaluation between two updates."""

    learner: LearnerState
    """The learner."""
    rollouts: int
    """Number of updates made."""
    steps: int
    """Agent steps so far."""
    seconds: float
    """Wall-clock time so far."""
    points: Sequence[CurvePoint]
    """The learning curve so far."""
    episodes: Sequence[Episode]
    """All episodes that have ended and been reported."""

    def pack(self) -> bytes:
        """Return the state as a safetensors file with a checksum."""
        arrays = {_LEARNER + name: array for name, array in self.learner.arrays.items()}
        arrays[_ENDED] = np.array([episode.steps for episode in self.episodes], np.int64)
        arrays[_SCORES] = np.array([episode.score for episode in self.episodes], np.float64)
        header = {
            "learner": self.learner.values,
            "rollouts": self.rollouts,
            "steps": self.steps,
            "seconds": self.seconds,
            "points": [point.plain() for point in self.points],
        }
        return pack(arrays, header)

    @classmethod
    def unpack(cls, data: bytes) -> TaskState:
        """Invert `pack`. Raises CorruptFile if that is not possible."""
        arrays, header = unpack(data, "the state of the task")
        try:
            return cls(
                learner=LearnerState(
                    {name.removeprefix(_LEARNER): x for name, x in arrays.items() if name.startswith(_LEARNER)},
                    dict(header["learner"]),
                ),
                rollouts=int(header["rollouts"]),
                steps=int(header["steps"]),
                seconds=float(header["seconds"]),
                points=[CurvePoint(**point) for point in header["points"]],
                episodes=list(map(Episode, arrays[_ENDED].tolist(), arrays[_SCORES].tolist())),
            )
        except DECODE_ERRORS as error:
            raise CorruptFile(f"the state of the task is damaged: {one_line(error)}") from None


class StateServer(Protocol):
    """The part of the server that keeps states."""

    def save_state(self, lease_id: str, incarnation: str, state: bytes, steps: int) -> Ack:
        """Keep the state of a task of an evaluation after `steps` steps, so that it can be continued from there."""


class StateKeeper:
    """Continues a task from the state that it starts with, and saves its states from time to time.

    A task whose state was saved on another kind of device starts from the beginning.

    Args:
        lease: the task's lease.
        start: what the task starts from. Only tasks of evaluations have states.
        learner: the learner, into which the state is loaded if there is one.
        curve: the learning curve, which is continued as well.
        server: keeps the states.
        interval: seconds between two saved states.
        clock: monotonic seconds.

    Raises CorruptFile if the state cannot be read, and what `Learner.load_state` raises.
    """

    def __init__(
        self,
        lease: Lease,
        start: Start,
        learner: Learner,
        curve: LearningCurve,
        server: StateServer,
        interval: float,
        clock: Callable[[], float],
    ) -> None:
        self._lease = lease
        self._learner = learner
        self._curve = curve
        self._server = server
        self._interval = interval
        self._clock = clock
        self._saved = clock()
        self._is_on = start.evaluation
        self.rollouts, self.steps, self.seconds = 0, 0, 0.0
        """Updates, agent steps and seconds that earlier processes spent on the task."""
        if start.state is not None:
            state = TaskState.unpack(start.state)
            try:
                learner.load_state(state.learner)
            except OtherDevice as reason:
                log.warning("%s starts from the beginning: %s", lease.task.game, reason)
                return
            curve.load(state.steps, state.points, state.episodes)
            self.rollouts, self.steps, self.seconds = state.rollouts, state.steps, state.seconds

    @property
    def is_due(self) -> bool:
        """Whether the state should be saved now."""
        return self._is_on and self._clock() - self._saved > self._interval

    def save(self, rollouts: int, steps: int, seconds: float) -> None:
        """Save the state after these numbers of updates, agent steps and seconds, if the learner has one."""
        self._saved = self._clock()
        if not self._is_on or (learner := self._learner.state()) is None:
            return
        state = TaskState(learner, rollouts, steps, seconds, self._curve.points, self._curve.episodes)
        self._server.save_state(self._lease.id, self._lease.incarnation, state.pack(), steps)
        failpoint("task.saved")
