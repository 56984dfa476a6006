"""Execute and time the server's calls; optionally draw the cost of their vectors from samples.

The time of a call is its CPU time plus the time it waits for the disk (fsync). Other processes on the same cores do not
affect it.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from leap_dist.server.meta_server import MetaServer


class Taken(NamedTuple):
    """Answer of a call and its duration."""

    answer: Any
    seconds: float
    """Seconds for which the server is busy with the call, including Ray's share."""
    cpu_seconds: float


class Service(Protocol):
    """Interface for executing a call and determining its duration."""

    def __call__(self, kind: str, size: int, call: Callable[[], Any]) -> Taken:
        """Execute `call` and return its answer and duration.

        Args:
            kind: Kind of call: lease, renew, partial, final or poll, or `together N` with N counted contributions.
            size: Bytes sent with the call.
            call: Function to execute.
        """


@dataclass(frozen=True)
class RayCost:
    """Server time in seconds that Ray adds to a call, as measured by anchor.py."""

    call: float = 0.0
    vector: float = 0.0
    """Additional seconds for each megabyte sent with the call."""

    def of(self, size: int) -> float:
        """Return the seconds for a call with `size` bytes."""
        return self.call + self.vector * size / 1e6


class Given:
    """Service with given durations, for tests and for simulations in which only the result counts."""

    def __init__(self, seconds: Mapping[str, float] | float) -> None:
        self._seconds = seconds

    def __call__(self, kind: str, size: int, call: Callable[[], Any]) -> Taken:
        """Execute the call and return its given duration; see `Service.__call__`."""
        seconds = self._seconds if isinstance(self._seconds, float) else self._seconds.get(kind, 0.0)
        return Taken(call(), seconds, seconds)


class Disk:
    """Context manager that measures the time this process waits in fsync."""

    def __init__(self) -> None:
        self.waited = 0.0
        self._fsync = os.fsync

    def __enter__(self) -> Disk:
        os.fsync = self._timed
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync = self._fsync

    def _timed(self, handle: int) -> None:
        started, processor = time.perf_counter(), time.process_time()
        self._fsync(handle)
        passed = time.perf_counter() - started
        self.waited += max(0.0, passed - (time.process_time() - processor))


class Measured:
    """Service with measured durations plus Ray's cost."""

    def __init__(self, disk: Disk, ray: RayCost) -> None:
        self._disk = disk
        self._ray = ray
        self._before = 0.0  # total work of the calls before this one
        self._started: tuple[float, float] | None = None  # CPU and disk time at the start of the current call

    def __call__(self, kind: str, size: int, call: Callable[[], Any]) -> Taken:
        """Execute and time the call; see `Service.__call__`."""
        self._started = time.process_time(), self._disk.waited
        answer = call()
        cpu, disk = self._spent()
        self._started = None
        cpu += self._ray.of(size)
        self._before += cpu + disk
        return Taken(answer, cpu + disk, cpu)

    def work(self) -> float:
        """Return the total seconds of work including the current call. Ray's cost is added between calls."""
        return self._before + sum(self._spent())

    def _spent(self) -> tuple[float, float]:
        """Return the CPU and disk seconds of the current call."""
        if self._started is None:
            return 0.0, 0.0
        processor, waited = self._started
        return time.process_time() - processor, self._disk.waited - waited


@dataclass
class Samples:
    """Sampled (CPU, disk) seconds of calls by kind, and of a meta-update by |B|.

    In modes that make a meta-update for each push, the push includes it.
    """

    calls: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    updates: dict[int, tuple[float, float]] = field(default_factory=dict)
    together: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Seconds (CPU, disk) of a batched delivery by its number of counted contributions."""

    def note(self, kind: str, took: Taken) -> None:
        """Record one call."""
        self.calls[kind].append((took.cpu_seconds, took.seconds - took.cpu_seconds))

    def update(self, batch: int) -> np.ndarray:
        """Return the (CPU, disk) seconds of a meta-update with `batch` contributions."""
        return _line(self.updates, batch)

    def delivery(self, count: int) -> np.ndarray:
        """Return the (CPU, disk) seconds of a delivery with `count` counted contributions."""
        return _line(self.together, count) if count else np.zeros(2)

    def mean(self, kind: str) -> np.ndarray:
        """Return the mean (CPU, disk) seconds of a kind of call, or zeros without samples."""
        return np.mean(self.calls[kind], axis=0) if self.calls.get(kind) else np.zeros(2)


def _line(measured: Mapping[int, tuple[float, float]], count: int) -> np.ndarray:
    """Evaluate the line through two measurements at `count`, clamped to zero."""
    if not measured:
        return np.zeros(2)
    (small, less), (large, more) = sorted(measured.items())
    slope = np.subtract(more, less) / (large - small)
    return np.asarray(np.maximum(0.0, np.array(less) + (count - small) * slope))


class Sampled(Measured):
    """Service that executes calls with a small vector and no disk, and draws the rest of the cost from samples.

    The samples were taken with full and with small vectors. `server` must be set before the first call.
    """

    server: MetaServer

    def __init__(
        self,
        disk: Disk,
        ray: RayCost,
        *,
        full: Samples,
        small: Samples,
        batch: int,
        seed: int,
    ) -> None:
        super().__init__(disk, ray)
        self._random = np.random.default_rng(seed)
        self._added = {kind: np.maximum(0.0, np.array(taken) - small.mean(kind)) for kind, taken in full.calls.items()}
        self._update = np.maximum(0.0, full.update(batch) - small.update(batch))
        self._full, self._small = full, small
        self._drawn = np.zeros(2)
        self._version = 0
        self._looks = 0

    def __call__(self, kind: str, size: int, call: Callable[[], Any]) -> Taken:
        """Execute the call and add a sampled cost; see `Service.__call__`."""
        kind, _, count = kind.partition(" ")
        added = self._added.get(kind)
        if kind == "together":
            self._drawn = np.maximum(0.0, self._full.delivery(int(count)) - self._small.delivery(int(count)))
        else:
            self._drawn = np.zeros(2) if added is None else added[self._random.integers(len(added))]
        self._version, self._looks = self.server.version, 0
        return super().__call__(kind, size, call)

    def work(self) -> float:
        """Return the total seconds of work, without the sampled cost at the first reading of a call.

        A server reads the value first when a call begins, before any of the cost has arisen.
        """
        self._looks += 1
        return self._before + sum(self._spent() if self._looks > 1 else super()._spent())

    def _spent(self) -> tuple[float, float]:
        processor, disk = super()._spent()
        if self._started is None:
            return 0.0, 0.0
        more = self._drawn + (self.server.version - self._version) * self._update
        return processor + float(more[0]), disk + float(more[1])
