"""One aggregator actor per node, which delivers the reports of the node's workers to the server together."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from leap_dist.driver.clients import ServerClient
from leap_dist.protocol.messages import Ack, Contribution, Renewal
from leap_dist.server.aggregator import Aggregator

MAX_CONCURRENT_CALLS = 1000


class _Delivery:
    """The server as an aggregator sees it: calls are retried while the server restarts."""

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
        seconds: how often each delivers, see Aggregator; 0 turns aggregators off.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.handles: dict[str, Any] = {}
        """Actor handles by Ray's ID of the node."""

    def follow(self, nodes: Iterable[str], server: Any) -> None:
        """Start an aggregator on each new node, and forget those whose node has gone or is about to."""
        if not self._seconds:
            return
        self.handles = {name: handle for name, handle in self.handles.items() if name in nodes}
        for name in nodes:
            if name not in self.handles:
                there = NodeAffinitySchedulingStrategy(name, soft=False)
                self.handles[name] = AGGREGATOR.options(scheduling_strategy=there).remote(server, self._seconds)
