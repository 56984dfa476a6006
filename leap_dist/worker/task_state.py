"""The state of a running task, from which another process can continue it to the same end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from leap_dist.leap.learner import LearnerState
from leap_dist.protocol.messages import CurvePoint, Episode
from leap_dist.storage.atomic import DECODE_ERRORS, CorruptFile, one_line, pack, unpack

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
