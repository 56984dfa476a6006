"""Entry point of the command line: parse the arguments, run one command, return its exit code.

`train` is here, because the main path begins with it; commands.py has the other commands. Modules that import PyTorch
or Ray are imported only when they are needed, so that help and error messages appear at once.
"""

from __future__ import annotations

import argparse
import sys

from leap_dist.cli import console, parser
from leap_dist.config.loading import ConfigError
from leap_dist.driver.errors import RunFailed
from leap_dist.driver.signals import check_stop, stop_signal


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code. Bad input ends the program with one line and exit code 2."""
    with console.safe_streams(), stop_signal() as stop:
        parsed = parser.parse(arguments)
        stop.immediate = parsed.command not in ("train", "evaluate", "study")  # those check for signals themselves
        try:
            stop.check()
            return _run(parsed)
        except KeyboardInterrupt as error:
            print(f"\n{str(error) or console.STOPPED.get(parsed.command, 'stopped')}", file=sys.stderr)
            return console.INTERRUPTED


def _run(parsed: argparse.Namespace) -> int:
    try:
        from leap_dist.cli import commands

        if parsed.command == "train":
            return train(parsed)
        return commands.COMMANDS[parsed.command](parsed)
    except ConfigError as error:
        console.complain(str(error))
    except Exception as error:
        from leap_dist.storage.atomic import CorruptFile
        from leap_dist.storage.locks import LockLost, RunDirectoryBusy

        if isinstance(error, RunDirectoryBusy | CorruptFile):
            console.complain(str(error))
        if not isinstance(error, LockLost | RunFailed):
            raise
        console.notice("error", str(error))
        return console.FAILED


def train(parsed: argparse.Namespace) -> int:
    """Meta-train an initialization."""
    from leap_dist.cli import commands

    config, run = commands.training(parsed)
    from leap_dist.cli import plan, results
    from leap_dist.driver import driver, reporting
    from leap_dist.storage import run_directory

    driver.check_prerequisites(config)
    check_stop()  # before anything is written
    with run, run.translated_errors():
        if (summary := reporting.finished(config, run.folder)) is not None:
            results.print_finished(config, run, summary)
            return console.EXIT_CODES["done"]
        run_directory.prepare(run.folder, config, patience=run_directory.ORPHAN_SECONDS if parsed.resume else 0.0)
        run.publish()
        rate = plan.print_training(config, run).rate
        outcome, summary = reporting.train(config, run, profile=parsed.profile, rate=rate)
        results.print_training(config, run, outcome, summary)
        if parsed.profile:
            results.print_profiles(run)
    return console.EXIT_CODES[outcome]
