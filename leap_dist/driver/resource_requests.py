"""The joint request of all runs to a cluster's autoscaler, made of leases that expire with their runs.

Ray knows one request per cluster, which holds until the next one replaces it. Two runs would overwrite each other's,
and the request of a run that was killed would keep unused nodes running. So a small actor, one per cluster, keeps the
requests of all runs that renew theirs, passes their sum to the autoscaler, and ends when there is none left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

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
CALL_SECONDS = 30.0
"""Time limit for a call of the actor, which may be starting."""


class Request(NamedTuple):
    """What one run asks for: the resources and the labels of each of its workers."""

    bundles: list[dict[str, float]]
    selectors: list[dict[str, str]]


class RequestBook:
    """The requests of all runs, and their sum.

    Args:
        ask: called with the sum whenever it changes.
        clock: monotonic seconds.
    """

    def __init__(self, ask: Callable[[Request], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._ask = ask
        self._clock = clock
        self._requests: dict[str, tuple[Request, float]] = {}  # with the time at which they expire, by run
        self._asked: Request | None = None

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
        """Forget expired requests. Ask for the sum of the others if it has changed or could not be asked for before."""
        now = self._clock()
        self._requests = {run: kept for run, kept in self._requests.items() if now < kept[1]}
        kept = [request for request, _ in self._requests.values()]
        total = Request([b for request in kept for b in request.bundles], [s for r in kept for s in r.selectors])
        if total != self._asked:
            self._ask(total)
            self._asked = total


def ask_autoscaler(request: Request) -> None:
    """Replace the cluster's request. Raises one of Ray's errors if the head does not answer."""
    from ray.autoscaler.sdk import request_resources  # slow to import, and a run on one machine never asks

    request_resources(bundles=request.bundles, bundle_label_selectors=request.selectors or None)


class RequestActor:
    """A RequestBook in a Ray actor, which outlives the run that started it and ends when no run asks for anything."""

    def __init__(self) -> None:
        redact_output()
        self._book = RequestBook(ask_autoscaler)
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
