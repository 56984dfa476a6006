"""What workers were promised, written down by themselves: who claims that nothing was lost has to know what there was.

Where the environment variable LEAP_AUDIT names a folder, every worker process appends to a file of its own there, one
line of JSON per event. `benchmarks/chaos.py` holds the ledger against it. Without that variable nothing is written.
"""

from __future__ import annotations

import json
import os
from pathlib import Path


def note(event: str, **what: object) -> None:
    """Appends an event to this process's file. On disk when this returns, as far as a killed process goes."""
    folder = os.environ.get("LEAP_AUDIT")
    if folder is not None:
        with Path(folder, f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps({"event": event, **what}) + "\n")


def read(folder: Path) -> list[dict[str, object]]:
    """All events of all processes, each process's in order. A line that a kill cut short is left out."""
    events = []
    for path in sorted(folder.glob("*.jsonl")):
        events += [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return events
