"""Read-only access to a run directory or URL, for status, pictures and initializations."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from leap_dist.config.loading import ConfigError
from leap_dist.storage import locks, replica, run_directory
from leap_dist.storage.location import Location, Url, holds_objects, translated_errors
from leap_dist.storage.objects import Storage, open_storage
from leap_dist.storage.replica import LEDGER


def is_remote(where: Location) -> bool:
    """Return whether a run is kept as objects there, even if `where` is the target directory of a file:// URL."""
    return isinstance(where, Url) or holds_objects(where)


@contextlib.contextmanager
def local_copy(where: Location, *wanted: str, field: str = "run-dir") -> Iterator[Path]:
    """Yield a directory to read a run from: the run directory, or a temporary copy of the `wanted` files that exist.

    Raises ConfigError. Errors inside the block name the URL instead of the copy.
    """
    if not isinstance(where, Url):
        if not holds_objects(where):
            yield where
            return
        where = Url(f"file://{where.resolve()}")
    storage = open_storage(where, field)
    with tempfile.TemporaryDirectory(prefix="leap-dist-read-") as temporary:
        folder = Path(temporary) / (re.sub(r"[^A-Za-z0-9_.-]", "-", storage.url.rpartition("/")[2]) or "run")
        folder.mkdir()
        with translated_errors(folder, storage.url):
            _fetch(storage, folder, wanted, field)
            yield folder


@functools.cache
def cached_initialization(where: Url) -> Path:
    """Return the path of a copy of an init.safetensors, which is kept until the process ends.

    The URL is that of the file or of its run, whose description lies beside the copy. Raises ConfigError.
    """
    folder = Path(tempfile.mkdtemp(prefix="leap-dist-read-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return fetch_initialization(where, folder)


def fetch_initialization(where: Url, below: Path) -> Path:
    """Download an init.safetensors into a new folder below `below`, named like the run. Raises ConfigError."""
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
    """Return whether a launch is working on the run; True if that is unknown."""
    if not isinstance(where, Url):
        if not holds_objects(where):
            return run_directory.is_alive(where)
        where = Url(f"file://{where.resolve()}")
    storage = open_storage(where)
    try:
        claim = locks.read_claim(storage)
        if claim is not None and locks.is_released(storage, claim):
            return False
        return locks.is_alive(storage, claim)
    except OSError:
        return True


def is_starting(where: Location, folder: Path) -> bool:
    """Return whether a launch works on a run that has never reported, while Ray starts, for example.

    Args:
        where: where the run is kept.
        folder: directory to read it from; see `local_copy`.
    """
    return run_directory.exists(folder) and not _has_reported(folder) and is_alive(where)


def require_summary(folder: Path) -> None:
    """Raise ConfigError, which says what a directory holds instead, if there is no summary.json in it."""
    if _has_reported(folder):
        return
    place = f"run-dir: {folder}"
    if os.path.isfile(folder):
        raise ConfigError(f"{place} is a file; name the directory of a run, an evaluation or a study")
    if run_directory.exists(folder):
        raise ConfigError(f"{place} has no summary.json: its launch ended before its first report; start it again")
    if run_directory.has_begun(folder):
        raise ConfigError(
            f"{place} has no summary.json: the MetaServer of a program made it (call its method status), or the run "
            "is damaged"
        )
    if runs := [path.name for path in _folders(folder) if _holds_something(path)]:
        more = f" and {len(runs) - SHOWN} more" if len(runs) > SHOWN else ""
        raise ConfigError(f"{place} holds {', '.join(runs[:SHOWN])}{more}; name one, as in {folder / runs[0]}")
    raise ConfigError(f"{place} has no summary.json; no run was started there")


SHOWN = 12
"""Largest number of runs that a message about the directory around them names."""


def _has_reported(folder: Path) -> bool:
    return os.path.exists(folder / "summary.json")


def _holds_something(folder: Path) -> bool:
    return any(os.path.exists(folder / name) for name in ("config.yaml", "study.json"))


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []


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
            replica.write_ledger(storage, folder, names, locks.read_claim(storage))
    except OSError as error:
        raise ConfigError(f"{field}: {storage.url} cannot be read: {error.strerror or error}") from None
