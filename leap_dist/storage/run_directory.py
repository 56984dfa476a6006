"""The run directory: creating it, checking it before Ray starts, and describing the run for later readers."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from leap_dist.config import loading as configuration
from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.protocol import schema
from leap_dist.storage.atomic import write_atomic
from leap_dist.storage.redaction import redact_all
from leap_dist.storage.run_lock import RunDirectoryBusy, lock_holder, other_host

CONTENT = (
    "config.yaml", "manifest.json", "checkpoints", "journal", "ledger.jsonl", "init.safetensors", "tensorboard",
    "ledger", "summary.json", "progress.png", ".lock", "profile",
    "arms.json", "runs", "figures", "report.md", "report.html", "results.csv", "results.json",
)  # fmt: skip
"""Names that a training run or an evaluation uses in its directory."""

PACKAGES = ("torch", "ray", "numpy", "gymnasium", "ale-py", "safetensors", "tensorboard")
"""Packages whose versions are recorded in manifest.json."""

ORPHAN_SECONDS = 10.0
"""Seconds for which a server may outlive its killed driver."""

WATCH_SECONDS = 6.0
"""Seconds within which a live driver writes several summaries, even on a file system that shows changes late."""

ENDED = ("done", "interrupted", "failed")
"""States of a run that has no driver."""


def prepare(run_dir: Path, config: Config, *, patience: float = 0.0) -> None:
    """Create a run directory, or accept one to resume, and write config.yaml and manifest.json.

    If a live server holds the directory but its driver is silent, waits up to `patience` seconds for that server to
    end. If the last holder ran on another host, whose lock may be invisible here, watches for its reports.

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
        write_atomic(run_dir / "config.yaml", configuration.to_yaml(config).encode(), "config")
        write_atomic(run_dir / "manifest.json", json.dumps(manifest(config), indent=2).encode(), "manifest")
    except OSError as error:
        raise ConfigError(f"run-dir: {run_dir} cannot be written ({error.strerror}); choose another") from None


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
        with (run_dir / "summary.json").open("rb") as file:  # opening makes a shared file system refresh its cache
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return 0


def is_alive(run_dir: Path) -> bool:
    """Return whether a launch works on the run; True if that cannot be told.

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


def holds_evaluation(folder: Path) -> bool:
    """Return whether an evaluation was started in this directory."""
    try:
        return (folder / "arms.json").exists()
    except OSError:
        return False


def refuse_links(run_dir: Path) -> None:
    """Raise ConfigError if anything that a run would read or write is a symbolic link, which may lead outside."""
    for name in CONTENT:
        _refuse_link(run_dir, run_dir / name)
        for folder, folders, files in os.walk(run_dir / name):
            for inner in (*folders, *files):
                _refuse_link(run_dir, Path(folder, inner))


def _refuse_link(run_dir: Path, path: Path) -> None:
    if path.is_symlink():
        raise ConfigError(
            f"run-dir: {path.relative_to(run_dir)} in {run_dir} is a symbolic link; put a copy there, or choose another"
        )


def load_config(run_dir: Path, overrides: dict[str, Any]) -> Config:
    """Return the configuration to resume with. Raises ConfigError without a run, or if a fixed setting would change."""
    refuse_links(run_dir)
    if not exists(run_dir):
        raise ConfigError(f"resume: {run_dir} holds no run; leave --resume out to start one there")
    if holds_evaluation(run_dir):
        raise ConfigError(f"resume: {run_dir} holds an evaluation; continue it by the same evaluate command")
    saved = configuration.read_yaml(run_dir / "config.yaml")
    old = configuration.resolve(str(saved.get("preset")), saved)
    new = configuration.resolve(old.preset, saved, overrides)
    if changes := configuration.incompatibilities(old, new):
        raise ConfigError("resume: these settings cannot change during a run: " + "; ".join(changes))
    return new


def changed_packages(run_dir: Path) -> list[str]:
    """Return a warning for each package whose version differs from the one that the run was last started with.

    Call this before `prepare`, which records the versions that are installed now.
    """
    try:
        packages = json.loads((run_dir / "manifest.json").read_bytes())["packages"]
        schema.check(packages, {...: str}, "packages")
    except (OSError, KeyError, ValueError, TypeError, RecursionError):
        return ["manifest.json cannot be read, so changed package versions cannot be detected"]
    installed = {name: metadata.version(name) for name in PACKAGES}
    return [
        f"{name} is {installed[name]}, the run was started with {ascii(packages[name])[1:-1][:40]}: the bits may differ"
        for name in PACKAGES
        if name in packages and packages[name] != installed[name]
    ]


def manifest(config: Config) -> dict[str, Any]:
    """Return what is needed to repeat the run: versions, revision, seed, command and hardware."""
    import torch  # takes seconds, and most of those who use this module do not need it

    return {
        "leap_dist": _git_revision(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": redact_all([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seed": config.seed,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "hardware": {
            "machine": platform.machine(),
            "system": f"{platform.system()} {platform.release()}",
            "processors": os.cpu_count(),
            "bfloat16": torch.cpu._is_avx512_bf16_supported(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Replace summary.json. Raises OSError."""
    write_atomic(run_dir / "summary.json", json.dumps(summary, indent=1).encode(), "summary", durable=False)


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Return the content of summary.json. Raises ConfigError if it is missing or damaged."""
    refuse_links(run_dir)
    try:
        summary = json.loads((run_dir / "summary.json").read_bytes())
        json.dumps(summary, ensure_ascii=False).encode()  # text that cannot be printed is damage as well
    except (OSError, ValueError, RecursionError):
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


def _git_revision() -> str:
    """Return the commit of the running code, with a + if it was modified; "unknown" outside a checkout."""
    here = Path(__file__).parents[1]
    try:
        revision = _git(here, "rev-parse", "--short=12", "HEAD")
        return revision + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
