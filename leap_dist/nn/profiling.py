"""Where a worker's time goes: seconds by part, always, and a profiler's trace where one is asked for."""

from __future__ import annotations

import gzip
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.profiler import profile, record_function, schedule

PARTS = ("emulator", "acting", "update", "leap", "waiting", "starting")
"""Stepping environments; choosing actions; loss, gradient and optimizer; the meta-learner; the server; a new task."""


class Stopwatch:
    """Adds up seconds by part: `with stopwatch("acting"): …`. What no part covers counts for none.

    On a GPU the processor launches work and goes on: that work's time shows where the processor next waits for the
    GPU, which is in "acting".
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started = clock()
        self._parts = {name: _Part(name, clock) for name in PARTS}

    def __call__(self, part: str) -> _Part:
        """A context whose duration counts for `part`, one of PARTS. Parts must not be nested."""
        return self._parts[part]

    def name_in_trace(self, on: bool) -> None:
        """Whether a profiler's trace shows the parts by name."""
        for part in self._parts.values():
            part.named = on

    def seconds(self) -> dict[str, float]:
        """Of every part since the start, and their "total" with what belongs to none."""
        return {name: part.seconds for name, part in self._parts.items()} | {"total": self._clock() - self._started}


class _Part:
    """Cheap enough for every step of the environments: under a microsecond."""

    __slots__ = ("_clock", "_entered", "_region", "name", "named", "seconds")

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self.name = name
        self.seconds = 0.0
        self.named = False
        self._clock = clock
        self._entered = 0.0
        self._region: record_function | None = None

    def __enter__(self) -> None:
        if self.named:
            self._region = record_function(self.name)
            self._region.__enter__()
        self._entered = self._clock()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds += self._clock() - self._entered
        if self._region is not None:
            self._region.__exit__(kind, error, trace)
            self._region = None


def shares(seconds: dict[str, float], before: dict[str, float] | None = None) -> dict[str, float]:
    """The part of the time that each of PARTS took, and "other", since an earlier reading; {} where no time passed."""
    passed = {name: value - (before[name] if before else 0.0) for name, value in seconds.items()}
    total = passed.pop("total")
    if total <= 0:
        return {}
    return {name: value / total for name, value in passed.items()} | {"other": 1 - sum(passed.values()) / total}


def breakdown(seconds: dict[str, float]) -> str:
    """A reading as a table for people."""
    rows = sorted(shares(seconds).items(), key=lambda row: -row[1])
    total = seconds["total"]
    return "\n".join(
        f"{name:<10}{total * share:>10.1f} s{share:>8.1%}  {'█' * round(40 * share)}" for name, share in rows
    )


class Profiler:
    """Records a torch profiler's trace of some updates in the midst of training, once.

    Args:
        stopwatch: whose parts the trace shows by name.
        skip: updates before the recording starts, so that it shows the steady state.
        updates: how many it shows.
    """

    def __init__(self, stopwatch: Stopwatch, *, skip: int = 20, updates: int = 10) -> None:
        self._stopwatch = stopwatch
        self._recording: tuple[bytes, str] | None = None
        self._updates = 0
        self._first = skip
        self._last = skip + updates
        self._profile: Any = None

    def step(self) -> None:
        """To be called after every update."""
        self._updates += 1
        if self._updates == self._first:
            self._stopwatch.name_in_trace(True)
            self._profile = profile(schedule=schedule(wait=0, warmup=1, active=self._last - self._first, repeat=1))
            self._profile.__enter__()
        elif self._profile is not None:
            self._profile.step()
            if self._updates > self._last:
                self._finish()

    def take_recording(self) -> tuple[bytes, str] | None:
        """Once, when the recording is done: Chrome's trace format, compressed by gzip, and the costliest operators."""
        if self._recording is None:  # set once, by the thread that trains; another one asks
            return None
        recording, self._recording = self._recording, None
        return recording

    def _finish(self) -> None:
        self._profile.__exit__(None, None, None)
        self._stopwatch.name_in_trace(False)
        averages = self._profile.key_averages()
        operators = averages.table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            self._recording = gzip.compress(path.read_bytes()), operators
        self._profile = None


class NoProfiler:
    """Where nobody asked for one."""

    def step(self) -> None:
        """Does nothing."""

    def take_recording(self) -> None:
        """Nothing."""
