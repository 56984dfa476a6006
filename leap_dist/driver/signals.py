"""SIGINT and SIGTERM: the first asks for a clean stop, the second stops at once."""

from __future__ import annotations

import signal
import time


class StopSignal:
    """Catches both signals until `restore` is called; the second one raises KeyboardInterrupt.

    Ray replaces the SIGTERM handler, so create this after `ray.init`.
    """

    def __init__(self) -> None:
        self.asked = False
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def wait(self, seconds: float) -> None:
        """Sleep for `seconds`, or until the next signal."""
        deadline = time.monotonic() + seconds
        before = self.asked
        while (left := deadline - time.monotonic()) > 0 and self.asked == before:
            time.sleep(min(left, 0.1))

    def restore(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
