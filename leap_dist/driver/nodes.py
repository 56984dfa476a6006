"""The cluster's nodes. A separate thread watches them: Ray's calls block for up to a minute without a head node."""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import ray

from leap_dist.driver.reservation import Reservation
from leap_dist.driver.waiting import RunningClock

READ_SECONDS = 1.0
GONE_SECONDS = 15.0
"""How long the head node may be silent before it counts as gone."""
NOTICE_SECONDS = 30.0
"""A node that announces that it will leave, but not when, is assumed to stay for this many seconds."""


class Node(NamedTuple):
    """A node that is alive and not about to leave."""

    resources: dict[str, float]
    labels: dict[str, str]
    host: str
    """Address of the node."""
    gpu_bytes: float = math.inf
    """Free memory of each of its GPUs, or of the one with the least; infinite where it is not known."""
    bundles: tuple[dict[str, float], ...] = ()
    """Resources of each bundle there that is reserved for this program; empty for a program without a reservation."""

    def without_gpus(self) -> Node:
        """Return the node as one whose GPUs cannot be used."""
        bundles = tuple({**bundle, "GPU": 0.0} for bundle in self.bundles)
        return self._replace(resources={**self.resources, "GPU": 0.0}, bundles=bundles)


class View(NamedTuple):
    """The nodes at one time."""

    staying: dict[str, Node]
    """Nodes that are alive and not about to leave, by Ray's ID."""
    leaving: dict[str, float]
    """When each node that is about to leave will be gone, on the monotonic clock, by Ray's ID."""
    read_at: float = math.inf
    """When the nodes were read, on the monotonic clock; infinite for a view that is never out of date."""


class Nodes:
    """The newest view of the nodes, at most a few seconds old while the cluster has a head node."""

    def __init__(self) -> None:
        """Read the nodes now and every READ_SECONDS until `close`. Raises Ray's error if the first read fails."""
        self.clock = RunningClock()
        """Clock for waiting for other processes; it stands still while this process is stopped."""
        self.reservation = Reservation.of_this_program()
        self.view = _read({}, self.reservation)
        self._seen_at = self.clock()
        self.clock.start()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="nodes", daemon=True)
        self._thread.start()

    @functools.cached_property
    def own(self) -> str | None:
        """Ray's ID of the node that this process runs on."""
        node: str = ray.get_runtime_context().get_node_id()
        return node

    @property
    def head_is_gone(self) -> bool:
        """Whether the head node has been silent for too long."""
        return self.clock() - self._seen_at > GONE_SECONDS

    def close(self) -> None:
        """Stop reading. Must be called before Ray shuts down."""
        self._closed.set()
        self.clock.close()
        self._thread.join(GONE_SECONDS)

    def _watch(self) -> None:
        while not self._closed.wait(READ_SECONDS):
            try:
                self.view = _read(self.view.leaving, self.reservation)
            except Exception:  # Ray raises various errors when its head does not answer; only their duration matters
                continue
            self._seen_at = self.clock()


def _read(known: Mapping[str, float], reservation: Reservation) -> View:
    """Read the nodes. `known` holds the last view's deadlines, which stay the same if the wall clock jumps."""
    read_at = time.monotonic()
    leaving = {name: known[name] if name in known else _monotonic(deadline) for name, deadline in _draining().items()}
    nodes: dict[str, dict[str, Any]] = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    staying = {
        name: Node(
            node["Resources"],
            node.get("Labels") or {},
            node["NodeManagerAddress"],
            bundles=tuple(node.get("Bundles", ())),
        )
        for name, node in reservation.limit(nodes).items()
        if name not in leaving
    }
    return View(staying, leaving, read_at)


def _draining() -> dict[str, int]:
    """Return the deadlines of nodes that are about to leave, in milliseconds of the wall clock; 0 means unknown."""
    try:
        return dict(ray._private.state.state.get_draining_nodes())
    except Exception:  # the interface is not public and may change; the pool works without it
        return {}


def _monotonic(deadline: int) -> float:
    """Convert a deadline on the wall clock, in milliseconds, to the monotonic clock, in seconds."""
    left = deadline / 1000 - time.time() if deadline else NOTICE_SECONDS
    return time.monotonic() + max(0.0, left)
