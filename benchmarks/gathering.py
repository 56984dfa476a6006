"""What leap_dist/server/aggregator.py does on a node, in simulated time: reports are gathered, and delivered together.

The real one waits for the server's answer where it stands, which a simulation cannot; the rules are the same.
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
    """One node's. Whoever calls it says when."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._reports: dict[str, _Report[Asker]] = {}  # by lease, in the order of arrival
        self._under_way: dict[str, _Report[Asker]] | None = None
        self._known: dict[str, Ack] = {}
        self._delivered = -math.inf
        self._waits_since: float | None = None

    def take(self, now: float, lease: str, what: Contribution | Renewal, asker: Asker) -> Ack | None:
        """A report. Returns the answer, or None where the asker has to wait for the server's."""
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
        """When the next delivery is to begin; ∞ while one is under way, or there is nothing."""
        if not self._reports or self._under_way is not None:
            return math.inf
        return self._delivered + self._seconds if self._waits_since is None else self._waits_since + SOON_SECONDS

    def deliver(self, now: float) -> tuple[list[Contribution], list[Renewal]]:
        """Begins a delivery."""
        self._under_way, self._reports = self._reports, {}
        self._delivered, self._waits_since = now, None
        reports = self._under_way.values()
        contributions = [one.contribution for one in reports if one.contribution is not None]
        return contributions, [one.renewal for one in reports if one.renewal is not None]

    def answered(self, acks: Sequence[Ack]) -> list[tuple[Asker, Ack]]:
        """Ends it; `acks` are the server's. Returns who waited for which answer."""
        assert self._under_way is not None
        reports, self._under_way = self._under_way, None
        keys = [key for key, one in reports.items() if one.contribution is not None]
        keys += [key for key, one in reports.items() if one.renewal is not None]
        found: list[tuple[Asker, Ack]] = []
        for key, ack in zip(keys, acks, strict=True):
            self._known[key] = ack
            found += [(asker, ack) for asker in reports.pop(key, _Report()).waiting]
            if not ack.proceed:  # nobody will speak of it again
                del self._known[key]
        return found
