"""Who only reads a run, wherever it is kept: status, pictures, its initialization."""

from __future__ import annotations

import atexit
import contextlib
import functools
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from leap_dist.config.loading import ConfigError
from leap_dist.storage import remote_lock, replica, run_directory
from leap_dist.storage.location import Location, Url, is_kept, naming
from leap_dist.storage.objects import Storage, open_storage
from leap_dist.storage.replica import LEDGER


def is_remote(where: Location) -> bool:
    """Whether a run is kept there in the way of object storage, whatever it was called by."""
    return isinstance(where, Url) or is_kept(where)


@contextlib.contextmanager
def folder_of(where: Location, *wanted: str, field: str = "run-dir") -> Iterator[Path]:
    """A directory to read a run from: itself, or a private copy of the `wanted` files, as far as there are such.

    Raises ConfigError; what is raised inside names the URL instead of the copy.
    """
    if not isinstance(where, Url):
        if not is_kept(where):
            yield where
            return
        where = Url(f"file://{where.resolve()}")
    storage = open_storage(where, field)
    with tempfile.TemporaryDirectory(prefix="leap-dist-read-") as temporary:
        folder = Path(temporary) / (re.sub(r"[^A-Za-z0-9_.-]", "-", storage.url.rpartition("/")[2]) or "run")
        folder.mkdir()
        with naming(folder, storage.url):
            _fetch(storage, folder, wanted, field)
            yield folder


@functools.cache
def initialization(where: Url) -> Path:
    """A private copy of an init.safetensors, or of the one in a run, until the process ends.

    What describes its run lies beside it. Raises ConfigError.
    """
    folder = Path(tempfile.mkdtemp(prefix="leap-dist-read-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return fetch_initialization(where, folder)


def fetch_initialization(where: Url, below: Path) -> Path:
    """The same in a new folder `below` one, which is of the run's name. Raises ConfigError."""
    parent, _, name = where.rstrip("/").rpartition("/")
    if not name.endswith(".safetensors"):
        parent, name = where, "init.safetensors"
    storage = open_storage(parent, "init")
    folder = below / re.sub(r"[^A-Za-z0-9_.-]", "-", storage.url.rpartition("/")[2])
    folder.mkdir()
    _fetch(storage, folder, (name, "config.yaml", "manifest.json"), "init")
    if not (folder / name).exists():
        raise ConfigError(f"init: there is no {name} at {storage.url}")
    return folder / name


def is_alive(where: Location) -> bool:
    """Whether somebody works on a run that has not ended; yes where that cannot be told."""
    if not isinstance(where, Url):
        if not is_kept(where):
            return run_directory.is_alive(where)
        where = Url(f"file://{where.resolve()}")
    storage = open_storage(where)
    try:
        claim = remote_lock.read_claim(storage)
        if claim is not None and remote_lock.is_released(storage, claim):
            return False
        return remote_lock.is_alive(storage, claim)
    except OSError:
        return True


def _fetch(storage: Storage, folder: Path, wanted: tuple[str, ...], field: str) -> None:
    try:
        if storage.folder is not None:
            run_directory.refuse_links(storage.folder)
        names = storage.names()
        there = {name: name for name in names if name in wanted}
        if not there:
            raise ConfigError(f"{field}: {storage.url} holds no run")
        replica.fetch(storage, folder, there)
        if LEDGER in wanted:
            replica.write_ledger(storage, folder, names, remote_lock.read_claim(storage))
    except OSError as error:
        raise ConfigError(f"{field}: {storage.url} cannot be read: {error.strerror or error}") from None
