"""Admission control: which contributions may count, and how much the server takes on at once.

Three checks protect the server. `ContributionValidator` refuses contributions that cannot count: those for another
version or encoder, those that are not finite, and those that are far too large. `RateLimiter` rejects partial
contributions above a fixed rate before they cost any work. `BackPressure` measures how much of the server's time
reports (renewals and partial contributions) take, and tells workers how long to wait until the next one, so that

    open leases × cost of a report / interval  ≤  share − what everything else takes

Final contributions are never delayed, and below that load no worker has to wait.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np

from leap_dist.config.settings import Config
from leap_dist.nn.flat_vector import Manifest
from leap_dist.protocol.messages import Contribution, Lease
from leap_dist.server.meta_state import MetaState


class ContributionValidator:
    """Validates contributions to open leases, without changing anything."""

    def __init__(self, config: Config, manifest: Manifest, state: MetaState) -> None:
        self._config = config
        self._manifest = manifest
        self._state = state

    def problem(self, lease: Lease, contribution: Contribution) -> str:
        """Return the reason why a contribution cannot count, or "" if it can."""
        vector, start, size = contribution.vector, contribution.start, self._manifest.size
        if contribution.manifest != self._manifest.digest:
            return "manifest"
        if not lease.version <= contribution.base_version <= self._state.version:
            return "base-version"
        if vector.dtype != np.float32 or (start is not None and start.dtype != np.float32):
            return "dtype"
        if not (contribution.final or self._config.prefixes_count) and vector.shape == (0,) and start is None:
            return ""  # a progress report without a vector, because it would not be used
        if vector.shape != (self._expected_length(lease, vector.size),):
            return "shape"
        if self._config.corrects_endpoint != (start is not None) or (start is not None and start.shape != (size,)):
            return "shape"
        added = self._state.backlog.added(contribution)
        if not np.isfinite(added).all() or (start is not None and not np.isfinite(start).all()):
            return "non-finite"
        counts = contribution.final or self._config.mode == "stream"
        return "exploding" if counts and self._state.backlog.norm(added) > self._state.max_norm() else ""

    def _expected_length(self, lease: Lease, found: int) -> int:
        """Return how long a vector must be. The first head of a game may have any length but 0."""
        size, unfinished = self._manifest.size, self._state.backlog.unfinished
        if self._config.meta_learner == "none":
            return 0
        if lease.id in unfinished:  # the contribution is compared with that one
            return len(unfinished[lease.id].vector)
        if self._config.keeps_heads:
            return size + (self._state.head_size(lease.task.game) or max(1, found - size))
        return size


BURST_SECONDS = 2.0
"""Length of a burst: the pushes that are permitted in this many seconds are accepted at once."""


class RateLimiter:
    """Leaky bucket: every push fills it, and it drains at the permitted rate.

    Args:
        per_second: permitted rate of pushes.
        clock: returns monotonic seconds.
    """

    def __init__(self, per_second: float, clock: Callable[[], float]) -> None:
        self._per_second = per_second
        self._clock = clock
        self._level = 0.0  # pushes
        self._at = clock()

    def admit(self) -> bool:
        """Return whether one more push is permitted now, and count it if so."""
        now = self._clock()
        self._level = max(0.0, self._level - (now - self._at) * self._per_second)
        self._at = now
        if self._level + 1 > self._per_second * BURST_SECONDS:
            return False
        self._level += 1
        return True

    def wait(self, pushers: int) -> float:
        """Return how many seconds to wait so that `pushers` workers are served in turn; at least one."""
        return max(1.0, pushers / self._per_second)


WINDOW_SECONDS = 5.0
"""Minimum length of a measurement. It also spans at least two of the intervals that workers were told to wait."""
MIN_REPORT_SHARE = 0.1
"""Fraction of the share that is left to reports, however busy the server is with everything else."""


class BackPressure:
    """Measures the server's calls and decides how long workers should wait between reports.

    Each call to the server must be wrapped in `with pressure.call(...)`.

    Args:
        share: largest fraction of the server's time that all its work should take; only reports are limited.
        max_wait: longest wait in seconds. A lease must outlive several of them.
        clock: returns monotonic seconds.
        work: returns the seconds of work done so far. Work between two calls is attributed to the second. The default,
            the processor time of this process, suits a process that does nothing else: it includes Ray's work to
            deliver a call.
    """

    def __init__(
        self,
        share: float,
        max_wait: float,
        clock: Callable[[], float] = time.monotonic,
        work: Callable[[], float] = time.process_time,
    ) -> None:
        self._share = share
        self._max_wait = max_wait
        self._clock = clock
        self._work = work
        self._worked = work()  # when the last call ended
        self._inside = False
        self._since = clock()
        self._on_reports = self._on_others = 0.0  # seconds spent since then
        self._reports = 0
        self._cost = 0.0  # seconds per report
        self._left = share  # what the rest of the work leaves to reports
        self._limiting = False
        self._told = 0.0
        self.busy_share = 0.0
        """Fraction of the server's time that all work took in the last measurement."""

    @contextlib.contextmanager
    def call(self, *, reports: int = 0) -> Iterator[None]:
        """Measure one call to the server that handles this many reports. A nested call is part of the outer one."""
        if self._inside:
            yield
            return
        self._inside = True
        started, worked = self._clock(), self._work()
        try:
            yield
        finally:
            self._inside = False
            now, done = self._clock(), self._work()
            # A call that waits for the disk does no work, but no other call is served in the meantime.
            seconds = worked - self._worked + max(now - started, done - worked)
            self._worked = done
            if reports:
                self._on_reports += seconds
                self._reports += reports
            else:
                self._on_others += seconds
            self._measure(now)

    def wait(self, leases: int) -> float:
        """Return how many seconds to wait after a report while this many leases are open; 0 below the limit."""
        self._told = min(leases * self._cost / self._left, self._max_wait) if self._limiting else 0.0
        return self._told

    def _measure(self, now: float) -> None:
        length = max(WINDOW_SECONDS, 2 * self._told)
        elapsed = now - self._since
        # Reports may exceed their share long before the end of a measurement.
        flood = not self._limiting and self._on_reports > self._left * length
        if elapsed < length and not flood:
            return
        if self._reports:
            cost = self._on_reports / self._reports
            self._cost = 0.5 * (self._cost + cost) if self._cost else cost
        if elapsed >= length:
            self._left = max(self._share - self._on_others / elapsed, MIN_REPORT_SHARE * self._share)
            self.busy_share = (self._on_reports + self._on_others) / elapsed
        # Limited reports take all the time that is left. If they take less than half of it, they need no limit.
        part = self._on_reports / max(elapsed, 1e-9) / self._left
        self._limiting = part > (0.5 if self._limiting else 1.0)
        self._since, self._on_reports, self._on_others, self._reports = now, 0.0, 0.0, 0
