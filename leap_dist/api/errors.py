"""Exceptions that `train` and `evaluate` raise where the command line would exit with a code other than 0.

exit code    exception
1            RunFailed: the run could not continue, and the message says why
2            ConfigError, RunDirectoryBusy or CorruptFile: bad input, nothing was started
130          Interrupted: stopped by a signal, with everything accepted saved
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from leap_dist.config.loading import ConfigError
from leap_dist.driver.errors import RunFailed


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run. Everything that was accepted is saved, and `result` says where."""

    def __init__(self, result: Any) -> None:
        super().__init__(f"interrupted; everything accepted is saved in {result.path}")
        self.result = result
        """The result that `train` or `evaluate` would have returned."""


@contextlib.contextmanager
def naming_arguments() -> Iterator[None]:
    """Change the messages of ConfigErrors that are raised in this context: arguments instead of flags."""
    try:
        yield
    except ConfigError as error:
        if (message := in_python(str(error))) == str(error):
            raise
        raise ConfigError(message) from None


def in_python(message: str) -> str:
    """Return a message of the command line with the arguments of `train` and `evaluate` instead of its flags."""
    message = message.replace("add --resume", "pass resume=True").replace("run-dir: ", "run_dir: ")
    return re.sub(r"(?<![\w-])--([a-z][\w.-]*)", lambda flag: flag[1].replace("-", "_"), message)


def raise_for(outcome: str, result: Any, summary: dict[str, Any], error: BaseException | None) -> None:
    """Raise the exception that belongs to an outcome; do nothing for "done" and "stopped".

    Raises `error`, the exception of a callback, if there is one; else Interrupted, or RunFailed with the last alerts.
    """
    if error is not None:
        raise error
    if outcome == "interrupted":
        raise Interrupted(result)
    if outcome == "failed":
        reasons = "; ".join(summary.get("alerts", [])[-3:]) or f"see {result.path}/summary.json"
        raise RunFailed(f"the run could not continue: {reasons}")
