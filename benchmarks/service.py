"""How long the server's calls take: really made and timed, the vector's part of it drawn from samples where asked.

What is counted as a call's time is its processor time and the time that it waits for the disk (fsync). What others do
on the same cores meanwhile does not count.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from leap_dist.server import MetaServer


class Taken(NamedTuple):
    """A call's answer and what it took."""

    answer: Any
    seconds: float
    """That the server is busy with it, Ray's share included."""
    cpu_seconds: float


class Service(Protocol):
    """Makes a call and says how long that took."""

    def __call__(self, kind: str, call: Callable[[], Any]) -> Taken:
        """`kind` is lease, renew, partial, final, together or poll."""


@dataclass(frozen=True)
class RayCost:
    """What Ray adds to a call on the server's side, in seconds: measured by anchor.py."""

    call: float = 0.0
    vector: float = 0.0
    """On top, for each megabyte that comes with it."""

    def of(self, kind: str, megabytes: float) -> float:
        """Of a call that brings that much."""
        return self.call + (self.vector * megabytes if kind in ("partial", "final", "together") else 0.0)


class Given:
    """Calls are made, but take what is said here. For tests, and where only the result counts."""

    def __init__(self, seconds: Mapping[str, float] | float) -> None:
        self._seconds = seconds

    def __call__(self, kind: str, call: Callable[[], Any]) -> Taken:
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

    def __init__(self, disk: Disk, ray_seconds: Callable[[str], float]) -> None:
        self._disk = disk
        self._ray_seconds = ray_seconds

    def __call__(self, kind: str, call: Callable[[], Any]) -> Taken:
        """See Service."""
        waited, processor = self._disk.waited, time.process_time()
        answer = call()
        cpu = time.process_time() - processor + self._ray_seconds(kind)
        return Taken(answer, cpu + self._disk.waited - waited, cpu)


@dataclass
class Samples:
    """(processor seconds, disk seconds) of calls by kind, and of a meta-update by |B|.

    In modes that make a meta-update of each push it is part of the push.
    """

    calls: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    updates: dict[int, tuple[float, float]] = field(default_factory=dict)

    def note(self, kind: str, took: Taken) -> None:
        """One call."""
        self.calls[kind].append((took.cpu_seconds, took.seconds - took.cpu_seconds))

    def update(self, batch: int) -> np.ndarray:
        """(processor, disk) of a meta-update of that many contributions: a straight line through the two measured."""
        if not self.updates:
            return np.zeros(2)
        (small, less), (large, more) = sorted(self.updates.items())
        slope = np.subtract(more, less) / (large - small)
        return np.asarray(np.maximum(0.0, np.array(less) + (batch - small) * slope))

    def mean(self, kind: str) -> np.ndarray:
        """(processor, disk) of a kind; zeros where there was none."""
        return np.mean(self.calls[kind], axis=0) if self.calls.get(kind) else np.zeros(2)


class Sampled:
    """Calls are made with a small vector, on no disk; what a full one adds is drawn from samples of both."""

    def __init__(
        self, server: MetaServer, measured: Measured, full: Samples, small: Samples, batch: int, seed: int
    ) -> None:
        self._server = server
        self._measured = measured
        self._random = np.random.default_rng(seed)
        self._added = {kind: np.maximum(0.0, np.array(taken) - small.mean(kind)) for kind, taken in full.calls.items()}
        self._update = np.maximum(0.0, full.update(batch) - small.update(batch))

    def __call__(self, kind: str, call: Callable[[], Any]) -> Taken:
        """See Service."""
        version = self._server.version
        answer, seconds, cpu = self._measured(kind, call)
        updates = self._server.version - version
        added = self._added.get(kind)
        more = np.zeros(2) if added is None else added[self._random.integers(len(added))]
        more = more + updates * self._update
        return Taken(answer, seconds + float(more.sum()), cpu + float(more[0]))


@contextlib.contextmanager
def timing() -> Iterator[Disk]:
    """A disk watch, entered."""
    with Disk() as disk:
        yield disk
