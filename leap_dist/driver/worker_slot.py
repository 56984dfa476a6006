"""A place for a worker in the pool, and the state of the actor that currently fills it."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import ray

from leap_dist.driver.actor_messages import WorkerHealth
from leap_dist.nn.profiling import shares

HEALTHY_SECONDS = 60.0
"""A worker that lived this long does not count as one that keeps dying."""
LONGEST_BACKOFF = 30.0
"""Longest pause in seconds before a worker that keeps dying is started again."""
READINGS = 120
"""Stopwatch readings that are kept per worker, about a minute's worth."""


@dataclass
class WorkerSlot:
    """A place in the pool. Its name and its record of failures outlive the actors that fill it."""

    name: str
    incarnation: str = ""
    actor: Any = None
    run: ray.ObjectRef[Any] | None = None
    """Result of the actor's `run`; None while no actor fills the slot."""
    health: ray.ObjectRef[Any] | None = None
    pid: int | None = None
    host: str | None = None
    """Ray's ID of the node that the actor was placed on."""
    device: str = ""
    """Device on which the actor computes."""
    node: str | None = None
    """Ray's ID of the node, once the actor has answered."""
    memory_bytes: int | None = None
    readings: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=READINGS))
    """Readings of the worker's stopwatch, oldest first."""
    operators: str | None = None
    """The profiler's table of operators, once it has arrived."""
    started: float = 0.0
    late_reported: bool = False
    """Whether an alert has been raised because the actor takes long to start."""
    failures: int = 0
    """Failures in a row."""
    not_before: float = 0.0
    """When the next actor may start, on the monotonic clock."""
    gone_by: float | None = None
    """When the worker's node goes away, on the monotonic clock; None until the worker has been told."""
    is_held: bool = False
    """Whether no actor may start because it is still open why the last one died."""
    done: bool = False
    quarantined: bool = False

    def fill(self, actor: Any, incarnation: str, run: ray.ObjectRef[Any], host: str, device: str) -> None:
        """Assign a new actor to this slot, on this node and device. `run` refers to the result of its method `run`."""
        self.actor, self.incarnation, self.host, self.device = actor, incarnation, host, device
        self.readings.clear()
        self.late_reported = False
        self.started = time.monotonic()
        self.run = run
        self.health = actor.health.remote()

    def record(self, health: WorkerHealth) -> None:
        """Keep what a health report says, and ask for the next one."""
        self.pid, self.node, self.memory_bytes = health.pid, health.node, health.memory_bytes
        self.readings.append(health.seconds)
        self.health = self.actor.health.remote()

    def back_off(self) -> float:
        """Record a failure. Returns the pause in seconds before the next start, which grows with failures in a row."""
        now = time.monotonic()
        self.failures = self.failures + 1 if now - self.started < HEALTHY_SECONDS else 1
        pause: float = min(2.0 ** (self.failures - 1), LONGEST_BACKOFF)
        self.not_before = now + pause
        return pause

    def clear(self) -> None:
        """Forget the actor."""
        self.actor = self.run = self.health = self.pid = self.node = self.memory_bytes = self.gone_by = None

    @property
    def is_idle(self) -> bool:
        """Whether no actor fills the slot and nothing about the slot has to be remembered."""
        return self.run is None and not (self.is_held or self.done or self.quarantined)

    @property
    def is_ready(self) -> bool:
        """Whether an actor may start now."""
        return self.is_idle and time.monotonic() >= self.not_before

    @property
    def state(self) -> str:
        """State of the worker, in one or two words."""
        if self.quarantined:
            return "quarantined"
        if self.done:
            return "done"
        if self.run is None:
            return "no room" if self.is_ready else "restarting"
        if self.gone_by is not None:
            return "leaving"
        return "running" if self.pid is not None else "starting"

    def describe(self) -> dict[str, Any]:
        """Return the worker's state as a JSON-compatible dict."""
        return {
            "name": self.name,
            "state": self.state,
            "pid": self.pid,
            "node": self.node,
            "device": self.device,
            "memory_bytes": self.memory_bytes,
            "time_share": shares(self.readings[-1], self.readings[0]) if self.readings else {},
        }
