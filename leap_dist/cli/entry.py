"""Entry point of the process: catches signals first, then imports and runs the command line."""

from __future__ import annotations

import signal
import sys

from leap_dist.driver.signals import stop_signal


def run() -> int:
    """Run the command that `sys.argv` names. Returns the exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # in all threads; see leap_dist/driver/cluster.py
    with stop_signal(until_exit=True) as stop:
        stop.importing = True
        from leap_dist.cli.main import main  # slow
        from leap_dist.storage.redaction import print_exception

        stop.importing = False
        sys.excepthook = print_exception
        return main()
