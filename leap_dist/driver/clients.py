"""Clients of the server actor, directly and through the aggregators of the nodes. Every call may be repeated."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from leap_dist.protocol.messages import Ack, Contribution, Idle, Renewal
from leap_dist.server.aggregator import Aggregator
from leap_dist.storage.redaction import redact_output
from leap_dist.testing import delivery_log

log = logging.getLogger(__name__)

CALL_SECONDS = 120.0
"""How long calls are retried. A worker that cannot reach the server for this long gives up and is restarted."""


class ServerClient:
    """The server from the view of a running task: calls are retried while the server restarts.

    Args:
        server: handle of the server actor.
        aggregator: handle of the node's aggregator, through which renewals and contributions go while it works.
    """

    def __init__(self, server: Any, aggregator: Any = None) -> None:
        self._server = server
        self._aggregator = aggregator

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the server.

        Raises ActorUnavailableError if the server is unavailable for CALL_SECONDS, ActorDiedError if it is gone for
        good.
        """
        deadline, pause = time.monotonic() + CALL_SECONDS, 0.1
        while True:
            try:
                return ray.get(getattr(self._server, method).remote(*arguments))
            except ActorUnavailableError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(pause)
                pause = min(2 * pause, 2.0)

    def lease(self, worker: str, incarnation: str, most: int) -> tuple[list[Any], Idle | None]:
        """Lease up to `most` tasks, each under its own worker name. Return them, and the server's Idle if fewer."""
        grants: list[Any] = []
        for number in range(most):
            suffix = f"/{number}" if number else ""
            answer = self.call("lease", worker + suffix, incarnation + suffix)
            if isinstance(answer, Idle):
                return grants, answer
            grants.append(answer)
        return grants, None

    def renew(self, lease_id: str, incarnation: str, steps: int) -> Ack:
        """Extend the lease."""
        ack: Ack = self._report("renew", lease_id, incarnation, steps)
        return ack

    def push(self, contribution: Contribution) -> Ack:
        """Deliver a contribution. Repeats the call while the server's disk is full or the server is busy.

        A partial contribution is not repeated for a busy server, because the next one contains it.
        """
        name = {"lease": contribution.lease, "seq": contribution.seq, "final": contribution.final}
        delivery_log.record("pushed", **name)
        while True:
            ack: Ack = self._report("push", contribution)
            if ack.durable:
                delivery_log.record("durable", **name)
            skipped = ack.reason == "busy" and not contribution.final
            if ack.accepted or not ack.wait or not ack.proceed or skipped:
                return ack
            time.sleep(ack.wait)

    def save_state(self, lease_id: str, incarnation: str, state: bytes, steps: int) -> Ack:
        """Store the state of a task on the server."""
        ack: Ack = self.call("save_state", lease_id, incarnation, state, steps)
        return ack

    def snapshot(self) -> tuple[int, np.ndarray]:
        """Return the current version and φ."""
        while True:
            version, reference = self.call("snapshot")
            with contextlib.suppress(ObjectLostError):  # the server restarted meanwhile and has a new object
                return version, ray.get(reference)

    def bypass_aggregator(self) -> None:
        """Send all further reports directly to the server, so that they arrive before this node goes away."""
        self._aggregator = None

    def _report(self, method: str, *arguments: Any) -> Any:
        aggregator = self._aggregator
        if aggregator is not None:
            try:
                return ray.get(getattr(aggregator, method).remote(*arguments))
            except RayError as error:  # it may have been delivered; repeating it is harmless
                log.warning("the node's aggregator does not answer: %s", error)
                if isinstance(error, ActorDiedError):
                    self._aggregator = None
        return self.call(method, *arguments)


MAX_CONCURRENT_CALLS = 1000


class _Delivery:
    """The server from the view of an aggregator: calls are retried while the server restarts."""

    def __init__(self, server: Any) -> None:
        self._client = ServerClient(server)

    def push_together(self, contributions: Sequence[Contribution], renewals: Sequence[Renewal]) -> list[Ack]:
        """Deliver reports; see MetaServer.push_together."""
        acks: list[Ack] = self._client.call("push_together", list(contributions), list(renewals))
        return acks

    def snapshot(self) -> tuple[int, np.ndarray]:
        """Return the current version and φ."""
        return self._client.snapshot()


class AggregatorActor:
    """An Aggregator in a Ray actor. Calls wait in an event loop; a thread delivers them."""

    def __init__(self, server: Any, seconds: float) -> None:
        redact_output()
        self._aggregator = Aggregator(_Delivery(server), seconds)
        threading.Thread(target=self._aggregator.run, name="deliveries", daemon=True).start()

    async def renew(self, lease_id: str, incarnation: str, steps: int) -> Ack:
        """Extend a lease; see Aggregator.renew_soon."""
        return await asyncio.wrap_future(self._aggregator.renew_soon(lease_id, incarnation, steps))

    async def push(self, contribution: Contribution) -> Ack:
        """Take a contribution; see Aggregator.push_soon."""
        return await asyncio.wrap_future(self._aggregator.push_soon(contribution))


AGGREGATOR: Any = ray.remote(  # type: ignore[call-overload]
    num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=MAX_CONCURRENT_CALLS
)(AggregatorActor)


class Aggregators:
    """The aggregators of all nodes that are not about to leave.

    Args:
        seconds: time between two deliveries of an aggregator, see Aggregator; 0 turns aggregators off.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.handles: dict[str, Any] = {}
        """Actor handles by Ray's node ID."""

    def follow(self, nodes: Iterable[str], server: Any) -> None:
        """Start an aggregator on each new node, and forget those whose node is gone or about to leave."""
        if not self._seconds:
            return
        self.handles = {name: handle for name, handle in self.handles.items() if name in nodes}
        for name in nodes:
            if name not in self.handles:
                there = NodeAffinitySchedulingStrategy(name, soft=False)
                self.handles[name] = AGGREGATOR.options(scheduling_strategy=there).remote(server, self._seconds)
