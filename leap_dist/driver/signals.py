"""SIGINT, SIGTERM and SIGHUP: the first one asks for a clean stop, the second one stops at once.

The command line enters `stop_signal` before it imports anything slow; this module itself imports nothing slow. From
then on a signal does not interrupt the program wherever it is, which could leave processes behind, for example while
Ray starts. Instead the program checks for it between steps and while it waits.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

INTERRUPTED = 130
"""Exit code after a signal."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

AT_START = "stopping: no task runs yet. Press Ctrl-C again to stop immediately"


class Stopped(KeyboardInterrupt):
    """A signal asked for a stop before the work had begun."""

    def __init__(self) -> None:
        super().__init__("stopped before anything was trained")


class StopSignal:
    """Whether a signal has asked for a stop."""

    def __init__(self) -> None:
        self.asked = False
        self.immediate = False
        """Whether even the first signal stops at once, for commands that have nothing to finish."""
        self.message = AT_START
        """Text that the first signal prints: what happens now, what is kept, and what a second signal does."""
        self.importing = False
        """Whether the process has only imported modules so far, so that it can simply exit."""
        self.finished = False
        """Whether the work is done and the process about to exit, so that signals no longer matter."""

    def check(self) -> None:
        """Raise Stopped if a signal has asked for a stop."""
        if self.asked:
            raise Stopped

    def wait(self, seconds: float) -> None:
        """Sleep for `seconds`, or until the next signal."""
        deadline = time.monotonic() + seconds
        before = self.asked
        while (left := deadline - time.monotonic()) > 0 and self.asked == before:
            time.sleep(min(left, 0.1))

    def handle(self, number: int, frame: object) -> None:
        """Handle a signal. Raises KeyboardInterrupt for the second one."""
        if self.finished:
            return
        if self.importing:
            os._exit(INTERRUPTED)
        if self.asked or self.immediate:
            raise KeyboardInterrupt
        self.asked = True
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{self.message}\n".encode())  # `print` must not be called in a signal handler


class _Context(threading.local):
    """The outermost StopSignal of each thread."""

    current: StopSignal | None = None


_context = _Context()


@contextlib.contextmanager
def stop_signal(*, until_exit: bool = False) -> Iterator[StopSignal]:
    """Catch the signals in this context. Nested contexts of a thread share the StopSignal of the outermost one.

    Outside the main thread Python cannot catch signals, so there only the program itself can ask for a stop. SIGHUP
    remains ignored under nohup.

    Args:
        until_exit: keep the handlers after the context and ignore further signals, because the process exits next.
    """
    if _context.current is not None:
        yield _context.current
        return
    stop = _context.current = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        try:
            yield stop
        finally:
            _context.current = None
        return
    caught = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, stop.handle) for number in caught}
    try:
        yield stop
    finally:
        _context.current = None
        stop.finished = True
        if not until_exit:
            for number, handler in previous.items():
                signal.signal(number, handler)


def check_stop() -> None:
    """Raise Stopped if a signal has asked for a stop in the current context."""
    if _context.current is not None:
        _context.current.check()
