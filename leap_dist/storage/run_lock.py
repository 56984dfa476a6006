"""The lock on a run directory, which allows one live server in it."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from pathlib import Path
from typing import TextIO


class RunDirectoryBusy(RuntimeError):
    """Another live server holds the run directory."""


class RunLock:
    """An advisory lock (flock) on a run directory, which the operating system drops when its holder dies."""

    def __init__(self, run_dir: Path) -> None:
        """Take the lock. Raises RunDirectoryBusy, which names the holder, if another process has it; OSError."""
        self._file: TextIO = (run_dir / ".lock").open("a+")
        if not _flock(self._file, fcntl.LOCK_EX, attempts=20):
            self._file.close()
            raise RunDirectoryBusy(f"{run_dir} is in use by a live server ({_holder(run_dir)})")
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Release the lock. Idempotent."""
        self._file.close()


def lock_holder(run_dir: Path) -> str | None:
    """Return the process that holds the lock on a run directory, or None. Raises OSError if that cannot be told."""
    path = run_dir / ".lock"
    if not path.exists():
        return None
    with path.open() as file:
        return None if _flock(file, fcntl.LOCK_SH, attempts=1) else _holder(run_dir)


def other_host(run_dir: Path) -> str | None:
    """Return the last holder of the lock if it runs on another host, whose lock may be invisible here; else None."""
    try:
        holder = _holder(run_dir)
    except OSError:
        return None
    match = re.fullmatch(r"process \d+ on (\S+)", holder)
    return holder if match and match[1] != socket.gethostname() else None


def _flock(file: TextIO, kind: int, *, attempts: int) -> bool:
    """Try to lock, up to `attempts` times, 50 ms apart: another process may be testing the lock, or be dying."""
    for attempt in range(attempts):
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if attempt + 1 < attempts:
                time.sleep(0.05)
    return False


def _holder(run_dir: Path) -> str:
    return (run_dir / ".lock").read_text(errors="replace")[:200].strip() or "an unknown process"
