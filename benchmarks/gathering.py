"""Simulate leap_dist/server/aggregator.py, which batches the reports of a node's workers into one delivery.

The real aggregator blocks until the server answers, which a discrete-event simulation cannot do. The rules are the
same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from leap_dist.protocol.messages import Ack, Contribution, Renewal
from leap_dist.server.aggregator import SOON_SECONDS

Asker = TypeVar("Asker")


@dataclass
class _Report(Generic[Asker]):
    contribution: Contribution | None = None
    renewal: Renewal | None = None
    waiting: list[Asker] = field(default_factory=list)


class Gathering(Generic[Asker]):
    """Batched reports of one node. The caller supplies the time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._reports: dict[str, _Report[Asker]] = {}  # by lease, in order of arrival
        self._under_way: dict[str, _Report[Asker]] | None = None
        self._known: dict[str, Ack] = {}
        self._delivered = -math.inf
        self._waits_since: float | None = None

    def take(self, now: float, lease: str, what: Contribution | Renewal, asker: Asker) -> Ack | None:
        """Accept a report. Return the answer, or None if the asker has to wait for the server's."""
        report = self._reports.get(lease, _Report())
        final = False
        if isinstance(what, Renewal):
            report.renewal = what
        else:
            final = what.final
            report.contribution, report.renewal = what, None
            self._reports.pop(lease, None)
        self._reports[lease] = report
        if lease in self._known and not final:
            return self._known[lease]
        report.waiting.append(asker)
        self._waits_since = now if self._waits_since is None else self._waits_since
        return None

    @property
    def due(self) -> float:
        """Return when the next delivery should begin: ∞ while one is in progress or if there are no reports."""
        if not self._reports or self._under_way is not None:
            return math.inf
        return self._delivered + self._seconds if self._waits_since is None else self._waits_since + SOON_SECONDS

    def deliver(self, now: float) -> tuple[list[Contribution], list[Renewal]]:
        """Begin a delivery and return its contributions and renewals."""
        self._under_way, self._reports = self._reports, {}
        self._delivered, self._waits_since = now, None
        reports = self._under_way.values()
        contributions = [one.contribution for one in reports if one.contribution is not None]
        return contributions, [one.renewal for one in reports if one.renewal is not None]

    def answered(self, acks: Sequence[Ack]) -> list[tuple[Asker, Ack]]:
        """End the delivery. `acks` are the server's answers; return each waiting asker with its answer."""
        assert self._under_way is not None
        reports, self._under_way = self._under_way, None
        keys = [key for key, one in reports.items() if one.contribution is not None]
        keys += [key for key, one in reports.items() if one.renewal is not None]
        found: list[tuple[Asker, Ack]] = []
        for key, ack in zip(keys, acks, strict=True):
            self._known[key] = ack
            found += [(asker, ack) for asker in reports.pop(key, _Report()).waiting]
            if not ack.proceed:  # no more reports of this lease will come
                del self._known[key]
        return found
