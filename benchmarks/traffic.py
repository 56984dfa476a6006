"""Who works in a simulation (simulation.py), what they send, and what is counted of it."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from leap_dist.protocol.messages import Contribution, Lease, Renewal


@dataclass(frozen=True)
class Load:
    """Who works, how fast, over what network, and how often something breaks."""

    workers: int
    speeds: Mapping[str, float]
    """Agent steps per second of a worker, by game."""
    workers_per_node: int = 8
    straggling: float = 0.25
    """σ of the lognormal factor that makes a worker slower, or faster, for life; its median is 1."""
    hours_between_failures: float = math.inf
    """Mean, of one worker."""
    silent: float = 0.5
    """Share of the failures that the server hears of only by the lease's deadline; the driver tells of the others."""
    latency: float = 0.0005
    """Seconds, one way."""
    worker_bandwidth: float = 1.25e8
    """Bytes per second of a worker's link."""
    server_bandwidth: float = 1.25e9
    """Bytes per second of the server's node; what all send goes through it."""
    between_tasks: float = 0.1
    """Seconds from a lease to the task's first step."""
    longest_pause: float = 0.5
    """Seconds between two calls of a worker for which there is no task, at most, unless it is told another number."""
    paced: bool = True
    """Workers heed what the server says about their renewals, too, and push as soon as they may again."""
    polls_paced: bool = True
    """The driver polls less often where that takes long."""


class Clock:
    """Simulated seconds; a measured window starts at 0."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """Now."""
        return self.now


class Content(Protocol):
    """What a worker's path makes of φ."""

    snapshot_bytes: int

    def lease(self, lease: Lease) -> None:
        """A task starts, from the present φ."""

    def contribution(self, lease: Lease, seq: int, rollouts: int, final: bool) -> Contribution:
        """What it has to send after so many rollouts."""

    def received(self, contribution: Contribution) -> Callable[[], Contribution]:
        """What the server's process has to do before it sees that."""

    def bytes(self, contribution: Contribution) -> int:
        """Length of that on the wire."""


@dataclass
class Tally:
    """What was seen within the measured window."""

    calls: Counter[str] = field(default_factory=Counter)
    """Of the server, by kind: lease, renew, partial, final, poll; `update` are pushes that made a meta-update."""
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """That the server was busy with them, Ray's share included."""
    cpu_seconds: float = 0.0
    delays: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Seconds from the arrival of a call to its start, by kind."""
    round_trips: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Seconds from the sending of a call to its answer, by kind."""
    bytes_in: float = 0.0
    bytes_out: float = 0.0
    steps_lost: float = 0.0
    lines: list[dict[str, Any]] = field(default_factory=list)
    """Of the ledger."""
    refused: Counter[str] = field(default_factory=Counter)
    """Answers to pushes and renewals, by reason."""
    network_seconds: float = 0.0
    """That the server's link was busy."""
    failures: int = 0


@dataclass(slots=True)
class Worker:
    """One of the fleet, on its way through a task."""

    name: str
    node: int
    slow: float
    fails_at: float
    incarnation: str
    lease: Lease | None = None
    rollouts: int = 0
    """Done at `since`; training goes on from there."""
    since: float = 0.0
    seq: int = 0
    pushed: int = 0
    """Agent steps when that was done last."""
    renewed: float = 0.0
    quiet_until: float = 0.0
    pause: float = 0.05
    primed_at: float = 0.0
    """When a partial contribution takes the place of a renewal in the warm-up, so that the server has one of each."""
    head_start: int = 0
    """Rollouts of the first task that are done when it begins, so that not all workers start at its beginning."""


class Call(NamedTuple):
    """On its way to the server."""

    kind: str
    size: int
    worker: Worker | None
    make: Callable[[], Any]
    report: Contribution | Renewal | None
    sent: float
    arrived: float = 0.0
    node: int = 0
    """Of what is delivered together."""
    counting: int = 0
    """Contributions in that which are journaled."""
