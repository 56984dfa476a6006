"""The cluster's nodes, watched from a thread of its own: where the head is gone, asking blocks for a minute."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import ray

LOOK_SECONDS = 1.0
GONE_SECONDS = 15.0  # without an answer from the head, after which it is taken for gone
NOTICE_SECONDS = 30.0  # that a node is given which leaves, but does not say when


class Node(NamedTuple):
    """One that is there, and stays."""

    resources: dict[str, float]
    labels: dict[str, str]
    host: str
    """Its address."""


class View(NamedTuple):
    """What there was at one time."""

    staying: dict[str, Node]
    """By Ray's name of them."""
    leaving: dict[str, float]
    """Nodes that are there, but about to go, with the reading of the monotonic clock at which they do."""


class Nodes:
    """The newest view of the nodes, a few seconds old at most while the cluster has a head."""

    def __init__(self) -> None:
        """Looks once, and goes on looking until `close`. Raises what Ray raises where the first look fails."""
        self.view = _look({})
        self._seen_at = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="nodes", daemon=True)
        self._thread.start()

    @property
    def head_is_gone(self) -> bool:
        """Nothing was heard of the cluster's head for too long."""
        return time.monotonic() - self._seen_at > GONE_SECONDS

    def close(self) -> None:
        """Looks no more. To be called before Ray shuts down."""
        self._closed.set()
        self._thread.join(GONE_SECONDS)

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            try:
                self.view = _look(self.view.leaving)
            except Exception:  # whatever Ray raises where its head does not answer: that it lasts is what counts
                continue
            self._seen_at = time.monotonic()


def _look(known: Mapping[str, float]) -> View:
    """`known`: when the nodes go that were leaving before; a wall clock that jumps does not change that."""
    leaving = {name: known[name] if name in known else _reading(deadline) for name, deadline in _draining().items()}
    nodes: list[dict[str, Any]] = [node for node in ray.nodes() if node["Alive"]]
    staying = {
        node["NodeID"]: Node(node["Resources"], node.get("Labels") or {}, node["NodeManagerAddress"])
        for node in nodes
        if node["NodeID"] not in leaving
    }
    return View(staying, leaving)


def _draining() -> dict[str, int]:
    """Nodes that are about to leave, and when: milliseconds of the wall clock, 0 where that is not said."""
    try:
        return dict(ray._private.state.state.get_draining_nodes())
    except Exception:  # not a public interface: whatever it may raise one day, the pool works without
        return {}


def _reading(deadline: int) -> float:
    """Of the monotonic clock at a deadline that Ray gives by the wall clock."""
    left = deadline / 1000 - time.time() if deadline else NOTICE_SECONDS
    return time.monotonic() + max(0.0, left)
