"""Renewal of leases while learners are made, which may take longer than a lease lasts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from leap_dist.protocol.messages import Ack, Lease


class Renewer(Protocol):
    """The part of the server that renews leases."""

    def renew(self, lease_id: str, incarnation: str, steps: int) -> Ack:
        """Extend the lease and report progress."""


class Heartbeat:
    """Renews leases that were just granted, whenever it is called `seconds` or more after they were last renewed.

    Args:
        leases: leases of tasks that have not made a step yet.
        server: renews them.
        seconds: time between two renewals.
        clock: monotonic seconds.
    """

    def __init__(self, leases: Sequence[Lease], server: Renewer, seconds: float, clock: Callable[[], float]) -> None:
        self._leases = leases
        self._server = server
        self._seconds = seconds
        self._clock = clock
        self._renewed = clock()

    def __call__(self) -> None:
        """Renew the leases if it is time. Raises whatever the server raises."""
        if self._clock() - self._renewed >= self._seconds:
            for lease in self._leases:
                self._server.renew(lease.id, lease.incarnation, 0)
            self._renewed = self._clock()


def no_heartbeat() -> None:
    """Renew nothing, where there is no lease."""
