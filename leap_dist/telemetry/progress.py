"""Speed and remaining time of a run, computed from the server's counters."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from leap_dist.config import registry
from leap_dist.config.plurals import counted
from leap_dist.config.settings import Config

WINDOW_SECONDS = 30.0
SETTLED_SECONDS = 10.0
"""Seconds of training after which the remaining time is estimated."""
_LONGEST = 10**13  # seconds; Python's timedelta reaches not much further


def duration(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds, after days if there are any."""
    return str(timedelta(seconds=round(min(max(0.0, seconds), _LONGEST))))


def tasks_done(summary: Mapping[str, Any], noun: str = "task") -> str:
    """Return the number of tasks that are done, of how many, and how many more wait for a meta-update to apply them."""
    wanted = max(summary["tasks_wanted"], summary["tasks"])  # a later launch may ask for fewer than there are
    return f"{summary['tasks']:,} of {counted(wanted, noun)}{waiting(summary, ' (', ' meta-update)')}"


def waiting(summary: Mapping[str, Any], before: str, after: str = "") -> str:
    """Return how many tasks are done but not yet applied, between two texts; "" if there are none."""
    number = summary.get("tasks_waiting", 0)
    return f"{before}{number:,} more wait{'s' if number == 1 else ''} for the next{after}" if number else ""


class Progress:
    """Turns the server's status into the summary that the table, TensorBoard and summary.json show.

    Args:
        config: configuration of the run.
        wall_seconds_before: wall time of earlier launches of the same run.
    """

    def __init__(self, config: Config, wall_seconds_before: float) -> None:
        self._config = config
        self._before = wall_seconds_before
        self._started = time.monotonic()
        self._first_task: float | None = None
        self._tasks_before: int | None = None  # tasks of earlier launches
        self._step_rate, self._push_rate = _Rate(), _Rate()
        self._done_before: float | None = None  # number of tasks, with fractions, in the first report
        self._begun: tuple[float, float] | None = None  # (time, number of tasks) in the first report of progress
        self.start = StartTimes()
        """Durations of the parts of the start. Until the server works, the driver announces the parts."""
        self.places: dict[str, str] = {"logs": "", "metrics": ""}
        """Where the driver's node keeps Ray's logs, and the address of its page for Prometheus; "" if not known."""

    def summary(self, status: dict[str, Any], state: str, more: dict[str, Any]) -> dict[str, Any]:
        """Return the status with rates, times, and `more` entries about the workers."""
        now = time.monotonic()
        tasks = status["tasks"] + status["tasks_waiting"]
        self._tasks_before = tasks if self._tasks_before is None else self._tasks_before
        is_done_with_one = tasks > self._tasks_before
        if status["leases"] or is_done_with_one:
            self.start.begin("loading")
        if is_done_with_one or any(lease["steps"] for lease in status["leases"]):
            self.start.end()
        if self._first_task is None and tasks:
            self._first_task = now - self._started
        return {
            **status,
            # A run that has made more meta-updates is done, whatever a later launch asks for.
            "tasks_wanted": max(status["tasks_wanted"], status["tasks"]),
            "state": state,
            "preset": self._config.preset,
            "mode": self._config.mode,
            "meta_learner": self._config.meta_learner,
            "modules": list(self._config.gymnasium.modules),
            "measure": registry.for_config(self._config).name,
            "updated": time.time(),
            "wall_seconds": self._before + now - self._started,
            "steps_per_second": self._step_rate(now, status["agent_steps"]),
            "pushes_per_second": self._push_rate(now, status["pushes"]),
            "eta_seconds": self._eta(now, status),
            "time_to_first_task": self._first_task,
            "time_to_first_step": self.start.total,
            "start_seconds": dict(self.start.seconds),
            **self.places,
            **more,
        }

    def _eta(self, now: float, status: dict[str, Any]) -> float | None:
        """Return the remaining seconds; None until they can be told from SETTLED_SECONDS of training.

        The clock starts at the first report of progress, so that the time until then, the start, does not count.
        """
        done = status["tasks"] + status["tasks_waiting"]
        done += sum(lease["steps"] / lease["steps_wanted"] for lease in status["leases"])
        if self._done_before is None:
            self._done_before = done
        if self._begun is None and done > self._done_before:
            self._begun = now, done
        if self._begun is None or now - self._begun[0] < SETTLED_SECONDS:
            return None
        then, done_then = self._begun
        left = max(0.0, status["tasks_wanted"] - done)
        return (now - then) * left / (done - done_then) if done > done_then else None


class StartTimes:
    """How long a launch takes until its first step is reported, divided into consecutive parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """Seconds of each part that has ended: "ray", "nodes", "server", "workers", "loading"."""
        self.total: float | None = None
        """Seconds from the launch to the first step; None before it, or if a run ended without one."""
        self._began = self._since = time.monotonic()
        self._part = "ray"

    def begin(self, part: str) -> None:
        """End the current part and begin another one. Has no effect during that part and after the first step."""
        if part != self._part:
            self._end_part(part)

    def end(self) -> None:
        """Record the first step. Only the first call has an effect, and only once tasks are loading."""
        if self._part == "loading":
            self._end_part("")
            self.total = self._since - self._began

    def _end_part(self, following: str) -> None:
        if self._part:
            now = time.monotonic()
            self.seconds[self._part] = now - self._since
            self._part, self._since = following, now


class _Rate:
    """Rate of a counter per second over the last WINDOW_SECONDS."""

    def __init__(self) -> None:
        self._window: deque[tuple[float, int]] = deque()  # (time, count)

    def __call__(self, now: float, count: int) -> float:
        if self._window and count < self._window[-1][1]:  # the server restarted and counts from an older state
            self._window.clear()
        self._window.append((now, count))
        while now - self._window[0][0] > WINDOW_SECONDS:
            self._window.popleft()
        then, count_then = self._window[0]
        return (count - count_then) / (now - then) if now > then else 0.0
