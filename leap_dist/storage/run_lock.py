"""The lock on a run directory: one live server each."""

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
    """An advisory lock on the run directory, which the operating system drops when its holder dies."""

    def __init__(self, run_dir: Path) -> None:
        """Takes the lock. Raises RunDirectoryBusy, naming the holder, where another process keeps it; OSError."""
        self._file: TextIO = (run_dir / ".lock").open("a+")
        if not _flock(self._file, fcntl.LOCK_EX, attempts=20):
            self._file.close()
            raise RunDirectoryBusy(f"{run_dir} is in use by a live server ({_holder(run_dir)})")
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Gives the lock back. Idempotent."""
        self._file.close()


def lock_holder(run_dir: Path) -> str | None:
    """Who holds the lock on a run directory, None where nobody does. Raises OSError where that cannot be told."""
    path = run_dir / ".lock"
    if not path.exists():
        return None
    with path.open() as file:
        return None if _flock(file, fcntl.LOCK_SH, attempts=1) else _holder(run_dir)


def other_host(run_dir: Path) -> str | None:
    """Who last held the lock, where that is a process of another host: a lock there may not be seen here."""
    try:
        holder = _holder(run_dir)
    except OSError:
        return None
    match = re.fullmatch(r"process \d+ on (\S+)", holder)
    return holder if match and match[1] != socket.gethostname() else None


def _flock(file: TextIO, kind: int, *, attempts: int) -> bool:
    """Tries to lock, `attempts` times in steps of 50 ms: somebody may just be looking, or a killed holder dying."""
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
