"""The formulas of docs/scaling.md, which a test holds against the simulation.

python -c "from benchmarks.sizing import estimate; print(estimate(workers=64, batch=16))"
"""

from __future__ import annotations

from typing import NamedTuple

VECTOR_MEGABYTES = 2.7  # of the encoder of `fast`
BITS = {"float32": 32, "int16": 16, "int8": 8}


class Estimate(NamedTuple):
    """What to expect while the server keeps up."""

    task_seconds: float
    meta_updates_per_hour: float
    staleness: float
    """Mean: meta-updates during a task, in mode buffered."""
    pushes_per_second: float
    """Final contributions and partial ones."""
    renewals_per_second: float
    """Without aggregators, and below the load from which workers are told to come more rarely."""
    megabytes_per_second: float
    """Into the server."""
    journal_gigabytes: float
    """At most."""


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
    """For `workers` that make so many agent steps per second each, in mode buffered with |B| = `batch`."""
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
