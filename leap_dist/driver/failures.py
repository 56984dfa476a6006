"""Failures of workers by node: a node on which workers keep failing is checked again, and others come first."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable

from leap_dist.driver.preflight import NoChecks
from leap_dist.driver.worker_slot import HEALTHY_SECONDS, WorkerSlot

LIMIT = 3
"""Number of failures in a row after which a node is checked again."""


class Failures:
    """Counts the failures in a row on each node. They end when a worker that started later is healthy.

    Args:
        checks: the checks that ask a node again.
    """

    def __init__(self, checks: NoChecks) -> None:
        self._checks = checks
        self._counts: Counter[str] = Counter()
        self._since: dict[str, float] = {}  # time of the first failure in a row, by node
        self._doubtful: set[str] = set()

    def record(self, host: str) -> None:
        """Record that a worker on this node has failed."""
        self._counts[host] += 1
        self._since.setdefault(host, time.monotonic())
        if self._counts[host] % LIMIT == 0:
            self._doubtful.add(host)

    def rounds(self, host: str) -> int:
        """Return how often in a row this node has reached the limit."""
        return self._counts[host] // LIMIT

    def follow(self, slots: Iterable[WorkerSlot]) -> None:
        """Note which workers are healthy by now, and have nodes checked again on which workers keep failing."""
        running = [(slot.host, slot) for slot in slots if slot.run is not None and slot.host is not None]
        old = time.monotonic() - HEALTHY_SECONDS
        for host, slot in running:
            if slot.pid is not None and self._since.get(host, math.inf) < slot.started <= old:
                del self._counts[host], self._since[host]
        on_gpus = {host for host, slot in running if slot.device == "cuda"}
        for host in self._doubtful:
            self._checks.doubt(host, occupied=host in on_gpus)
        self._doubtful.clear()
