"""Failures of workers by node: a node on which workers keep failing is checked again, and others come first."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from leap_dist.driver.placement import Room
from leap_dist.driver.preflight import NoChecks
from leap_dist.driver.worker_slot import HEALTHY_SECONDS, WorkerSlot

LIMIT = 3
"""Number of failures in a row after which a node is checked again."""
LOST = 3
"""Number of workers in quarantine that exclude their node, if no more are still running there."""
RETRY_SECONDS = 600.0
"""A node that is excluded gets one more worker each time this many seconds have passed."""


class Failures:
    """Counts the failures in a row on each node, and chooses nodes accordingly.

    The failures end when a worker that started later is healthy. Workers in quarantine are never forgotten: the process
    of a worker on which every task fails is healthy.

    Args:
        checks: the checks that ask a node again.
    """

    def __init__(self, checks: NoChecks) -> None:
        self._checks = checks
        self._counts: Counter[str] = Counter()
        self._since: dict[str, float] = {}  # time of the first failure in a row, by node
        self._doubtful: set[str] = set()
        self._tried: dict[str, float] = {}  # time of the last start or quarantine, by node
        self._announced: set[str] = set()

    def record(self, host: str) -> None:
        """Record that a worker on this node has failed."""
        self._counts[host] += 1
        self._since.setdefault(host, time.monotonic())
        if self._counts[host] % LIMIT == 0:
            self._doubtful.add(host)

    def record_quarantine(self, host: str) -> None:
        """Record that a worker on this node has been put into quarantine."""
        self.record(host)
        self.record_start(host)

    def record_start(self, host: str) -> None:
        """Record that a worker starts on this node."""
        self._tried[host] = time.monotonic()

    def rounds(self, host: str) -> int:
        """Return how often in a row this node has reached the limit."""
        return self._counts[host] // LIMIT

    def choose(self, hosts: Mapping[str, Room], slots: Collection[WorkerSlot], shut: Collection[str]) -> str | None:
        """Return the node for the next worker, or None.

        Nodes on which workers keep failing come last, those with GPUs before others, then the one with most room, from
        which the workers in quarantine are subtracted: if their node is to blame, it must not attract the others. A
        node most of whose workers are in quarantine gets one from time to time, unless there are only such nodes.

        Args:
            hosts: room on each node that may get workers.
            slots: all slots of the pool.
            shut: nodes that get no workers now.
        """
        taken, lost = _counts(slots)
        old = time.monotonic() - RETRY_SECONDS
        excluded = {name for name in _bad(hosts, taken, lost) if self._tried.get(name, old) > old}
        free = {name: room.workers - taken[name] for name, room in hosts.items() if name not in {*shut, *excluded}}
        return max(
            (name for name in free if free[name] > 0),
            key=lambda name: (-self.rounds(name), hosts[name].device == "cuda", free[name] - lost[name]),
            default=None,
        )

    def follow(self, hosts: Collection[str], slots: Collection[WorkerSlot]) -> set[str]:
        """Note which workers are healthy by now, and have nodes checked again on which workers keep failing.

        Returns the nodes that are excluded because of their workers in quarantine, each once.
        """
        running = [(slot.host, slot) for slot in slots if slot.run is not None and slot.host is not None]
        old = time.monotonic() - HEALTHY_SECONDS
        for host, slot in running:
            if slot.pid is not None and self._since.get(host, math.inf) < slot.started <= old:
                del self._counts[host], self._since[host]
        on_gpus = {host for host, slot in running if slot.device == "cuda"}
        for host in self._doubtful:
            self._checks.doubt(host, occupied=host in on_gpus)
        self._doubtful.clear()
        new = _bad(hosts, *_counts(slots)) - self._announced
        self._announced |= new
        return new


def _counts(slots: Iterable[WorkerSlot]) -> tuple[Counter[str | None], Counter[str | None]]:
    """Return the numbers of workers that run and that are in quarantine, by node."""
    slots = list(slots)
    taken = Counter(slot.host for slot in slots if slot.run is not None)
    return taken, Counter(slot.host for slot in slots if slot.quarantined)


def _bad(hosts: Collection[str], taken: Counter[str | None], lost: Counter[str | None]) -> set[str]:
    """Return the nodes to exclude because of their workers in quarantine, unless that would be all of them."""
    bad = {name for name in hosts if lost[name] >= max(LOST, taken[name])}
    return bad if len(bad) < len(hosts) else set()
