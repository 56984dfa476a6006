"""How much a server takes at once: a flood of pushes is turned away before it costs anything."""

from __future__ import annotations

from collections.abc import Callable

BURST_SECONDS = 2.0
"""Of pushes at the full rate that are taken at once."""


class Intake:
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
