"""How long the server's calls take: really made and timed, the vector's part of it drawn from samples where asked.

What is counted as a call's time is its processor time and the time that it waits for the disk (fsync). What others do
on the same cores meanwhile does not count.
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
    """A call's answer and what it took."""

    answer: Any
    seconds: float
    """That the server is busy with it, Ray's share included."""
    cpu_seconds: float


class Service(Protocol):
    """Makes a call and says how long that took."""

    def __call__(self, kind: str, size: int, call: Callable[[], Any]) -> Taken:
        """`kind` is lease, renew, partial, final, poll, or together and how many contributions in it count.

        `size` is what comes with it, in bytes.
        """


@dataclass(frozen=True)
class RayCost:
    """What Ray adds to a call on the server's side, in seconds: measured by anchor.py."""

    call: float = 0.0
    vector: float = 0.0
    """On top, for each megabyte that comes with it."""

    def of(self, size: int) -> float:
        """Of a call with so many bytes."""
        return self.call + self.vector * size / 1e6


class Given:
    """Calls are made, but take what is said here. For tests, and where only the result counts."""

    def __init__(self, seconds: Mapping[str, float] | float) -> None:
        self._seconds = seconds

    def __call__(self, kind: str, size: int, call: Callable[[], Any]) -> Taken:
        """See Service."""
        seconds = self._seconds if isinstance(self._seconds, float) else self._seconds.get(kind, 0.0)
        return Taken(call(), seconds, seconds)


class Disk:
    """Measures the time that this process waits in fsync. Only while it is entered."""

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
    """Calls take what they take, and what Ray adds."""

    def __init__(self, disk: Disk, ray: RayCost) -> None:
        self._disk = disk
        self._ray = ray
        self._before = 0.0  # work of all calls before this one
        self._started: tuple[float, float] | None = None  # processor and disk, when the call under way began

    def __call__(self, kind: str, size: int, call: Callable[[], Any]) -> Taken:
        """See Service."""
        self._started = time.process_time(), self._disk.waited
        answer = call()
        cpu, disk = self._spent()
        self._started = None
        cpu += self._ray.of(size)
        self._before += cpu + disk
        return Taken(answer, cpu + disk, cpu)

    def work(self) -> float:
        """Seconds so far, those of the call under way included; what Ray adds comes between two calls."""
        return self._before + sum(self._spent())

    def _spent(self) -> tuple[float, float]:
        """Processor and disk, by the call under way."""
        if self._started is None:
            return 0.0, 0.0
        processor, waited = self._started
        return time.process_time() - processor, self._disk.waited - waited


@dataclass
class Samples:
    """(processor seconds, disk seconds) of calls by kind, and of a meta-update by |B|.

    In modes that make a meta-update of each push it is part of the push.
    """

    calls: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    updates: dict[int, tuple[float, float]] = field(default_factory=dict)
    together: dict[int, tuple[float, float]] = field(default_factory=dict)
    """The same of a delivery by the contributions in it that count."""

    def note(self, kind: str, took: Taken) -> None:
        """One call."""
        self.calls[kind].append((took.cpu_seconds, took.seconds - took.cpu_seconds))

    def update(self, batch: int) -> np.ndarray:
        """(processor, disk) of a meta-update of that many contributions."""
        return _line(self.updates, batch)

    def delivery(self, count: int) -> np.ndarray:
        """The same of a delivery with so many contributions that count."""
        return _line(self.together, count) if count else np.zeros(2)

    def mean(self, kind: str) -> np.ndarray:
        """(processor, disk) of a kind; zeros where there was none."""
        return np.mean(self.calls[kind], axis=0) if self.calls.get(kind) else np.zeros(2)


def _line(measured: Mapping[int, tuple[float, float]], count: int) -> np.ndarray:
    """The straight line through two measurements, nowhere below zero."""
    if not measured:
        return np.zeros(2)
    (small, less), (large, more) = sorted(measured.items())
    slope = np.subtract(more, less) / (large - small)
    return np.asarray(np.maximum(0.0, np.array(less) + (count - small) * slope))


class Sampled(Measured):
    """Calls are made with a small vector, on no disk; what a full one adds is drawn from samples of both.

    `server` has to be set before the first call.
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
        """See Service."""
        kind, _, count = kind.partition(" ")
        added = self._added.get(kind)
        if kind == "together":
            self._drawn = np.maximum(0.0, self._full.delivery(int(count)) - self._small.delivery(int(count)))
        else:
            self._drawn = np.zeros(2) if added is None else added[self._random.integers(len(added))]
        self._version, self._looks = self.server.version, 0
        return super().__call__(kind, size, call)

    def work(self) -> float:
        """See above. What is drawn is spent after the first look, with which a server begins a call."""
        self._looks += 1
        return self._before + sum(self._spent() if self._looks > 1 else super()._spent())

    def _spent(self) -> tuple[float, float]:
        processor, disk = super()._spent()
        if self._started is None:
            return 0.0, 0.0
        more = self._drawn + (self.server.version - self._version) * self._update
        return processor + float(more[0]), disk + float(more[1])
