"""The files of `--profile`: each worker's profiler trace and time breakdown."""

from __future__ import annotations

from collections.abc import Iterable, MutableSequence
from pathlib import Path

from leap_dist.driver.worker_slot import WorkerSlot
from leap_dist.nn.profiling import breakdown
from leap_dist.storage.atomic import write_atomic


class Profiles:
    """Writes profiles to a directory.

    Args:
        folder: the directory, which is made when it is needed, or None if nothing is profiled.
        alerts: receives a line for each file that cannot be written.
    """

    def __init__(self, folder: Path | None, alerts: MutableSequence[str]) -> None:
        self._folder = folder
        self._alerts = alerts

    def wants(self, slot: WorkerSlot) -> bool:
        """Return whether the next worker of this slot is to be profiled."""
        return self._folder is not None and slot.operators is None

    def write_trace(self, slot: WorkerSlot, trace: bytes) -> None:
        """Write the profiler trace of a worker."""
        self._write(f"{slot.name}.trace.json.gz", trace)

    def write_breakdowns(self, slots: Iterable[WorkerSlot]) -> None:
        """Write each worker's time breakdown and costliest operators."""
        for slot in slots:
            if slot.readings:
                text = f"{slot.name}\n\n{breakdown(slot.readings[-1])}\n\n{slot.operators or ''}"
                self._write(f"{slot.name}.txt", text.encode())

    def _write(self, name: str, content: bytes) -> None:
        if self._folder is None:
            return
        try:
            self._folder.mkdir(exist_ok=True)
            write_atomic(self._folder / name, content, "profile", durable=False)
        except OSError as error:
            self._alerts.append(f"{name} could not be written: {error}")
