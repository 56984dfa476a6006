"""Fault injection: named points at which tests kill the process or make the disk full. Disarmed, they do nothing.

    LEAP_FAILPOINTS="journal.written=kill@3,checkpoint.write=full@2-5"  python launch.py train …

kills the process that reaches `journal.written` for the third time with SIGKILL, and makes the disk full for the second
to fifth checkpoint. If LEAP_FAILPOINTS_FIRED names a file, faults that fired are recorded there, and a fault that fires
only once does not fire again in another process, so that a restarted server survives. For tests and drills only.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

FILES = (
    "config",
    "manifest",
    "lease",
    "journal",
    "checkpoint-file",
    "init",
    "summary",
    "arms",
    "transfer-run",
    "validation",
    "transfer-agent",
    "transfer-state",
    "transfer-report",
    "study",
    "study-report",
    "object",
    "position",
)
"""Kinds of files that `write_atomic` writes."""
WRITES = ("write", "written", "renamed", "durable")
"""Stages of a write: before it, after the flush of the temporary file, after the rename, after the flush of that."""

POINTS = (
    *(f"{file}.{write}" for file in FILES for write in WRITES),
    *(f"checkpoint.{write}" for write in WRITES),
    *(f"ledger.{write}" for write in ("write", "written", "durable")),
    "journal.discard",  # an entry that is no longer needed is about to be deleted
    "lease.close",  # the record of a lease is about to be deleted
    "update.apply",  # a meta-update is about to change φ
    "update.applied",  # φ has changed, in memory only
    "push.received",
    "push.acknowledge",  # all is done, but the worker has no reply yet
    "lease.acknowledge",
    "task.start",  # in the worker
    "task.update",
    "task.pushed",
    "task.saved",
)

ACTIONS: dict[str, Callable[[str], object]] = {}
"""Actions by name: "kill" sends SIGKILL, "full" raises ENOSPC, "raise" an unexpected error; "hang" blocks forever
and "slow" sleeps for a tenth of a second."""


class _Fault(NamedTuple):
    action: str
    first: int
    last: int
    text: str


_armed: dict[str, list[_Fault]] = {}
hits: Counter[str] = Counter()
"""Number of times that each point was reached in this process while any was armed."""


def failpoint(name: str) -> None:
    """Mark a point of the program. If a fault is armed there and due, it happens."""
    if not _armed:
        return
    hits[name] += 1
    for fault in _armed.get(name, ()):
        if fault.first <= hits[name] <= fault.last and _may_fire(fault):
            ACTIONS[fault.action](name)


def arm(text: str) -> None:
    """Arm the faults in `text` instead of those armed before, and reset all counts. Raises ValueError."""
    faults: dict[str, list[_Fault]] = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"([a-z.-]+)=([a-z]+)(?:@(\d+)(?:-(\d+))?)?", part)
        if match is None or match[1] not in POINTS or match[2] not in ACTIONS:
            raise ValueError(f"failpoints: {part!r} is not POINT=ACTION@FIRST-LAST with one of {', '.join(ACTIONS)}")
        first = int(match[3] or 1)
        faults.setdefault(match[1], []).append(_Fault(match[2], first, int(match[4] or first), part))
    _armed.clear()
    _armed.update(faults)
    hits.clear()


def _may_fire(fault: _Fault) -> bool:
    """Record that a fault is about to fire. Return False if it must not, because it has fired already."""
    name = os.environ.get("LEAP_FAILPOINTS_FIRED")
    if name is None:
        return True
    path = Path(name)
    if fault.first == fault.last and path.exists() and fault.text in path.read_text().splitlines():
        return False
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o666), "a") as file:
        file.write(f"{fault.text}\n")
    return True


def _kill(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _full(name: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)


def _raise(name: str) -> None:
    raise RuntimeError(f"failpoint {name}")


def _hang(name: str) -> None:
    threading.Event().wait()


def _slow(name: str) -> None:
    time.sleep(0.1)


ACTIONS |= {"kill": _kill, "full": _full, "raise": _raise, "hang": _hang, "slow": _slow}
arm(os.environ.get("LEAP_FAILPOINTS", ""))
