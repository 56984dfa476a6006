"""Parts of a simulation (simulation.py): the fleet's load, workers, messages and tallies."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from leap_dist.protocol.messages import Contribution, Lease, Renewal


@dataclass(frozen=True)
class Load:
    """Load of a fleet: workers and their speeds, the network, and failure rates."""

    workers: int
    speeds: Mapping[str, float]
    """Agent steps per second of a worker, by game."""
    workers_per_node: int = 8
    straggling: float = 0.25
    """Standard deviation σ of each worker's permanent lognormal slowdown factor, whose median is 1."""
    hours_between_failures: float = math.inf
    """Mean hours between failures of one worker."""
    silent: float = 0.5
    """Share of failures that the server notices only by the lease's deadline; the driver reports the others."""
    latency: float = 0.0005
    """One-way network latency in seconds."""
    worker_bandwidth: float = 1.25e8
    """Bandwidth of a worker's link in bytes per second."""
    server_bandwidth: float = 1.25e9
    """Bandwidth of the server's node in bytes per second, shared by all traffic."""
    between_tasks: float = 0.1
    """Seconds from a lease to the task's first step."""
    longest_pause: float = 0.5
    """Maximum seconds between lease requests of an idle worker, unless the server sets another pause."""
    paced: bool = True
    """Whether workers also follow the server's pacing of renewals, and push as soon as it allows."""
    polls_paced: bool = True
    """Whether the driver polls less often when polls take long."""


class Clock:
    """Simulated clock in seconds; a measured window starts at 0."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """Return the current simulated time."""
        return self.now


class Content(Protocol):
    """Interface for the contents of workers' contributions."""

    snapshot_bytes: int

    def lease(self, lease: Lease) -> None:
        """Start a task from the current φ."""

    def contribution(self, lease: Lease, seq: int, rollouts: int, final: bool) -> Contribution:
        """Return the worker's contribution after `rollouts` rollouts."""

    def received(self, contribution: Contribution) -> Callable[[], Contribution]:
        """Return the work that the server's process does to receive the contribution."""

    def bytes(self, contribution: Contribution) -> int:
        """Return the length of the contribution on the wire."""


@dataclass
class Tally:
    """Observations within the measured window."""

    calls: Counter[str] = field(default_factory=Counter)
    """Number of server calls by kind: lease, renew, partial, final, poll; `update` counts pushes with a meta-update."""
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds for which calls kept the server busy, by kind, including Ray's share."""
    cpu_seconds: float = 0.0
    delays: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Seconds from the arrival of a call to its start, by kind."""
    round_trips: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Seconds from sending a call to receiving its answer, by kind."""
    bytes_in: float = 0.0
    bytes_out: float = 0.0
    steps_lost: float = 0.0
    lines: list[dict[str, Any]] = field(default_factory=list)
    """Lines of the ledger."""
    refused: Counter[str] = field(default_factory=Counter)
    """Number of refused pushes and renewals, by reason."""
    network_seconds: float = 0.0
    """Seconds for which the server's link was busy."""
    failures: int = 0


@dataclass(slots=True)
class Worker:
    """Simulated worker and its progress through a task."""

    name: str
    node: int
    slow: float
    fails_at: float
    incarnation: str
    lease: Lease | None = None
    rollouts: int = 0
    """Number of rollouts done at time `since`, from which training continues."""
    since: float = 0.0
    seq: int = 0
    pushed: int = 0
    """Number of agent steps done at the last push."""
    renewed: float = 0.0
    quiet_until: float = 0.0
    pause: float = 0.05
    primed_at: float = 0.0
    """Time after which one warm-up renewal becomes a partial contribution, so that the server holds one per lease."""
    head_start: int = 0
    """Number of rollouts of the first task already done when it begins, so that workers start out of phase."""


class Call(NamedTuple):
    """Call on its way to the server."""

    kind: str
    size: int
    worker: Worker | None
    make: Callable[[], Any]
    report: Contribution | Renewal | None
    sent: float
    arrived: float = 0.0
    node: int = 0
    """Node whose reports a batched delivery carries."""
    counting: int = 0
    """Number of journaled contributions in a batched delivery."""
