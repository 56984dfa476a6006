"""Leases: which worker holds which task, until when, and how closed leases ended."""

from __future__ import annotations

import math
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from leap_dist.protocol.messages import Contribution, Lease, Task

ACCEPTED = "accepted"
"""Outcome of a lease whose final contribution was accepted."""
MAX_CLOSED = 1024
"""Number of closed leases whose outcome is remembered."""


@dataclass
class OpenLease:
    """A lease that a worker holds, with the newest contribution to it."""

    lease: Lease
    granted: float
    """When the lease was granted; see `LeaseBook.now`."""
    renewed: float
    """When its worker was last heard from; see `LeaseBook.now`."""
    steps: int = 0
    """Agent steps into the task, as far as reported."""
    seq: int = 0
    """`seq` of the newest contribution."""
    newest: Contribution | None = None
    """Newest contribution."""

    @property
    def deadline(self) -> float:
        """Time after which the lease has expired; see `LeaseBook.now`."""
        return self.renewed + self.lease.seconds


class LeaseStore(Protocol):
    """Durable records of the open leases, which a restarted server reads back; `Journal` is one."""

    def open_lease(self, lease_id: str, header: dict[str, Any]) -> None:
        """Record a lease. Raises OSError if that fails; there is no record then."""

    def close_lease(self, lease_id: str) -> None:
        """Remove the record of a lease."""

    def leases(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Return all records, and a warning for each that cannot be read."""


class LeaseBook:
    """The open leases, and the outcomes of the last MAX_CLOSED that were closed.

    Args:
        store: where open leases are recorded.
        session: name of this launch, recorded with each lease.
        clock: returns monotonic seconds.
        max_gap: longest time, in seconds, that counts between two readings of the clock. While the server itself stood
            still (stopped, swapped out, or waiting for a slow disk), no worker could report, and none is to blame.
    """

    def __init__(self, store: LeaseStore, session: str, clock: Callable[[], float], max_gap: float = math.inf) -> None:
        self._store = store
        self.session = session
        self._clock = clock
        self._max_gap = max_gap
        self._now = self._looked_at = clock()
        self._open: dict[str, OpenLease] = {}
        self._by_worker: dict[str, dict[str, OpenLease]] = {}
        self._no_expiry_before = math.inf  # renewals only postpone deadlines, so until then nothing needs checking
        self._closed: OrderedDict[str, tuple[str, int]] = OrderedDict()  # outcome and seq of the newest contribution

    def __len__(self) -> int:
        return len(self._open)

    def now(self) -> float:
        """Return the time that counts for leases: the seconds for which the server has been running."""
        time = self._clock()
        self._now += min(time - self._looked_at, self._max_gap)
        self._looked_at = time
        return self._now

    def grant(self, task: Task, worker: str, incarnation: str, version: int, seconds: float) -> Lease:
        """Record and open a lease. Raises OSError if it cannot be recorded; it is not granted then."""
        lease = Lease(f"{task.index:06d}-{uuid.uuid4().hex[:8]}", task, worker, incarnation, version, seconds)
        self._store.open_lease(lease.id, {"session": self.session, **asdict(lease)})
        self._begin(lease)
        return lease

    def get(self, lease_id: str) -> OpenLease | None:
        """Return the open lease with this id, if there is one."""
        return self._open.get(lease_id)

    def all(self) -> list[OpenLease]:
        """Return every open lease, in the order in which they were granted."""
        return list(self._open.values())

    def of(self, worker: str) -> list[OpenLease]:
        """Return the leases that any incarnation of a worker holds."""
        return list(self._by_worker.get(worker, {}).values())

    def expired(self) -> list[OpenLease]:
        """Return the open leases that are past their deadline."""
        now = self.now()
        if now <= self._no_expiry_before:
            return []
        self._no_expiry_before = min((held.deadline for held in self._open.values()), default=math.inf)
        return [held for held in self._open.values() if held.deadline < now]

    def extend(self, held: OpenLease, steps: int = 0) -> int:
        """Renew a lease whose worker is `steps` agent steps into its task. Return how many of these are new."""
        held.renewed = self.now()
        new = max(0, steps - held.steps)
        held.steps += new
        return new

    def end(self, held: OpenLease, outcome: str) -> None:
        """Close a lease and remember how it ended."""
        del self._open[held.lease.id]
        of_worker = self._by_worker[held.lease.worker]
        del of_worker[held.lease.id]
        if not of_worker:
            del self._by_worker[held.lease.worker]
        self._store.close_lease(held.lease.id)
        self.remember(held.lease.id, outcome, held.seq)

    def remember(self, lease_id: str, outcome: str, seq: int = 0) -> None:
        """Remember how a lease ended and its newest contribution, to answer workers that still push to it."""
        self._closed[lease_id] = outcome, seq
        while len(self._closed) > MAX_CLOSED:
            self._closed.popitem(last=False)

    def outcome(self, lease_id: str) -> str:
        """Return how a closed lease ended, or "unknown-lease" if that is not known."""
        return self._closed.get(lease_id, ("unknown-lease", 0))[0]

    def last_seq(self, lease_id: str) -> int:
        """Return the `seq` of the newest contribution to a closed lease, or 0 if that is not known."""
        return self._closed.get(lease_id, ("", 0))[1]

    def accepted(self) -> dict[str, int]:
        """Return the closed leases whose final contribution was accepted, with its `seq`."""
        return {lease_id: seq for lease_id, (outcome, seq) in self._closed.items() if outcome == ACCEPTED}

    def reopen(self, is_pending: Callable[[int], bool]) -> tuple[list[OpenLease], int, list[str]]:
        """Open the recorded leases after a restart, with a fresh deadline.

        Records that should have been removed are recognized and dropped: those of closed leases, of tasks that are not
        pending, and of tasks of which there is a newer record.

        Args:
            is_pending: returns whether the task with this index is still to be done.

        Returns the leases of other sessions, whose workers are gone; the highest task index seen plus one, or 0 if
        there was none; and a warning for each record that cannot be used.
        """
        newest: dict[int, tuple[Lease, str | None]] = {}
        headers, warnings = self._store.leases()
        for header in headers:  # oldest first
            try:
                session, lease = header.pop("session", None), Lease.from_dict(header)
            except ValueError as error:  # the task is trained again
                warnings.append(f"the record of lease {header['id']} cannot be used: {error}")
                continue
            if lease.task.index in newest:
                self._store.close_lease(newest[lease.task.index][0].id)
            newest[lease.task.index] = lease, session
        orphans = []
        for index, (lease, session) in sorted(newest.items()):
            if lease.id in self._closed or not is_pending(index):
                self._store.close_lease(lease.id)
                continue
            held = self._begin(lease)
            if session != self.session:
                orphans.append(held)
        return orphans, max(newest, default=-1) + 1, warnings

    def _begin(self, lease: Lease) -> OpenLease:
        now = self.now()
        held = OpenLease(lease, granted=now, renewed=now)
        self._open[lease.id] = self._by_worker.setdefault(lease.worker, {})[lease.id] = held
        self._no_expiry_before = min(self._no_expiry_before, held.deadline)
        return held


def describe(held: OpenLease, now: float) -> dict[str, Any]:
    """Return an open lease as plain data, for users and dashboards."""
    newest = held.newest
    curve = newest.curve if newest else ()
    # A curve may have hundreds of points, and there may be hundreds of leases.
    scored = [point for point in curve if point.score is not None][-1:]
    return {
        "lease": held.lease.id,
        "worker": held.lease.worker,
        "game": held.lease.task.game,
        "visit": held.lease.task.visit,
        "version": held.lease.version,
        "steps": held.steps,
        "steps_wanted": held.lease.task.steps,
        "seconds": held.renewed - held.granted,
        "length": newest.path.length if newest else 0.0,
        "curve": [point.plain() for point in (*(one for one in scored if one is not curve[-1]), *curve[-1:])],
        "silent_seconds": now - held.renewed,
    }
