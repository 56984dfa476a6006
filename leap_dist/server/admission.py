"""What a contribution has to be before anything counts.

How much a server takes at once: a flood of pushes is turned away before it costs anything.

How often running tasks may report: as they like, until that takes more of the server's time than it should.

The server measures what a report (a renewal, a contribution that is not final) costs it, and what everything else
takes, and tells whoever reports how long to stay away, so that

    open leases × cost of a report / interval  ≤  share − what everything else takes

Final contributions are never told to wait. Below that load nobody is told anything.
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
    """Looks at contributions to open leases; changes nothing."""

    def __init__(self, config: Config, manifest: Manifest, state: MetaState) -> None:
        self._config = config
        self._manifest = manifest
        self._state = state

    def problem(self, lease: Lease, contribution: Contribution) -> str:
        """Why a contribution cannot count; "" where it can."""
        vector, start, size = contribution.vector, contribution.start, self._manifest.size
        if contribution.manifest != self._manifest.digest:
            return "manifest"
        if not lease.version <= contribution.base_version <= self._state.version:
            return "base-version"
        if vector.dtype != np.float32 or (start is not None and start.dtype != np.float32):
            return "dtype"
        if not (contribution.final or self._config.prefixes_count) and vector.shape == (0,) and start is None:
            return ""  # nobody would read it, so it was not sent
        if vector.shape != (self._expected_size(lease, vector.size),):
            return "shape"
        if self._config.corrects_endpoint != (start is not None) or (start is not None and start.shape != (size,)):
            return "shape"
        added = self._state.added(contribution)
        if not np.isfinite(added).all() or (start is not None and not np.isfinite(start).all()):
            return "non-finite"
        counts = contribution.final or self._config.mode == "stream"
        return "exploding" if counts and self._state.norm(added) > self._state.largest_norm() else ""

    def _expected_size(self, lease: Lease, found: int) -> int:
        """Length that a vector should have. A game's first head may have any."""
        size = self._manifest.size
        if self._config.meta_learner == "none":
            return 0
        if lease.id in self._state.unfinished:  # it is measured from that
            return len(self._state.unfinished[lease.id].vector)
        if self._config.keeps_heads:
            return size + (self._state.head_size(lease.task.game) or max(1, found - size))
        return size


BURST_SECONDS = 2.0
"""Of pushes at the full rate that are taken at once."""


class RateLimiter:
    """A leaky bucket: every push fills it, time empties it."""

    def __init__(self, per_second: float, clock: Callable[[], float]) -> None:
        self._per_second = per_second
        self._clock = clock
        self._level = 0.0  # pushes
        self._at = clock()

    def admit(self) -> bool:
        """Whether there is room for one more push, which it takes then."""
        now = self._clock()
        self._level = max(0.0, self._level - (now - self._at) * self._per_second)
        self._at = now
        if self._level + 1 > self._per_second * BURST_SECONDS:
            return False
        self._level += 1
        return True

    def wait(self, pushers: int) -> float:
        """Seconds to stay away, so that as many as push now would be served in turn; at least one."""
        return max(1.0, pushers / self._per_second)


WINDOW_SECONDS = 5.0
"""That a measurement takes at least; and at least two of the intervals that it is about."""
LEAST_PART = 0.1
"""Of the share, which is left to reports however busy the server is with everything else."""


class BackPressure:
    """Measures a server's calls, which `with pace.call(…)` has to be put around, and says how long to stay away.

    Args:
        share: of the server's time that all of its work together should take at most, as far as reports decide it.
        longest: seconds to stay away at most: a lease has to outlive several of them.
        clock: monotonic seconds.
        work: seconds of work so far, of which what happens between two calls counts for the second one. The default is
            the processor time of this process, for a process that is the server and nothing else: what Ray does to
            deliver a call is in it.
    """

    def __init__(
        self,
        share: float,
        longest: float,
        clock: Callable[[], float] = time.monotonic,
        work: Callable[[], float] = time.process_time,
    ) -> None:
        self._share = share
        self._longest = longest
        self._clock = clock
        self._work = work
        self._worked = work()  # when the last call ended
        self._inside = False
        self._since = clock()
        self._on_reports = self._on_others = 0.0  # seconds, since then
        self._reports = 0
        self._cost = 0.0  # seconds of a report
        self._left = share  # for reports
        self._pacing = False
        self._told = 0.0
        self.busy_share = 0.0
        """Part of the server's time that everything took, when that was measured last."""

    @contextlib.contextmanager
    def call(self, *, reports: int = 0) -> Iterator[None]:
        """Around one call to the server, of so many reports. A call inside of another one is part of it."""
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
            # A call that waits for the disk does no work, but nobody else is served meanwhile.
            seconds = worked - self._worked + max(now - started, done - worked)
            self._worked = done
            if reports:
                self._on_reports += seconds
                self._reports += reports
            else:
                self._on_others += seconds
            self._measure(now)

    def wait(self, leases: int) -> float:
        """Seconds to stay away after a report, with so many leases open; 0 where the server has time enough."""
        self._told = min(leases * self._cost / self._left, self._longest) if self._pacing else 0.0
        return self._told

    def _measure(self, now: float) -> None:
        length = max(WINDOW_SECONDS, 2 * self._told)
        elapsed = now - self._since
        flood = not self._pacing and self._on_reports > self._left * length  # too much already, long before the end
        if elapsed < length and not flood:
            return
        if self._reports:
            cost = self._on_reports / self._reports
            self._cost = 0.5 * (self._cost + cost) if self._cost else cost
        if elapsed >= length:
            self._left = max(self._share - self._on_others / elapsed, LEAST_PART * self._share)
            self.busy_share = (self._on_reports + self._on_others) / elapsed
        # Paced reports take all that is left. Where they take less than half, they would come as rarely by themselves.
        part = self._on_reports / max(elapsed, 1e-9) / self._left
        self._pacing = part > (0.5 if self._pacing else 1.0)
        self._since, self._on_reports, self._on_others, self._reports = now, 0.0, 0.0, 0
