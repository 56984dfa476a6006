"""A run at a URL: taking it over, working on a local copy, and releasing it.

The server puts what makes the run durable at the URL, see `replica`. Everything else (configuration, summary,
pictures, TensorBoard files) is copied from here, in the background.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import re
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from leap_dist.config.loading import ConfigError
from leap_dist.storage import locks, replica, run_directory
from leap_dist.storage.location import Location, Run, Url, holds_objects
from leap_dist.storage.locks import Heartbeat, RunDirectoryBusy, lock_holder
from leap_dist.storage.objects import Storage, open_storage
from leap_dist.storage.redaction import redact
from leap_dist.storage.replica import COPIES, LEDGER, Remote

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


log = logging.getLogger(__name__)

LAST_ATTEMPTS = 3
"""Attempts at the final copy when a launch ends."""


class RemoteRun(Run):
    """A run at a URL. Entering takes it over and fills the working copy; leaving puts everything back.

    Entering raises ConfigError if the storage cannot be used, and RunDirectoryBusy if another launch holds the run.
    """

    def __init__(self, url: Url) -> None:
        """Open the storage without sending a request yet. Raises ConfigError if the URL cannot be used."""
        # Not Run.__init__: a working copy is private, so it needs no lock against other launches.
        self._storage = open_storage(url)
        if url.lower().startswith("memory:"):
            raise ConfigError("run-dir: memory:// belongs to one process, and a run has several; use file:///")
        self.shown = self._storage.url
        name = re.sub(r"[^A-Za-z0-9_-]", "-", self.shown.rpartition("/")[2])[:40]
        self.folder = Path(tempfile.mkdtemp(prefix=f"leap-dist-{name}-"))
        atexit.register(self._remove_working_copy)
        self._keep_working_copy = False
        self._alerts: deque[str] = deque(maxlen=20)
        self._heartbeat: Heartbeat | None = None
        self._copy = BackgroundCopy(self._storage, self.folder, self._alert, lambda: self._lost is not None)

    @property
    def _lost(self) -> locks.LockLost | None:
        return self._heartbeat.lost if self._heartbeat else None

    def fetch_config(self) -> bool:
        """Download the configuration, if any. Returns whether a run has begun at the URL. Raises ConfigError."""
        with self.translated_errors(), self._one_line_errors():
            names = [name for name in ("config.yaml", "manifest.json") if self._storage.find(name) is not None]
            replica.fetch(self._storage, self.folder, {name: name for name in names})
            begun = replica.has_begun(self._storage)
            if begun and "config.yaml" not in names:
                raise ConfigError(run_directory.damaged(f"run-dir: {self.shown}"))
            return begun

    def __enter__(self) -> RemoteRun:
        with self._one_line_errors():
            if self._storage.folder is not None:
                run_directory.refuse_links(self._storage.folder)
                if (holder := lock_holder(self._storage.folder)) is not None:
                    raise RunDirectoryBusy(f"run-dir: {self.shown} is in use by a live server ({holder}); stop it")
            self._storage.probe()
            claim, before = locks.take_over(self._storage, warn=lambda text: log.warning("run-dir: %s", text))
            self.remote = Remote(self.shown, claim)
            self._heartbeat = Heartbeat(self._storage, claim, self._alert)
            self._heartbeat.start()
            try:
                replica.pull(self._storage, self.folder, claim, before)
            except BaseException:
                self._heartbeat.stop()
                self._heartbeat.release()
                raise
        return self

    def publish(self) -> None:
        """See `Run.publish`."""
        with self._one_line_errors():
            for name in ("config.yaml", "manifest.json"):
                self._copy.copy(name)
        self._copy.start()

    def report(self, summary: dict[str, Any]) -> dict[str, Any]:
        """See `Run.report`."""
        if self._lost is not None:
            raise self._lost
        return {**summary, "alerts": [*summary["alerts"], *self._alerts]}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Copy all that has changed (after an error only the summary), then release the run."""
        self._copy.stop()
        if self._heartbeat is not None:
            self._heartbeat.stop()
            if self._lost is None:
                if kind is None:
                    self._final_copy()
                else:
                    with contextlib.suppress(OSError):
                        self._copy.copy("summary.json")
                self._heartbeat.release()
        self._remove_working_copy()

    def _final_copy(self) -> None:
        """Copy what the URL still lacks when the launch ends. If that fails, the working copy is kept."""
        assert self.remote is not None  # or nothing was entered that could be left
        deadline = time.monotonic() + run_directory.ORPHAN_SECONDS
        while (alive := lock_holder(self.folder) is not None) and time.monotonic() < deadline:
            time.sleep(0.1)  # the server may outlive the shutdown of the cluster by a moment
        for attempt in range(LAST_ATTEMPTS):
            time.sleep(float(attempt))
            problem = self._copy.copy_all()
            try:
                if alive:
                    self._storage.put(LEDGER, (self.folder / LEDGER).read_bytes())
                else:
                    replica.put_whole_ledger(self._storage, self.folder, self.remote.claim)
            except OSError as error:
                problem = redact(str(error.strerror))
            if not problem:
                return
        self._keep_working_copy = True
        log.warning("some files could not be copied to %s (%s); find them in %s", self.shown, problem, self.folder)

    def _alert(self, text: str) -> None:
        if text not in self._alerts:
            self._alerts.append(text)

    @contextlib.contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        """Turn an OSError of the storage into a ConfigError of one line."""
        try:
            yield
        except OSError as error:
            raise ConfigError(f"run-dir: {self.shown} cannot be used: {error.strerror or error}") from None

    def _remove_working_copy(self) -> None:
        if not self._keep_working_copy:
            shutil.rmtree(self.folder, ignore_errors=True)


def open_run(where: Location, *, resume: bool | Literal["auto"]) -> Run:
    """Open the run to start or, with `resume`, to continue; "auto" continues a run that has begun, and starts others.

    Raises ConfigError if a new run exists already, or a run to resume does not.
    """
    if isinstance(where, Url):
        remote = RemoteRun(where)
        begun = remote.fetch_config()
        remote.continues = begun if resume == "auto" else resume
        if begun and not resume:
            raise ConfigError(run_directory.holds_run(remote.shown))
        if resume is True and not run_directory.exists(remote.folder):
            raise ConfigError(f"resume: {remote.shown} holds no run; leave --resume out to start one there")
        return remote
    if holds_objects(where):
        raise ConfigError(f"run-dir: {where} holds a run that belongs to a URL; use file://{where.resolve()}")
    begun = run_directory.has_begun(where)
    if not resume and begun:
        raise ConfigError(run_directory.already_exists(where))
    if not begun and resume is not True:
        run_directory.require_free(where)
    run = Run(where, new=not resume)
    run.continues = begun if resume == "auto" else resume
    return run
