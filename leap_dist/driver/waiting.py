"""Waiting for results of remote calls: every wait has a time limit and ends early when a signal asks for a stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

from leap_dist.driver.errors import ClusterError
from leap_dist.driver.signals import StopSignal

TICK_SECONDS = 0.5
LONGEST_STEP = 3.0
"""Longest time between two ticks that still counts as running time: a busy machine may delay a tick."""


class RunningClock:
    """Monotonic seconds that stand still while the process is stopped: Ctrl-Z, SIGSTOP, a suspended machine.

    A process that waits for others must not count the time during which it could not receive their answers.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._last_tick = clock()
        self._stopped_seconds = 0.0
        self._closed = threading.Event()

    def start(self) -> None:
        """Tick in a background thread until `close`."""
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


STEP_SECONDS = 0.2
"""How often a wait checks for a signal."""


def wait_for(references: list[ray.ObjectRef[Any]], seconds: float, stop: StopSignal) -> list[ray.ObjectRef[Any]]:
    """Wait up to `seconds` for all results. Returns those that are ready. Raises Stopped after a signal."""
    deadline = time.monotonic() + seconds
    while True:
        stop.check()
        step = max(0.0, min(STEP_SECONDS, deadline - time.monotonic()))
        ready, missing = ray.wait(references, num_returns=len(references), timeout=step)
        if not missing or time.monotonic() >= deadline:
            return ready


def result_of(reference: ray.ObjectRef[Any], seconds: float, stop: StopSignal) -> Any:
    """Return the result of a remote call. Raises GetTimeoutError after `seconds`, Stopped, or the call's own error."""
    if not wait_for([reference], seconds, stop):
        raise GetTimeoutError(f"no answer within {seconds:.0f} s")
    return ray.get(reference)


def first_answer(method: Any, seconds: float, stop: StopSignal) -> Any:
    """Call a method of an actor that is starting, again and again while Ray restarts its process.

    Raises ClusterError if it does not answer within `seconds`, or has ended for good; Stopped.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return result_of(method.remote(), max(0.0, deadline - time.monotonic()), stop)
        except ActorDiedError as error:
            raise ClusterError(f"the server cannot start: {last_line(error)}") from None
        except (ActorUnavailableError, GetTimeoutError) as error:
            if time.monotonic() >= deadline:
                raise ClusterError(f"the server has not started within {seconds:.0f} s: {last_line(error)}") from None
            stop.wait(0.5)


def last_line(error: BaseException) -> str:
    """Return the last line of an error from Ray, which says what happened; the others are a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
