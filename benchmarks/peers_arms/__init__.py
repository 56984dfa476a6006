"""The systems that `benchmarks.peers` measures, one script each.

A script runs in the environment of the system that it measures and prints one JSON line. Those of the peers use nothing
of this project but this package.
"""

from __future__ import annotations

import argparse
import json


def arguments(description: str | None) -> argparse.Namespace:
    """What every arm is told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--game", default="breakout", help="ROM name")
    parser.add_argument("--mode", required=True, help="which way of running the environments")
    parser.add_argument("--envs", type=int, default=16, help="environments; in each process, where there are several")
    parser.add_argument("--warmup", type=float, default=10.0, help="seconds after the first update that do not count")
    parser.add_argument("--seconds", type=float, default=30.0, help="seconds that count")
    return parser.parse_args()


def environment_id(game: str) -> str:
    """The Gymnasium name of a ROM: "ms_pacman" is "ale_py:ALE/MsPacman-v5"; asking for it registers the games."""
    return f"ale_py:ALE/{''.join(part.capitalize() for part in game.split('_'))}-v5"


EMULATOR = {"frameskip": 1, "repeat_action_probability": 0.0, "full_action_space": False}
"""Of the Gymnasium environment: the preprocessing around it skips the frames, and nothing is sticky, as with us."""


class Stopwatch:
    """Counts agent steps against the clock between the end of the warm-up and the end of the measurement."""

    def __init__(self, warmup: float, seconds: float) -> None:
        self._warmup = warmup
        self._seconds = seconds
        self._first: tuple[float, int] | None = None
        self._begun: tuple[float, int] | None = None
        self._now = (0.0, 0)

    def done(self, now: float, steps: int) -> bool:
        """Takes a reading of the clock and of the steps done so far. Returns whether there are enough."""
        self._now = now, steps
        if not self._first and steps:
            self._first = self._now
        elif self._first and not self._begun and now - self._first[0] >= self._warmup:
            self._begun = self._now
        return self._begun is not None and now - self._begun[0] >= self._seconds

    def show(self) -> None:
        """Prints what was measured, for `benchmarks.peers`. Raises RuntimeError where the warm-up never ended."""
        if self._begun is None:
            raise RuntimeError("the warm-up never ended")
        (then, before), (now, after) = self._begun, self._now
        print(json.dumps({"agent_steps": after - before, "seconds": now - then}), flush=True)
