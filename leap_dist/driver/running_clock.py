"""A clock for timeouts that ignores the time in which this process was stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

TICK_SECONDS = 0.5
LONGEST_STEP = 3.0
"""Seconds between two ticks that still count as running time: a busy machine may delay a tick."""


class RunningClock:
    """Monotonic seconds that stand still while the process is stopped: Ctrl-Z, SIGSTOP, a suspended machine.

    Who waits for others must not count time in which it did not listen.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._last_tick = clock()
        self._stopped_seconds = 0.0
        self._closed = threading.Event()

    def start(self) -> None:
        """Tick in a thread of its own until `close`."""
        threading.Thread(target=self._run, name="running-clock", daemon=True).start()

    def __call__(self) -> float:
        """Return the time in seconds. Must be called at least every LONGEST_STEP seconds, as the thread does."""
        with self._lock:
            now = self._clock()
            self._stopped_seconds += max(0.0, now - self._last_tick - LONGEST_STEP)
            self._last_tick = now
            return now - self._stopped_seconds

    def close(self) -> None:
        """Stop ticking."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(TICK_SECONDS):
            self()
