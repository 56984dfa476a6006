"""Where a training run is kept: in a plain directory or at a URL, which look the same to `launch.py train`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from leap_dist.config import files
from leap_dist.config.loading import ConfigError
from leap_dist.storage import run_directory
from leap_dist.storage.atomic import CorruptFile
from leap_dist.storage.objects import is_url
from leap_dist.storage.replica import Remote


class Url(str):
    """URL of a run in object storage. `open_storage` refuses a URL that contains a secret."""


Location = Path | Url


def location(text: str) -> Location:
    """Parse a path or URL that a user typed."""
    return Url(text) if is_url(text) else Path(text)


class Run:
    """A run in a plain directory. Inside the `with` block the run belongs to this launch.

    Args:
        folder: the run directory.
        new: whether the directory must not hold a run that has begun.

    Entering raises RunDirectoryBusy if another launch is working in the directory, ConfigError if it cannot be used.
    """

    remote: Remote | None = None
    """Where the server keeps a replica of the run; None for a plain directory."""
    continues = False
    """Whether this launch continues a run that an earlier one has begun."""

    def __init__(self, folder: Path, *, new: bool = False) -> None:
        self.folder = folder
        """Local directory in which the server and the driver work."""
        self.shown = str(folder)
        """Path or URL by which the user knows the run."""
        self._claim = run_directory.claimed(folder, new=new)

    def __enter__(self) -> Run:
        self._claim.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Release the run; a directory in which no run has begun is removed after an error."""
        self._claim.__exit__(kind, error, where)

    def translated_errors(self) -> contextlib.AbstractContextManager[None]:
        """Make errors name the path or URL that the user knows instead of the working copy."""
        return translated_errors(self.folder, self.shown)

    def publish(self) -> None:
        """Make the run visible to others. Raises ConfigError if that fails."""

    def report(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Return the summary with alerts about the storage added.

        Raises LockLost if another launch has taken the run over, or if its directory is gone.
        """
        run_directory.require(self.folder)
        return summary


@contextlib.contextmanager
def translated_errors(folder: Path, shown: str) -> Iterator[None]:
    """Replace the path of a private copy in error messages by the path or URL that the user knows."""
    try:
        yield
    except (ConfigError, CorruptFile) as error:
        raise type(error)(str(error).replace(str(folder), shown)) from None


def holds_objects(folder: Path) -> bool:
    """Return whether a directory is the target of a file:// URL: it holds a run, but no server works in it."""
    try:
        with files.open_regular(folder / ".lock") as file:
            return file.read(1) == b"{"
    except OSError:
        return False
