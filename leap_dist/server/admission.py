"""Admission control: which contributions may count, and how much the server takes on at once.

Three checks protect the server. `ContributionValidator` refuses contributions that cannot count: of another lease's
version or encoder, not finite, or far too large. `RateLimiter` rejects partial contributions above a fixed rate before
they cost any work. `BackPressure` measures how much of the server's time reports (renewals and partial contributions)
take, and tells workers how long to wait until the next one, so that

    open leases × cost of a report / interval  ≤  share − what everything else takes

Final contributions are never delayed, and below that load nobody has to wait.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from leap_dist.config.settings import Config
from leap_dist.nn.flat_vector import Manifest
from leap_dist.protocol.messages import Contribution, Lease
from leap_dist.server.meta_state import MetaState
from leap_dist.storage.journal import Journal


@dataclass(frozen=True)
class Accepted:
    """A contribution that is in the journal."""

    order: int
    """Number of contributions accepted before this one; names the journal entry."""
    lease: Lease
    contribution: Contribution
    vector: np.ndarray
    """What the contribution adds to the previous one of its lease: all of it, except in `stream` mode."""
    norm: float
    """Norm of the shared part of `vector`."""
    steps: int
    """Agent steps since the previous accepted contribution of the lease."""


class Backlog:
    """Accepted contributions that wait for a meta-update, and the journal entries that are still needed.

    Args:
        journal: where accepted contributions are stored.
        size: number of shared parameters, which come first in every vector.
        keep_checkpoints: number of checkpoints kept; an entry outlives the oldest one that lacks it.
    """

    def __init__(self, journal: Journal, size: int, keep_checkpoints: int) -> None:
        self.journal = journal
        self.waiting: list[Accepted] = []
        """Contributions that are accepted and not yet applied, in order of acceptance."""
        self.unfinished: dict[str, Contribution] = {}
        """Newest accepted contribution of each lease that may still send more."""
        self.unmeasurable: set[str] = set()
        """Leases that end with a restart because the base of their next push is lost."""
        self.next_order = 0
        """Order of the next contribution to be accepted."""
        self._entries: dict[str, deque[int]] = {}  # by lease, orders of its journal entries
        self._bases: dict[str, int] = {}  # by lease, entry in the checkpoint from which a later push is measured
        self._covered = deque([0], maxlen=keep_checkpoints)  # first order that each kept checkpoint lacks
        # Kept for `norm`: allocating memory of this size costs more, page by page, than the sum itself.
        self._double = np.empty(size, np.float64)

    def added(self, contribution: Contribution) -> np.ndarray:
        """Return what a contribution adds to the previous one of its lease."""
        before = self.unfinished.get(contribution.lease)
        return contribution.vector if before is None else contribution.vector - before.vector

    def norm(self, vector: np.ndarray) -> float:
        """Return the norm of the shared part of a vector, computed in float64."""
        double = self._double[: len(vector)]
        double[:] = vector[: len(double)]
        return float(np.linalg.norm(double))

    def accept(self, lease: Lease, contribution: Contribution, arrays: dict[str, np.ndarray]) -> None:
        """Store a contribution durably and append it to `waiting`. Raises OSError if it could not be stored.

        The contribution's arrays are kept in memory; `arrays`, the form in which it was received, possibly quantized,
        is what goes to disk.
        """
        header = {"lease": asdict(lease), "contribution": contribution.header()}
        self.journal.write(self.next_order, arrays, header)
        self.append(lease, contribution)

    def append(self, lease: Lease, contribution: Contribution) -> None:
        """Append a contribution whose journal entry is `next_order`."""
        before = self.unfinished.get(contribution.lease)
        steps = contribution.steps - (before.steps if before else 0)
        vector = self.added(contribution)
        self.waiting.append(Accepted(self.next_order, lease, contribution, vector, self.norm(vector), steps))
        self.recall(self.next_order, contribution)
        self.next_order += 1

    def recall(self, order: int, contribution: Contribution) -> None:
        """Register a journal entry and, unless it is final, make it the base of the lease's next push."""
        self._entries.setdefault(contribution.lease, deque()).append(order)
        if contribution.final:
            self.forget(contribution.lease)
        else:
            self.unfinished[contribution.lease] = contribution

    def recall_unread(self, order: int) -> None:
        """Register a journal entry that is in the checkpoint and is no lease's base, without reading it."""
        self._entries[f"entry {order}"] = deque([order])

    def forget(self, lease_id: str) -> None:
        """Expect nothing more of a lease; what was accepted stays."""
        self.unfinished.pop(lease_id, None)

    def commit(self, count: int) -> None:
        """Drop the first `count` waiting contributions, which a durable checkpoint now contains."""
        self._covered.append(self.waiting[count - 1].order + 1)
        del self.waiting[:count]

    def discard(self) -> None:
        """Remove the journal entries that nobody needs any more."""
        first = self._covered[0]
        for lease_id, orders in list(self._entries.items()):
            # An entry is also needed while it is the base of the next one, or of a push that may still come.
            while orders and orders[0] < first:
                if orders[1] >= first if len(orders) > 1 else lease_id in self.unfinished:
                    break
                self.journal.discard(orders.popleft())
            if not orders:
                del self._entries[lease_id]
        self.journal.flush_discarded()

    def state_after(self, count: int) -> dict[str, Any]:
        """Return, as plain data for `restore`, the state once the first `count` waiting contributions are applied."""
        first = self.waiting[count - 1].order + 1 if count else 0
        bases = {}
        for lease_id, orders in self._entries.items():
            before = [order for order in orders if order < first]
            if before and (len(before) < len(orders) or lease_id in self.unfinished):
                bases[lease_id] = before[-1]
        return {"covered": [*self._covered, first] if count else [0], "bases": bases}

    def restore(self, state: dict[str, Any]) -> None:
        """Set what `state_after` returned."""
        self._covered.extend(state["covered"])
        self._bases = dict(state["bases"])
        self.next_order = self._covered[-1]

    def drop_lost_bases(self) -> list[tuple[str, int]]:
        """Give up the leases whose base was not recalled, and return them with the order of the lost entry."""
        lost = [(name, order) for name, order in self._bases.items() if order not in self._entries.get(name, ())]
        for lease_id, _ in lost:
            self.unmeasurable.add(lease_id)
            self.forget(lease_id)
        return lost


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
            return ""  # a progress report whose vector was left out, because nobody would read it
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
        if lease.id in unfinished:  # the contribution is measured from that one
            return len(unfinished[lease.id].vector)
        if self._config.keeps_heads:
            return size + (self._state.head_size(lease.task.game) or max(1, found - size))
        return size


BURST_SECONDS = 2.0
"""Length of a burst: this many seconds' worth of pushes are accepted at once."""


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
        """Return how many seconds to wait so that this many pushers are served in turn; at least one."""
        return max(1.0, pushers / self._per_second)


WINDOW_SECONDS = 5.0
"""Minimum length of a measurement. It also spans at least two of the intervals that it is about."""
MIN_REPORT_SHARE = 0.1
"""Fraction of the share that is left to reports, however busy the server is with everything else."""


class BackPressure:
    """Measures the server's calls and decides how long workers should wait between reports.

    Each call to the server must be wrapped in `with pressure.call(...)`.

    Args:
        share: fraction of the server's time that all its work together may take, as far as reports decide it.
        max_wait: longest wait in seconds. A lease must outlive several of them.
        clock: returns monotonic seconds.
        work: returns the seconds of work done so far. Work between two calls is attributed to the second. The default,
            the processor time of this process, suits a process that does nothing else: it includes what Ray does to
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
        # Limited reports take all that is left. If they take less than half, they no longer need a limit.
        part = self._on_reports / max(elapsed, 1e-9) / self._left
        self._limiting = part > (0.5 if self._limiting else 1.0)
        self._since, self._on_reports, self._on_others, self._reports = now, 0.0, 0.0, 0
