"""The cluster's nodes, watched from a thread of its own: where the head is gone, asking blocks for a minute."""

from __future__ import annotations

import threading
import time
from typing import Any, NamedTuple

import ray

LOOK_SECONDS = 2.0
GONE_SECONDS = 15.0  # without an answer from the head, after which it is taken for gone


class View(NamedTuple):
    """What there was at one time."""

    alive: dict[str, dict[str, float]]
    """Resources of the nodes that are there, and stay, by Ray's name of them."""
    leaving: frozenset[str]
    """Nodes that are there, but about to go."""


class Nodes:
    """The newest view of the nodes, a few seconds old at most while the cluster has a head."""

    def __init__(self) -> None:
        """Looks once, and goes on looking until `close`. Raises what Ray raises where the first look fails."""
        self.view = _look()
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
                self.view = _look()
            except Exception:  # whatever Ray raises where its head does not answer: that it lasts is what counts
                continue
            self._seen_at = time.monotonic()


def _look() -> View:
    leaving = _draining()
    nodes: list[dict[str, Any]] = [node for node in ray.nodes() if node["Alive"]]
    alive = {node["NodeID"]: node["Resources"] for node in nodes if node["NodeID"] not in leaving}
    return View(alive, frozenset(leaving))


def _draining() -> set[str]:
    """Nodes that are about to leave."""
    try:
        return set(ray._private.state.state.get_draining_nodes())
    except Exception:  # not a public interface: whatever it may raise one day, the pool works without
        return set()
