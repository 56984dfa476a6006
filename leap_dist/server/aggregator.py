"""Aggregator: combines the reports of all workers on a node into few calls to the server.

A renewal, or a partial contribution, is answered at once with the server's last answer about its lease, and is sent
with the next delivery; only the first report of a lease waits for the server. For each lease only the newest
contribution is sent, which contains the earlier ones. A final contribution brings the next delivery forward, so that
those that end within SOON_SECONDS of each other share one, and waits for the server's own answer: the aggregator never
acknowledges anything as durable by itself.

Vectors are not added up on the node. Each contribution stays separate: it counts exactly once by its lease and seq, it
is clipped, weighted and refused individually, and `sync` sums in the order of tasks, to the bit. Aggregation saves
calls, and the work that the server does once per delivery (`MetaServer.push_together`).

Nothing can be lost here: a worker pushes again, to another aggregator or to the server, what was not acknowledged as
durable. If a worker falls silent, the server notices it too, because only leases that have reported since the last
delivery are renewed.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from leap_dist.protocol.messages import Ack, Contribution, Renewal

SOON_SECONDS = 0.05
"""Delay between the first caller that waits for the server and the delivery it waits for."""
REMEMBERED_SECONDS = 600.0
"""Time without reports after which a lease is forgotten; its next report waits for the server again."""


class Server(Protocol):
    """The part of `MetaServer` that an aggregator calls."""

    def push_together(self, contributions: Sequence[Contribution], renewals: Sequence[Renewal]) -> list[Ack]:
        """Push contributions, then renew leases. Return the answers in that order."""

    def snapshot(self) -> tuple[int, np.ndarray]:
        """Return the current (version, φ)."""


@dataclass
class _Report:
    """The undelivered reports of a lease, and the callers that wait for an answer."""

    contribution: Contribution | None = None
    renewal: Renewal | None = None
    waiting: list[Future[Ack]] = field(default_factory=list)


@dataclass
class _Known:
    """The server's last answer about a lease."""

    ack: Ack
    heard: float


_Key = tuple[str, str]  # lease, incarnation


class Aggregator:
    """Stands between the workers of a node and the server. It may be called from any number of threads.

    Deliveries are made by `run`, in a separate thread, or by repeated calls of `tick`.

    Args:
        server: receives the deliveries. If it raises, the callers that wait for that delivery get the error, and the
            delivery is dropped; the next report of each lease in it waits for the server again.
        seconds: time between two deliveries if no caller waits for them.
        clock: returns monotonic seconds.
    """

    def __init__(self, server: Server, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._server = server
        self._seconds = seconds
        self._clock = clock
        self._changed = threading.Condition()
        self._delivering = threading.Lock()  # held during a delivery, so that reports cannot overtake each other
        self._reports: dict[_Key, _Report] = {}  # in order of arrival
        self._known: dict[_Key, _Known] = {}
        self._delivered = -math.inf  # when the last delivery began
        self._waits_since: float | None = None  # since when a caller has been waiting for the next delivery
        self._closed = False
        self.deliveries = 0
        """Number of calls to the server so far."""

    # Called by workers -------------------------------------------------------------------------------------------

    def renew(self, lease_id: str, incarnation: str, steps: int) -> Ack:
        """Renew a lease; see `MetaServer.renew`. The answer may be an earlier one. Raises what the server raised."""
        return self.renew_soon(lease_id, incarnation, steps).result()

    def push(self, contribution: Contribution) -> Ack:
        """Push a contribution; see `MetaServer.push`. Only the server itself answers a final one."""
        return self.push_soon(contribution).result()

    def snapshot(self) -> tuple[int, np.ndarray]:
        """Return the server's current (version, φ)."""
        return self._server.snapshot()

    def renew_soon(self, lease_id: str, incarnation: str, steps: int) -> Future[Ack]:
        """Renew a lease and return a future of the answer."""
        with self._changed:
            key = lease_id, incarnation
            report = self._reports.setdefault(key, _Report())
            report.renewal = Renewal(lease_id, incarnation, steps)
            return self._answer(key, report)

    def push_soon(self, contribution: Contribution) -> Future[Ack]:
        """Push a contribution and return a future of the answer."""
        with self._changed:
            key = contribution.lease, contribution.incarnation
            report = self._reports.get(key, _Report())
            if report.contribution is None or contribution.seq > report.contribution.seq:
                report.contribution = contribution
                self._reports.pop(key, None)
                self._reports[key] = report  # moved to the end: final contributions count in order of arrival
            report.renewal = None  # a contribution renews too
            return self._answer(key, report, must_wait=contribution.final)

    # Delivery --------------------------------------------------------------------------------------------------

    def tick(self) -> float:
        """Make a delivery if one is due. Return the seconds until the next one, or ∞ if there is nothing to deliver.

        Blocks until the server has answered.
        """
        with self._delivering:
            with self._changed:
                if self._due_in() > 0:
                    return self._due_in()
                reports, self._reports = self._reports, {}
                self._waits_since = None
                self._delivered = self._clock()
                self._forget()
            self._deliver(reports)
        with self._changed:
            return self._due_in()

    def run(self) -> None:
        """Make deliveries until `close` is called, then deliver what is left."""
        while True:
            self.tick()
            with self._changed:
                if self._closed and not self._reports:
                    return
                if (seconds := self._due_in()) > 0:
                    self._changed.wait(None if seconds == math.inf else seconds)

    def close(self) -> None:
        """Deliver everything at once and end `run`. Later reports wait for the next `tick`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # -------------------------------------------------------------------------------------------------------------

    def _answer(self, key: _Key, report: _Report, *, must_wait: bool = False) -> Future[Ack]:
        answer: Future[Ack] = Future()
        known = self._known.get(key)
        if known is None or must_wait:
            report.waiting.append(answer)
            if self._waits_since is None:
                self._waits_since = self._clock()
        else:
            known.heard = self._clock()
            answer.set_result(known.ack)
        self._changed.notify_all()
        return answer

    def _due_in(self) -> float:
        if not self._reports:
            return math.inf
        if self._closed:
            return 0.0
        due = self._delivered + self._seconds if self._waits_since is None else self._waits_since + SOON_SECONDS
        return max(0.0, due - self._clock())

    def _deliver(self, reports: dict[_Key, _Report]) -> None:
        contributions = {key: one.contribution for key, one in reports.items() if one.contribution is not None}
        renewals = {key: one.renewal for key, one in reports.items() if one.renewal is not None}
        self.deliveries += 1
        try:
            acks = self._server.push_together([*contributions.values()], [*renewals.values()])
            answers = list(zip([*contributions, *renewals], acks, strict=True))
        except Exception as error:
            with self._changed:
                for key in reports:
                    self._known.pop(key, None)
            for report in reports.values():
                for waiting in report.waiting:
                    _settle(waiting, error)
            return
        with self._changed:
            for key, ack in answers:  # later reports of the lease are not durable yet
                self._known[key] = _Known(replace(ack, durable=False), self._clock())
        for key, ack in answers:
            # If a lease has two answers, its callers get that to the contribution, which comes first.
            for waiting in reports.pop(key, _Report()).waiting:
                _settle(waiting, ack)

    def _forget(self) -> None:
        """Drop the answers about leases that have not reported for a long time."""
        now = self._clock()
        for key in [key for key, known in self._known.items() if now - known.heard > REMEMBERED_SECONDS]:
            del self._known[key]


def _settle(waiting: Future[Ack], outcome: Ack | Exception) -> None:
    with contextlib.suppress(InvalidStateError):  # the caller has given up waiting
        if isinstance(outcome, Exception):
            waiting.set_exception(outcome)
        else:
            waiting.set_result(outcome)
