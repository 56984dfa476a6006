"""The run directory: creating it, checking it before Ray starts, and describing the run for later readers."""

from __future__ import annotations

import contextlib
import errno
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
from leap_dist.storage.locks import LAUNCH, LOCK, LockLost, RunDirectoryBusy, RunLock, lock_holder, other_host
from leap_dist.storage.manifest import write_manifest
from leap_dist.storage.new_directory import cannot_be_written, remove_if_empty

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


LARGEST_INDENTED = 2**17
"""Size in bytes above which a summary is not indented: that takes ten times as long, twice a second."""


class RunDirectoryGone(LockLost):
    """The directory of a running run was removed, so nothing can be saved any more."""


@contextlib.contextmanager
def claimed(run_dir: Path, *, new: bool = False, field: str = "run-dir") -> Iterator[None]:
    """Hold a directory for one launch, so that a second launch is refused before it writes anything.

    With `new`, the directory must not hold a run that has begun. If the block raises before there is any result, what
    the launch has written is removed again, and a KeyboardInterrupt says so. Raises RunDirectoryBusy if another launch
    holds the directory, ConfigError, which names the `field`, if it holds a run or cannot be written.
    """
    try:
        _refuse_link(run_dir, run_dir / LAUNCH, field)
        run_dir.mkdir(parents=True, exist_ok=True)
        before, had_results = set(os.listdir(run_dir)), _has_results(run_dir)
        lock = RunLock(run_dir, LAUNCH)
    except RunDirectoryBusy as error:
        raise RunDirectoryBusy(str(error).replace("run-dir:", f"{field}:", 1)) from None
    except OSError as error:
        raise ConfigError(cannot_be_written(run_dir, error, field)) from None
    try:
        if new and has_begun(run_dir):  # by a launch that was faster
            raise ConfigError(already_exists(run_dir))
        yield
    except BaseException as error:
        is_unused = not had_results and not _has_results(run_dir) and not _is_locked(run_dir)
        if is_unused:
            _remove_start(run_dir, before)
        if isinstance(error, KeyboardInterrupt) and (is_unused or str(error)):  # a second signal has no text
            removed = f"{run_dir} was removed" if not run_dir.exists() else "what this launch has written was removed"
            kept = f"what {run_dir} held before is kept" if had_results else f"{run_dir} is kept"
            error.args = (f"stopped before anything was trained; {removed if is_unused else kept}",)
        raise
    finally:
        lock.release()


def _remove_start(run_dir: Path, before: set[str]) -> None:
    """Remove what a launch has written to a directory that held the files `before`, and an empty directory itself."""
    for name in {*CONTENT} - before:
        remove(run_dir / name)
    if not before:
        remove_if_empty(run_dir)


def already_exists(run_dir: Path) -> str:
    """Return the error for a new run in a directory that holds one, or an evaluation."""
    if holds_evaluation(run_dir):
        return f"run-dir: {run_dir} holds an evaluation; choose another directory"
    if not exists(run_dir):
        return damaged(f"run-dir: {run_dir}")
    return holds_run(str(run_dir))


def holds_run(shown: str) -> str:
    """Return the error for a new run at a place that holds one."""
    return f"run-dir: {shown} already holds a run; add --resume to continue it, or choose another directory"


def damaged(place: str) -> str:
    """Return the error for a run without its configuration; `place` is its field and its path or URL."""
    return (
        f"{place} holds a run without config.yaml: it is damaged, or the MetaServer of a program made it; restore "
        "that file, or choose another directory"
    )


def require_free(folder: Path, field: str = "run-dir") -> None:
    """Raise ConfigError if a directory holds anything but hidden files, logs and the files of a run's start."""
    try:
        names = os.listdir(folder)
    except OSError as error:  # there is none, or it cannot be written either, which is reported later
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(cannot_be_written(folder, error, field)) from None
        return
    started = (*_START_ONLY, "config.yaml") if exists(folder) else ()
    for name in sorted(names):
        is_log = name.endswith((".log", ".out", ".err")) and not (folder / name).is_dir()
        if not (name.startswith(".") or name in (*started, "lost+found") or is_log):
            raise ConfigError(
                f"{field}: {folder} is not empty ({name[:80]}) and holds no run; choose a new or an empty directory"
            )


def require_place_of_evaluation(out: Path) -> None:
    """Raise ConfigError if a directory holds anything but the files of an evaluation."""
    if holds_evaluation(out):
        return
    if has_begun(out):
        raise ConfigError(f"out: {out} holds a training run; choose another")
    require_free(out, "out")


def prepare(run_dir: Path, config: Config, *, patience: float = 0.0, field: str = "run-dir") -> None:
    """Create a run directory, or accept one to resume, and write config.yaml and manifest.json.

    If a live server holds the directory but its driver is silent, waits up to `patience` seconds for that server to
    end. If the last holder ran on another host, whose lock may be invisible here, watches for its reports. Files of a
    failed start are overwritten; otherwise manifest.json gains a session, and a training run keeps its config.yaml
    until the launch has reported (`write_config`).

    Raises ConfigError if the directory cannot be written or contains links, RunDirectoryBusy if a live server holds it.
    """
    refuse_links(run_dir, field=field)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if (holder := _holder_after(run_dir, patience)) is not None:
            raise RunDirectoryBusy(
                f"{field}: {run_dir} is in use by a live server ({holder}); stop it or choose another"
            )
        if (holder := _holder_elsewhere(run_dir, max(patience, WATCH_SECONDS))) is not None:
            raise RunDirectoryBusy(
                f"{field}: {run_dir} is in use from another host ({holder}); stop it or choose another"
            )
        if not has_begun(run_dir):
            for name in _START_ONLY:
                remove(run_dir / name)
        for leftover in run_dir.glob(".*.tmp"):  # a crash cut this write short
            remove(leftover)
        if holds_evaluation(run_dir) or not (exists(run_dir) and has_begun(run_dir)):
            write_config(run_dir, config)
        write_manifest(run_dir, config)
    except OSError as error:
        raise ConfigError(cannot_be_written(run_dir, error, field)) from None


def write_config(run_dir: Path, config: Config) -> None:
    """Write or replace config.yaml. Raises OSError."""
    write_atomic(run_dir / "config.yaml", configuration.to_yaml(config).encode(), "config")


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
        held = any(lock_holder(run_dir, name) is not None for name in (LOCK, LAUNCH))
        return held or _holder_elsewhere(run_dir, WATCH_SECONDS) is not None
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
    return os.path.exists(run_dir / "config.yaml")


def has_begun(run_dir: Path) -> bool:
    """Return whether a directory holds results: a start that failed leaves only a description of the run."""
    try:
        saved = any(any((run_dir / name).glob("[!.]*")) for name in ("checkpoints", "journal"))
        return saved or any((run_dir / name).exists() for name in ("ledger.jsonl", "arms.json"))
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG  # such a directory cannot exist


def _has_results(run_dir: Path) -> bool:
    """Return whether a run has begun in a directory, or an evaluation has trained an agent, at least in part."""
    if not holds_evaluation(run_dir):
        return has_begun(run_dir)
    return any(any(run_dir.glob(f"{kind}/*/*/*.*")) for kind in ("runs", "states"))


def holds_evaluation(folder: Path) -> bool:
    """Return whether an evaluation was started in this directory."""
    return os.path.exists(folder / "arms.json")


def refuse_links(run_dir: Path, names: Iterable[str] = CONTENT, field: str = "run-dir") -> None:
    """Raise ConfigError if anything that a run would read or write is a symbolic link, which may lead outside."""
    for name in names:
        _refuse_link(run_dir, run_dir / name, field)
        for folder, inner_folders, inner_files in os.walk(run_dir / name):
            for inner in (*inner_folders, *inner_files):
                _refuse_link(run_dir, Path(folder, inner), field)


def _refuse_link(run_dir: Path, path: Path, field: str = "run-dir") -> None:
    try:
        is_link = path.is_symlink()
    except OSError:  # its name is too long, for example
        return
    if is_link:
        raise ConfigError(
            f"{field}: {path.relative_to(run_dir)} in {run_dir} is a symbolic link; put a copy there, or choose another"
        )


def load_config(run_dir: Path, overrides: dict[str, Any], *, preset: str | None = None) -> Config:
    """Return the configuration to resume with.

    Raises ConfigError if there is no run, if a fixed setting would change, if `preset` is not that of the run, or if
    the run needs modules that `overrides` do not name.
    """
    refuse_links(run_dir)
    if holds_evaluation(run_dir):
        raise ConfigError(f"resume: {run_dir} holds an evaluation; continue it with the same evaluate command")
    if not exists(run_dir):
        if has_begun(run_dir):
            raise ConfigError(damaged(f"resume: {run_dir}"))
        raise ConfigError(f"resume: {run_dir} holds no run; leave --resume out to start one there")
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
    text = json.dumps(summary)
    if len(text) < LARGEST_INDENTED:
        text = json.dumps(summary, indent=1)
    write_atomic(run_dir / "summary.json", text.encode(), "summary", durable=False)


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Return the content of summary.json. Raises ConfigError if it is missing or damaged."""
    refuse_links(run_dir)
    try:
        summary = json.loads(read_regular(run_dir / "summary.json", LARGEST_SUMMARY))
        json.dumps(summary, ensure_ascii=False).encode()  # text that cannot be printed is damage as well
    except FileNotFoundError:
        raise ConfigError(f"run-dir: {run_dir} has no summary.json") from None
    except OSError as error:
        raise ConfigError(f"run-dir: {run_dir}/summary.json cannot be read ({error.strerror})") from None
    except (CorruptFile, ValueError, RecursionError):
        raise ConfigError(
            f"run-dir: {run_dir}/summary.json is damaged; the next launch with --resume replaces it"
        ) from None
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


def counted_steps(run_dir: Path) -> tuple[int, dict[str, int]]:
    """Return the agent steps that the newest summary counts, and those of each task that was open then, by lease.

    Returns 0 and nothing if that is unknown.
    """
    try:
        summary = read_summary(run_dir)
        schema.check(summary, {"agent_steps": int, "leases": [{"lease": str, "steps": int}]}, "summary")
    except (ConfigError, ValueError):
        return 0, {}
    return max(0, summary["agent_steps"]), {lease["lease"]: lease["steps"] for lease in summary["leases"]}
