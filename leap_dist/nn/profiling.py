"""How a worker spends its time: seconds by part of the work, and on request a trace of torch's profiler."""

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
"""Parts of a worker's time: stepping the environments; choosing actions; loss, gradient and optimizer; the
meta-learner; waiting for the server; starting a task."""


class Stopwatch:
    """Adds up seconds by part of the work: `with stopwatch("acting"): …`.

    Work on a GPU is asynchronous: its time shows up where the CPU next waits for the GPU, which is in "acting".
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started = clock()
        self._parts = {name: _Part(name, clock) for name in PARTS}

    def __call__(self, part: str) -> _Part:
        """Return a context whose duration is added to `part`, one of PARTS. Parts must not be nested."""
        return self._parts[part]

    def name_in_trace(self, on: bool) -> None:
        """Switch the names of the parts in a profiler's trace on or off."""
        for part in self._parts.values():
            part.named = on

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every part, and the "total" since the start, which includes time outside all parts."""
        return {name: part.seconds for name, part in self._parts.items()} | {"total": self._clock() - self._started}


class _Part:
    """A part of the work. Entering and leaving takes less than a microsecond, since every step does both."""

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
    """Return the fraction of the time that each of PARTS and "other" took since the reading `before`.

    Both arguments are results of `Stopwatch.seconds`. Returns {} if no time has passed.
    """
    passed = {name: value - (before[name] if before else 0.0) for name, value in seconds.items()}
    total = passed.pop("total")
    if total <= 0:
        return {}
    return {name: value / total for name, value in passed.items()} | {"other": 1 - sum(passed.values()) / total}


def breakdown(seconds: dict[str, float]) -> str:
    """Return the result of `Stopwatch.seconds` as a table of text."""
    rows = sorted(shares(seconds).items(), key=lambda row: -row[1])
    total = seconds["total"]
    return "\n".join(
        f"{name:<10}{total * share:>10.1f} s{share:>8.1%}  {'█' * round(40 * share)}" for name, share in rows
    )


class Profiler:
    """Records one trace of torch's profiler over some updates in the middle of training.

    Args:
        stopwatch: its parts appear by name in the trace.
        skip: number of updates before the recording starts, so that it shows the steady state.
        updates: number of updates to record.
    """

    def __init__(self, stopwatch: Stopwatch, *, skip: int = 20, updates: int = 10) -> None:
        self._stopwatch = stopwatch
        self._recording: tuple[bytes, str] | None = None
        self._updates = 0
        self._first = skip
        self._last = skip + updates
        self._profile: Any = None

    def step(self) -> None:
        """Count an update; call it after each one."""
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
        """Return the recording once it is complete, and None from then on.

        It consists of the trace in Chrome's format, compressed by gzip, and a table of the most expensive operators.
        """
        if self._recording is None:  # the training thread sets it once; another thread takes it
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
    """No-op profiler, used when `--profile` is off."""

    def step(self) -> None:
        """Do nothing."""

    def take_recording(self) -> None:
        """Return None."""
