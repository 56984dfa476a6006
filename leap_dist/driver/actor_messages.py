"""Messages of actors to each other and to the driver, besides those of the protocol."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray

from leap_dist.protocol.messages import Lease
from leap_dist.tasks.atari.video import Clip
from leap_dist.worker.start import Start

NO_VECTOR = np.empty(0, np.float32)
"""Placeholder in a Start for φ, to which the Grant has a reference."""


class Grant(NamedTuple):
    """A lease and everything that its task starts from."""

    lease: Lease
    vector: ray.ObjectRef[Any]
    """Reference to φ, which Ray fetches once per node."""
    start: Start
    """Everything else that the task starts from, with NO_VECTOR in place of φ."""


class EndedWorker(NamedTuple):
    """An incarnation of a worker that no longer runs."""

    incarnation: str
    crashed: bool
    """Whether its process ended by itself: not on request, and not together with its node."""


class WorkerHealth(NamedTuple):
    """Health report of a worker: process, memory, time spent by part, and new recordings."""

    pid: int
    node: str
    """Ray's node ID."""
    memory_bytes: int
    """Resident memory of the process."""
    seconds: dict[str, float]
    """Seconds by part of the work, as a Stopwatch counts them."""
    profile: tuple[bytes, str] | None
    """Profiler trace and table of operators; each profile is reported only once."""
    clips: list[Clip]
    """Episodes recorded since the last report."""

    @classmethod
    def of_this_process(
        cls, seconds: dict[str, float], profile: tuple[bytes, str] | None, clips: list[Clip]
    ) -> WorkerHealth:
        """Return the report of the worker that runs in this process."""
        statm = Path("/proc/self/statm")
        pages = int(statm.read_text().split()[1]) if statm.exists() else 0
        node: str = ray.get_runtime_context().get_node_id()
        return cls(os.getpid(), node, pages * os.sysconf("SC_PAGE_SIZE"), seconds, profile, clips)
