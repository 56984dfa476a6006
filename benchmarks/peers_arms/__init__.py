"""Scripts for the systems that `benchmarks.peers` measures.

Each script runs in the environment of its system and prints one JSON line. The scripts of the peers import nothing from
this project except this package.
"""

from __future__ import annotations

import argparse
import json


def arguments(description: str | None) -> argparse.Namespace:
    """Parse the command line that all scripts share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--game", default="breakout", help="ROM name")
    parser.add_argument("--mode", required=True, help="how the system runs its environments")
    parser.add_argument(
        "--envs", type=int, default=16, help="number of environments (per process, if there are several)"
    )
    parser.add_argument("--warmup", type=float, default=10.0, help="seconds of warm-up after the first update")
    parser.add_argument("--seconds", type=float, default=30.0, help="measured seconds")
    return parser.parse_args()


def environment_id(game: str) -> str:
    """Return the Gymnasium name of a ROM: "ale_py:ALE/MsPacman-v5" for "ms_pacman". Its prefix registers the games."""
    return f"ale_py:ALE/{''.join(part.capitalize() for part in game.split('_'))}-v5"


EMULATOR = {"frameskip": 1, "repeat_action_probability": 0.0, "full_action_space": False}
"""Settings of the Gymnasium environment: no sticky actions, as in this project; the wrappers skip the frames."""


class Stopwatch:
    """Counter of agent steps between the end of the warm-up and the end of the measurement."""

    def __init__(self, warmup: float, seconds: float) -> None:
        self._warmup = warmup
        self._seconds = seconds
        self._first: tuple[float, int] | None = None
        self._begun: tuple[float, int] | None = None
        self._now = (0.0, 0)

    def done(self, now: float, steps: int) -> bool:
        """Record the time and the total steps so far. Return whether the measurement is complete."""
        self._now = now, steps
        if not self._first and steps:
            self._first = self._now
        elif self._first and not self._begun and now - self._first[0] >= self._warmup:
            self._begun = self._now
        return self._begun is not None and now - self._begun[0] >= self._seconds

    def show(self) -> None:
        """Print the result for `benchmarks.peers`. Raise RuntimeError if the warm-up never ended."""
        if self._begun is None:
            raise RuntimeError("the warm-up never ended")
        (then, before), (now, after) = self._begun, self._now
        print(json.dumps({"agent_steps": after - before, "seconds": now - then}), flush=True)
