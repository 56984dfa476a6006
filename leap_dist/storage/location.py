"""A run where it is kept: in a plain directory, or at a URL, of which a launch has a working copy on its own machine.

What makes the run durable is put at the URL by the server, see `mirror`. The rest (configuration, summary, pictures,
TensorBoard's files) is copied from here, in the background: training never waits for it.
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
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from leap_dist.config.loading import ConfigError
from leap_dist.storage import remote_lock, replica, run_directory
from leap_dist.storage.atomic import CorruptFile
from leap_dist.storage.objects import is_url, open_storage
from leap_dist.storage.redaction import redact
from leap_dist.storage.remote_lock import BEAT_SECONDS, LockLost
from leap_dist.storage.replica import LEDGER, PLAIN, Remote
from leap_dist.storage.run_lock import RunDirectoryBusy, lock_holder

log = logging.getLogger(__name__)

COPY_SECONDS = 30.0  # between two copies of a file that keeps changing
SUMMARY_SECONDS = 3.0  # the same of the summary
LAST_ATTEMPTS = 3  # of the copy at the end
BEATS_MISSED = 3  # after which a person is told


class Url(str):
    """Where a run is kept in object storage. Its text has no secret in it once `open_storage` has taken it."""


Location = Path | Url


def location(text: str) -> Location:
    """A path or URL, as a person types it."""
    return Url(text) if is_url(text) else Path(text)


class Run:
    """A run in a plain directory, as `launch.py train` sees it: a context in which the run belongs to this launch."""

    remote: Remote | None = None
    """Where the server is to keep it too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """Where everybody works."""
        self.shown = str(folder)
        """What a person knows it by."""

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Nothing has to be given back."""

    def naming(self) -> contextlib.AbstractContextManager[None]:
        """In it, errors say what a person knows, and not where the working copy is."""
        return naming(self.folder, self.shown)

    def publish(self) -> None:
        """Lets others see that there is a run. Raises ConfigError."""

    def report(self, summary: dict[str, Any]) -> dict[str, Any]:
        """A summary, with what a person should know about the storage. Raises LockLost where the run is another's."""
        return summary


class RemoteRun(Run):
    """A run at a URL. On entering it is taken over, and the working copy filled; on leaving all is put back.

    Raises ConfigError and RunDirectoryBusy, on entering too.
    """

    def __init__(self, url: Url) -> None:
        """Opens the storage; nothing is asked of it yet, nor written."""
        self._storage = open_storage(url)
        if url.lower().startswith("memory:"):
            raise ConfigError("run-dir: memory:// is of one process only, and a run has several; use file:///")
        self.shown = self._storage.url
        name = re.sub(r"[^A-Za-z0-9_-]", "-", self.shown.rpartition("/")[2])[:40]
        self.folder = Path(tempfile.mkdtemp(prefix=f"leap-dist-{name}-"))
        atexit.register(self._tidy)
        self._keep = False
        self._closed = threading.Event()
        self._lost: LockLost | None = None
        self._alerts: deque[str] = deque(maxlen=20)
        self._copied: dict[str, tuple[int, int]] = {}  # time and size, by name
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._copy_on)]

    def look(self) -> bool:
        """Whether a run is there; then the working copy gets its configuration. Raises ConfigError."""
        with self.naming(), self._trouble():
            names = [name for name in ("config.yaml", "manifest.json") if self._storage.find(name) is not None]
            replica.fetch(self._storage, self.folder, {name: name for name in names})
        return "config.yaml" in names

    def __enter__(self) -> RemoteRun:
        with self._trouble():
            if self._storage.folder is not None:
                run_directory.refuse_links(self._storage.folder)
                if (holder := lock_holder(self._storage.folder)) is not None:
                    raise RunDirectoryBusy(f"run-dir: {self.shown} is in use by a live server ({holder}); stop it")
            self._storage.probe()
            claim, before = remote_lock.take(self._storage, say=lambda text: log.warning("run-dir: %s", text))
            self.remote = Remote(self.shown, claim)
            self._threads[0].start()
            try:
                replica.pull(self._storage, self.folder, claim, before)
            except BaseException:
                self._close(release=True)
                raise
        return self

    def publish(self) -> None:
        """See Run."""
        with self._trouble():
            for name in ("config.yaml", "manifest.json"):
                self._copy(name)
        self._threads[1].start()

    def report(self, summary: dict[str, Any]) -> dict[str, Any]:
        """See Run."""
        if self._lost is not None:
            raise self._lost
        return {**summary, "alerts": [*summary["alerts"], *self._alerts]}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Puts all that has changed, or after an error only the summary, and gives the run back."""
        self._close(release=False)
        if self._lost is None:
            if kind is None:
                self._copy_the_last()
            else:
                with contextlib.suppress(OSError):
                    self._copy("summary.json")
            self._close(release=True)
        self._tidy()

    def _close(self, *, release: bool) -> None:
        """Ends the threads, and with `release` says that the run is free."""
        self._closed.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        if release and self.remote is not None:
            with contextlib.suppress(OSError):
                remote_lock.beat(self._storage, self.remote.claim, -1, released=True)

    def _beat(self) -> None:
        """Shows that this launch is alive, until it is closed or the run is another's."""
        count = missed = 0
        while self.remote is not None and not self._closed.wait(BEAT_SECONDS):
            count += 1
            try:
                remote_lock.beat(self._storage, self.remote.claim, count)
                remote_lock.check(self._storage, self.remote.claim)
                missed = 0
            except LockLost as error:
                self._lost = error
                return
            except OSError as error:
                missed += 1
                if missed == BEATS_MISSED:
                    self._alert(f"{self.shown} does not answer ({error.strerror}); it is tried again")

    def _copy_on(self) -> None:
        """Copies what changes, until this launch is closed."""
        others_at = time.monotonic()
        while not self._closed.wait(SUMMARY_SECONDS) and self._lost is None:
            with contextlib.suppress(OSError):
                self._copy("summary.json")
            if time.monotonic() - others_at >= COPY_SECONDS:
                others_at = time.monotonic()
                if problem := self._copy_all():
                    self._alert(f"not all of it could be copied to {self.shown} ({problem}); it is tried again")

    def _copy_all(self) -> str:
        """Copies every file that is not needed to go on. Returns what went wrong, if so."""
        problem = ""
        for top in PLAIN:
            path = self.folder / top
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file() and not file.name.startswith("."):
                    try:
                        self._copy(file.relative_to(self.folder).as_posix())
                    except OSError as error:
                        problem = redact(str(error.strerror))
        return problem

    def _copy(self, name: str) -> None:
        """Puts a file that has changed since it was put last. Raises OSError."""
        path = self.folder / name
        status = path.stat()
        state = status.st_mtime_ns, status.st_size
        if self._copied.get(name) != state:
            self._storage.put(name, path.read_bytes())
            self._copied[name] = state

    def _copy_the_last(self) -> None:
        """All that is not there yet, at the end."""
        deadline = time.monotonic() + run_directory.ORPHAN_SECONDS
        while (alive := lock_holder(self.folder) is not None) and time.monotonic() < deadline:
            time.sleep(0.1)  # a server may outlive the cluster's last word by a moment
        for attempt in range(LAST_ATTEMPTS):
            time.sleep(float(attempt))
            problem = self._copy_all()
            try:
                if alive:
                    self._storage.put(LEDGER, (self.folder / LEDGER).read_bytes())
                else:
                    replica.put_whole_ledger(self._storage, self.folder)
            except OSError as error:
                problem = redact(str(error.strerror))
            if not problem:
                return
        self._keep = True
        log.warning(
            "not all of it could be copied to %s (%s): what is missing is in %s", self.shown, problem, self.folder
        )

    def _alert(self, text: str) -> None:
        if text not in self._alerts:
            self._alerts.append(text)

    @contextlib.contextmanager
    def _trouble(self) -> Iterator[None]:
        """Turns what storage may raise into one line."""
        try:
            yield
        except OSError as error:
            raise ConfigError(f"run-dir: {self.shown} cannot be used: {error.strerror or error}") from None

    def _tidy(self) -> None:
        """Removes the working copy; the URL has it all."""
        if not self._keep:
            shutil.rmtree(self.folder, ignore_errors=True)


def open_run(where: Location, *, resume: bool) -> Run:
    """The run to begin or, with `resume`, to go on with. Raises ConfigError where it is there already, or is not."""
    if isinstance(where, Url):
        remote = RemoteRun(where)
        if remote.look() and not resume:
            raise ConfigError(_already(remote.shown))
        if resume and not run_directory.exists(remote.folder):
            raise ConfigError(f"resume: {remote.shown} holds no run; leave --resume out to start one there")
        return remote
    if is_kept(where):
        raise ConfigError(f"run-dir: {where} is where a run is kept by its URL; go on with file://{where.resolve()}")
    if not resume and run_directory.exists(where):
        raise ConfigError(_already(str(where)))
    return Run(where)


def is_kept(folder: Path) -> bool:
    """Whether a directory is what a file:// URL leads to: a run is kept there, but nobody works in it."""
    try:
        with (folder / ".lock").open("rb") as file:
            return file.read(1) == b"{"
    except OSError:
        return False


@contextlib.contextmanager
def naming(folder: Path, shown: str) -> Iterator[None]:
    """Lets errors say what a person knows, and not where the copy is."""
    try:
        yield
    except (ConfigError, CorruptFile) as error:
        raise type(error)(str(error).replace(str(folder), shown)) from None


def _already(shown: str) -> str:
    return f"run-dir: {shown} already holds a run; add --resume to go on with it, or choose another"
