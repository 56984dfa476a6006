"""Deaths of worker processes: whether a process ended by itself or together with its node."""

from __future__ import annotations

import time
from typing import NamedTuple

from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from leap_dist.driver.actor_messages import EndedWorker
from leap_dist.driver.nodes import Nodes
from leap_dist.driver.worker_slot import WorkerSlot

OUTLIVED_SECONDS = 20.0
"""A node must outlive a process by this many seconds for the death to be the process's own. If Ray's daemon on a node
is killed, the node counts as alive for another ten seconds or so after its workers have failed."""
REPORTED_SECONDS = 5.0
"""The same if the node itself has reported the death, so that it was alive then. When a machine shuts down, all of its
processes end within a few seconds."""
LEASE_SHARE = 1 / 3
"""Largest share of a lease's duration that a verdict may take: an expired lease would count as a failure."""


class _Death(NamedTuple):
    slot: WorkerSlot
    incarnation: str
    node: str
    since: float
    """When the worker failed, on the monotonic clock."""
    seconds: float
    """The node must outlive the process by this many seconds."""


class Deaths:
    """The deaths of which it is open whether the node has died as well.

    Until then, the server is not told, and nobody takes the worker's place: the server would take back its lease, and
    could no longer count the death against the task.

    Args:
        nodes: the cluster's nodes.
        lease_seconds: duration of a lease.
    """

    def __init__(self, nodes: Nodes, lease_seconds: float) -> None:
        self._nodes = nodes
        self._longest = LEASE_SHARE * lease_seconds
        self._open: list[_Death] = []

    def seconds(self, node: str | None, error: RayError) -> float | None:
        """Return for how many seconds a node must outlive a worker that ended with `error`, before that is blamed.

        Returns 0 for the driver's own node, and None if the process did not end by itself.
        """
        if node not in self._nodes.view.staying or not may_be_its_own(error):
            return None
        if node == self._nodes.own:
            return 0.0
        return min(REPORTED_SECONDS if is_reported(error) else OUTLIVED_SECONDS, self._longest)

    def hold(self, slot: WorkerSlot, seconds: float) -> None:
        """Keep the death of a slot's worker back until its node has outlived it by so many seconds, or is gone."""
        assert slot.node is not None
        slot.is_held = True
        self._open.append(_Death(slot, slot.incarnation, slot.node, time.monotonic(), seconds))

    def settle(self) -> list[EndedWorker]:
        """Return the deaths of which the cause is known by now."""
        view, now = self._nodes.view, time.monotonic()
        ended, still_open = [], []
        for death in self._open:
            is_alive = death.node in view.staying
            if is_alive and min(now, view.read_at) < death.since + death.seconds:
                still_open.append(death)
            else:
                death.slot.is_held = False
                ended.append(EndedWorker(death.incarnation, crashed=is_alive))
        self._open = still_open
        return ended


def may_be_its_own(error: RayError) -> bool:
    """Return whether a worker's process may have ended by itself, given the error of its `run`.

    An error that `run` itself has raised is no death, even if it is of that type: the server could not be reached.
    """
    died = isinstance(error, RayActorError) and not isinstance(error, RayTaskError)
    return died and "node has died" not in str(error)


def is_reported(error: RayError) -> bool:
    """Return whether a node has reported that a process there has died. Ray says so only in the text of the error."""
    return isinstance(error, ActorDiedError) and "worker process has died" in str(error)
