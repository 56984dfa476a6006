"""The joint request of all runs to a cluster's autoscaler, made of leases that expire with their runs.

Ray knows one request per cluster, which holds until the next one replaces it. Two runs would overwrite each other's,
and the request of a run that was killed would keep unused nodes running. So a small actor, one per cluster, keeps the
requests of all runs that renew theirs, passes their sum to the autoscaler, and ends when there is none left.

Ray ignores a request entirely if one of its bundles does not fit on the nodes that there may be. A sum that is refused
is therefore cut to as many bundles as fit, which a binary search finds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from leap_dist.driver.waiting import last_line
from leap_dist.storage.redaction import redact_output

log = logging.getLogger(__name__)

NAMESPACE, NAME = "leap-dist", "resource-requests"
LEASE_SECONDS = 60.0
"""Time after which a request that is not renewed is dropped."""
RENEW_SECONDS = 10.0
STATUS_SECONDS = 5
"""Time limit for reading what the autoscaler says to a request."""
CALL_SECONDS = 30.0
"""Time limit for a call of the actor, which may be starting."""


class Request(NamedTuple):
    """What one run asks for: the resources and the labels of each of its workers."""

    bundles: list[dict[str, float]]
    selectors: list[dict[str, str]]

    def first(self, count: int) -> Request:
        """Return the first `count` bundles."""
        return Request(self.bundles[:count], self.selectors[:count])


class Autoscaler(Protocol):
    """An autoscaler takes one request for the whole cluster, and may say whether it fits."""

    def ask(self, request: Request) -> None:
        """Replace the cluster's request."""

    def accepts(self) -> bool | None:
        """Return whether the newest request fits on the nodes that there may be, or None if that is not known (yet)."""


class RequestBook:
    """The requests of all runs, and their sum, of which the autoscaler gets as many bundles as it accepts.

    Args:
        autoscaler: takes the sum whenever it changes.
        clock: monotonic seconds.
    """

    def __init__(self, autoscaler: Autoscaler, clock: Callable[[], float] = time.monotonic) -> None:
        self._autoscaler = autoscaler
        self._clock = clock
        self._requests: dict[str, tuple[Request, float]] = {}  # with the time at which they expire, by run
        self._total = Request([], [])
        self._asked: Request | None = None
        self._accepted, self._refused = 0, 1  # so many bundles of the sum were accepted, and so many were refused

    @property
    def empty(self) -> bool:
        """Whether no run asks for anything."""
        return not self._requests

    def renew(self, run: str, request: Request, seconds: float = LEASE_SECONDS) -> None:
        """Accept or replace the request of a run, which is valid for `seconds`."""
        self._requests[run] = request, self._clock() + seconds
        self.tick()

    def withdraw(self, run: str) -> None:
        """Forget the request of a run."""
        self._requests.pop(run, None)
        self.tick()

    def tick(self) -> None:
        """Forget expired requests. Ask for the sum of the others if it has changed or could not be asked for before.

        If the autoscaler refuses the sum, ask for less, and later for more, until one bundle more would be refused.
        """
        now = self._clock()
        self._requests = {run: kept for run, kept in self._requests.items() if now < kept[1]}
        total = _add([request for request, _ in self._requests.values()])
        if total != self._total:
            self._total, self._accepted, self._refused = total, 0, len(total.bundles) + 1
        elif self._asked is not None:
            self._record(len(self._asked.bundles), self._autoscaler.accepts())
        size = len(total.bundles)
        if self._refused <= size:
            size = max(1, (self._accepted + self._refused) // 2)
        if (request := total.first(size)) != self._asked:
            self._asked = None
            self._autoscaler.ask(request)
            self._asked = request

    def _record(self, size: int, accepted: bool | None) -> None:
        """Narrow the search by what the autoscaler says to a request for the first `size` bundles."""
        if accepted:
            self._accepted = max(self._accepted, size)
            if self._refused <= size:  # the cluster's limits have become larger
                self._refused = len(self._total.bundles) + 1
        elif accepted is False and size:
            self._refused = size
            if self._accepted >= size:  # the cluster's limits have become smaller
                self._accepted = 0


def _add(requests: list[Request]) -> Request:
    """Return the sum of requests. Their bundles take turns, so that the first ones are of all runs."""
    turns = zip_longest(*(zip(*request, strict=True) for request in requests))
    pairs = [pair for turn in turns for pair in turn if pair is not None]
    return Request([bundle for bundle, _ in pairs], [selector for _, selector in pairs])


class ClusterAutoscaler:
    """The autoscaler of the cluster that this process is connected to.

    Only Ray's second autoscaler, which `ray up` and KubeRay start, says what it refuses. The first one takes what fits.
    """

    def __init__(self) -> None:
        self._asked_at: int | None = None  # version of the cluster's state that has the newest request

    def ask(self, request: Request) -> None:
        """Replace the cluster's request. Raises one of Ray's errors if the head does not answer."""
        from ray.autoscaler.sdk import request_resources  # slow to import, and a run on one machine never asks

        self._asked_at = None
        request_resources(bundles=request.bundles, bundle_label_selectors=request.selectors or None)

    def accepts(self) -> bool | None:
        """Return whether the newest request fits; None until the autoscaler has seen it, or if it does not say."""
        try:
            status = _read_status()
        except Exception:  # the interface is not public and may change, and the head may not answer
            return None
        if self._asked_at is None:
            self._asked_at = status.cluster_resource_state.cluster_resource_state_version
        return verdict(status, self._asked_at)


def verdict(status: Any, asked_at: int) -> bool | None:
    """Return whether the cluster's request fits, as Ray's GetClusterStatusReply says.

    None if the autoscaler has seen no state of the cluster that is newer than version `asked_at`, or reports nothing.
    """
    state = status.autoscaling_state
    if state.last_seen_cluster_resource_state_version <= asked_at:
        return None
    return not state.infeasible_cluster_resource_constraints


def _read_status() -> Any:
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]

    status = GetClusterStatusReply()
    client = ray.experimental.internal_kv.internal_kv_get_gcs_client()
    status.ParseFromString(client.get_cluster_status(timeout_s=STATUS_SECONDS))
    return status


class RequestActor:
    """A RequestBook in a Ray actor, which outlives the run that started it and ends when no run asks for anything."""

    def __init__(self) -> None:
        redact_output()
        self._book = RequestBook(ClusterAutoscaler())
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, name="expiry", daemon=True).start()

    def renew(self, run: str, bundles: list[dict[str, float]], selectors: list[dict[str, str]], seconds: float) -> None:
        """See RequestBook.renew."""
        with self._lock:
            self._book.renew(run, Request(bundles, selectors), seconds)

    def withdraw(self, run: str) -> None:
        """See RequestBook.withdraw."""
        with self._lock:
            self._book.withdraw(run)

    def _watch(self) -> None:
        idle = 0
        while idle < 3:  # a run that has just started the actor calls it within these seconds
            time.sleep(1.0)
            with self._lock, contextlib.suppress(Exception):  # if the head does not answer, it is asked again
                self._book.tick()
                idle = idle + 1 if self._book.empty else 0
        ray.kill(ray.get_runtime_context().current_actor)
        os._exit(0)


REQUESTS: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(RequestActor)


class ResourceRequest:
    """The request of this run: renewed by a thread until it is withdrawn.

    Args:
        request: what the run asks for.
        lease_seconds: how long the request stays valid if this process dies.
    """

    def __init__(self, request: Request, lease_seconds: float = LEASE_SECONDS) -> None:
        self._run = uuid.uuid4().hex
        self._request = request
        self._lease_seconds = lease_seconds
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="resource request", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Withdraw the request. Must be called before Ray shuts down."""
        self._closed.set()
        self._thread.join(CALL_SECONDS)
        with contextlib.suppress(RayError, ValueError):  # ValueError: the actor has ended
            ray.get(ray.get_actor(NAME, NAMESPACE).withdraw.remote(self._run), timeout=CALL_SECONDS)

    def _renew(self) -> None:
        warned = False
        # The driver's node outlives the nodes that come and go with workers.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"name": NAME, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
        while True:
            try:
                actor = REQUESTS.options(**options, scheduling_strategy=here).remote()
                ray.get(actor.renew.remote(self._run, *self._request, self._lease_seconds), timeout=CALL_SECONDS)
            except Exception as error:  # nodes that join anyway are used nevertheless
                if not warned:
                    log.warning("the autoscaler could not be asked for nodes: %s", last_line(error))
                warned = True
            if self._closed.wait(min(RENEW_SECONDS, self._lease_seconds / 4)):
                return
