"""Copies of those files of a run that are not needed to resume it: training never waits for them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

from leap_dist.storage.objects import Storage
from leap_dist.storage.redaction import redact
from leap_dist.storage.replica import COPIES

COPY_SECONDS = 30.0
"""Seconds between two copies of a file that keeps changing."""
SUMMARY_SECONDS = 3.0
"""Seconds between two copies of the summary."""


class BackgroundCopy:
    """A thread that copies files to object storage when they change.

    Args:
        storage: destination of the copies.
        folder: working copy to read from.
        alert: called with a line of text when files could not be copied.
        lost: returns whether another launch has taken the run over; nothing is copied from then on.
    """

    def __init__(self, storage: Storage, folder: Path, alert: Callable[[str], None], lost: Callable[[], bool]) -> None:
        self._storage = storage
        self._folder = folder
        self._alert = alert
        self._lost = lost
        self._copied: dict[str, tuple[int, int]] = {}  # name → (modification time, size)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="background copy", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and wait for it. Idempotent."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()

    def copy(self, name: str) -> None:
        """Copy one file if it has changed since it was last copied. Raises OSError."""
        path = self._folder / name
        status = path.stat()
        state = status.st_mtime_ns, status.st_size
        if self._copied.get(name) != state:
            self._storage.put(name, path.read_bytes())
            self._copied[name] = state

    def copy_all(self) -> str:
        """Copy every file that has changed. Returns the last error, without secrets, or "" if there was none."""
        problem = ""
        for top in COPIES:
            path = self._folder / top
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file() and not file.name.startswith("."):
                    try:
                        self.copy(file.relative_to(self._folder).as_posix())
                    except OSError as error:
                        problem = redact(str(error.strerror))
        return problem

    def _run(self) -> None:
        others_at = time.monotonic()
        while not self._stopped.wait(SUMMARY_SECONDS) and not self._lost():
            with contextlib.suppress(OSError):
                self.copy("summary.json")
            if time.monotonic() - others_at >= COPY_SECONDS:
                others_at = time.monotonic()
                if problem := self.copy_all():
                    self._alert(f"some files could not be copied to {self._storage.url} ({problem}); retrying")
