"""Which worker holds which task, until when, and how leases ended."""

from __future__ import annotations

import math
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from leap_dist.protocol.messages import Contribution, Lease, Task

ACCEPTED = "accepted"
_CLOSED_REMEMBERED = 1024


@dataclass
class OpenLease:
    """A lease that a worker holds, and the newest contribution to it."""

    lease: Lease
    granted: float
    renewed: float
    steps: int = 0
    seq: int = 0
    newest: Contribution | None = None

    @property
    def deadline(self) -> float:
        """Clock reading after which it is taken back."""
        return self.renewed + self.lease.seconds


class Record(Protocol):
    """Where open leases are recorded; see Journal."""

    def open_lease(self, lease_id: str, header: dict[str, Any]) -> None:
        """Raises OSError where that cannot be done."""

    def close_lease(self, lease_id: str) -> None:
        """Forgets it."""

    def leases(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Records, and a warning for each that cannot be read."""


class Unrecorded:
    """No record: whoever restarts begins without leases."""

    def open_lease(self, lease_id: str, header: dict[str, Any]) -> None:
        """Nothing."""

    def close_lease(self, lease_id: str) -> None:
        """Nothing."""

    def leases(self) -> tuple[list[dict[str, Any]], list[str]]:
        """None."""
        return [], []


class LeaseBook:
    """Open leases, each recorded in the journal, and the outcome of the last thousand that are closed."""

    def __init__(self, journal: Record, session: str, clock: Callable[[], float]) -> None:
        self._journal = journal
        self._session = session
        self._clock = clock
        self._open: dict[str, OpenLease] = {}
        self._by_worker: dict[str, dict[str, OpenLease]] = {}
        self._none_before = math.inf  # no lease expires before: deadlines only ever move away
        self._closed: OrderedDict[str, tuple[str, int]] = OrderedDict()  # outcome, newest seq

    def __len__(self) -> int:
        return len(self._open)

    def grant(self, task: Task, worker: str, incarnation: str, version: int, seconds: float) -> Lease:
        """Records and opens a lease. Raises OSError, and then there is none."""
        lease = Lease(f"{task.index:06d}-{uuid.uuid4().hex[:8]}", task, worker, incarnation, version, seconds)
        self._journal.open_lease(lease.id, {"session": self._session, **asdict(lease)})
        self._begin(lease)
        return lease

    def get(self, lease_id: str) -> OpenLease | None:
        """The open lease of that name."""
        return self._open.get(lease_id)

    def all(self) -> list[OpenLease]:
        """Every open lease, in the order they were granted."""
        return list(self._open.values())

    def of(self, worker: str) -> list[OpenLease]:
        """What a worker holds, under whatever incarnation."""
        return list(self._by_worker.get(worker, {}).values())

    def expired(self) -> list[OpenLease]:
        """Leases past their deadline."""
        now = self._clock()
        if now <= self._none_before:
            return []
        self._none_before = min((held.deadline for held in self._open.values()), default=math.inf)
        return [held for held in self._open.values() if held.deadline < now]

    def extend(self, held: OpenLease, steps: int = 0) -> int:
        """Moves the deadline, `steps` agent steps into the task. Returns how many of them are new."""
        held.renewed = self._clock()
        new = max(0, steps - held.steps)
        held.steps += new
        return new

    def end(self, held: OpenLease, outcome: str) -> None:
        """Closes a lease and remembers how it ended."""
        del self._open[held.lease.id]
        own = self._by_worker[held.lease.worker]
        del own[held.lease.id]
        if not own:
            del self._by_worker[held.lease.worker]
        self._journal.close_lease(held.lease.id)
        self.remember(held.lease.id, outcome, held.seq)

    def remember(self, lease_id: str, outcome: str, seq: int = 0) -> None:
        """Notes how a lease ended, after which contribution, so that whoever still pushes to it is told."""
        self._closed[lease_id] = outcome, seq
        while len(self._closed) > _CLOSED_REMEMBERED:
            self._closed.popitem(last=False)

    def outcome(self, lease_id: str) -> str:
        """How a closed lease ended; "unknown-lease" where that is not known."""
        return self._closed.get(lease_id, ("unknown-lease", 0))[0]

    def last(self, lease_id: str) -> int:
        """seq of the newest contribution to a closed lease; 0 where that is not known."""
        return self._closed.get(lease_id, ("", 0))[1]

    def accepted(self) -> dict[str, int]:
        """Remembered leases whose contribution was accepted, with its seq."""
        return {lease_id: seq for lease_id, (outcome, seq) in self._closed.items() if outcome == ACCEPTED}

    def reopen(self, done: set[int]) -> tuple[list[OpenLease], int, list[str]]:
        """After a restart: opens the recorded leases, with a fresh deadline, and forgets those whose task is `done`.

        Returns those of other sessions, whose workers are gone; one more than the highest task index seen (0 where
        there was none); and a warning for each record that cannot be used.
        """
        orphans, highest = [], 0
        headers, warnings = self._journal.leases()
        for header in headers:
            try:
                session, lease = header.pop("session", None), Lease.of(header)
            except ValueError as error:  # its task is trained again
                warnings.append(f"the record of lease {header['id']} cannot be used: {error}")
                continue
            highest = max(highest, lease.task.index + 1)
            if lease.task.index in done or lease.id in self._closed:
                self._journal.close_lease(lease.id)
                continue
            held = self._begin(lease)
            if session != self._session:
                orphans.append(held)
        return orphans, highest, warnings

    def _begin(self, lease: Lease) -> OpenLease:
        held = OpenLease(lease, granted=self._clock(), renewed=self._clock())
        self._open[lease.id] = self._by_worker.setdefault(lease.worker, {})[lease.id] = held
        self._none_before = min(self._none_before, held.deadline)
        return held


def describe(held: OpenLease, now: float) -> dict[str, Any]:
    """An open lease as plain data, for people and dashboards."""
    newest = held.newest
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
        "curve": [point.plain() for point in newest.curve] if newest else [],
        "silent_seconds": now - held.renewed,
    }
