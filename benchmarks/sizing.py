"""Sizing formulas of docs/scaling.md; a test compares them with the simulation.

python -c "from benchmarks.sizing import estimate; print(estimate(workers=64, batch=16))"
"""

from __future__ import annotations

from typing import NamedTuple

VECTOR_MEGABYTES = 2.7  # size of the encoder of `fast`
BITS = {"float32": 32, "int16": 16, "int8": 8}


class Estimate(NamedTuple):
    """Expected load while the server keeps up."""

    task_seconds: float
    meta_updates_per_hour: float
    staleness: float
    """Mean number of meta-updates during a task, in mode buffered."""
    pushes_per_second: float
    """Final and partial contributions per second."""
    renewals_per_second: float
    """Renewals per second without aggregators, at loads below which workers are not told to report less often."""
    megabytes_per_second: float
    """Megabytes per second that the server receives."""
    journal_gigabytes: float
    """Maximum size of the journal in gigabytes."""


def estimate(
    *,
    workers: int,
    batch: int,
    steps_per_second: float = 1750.0,
    task_steps: int = 1_000_000,
    push_interval: int = 50_000,
    heartbeat_seconds: float = 2.0,
    keep_checkpoints: int = 3,
    wire: str = "float32",
    prefixes_count: bool = False,
) -> Estimate:
    """Estimate the load in mode buffered with |B| = `batch`, for workers of equal speed."""
    seconds = task_steps / steps_per_second
    finals = workers / seconds
    partials = workers * steps_per_second / push_interval - finals
    vector = VECTOR_MEGABYTES * BITS[wire] / 32
    return Estimate(
        task_seconds=seconds,
        meta_updates_per_hour=3600 * finals / batch,
        staleness=workers / batch,
        pushes_per_second=finals + partials,
        renewals_per_second=workers / heartbeat_seconds,
        megabytes_per_second=vector * (finals + (partials if prefixes_count else 0.0)),
        journal_gigabytes=(keep_checkpoints + 1) * batch * vector / 1000,
    )
