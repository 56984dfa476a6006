"""New directories, which are removed again if nothing is put into them."""

from __future__ import annotations

import atexit
import contextlib
import itertools
from pathlib import Path

from leap_dist.config.loading import ConfigError


def create_unique(wanted: Path, field: str = "run-dir") -> Path:
    """Create a directory named `wanted`, or with -2, -3 … appended if that name is taken. Raises ConfigError.

    It and a new directory around it are removed when the process ends if they are still empty then.
    """
    made = [] if wanted.parent.exists() else [wanted.parent.absolute()]
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                break
    except OSError as error:
        raise ConfigError(cannot_be_written(wanted, error, field)) from None
    atexit.register(remove_if_empty, path.absolute(), *made)
    return path


def cannot_be_written(path: Path, error: OSError, field: str = "run-dir") -> str:
    """Return the message for a directory that cannot be written."""
    return f"{field}: {path} cannot be written ({error.strerror}); choose another"


def remove_if_empty(*paths: Path) -> None:
    """Remove each of these directories that is empty."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.rmdir()
