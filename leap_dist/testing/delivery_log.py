"""A log of deliveries, written by the workers themselves, that tests compare with the ledger.

If the environment variable LEAP_AUDIT names a folder, every worker process appends events to its own file there, one
line of JSON each. `benchmarks/chaos.py` checks the ledger against these files. Without the variable nothing is written.
"""

from __future__ import annotations

import json
import os
from pathlib import Path


def record(event: str, **what: object) -> None:
    """Append an event to this process's file. It survives a kill of the process as soon as this returns."""
    folder = os.environ.get("LEAP_AUDIT")
    if folder is not None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(Path(folder, f"{os.getpid()}.jsonl"), flags, 0o666), "a") as file:
            file.write(json.dumps({"event": event, **what}) + "\n")


def read(folder: Path) -> list[dict[str, object]]:
    """Return all events of all processes, in order for each process. Incomplete last lines are skipped."""
    events = []
    for path in sorted(folder.glob("*.jsonl")):
        events += [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return events
