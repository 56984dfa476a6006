"""One voice for the workers of a node: what they report goes to the server together, at most once in a while.

A renewal, or a contribution that is not final, is answered at once with what the server said last about that lease,
and goes to the server with the next delivery; only the first one of a lease waits for it. Of a lease the newest
contribution goes, which holds what those before it held. A final contribution brings the next delivery forward, so
that those that end within SOON_SECONDS of each other share one, and waits for the server's own answer: nothing is
called durable here.

Vectors are not added up on the node. Each contribution stays one: it counts exactly once by its lease and seq, it is
clipped, weighed and refused by itself, and `sync` sums in the order of tasks, to the bit. What is saved are calls, and
what the server does once for all of a delivery (MetaServer.push_together).

There is nothing to lose here: what was not answered as durable is pushed again by its worker, to another aggregator or
to the server itself. A worker that falls silent falls silent at the server: only leases that were heard of since the
delivery before are renewed.
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
"""From the first caller that waits for the server until the delivery that it waits for."""
REMEMBERED_SECONDS = 600.0
"""Since a lease was heard of; then its next report waits for the server, as its first one did."""


class Server(Protocol):
    """The part of MetaServer that an aggregator talks to."""

    def push_together(self, contributions: Sequence[Contribution], renewals: Sequence[Renewal]) -> list[Ack]:
        """Answers, contributions first."""

    def snapshot(self) -> tuple[int, np.ndarray]:
        """(version, φ) as they are now."""


@dataclass
class _Report:
    """What is to be delivered of a lease, and who waits for the answer."""

    contribution: Contribution | None = None
    renewal: Renewal | None = None
    waiting: list[Future[Ack]] = field(default_factory=list)


@dataclass
class _Known:
    """What the server said last about a lease."""

    ack: Ack
    heard: float


_Key = tuple[str, str]  # lease, incarnation


class Aggregator:
    """Stands between the workers of a node and the server. Any number of threads may call it.

    `run`, in a thread of its own, delivers; or `tick`, which somebody calls again and again.

    Args:
        server: answers a delivery. Whatever it raises goes to those who wait for that delivery, which is lost then; the
            next report of each lease that was in it waits for the server again.
        seconds: between two deliveries that nobody waits for.
        clock: monotonic seconds.
    """

    def __init__(self, server: Server, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._server = server
        self._seconds = seconds
        self._clock = clock
        self._changed = threading.Condition()
        self._delivering = threading.Lock()  # one at a time, or a lease's reports could overtake each other
        self._reports: dict[_Key, _Report] = {}  # in the order of arrival
        self._known: dict[_Key, _Known] = {}
        self._delivered = -math.inf  # when the last delivery began
        self._waits_since: float | None = None  # somebody, for the next one
        self._closed = False
        self.deliveries = 0
        """Calls to the server so far."""

    # What workers call -------------------------------------------------------------------------------------------

    def renew(self, lease_id: str, incarnation: str, steps: int) -> Ack:
        """See MetaServer; the answer may be older than the question. Raises what the server raised."""
        return self.renew_soon(lease_id, incarnation, steps).result()

    def push(self, contribution: Contribution) -> Ack:
        """The same. A final contribution is answered by the server, durably or not at all."""
        return self.push_soon(contribution).result()

    def snapshot(self) -> tuple[int, np.ndarray]:
        """(version, φ) as the server has them now."""
        return self._server.snapshot()

    def renew_soon(self, lease_id: str, incarnation: str, steps: int) -> Future[Ack]:
        """`renew` for callers that wait in a way of their own."""
        with self._changed:
            key = lease_id, incarnation
            report = self._reports.setdefault(key, _Report())
            report.renewal = Renewal(lease_id, incarnation, steps)
            return self._answer(key, report)

    def push_soon(self, contribution: Contribution) -> Future[Ack]:
        """`push` for callers that wait in a way of their own."""
        with self._changed:
            key = contribution.lease, contribution.incarnation
            report = self._reports.get(key, _Report())
            if report.contribution is None or contribution.seq > report.contribution.seq:
                report.contribution = contribution
                self._reports.pop(key, None)
                self._reports[key] = report  # to the end: what is final counts in the order it came
            report.renewal = None  # a contribution renews too
            return self._answer(key, report, must_wait=contribution.final)

    # What delivers -----------------------------------------------------------------------------------------------

    def tick(self) -> float:
        """Makes the delivery that is due, if one is. Returns seconds until the next may be; ∞ with nothing to deliver.

        Blocks while the server answers.
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
        """Delivers until `close` is called, and then what is left."""
        while True:
            self.tick()
            with self._changed:
                if self._closed and not self._reports:
                    return
                if (seconds := self._due_in()) > 0:
                    self._changed.wait(None if seconds == math.inf else seconds)

    def close(self) -> None:
        """Delivers what there is at once, and ends `run`. What comes later waits for the next `tick`."""
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
            for key, ack in answers:  # of what comes later nothing is durable yet
                self._known[key] = _Known(replace(ack, durable=False), self._clock())
        for key, ack in answers:
            # Where a lease has two, the renewal came later; but who waits, waits for the contribution.
            for waiting in reports.pop(key, _Report()).waiting:
                _settle(waiting, ack)

    def _forget(self) -> None:
        """Leases that nobody has spoken of for long."""
        now = self._clock()
        for key in [key for key, known in self._known.items() if now - known.heard > REMEMBERED_SECONDS]:
            del self._known[key]


def _settle(waiting: Future[Ack], outcome: Ack | Exception) -> None:
    with contextlib.suppress(InvalidStateError):  # whoever waited has given up
        if isinstance(outcome, Exception):
            waiting.set_exception(outcome)
        else:
            waiting.set_result(outcome)
