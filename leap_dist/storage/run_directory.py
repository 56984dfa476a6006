"""The run directory: creating it, checking it before Ray starts, and describing the run for later readers."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from leap_dist.config import files
from leap_dist.config import loading as configuration
from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.protocol import schema
from leap_dist.storage.atomic import CorruptFile, read_regular, remove, write_atomic
from leap_dist.storage.locks import LAUNCH, LockLost, RunDirectoryBusy, RunLock, lock_holder, other_host
from leap_dist.storage.manifest import write_manifest

CONTENT = (
    "config.yaml", "manifest.json", "checkpoints", "journal", "ledger.jsonl", "init.safetensors", "tensorboard",
    "ledger", "summary.json", "progress.png", "progress-phone.png", ".lock", ".launch", "profile",
    "best.safetensors", "validation.json", "validation",
    "arms.json", "initializations", "runs", "agents", "states", "figures", "report.md", "report.html", "results.csv",
    "results.json",
)  # fmt: skip
"""Names that a training run or an evaluation uses in its directory."""

_START_ONLY = ("manifest.json", "summary.json", "tensorboard", "profile", "progress.png")
"""Files besides config.yaml that a failed start may leave, and that a new start must not mistake for its own."""

ORPHAN_SECONDS = 10.0
"""Seconds for which a server may outlive its killed driver."""

WATCH_SECONDS = 6.0
"""Seconds within which several summaries of a live driver appear, even on a file system that shows changes late."""

ENDED = ("done", "interrupted", "failed")
"""States of a run that has no driver."""

LARGEST_SUMMARY = 2**24
"""Size in bytes of the largest summary that is read."""


class RunDirectoryGone(LockLost):
    """The directory of a running run was removed, so nothing can be saved any more."""


@contextlib.contextmanager
def claimed(run_dir: Path, *, new: bool = False) -> Iterator[None]:
    """Hold a directory for one launch, so that a second launch is refused before it writes anything.

    With `new`, the directory must not hold a run that has begun. If the block raises before one has, a directory that
    was empty is removed again. Raises RunDirectoryBusy if another launch holds the directory, ConfigError if it holds
    a run or cannot be written.
    """
    _refuse_link(run_dir, run_dir / LAUNCH)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        was_empty = not any(run_dir.iterdir())
        lock = RunLock(run_dir, LAUNCH)
    except OSError as error:
        raise ConfigError(f"run-dir: {run_dir} cannot be written ({error.strerror}); choose another") from None
    try:
        if new and has_begun(run_dir):  # by a launch that was faster
            raise ConfigError(already_exists(str(run_dir)))
        yield
    except BaseException:
        if was_empty and not has_begun(run_dir) and not _is_locked(run_dir):
            remove(run_dir)
        raise
    finally:
        lock.release()


def create_unique(wanted: Path) -> Path:
    """Create a directory named `wanted`, or with -2, -3 … appended if that name is taken. Raises ConfigError.

    It is removed when the process ends if it is still empty then.
    """
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                break
    except OSError as error:
        raise ConfigError(f"run-dir: {wanted} cannot be written ({error.strerror}); choose another") from None
    atexit.register(_remove_if_empty, path.absolute())
    return path


def already_exists(shown: str) -> str:
    """Return the error for a new run at a place that holds one."""
    return f"run-dir: {shown} already holds a run; add --resume to continue it, or choose another directory"


def prepare(run_dir: Path, config: Config, *, patience: float = 0.0) -> None:
    """Create a run directory, or accept one to resume, and write config.yaml and manifest.json.

    If a live server holds the directory but its driver is silent, waits up to `patience` seconds for that server to
    end. If the last holder ran on another host, whose lock may be invisible here, watches for its reports. Files of a
    failed start are overwritten; otherwise manifest.json gains a session.

    Raises ConfigError if the directory cannot be written or contains links, RunDirectoryBusy if a live server holds it.
    """
    refuse_links(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if (holder := _holder_after(run_dir, patience)) is not None:
            raise RunDirectoryBusy(
                f"run-dir: {run_dir} is in use by a live server ({holder}); stop it or choose another"
            )
        if (holder := _holder_elsewhere(run_dir, max(patience, WATCH_SECONDS))) is not None:
            raise RunDirectoryBusy(
                f"run-dir: {run_dir} is in use from another host ({holder}); stop it or choose another"
            )
        if not has_begun(run_dir):
            for name in _START_ONLY:
                remove(run_dir / name)
        for leftover in run_dir.glob(".*.tmp"):  # a crash cut this write short
            remove(leftover)
        write_atomic(run_dir / "config.yaml", configuration.to_yaml(config).encode(), "config")
        write_manifest(run_dir, config)
    except OSError as error:
        raise ConfigError(f"run-dir: {run_dir} cannot be written ({error.strerror}); choose another") from None


def require(run_dir: Path) -> None:
    """Raise RunDirectoryGone if the directory of a running run was removed or replaced."""
    try:
        os.stat(run_dir / "config.yaml")
    except (FileNotFoundError, NotADirectoryError):
        raise RunDirectoryGone(f"run-dir: {run_dir} was removed during the run") from None
    except OSError:  # a shared file system that does not answer at the moment
        return


def _is_locked(run_dir: Path) -> bool:
    try:
        return lock_holder(run_dir) is not None
    except OSError:
        return True


def _remove_if_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()


def _holder_after(run_dir: Path, patience: float) -> str | None:
    """Return who still holds the directory after `patience` seconds, or as soon as its driver reports; else None."""
    deadline, reported = time.monotonic() + patience, _reported(run_dir)
    while (holder := lock_holder(run_dir)) is not None:
        if time.monotonic() >= deadline or _reported(run_dir) != reported:
            return holder
        time.sleep(0.1)
    return None


def _reported(run_dir: Path) -> int:
    """Return the modification time of the summary in ns, or 0 if there is none. Only meant for comparison."""
    try:
        with files.open_regular(
            run_dir / "summary.json"
        ) as file:  # opening makes a shared file system refresh its cache
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return 0


def is_alive(run_dir: Path) -> bool:
    """Return whether a launch is working on the run; True if that is unknown.

    If the lock names another host, waits a few seconds for a driver there to report.
    """
    try:
        return lock_holder(run_dir) is not None or _holder_elsewhere(run_dir, WATCH_SECONDS) is not None
    except OSError:
        return True


def _holder_elsewhere(run_dir: Path, seconds: float) -> str | None:
    """Return the holder on another host if its driver reports within `seconds`; else None."""
    if (holder := other_host(run_dir)) is None or _ended(run_dir):
        return None
    deadline, reported = time.monotonic() + seconds, _reported(run_dir)
    while time.monotonic() < deadline:
        time.sleep(0.25)
        if _reported(run_dir) != reported:
            return holder
    return None


def _ended(run_dir: Path) -> bool:
    try:
        return read_summary(run_dir)["state"] in ENDED
    except ConfigError:
        return False


def exists(run_dir: Path) -> bool:
    """Return whether a run was started in this directory."""
    try:
        return (run_dir / "config.yaml").exists()
    except OSError:  # the name is too long, for example
        return False


def has_begun(run_dir: Path) -> bool:
    """Return whether a directory holds results: a start that failed leaves only a description of the run."""
    try:
        saved = any(any((run_dir / name).glob("[!.]*")) for name in ("checkpoints", "journal"))
        return saved or any((run_dir / name).exists() for name in ("ledger.jsonl", "arms.json"))
    except OSError:
        return True


def holds_evaluation(folder: Path) -> bool:
    """Return whether an evaluation was started in this directory."""
    try:
        return (folder / "arms.json").exists()
    except OSError:
        return False


def refuse_links(run_dir: Path, names: Iterable[str] = CONTENT) -> None:
    """Raise ConfigError if anything that a run would read or write is a symbolic link, which may lead outside."""
    for name in names:
        _refuse_link(run_dir, run_dir / name)
        for folder, inner_folders, inner_files in os.walk(run_dir / name):
            for inner in (*inner_folders, *inner_files):
                _refuse_link(run_dir, Path(folder, inner))


def _refuse_link(run_dir: Path, path: Path) -> None:
    if path.is_symlink():
        raise ConfigError(
            f"run-dir: {path.relative_to(run_dir)} in {run_dir} is a symbolic link; put a copy there, or choose another"
        )


def load_config(run_dir: Path, overrides: dict[str, Any], *, preset: str | None = None) -> Config:
    """Return the configuration to resume with.

    Raises ConfigError if there is no run, if a fixed setting would change, if `preset` is not that of the run, or if
    the run needs modules that `overrides` do not name.
    """
    refuse_links(run_dir)
    if not exists(run_dir):
        raise ConfigError(f"resume: {run_dir} holds no run; leave --resume out to start one there")
    if holds_evaluation(run_dir):
        raise ConfigError(f"resume: {run_dir} holds an evaluation; continue it with the same evaluate command")
    saved = configuration.completed(configuration.read_yaml(run_dir / "config.yaml"))
    saved = configuration.without_code(saved, overrides, f"the run in {run_dir}")
    old = configuration.resolve(str(saved.get("preset")), saved)
    if preset is not None and preset != old.preset:
        raise ConfigError(
            f"resume: the run has preset {old.preset}, not {preset}; leave the preset out, or use another directory"
        )
    new = configuration.resolve(old.preset, saved, overrides)
    if changes := configuration.incompatibilities(old, new):
        raise ConfigError("resume: these settings cannot change during a run: " + "; ".join(changes))
    return new


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Replace summary.json. Raises OSError."""
    write_atomic(run_dir / "summary.json", json.dumps(summary, indent=1).encode(), "summary", durable=False)


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Return the content of summary.json. Raises ConfigError if it is missing or damaged."""
    refuse_links(run_dir)
    try:
        summary = json.loads(read_regular(run_dir / "summary.json", LARGEST_SUMMARY))
        json.dumps(summary, ensure_ascii=False).encode()  # text that cannot be printed is damage as well
    except (CorruptFile, OSError, ValueError, RecursionError):
        hint = "it has not reported yet" if exists(run_dir) else "no run was started there"
        raise ConfigError(f"run-dir: {run_dir} has no summary.json; {hint}") from None
    try:
        schema.check(summary, {"state": str, "tasks_wanted": int}, "summary")
    except ValueError as error:
        raise ConfigError(f"run-dir: {run_dir}/summary.json is damaged, or of another version: {error}") from None
    assert isinstance(summary, dict)
    return summary


def wall_seconds(run_dir: Path) -> float:
    """Return the wall-clock seconds of all launches so far, or 0 if unknown."""
    try:
        seconds = float(read_summary(run_dir).get("wall_seconds", 0.0))
    except (ConfigError, TypeError, ValueError, OverflowError):
        return 0.0
    return seconds if 0 <= seconds < 1e10 else 0.0
