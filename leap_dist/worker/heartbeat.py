"""When leases are renewed: while their learners are made, between pushes, and during long measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from leap_dist.protocol.messages import Ack, Lease


class Renewer(Protocol):
    """The part of the server that renews leases."""

    def renew(self, lease_id: str, incarnation: str, steps: int) -> Ack:
        """Extend the lease and report progress."""


class Heartbeat:
    """Keeps leases alive: called often enough, it renews them whenever the server has not heard of them for too long.

    Args:
        leases: leases that were granted or renewed just now.
        server: renews them.
        seconds: longest time between two reports, unless the server asks for more.
        clock: monotonic seconds.
    """

    def __init__(self, leases: Sequence[Lease], server: Renewer, seconds: float, clock: Callable[[], float]) -> None:
        self._leases = leases
        self._server = server
        self._seconds = seconds
        self._clock = clock
        self._heard = self._quiet_until = clock()  # until then, the server wants no push but the final one
        # Even while the server wants no push, leases are renewed after this time.
        self._longest_silence = min((lease.seconds for lease in leases), default=0.0) / 4

    def __call__(self, steps: int = 0) -> None:
        """Renew the leases of tasks with `steps` agent steps if it is time. Raises whatever the server raises."""
        if self.is_due:
            for lease in self._leases:
                self._server.renew(lease.id, lease.incarnation, steps)
            self.heard()

    @property
    def is_due(self) -> bool:
        """Whether the server has not heard of the tasks for too long."""
        now = self._clock()
        return now - self._heard > (self._longest_silence if now < self._quiet_until else self._seconds)

    @property
    def may_push(self) -> bool:
        """Whether the server takes pushes that are not final."""
        return self._clock() >= self._quiet_until

    def heard(self, wait: float = 0.0) -> None:
        """Record that the server has heard of the tasks just now, and wants no push for `wait` seconds."""
        self._heard = self._clock()
        self._quiet_until = max(self._quiet_until, self._heard + wait)


def no_heartbeat() -> None:
    """Renew nothing, where there is no lease."""
