"""The lock on a run directory, which allows one live server in it."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from pathlib import Path
from typing import IO

from leap_dist.config import files

LOCK = ".lock"
LAUNCH = ".launch"


class RunDirectoryBusy(RuntimeError):
    """Another live server holds the run directory."""


class RunLock:
    """An advisory lock (flock) on a run directory, which the operating system drops when its holder dies.

    Args:
        run_dir: existing directory.
        name: file to lock. A server locks `LOCK`; a launch locks `LAUNCH` before it writes anything.

    Raises RunDirectoryBusy, which names the holder, if another process has the lock; OSError.
    """

    def __init__(self, run_dir: Path, name: str = LOCK) -> None:
        self._file = files.open_to_append(run_dir / name)
        if not _flock(self._file, fcntl.LOCK_EX, attempts=20):
            self._file.close()
            who = "a live server" if name == LOCK else "another launch"
            raise RunDirectoryBusy(f"run-dir: {run_dir} is in use by {who} ({_holder(run_dir, name)})")
        if os.fstat(self._file.fileno()).st_nlink == 0:  # a failed start removed it in this very moment
            self._file.close()
            raise RunDirectoryBusy(f"run-dir: {run_dir} was in use by another launch until now; try again")
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._file.flush()

    def release(self) -> None:
        """Release the lock. Idempotent."""
        self._file.close()


def lock_holder(run_dir: Path) -> str | None:
    """Return the process that holds the lock on a run directory, or None. Raises OSError if that cannot be told."""
    try:
        with files.open_regular(run_dir / LOCK) as file:
            return None if _flock(file, fcntl.LOCK_SH, attempts=1) else _holder(run_dir)
    except FileNotFoundError:
        return None


def other_host(run_dir: Path) -> str | None:
    """Return the last holder of the lock if it runs on another host, whose lock may be invisible here; else None."""
    try:
        holder = _holder(run_dir)
    except OSError:
        return None
    match = re.fullmatch(r"process \d+ on (\S+)", holder)
    return holder if match and match[1] != socket.gethostname() else None


def _flock(file: IO[bytes], kind: int, *, attempts: int) -> bool:
    """Try to lock, up to `attempts` times, 50 ms apart: another process may be testing the lock, or be dying."""
    for attempt in range(attempts):
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if attempt + 1 < attempts:
                time.sleep(0.05)
    return False


def _holder(run_dir: Path, name: str = LOCK) -> str:
    with files.open_regular(run_dir / name) as file:
        text = file.read(200).decode(errors="replace").strip()
    return ascii(text)[1:-1] or "an unknown process"
