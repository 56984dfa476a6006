"""One aggregator on every node: what its workers report goes to the server together (leap_dist.server.aggregator)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from leap_dist.driver.actors import ServerClient
from leap_dist.protocol.messages import Ack, Contribution, Renewal
from leap_dist.server.aggregator import Aggregator

AT_ONCE = 1000  # calls that an aggregator answers or keeps waiting


class _Delivery:
    """The server as an aggregator sees it: calls are retried over its restarts."""

    def __init__(self, server: Any) -> None:
        self._client = ServerClient(server)

    def push_together(self, contributions: Sequence[Contribution], renewals: Sequence[Renewal]) -> list[Ack]:
        """See MetaServer."""
        acks: list[Ack] = self._client.call("push_together", list(contributions), list(renewals))
        return acks

    def snapshot(self) -> tuple[int, np.ndarray]:
        """(version, φ) as they are now."""
        return self._client.snapshot()


class AggregatorActor:
    """An Aggregator behind Ray. Its calls wait in an event loop; a thread delivers."""

    def __init__(self, server: Any, seconds: float) -> None:
        self._aggregator = Aggregator(_Delivery(server), seconds)
        threading.Thread(target=self._aggregator.run, name="deliveries", daemon=True).start()

    async def renew(self, lease_id: str, incarnation: str, steps: int) -> Ack:
        """See Aggregator."""
        return await asyncio.wrap_future(self._aggregator.renew_soon(lease_id, incarnation, steps))

    async def push(self, contribution: Contribution) -> Ack:
        """See Aggregator."""
        return await asyncio.wrap_future(self._aggregator.push_soon(contribution))


AGGREGATOR: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=AT_ONCE)(AggregatorActor)  # type: ignore[call-overload]


class Aggregators:
    """An aggregator on each of the nodes that stay, where they are asked for."""

    def __init__(self, seconds: float) -> None:
        """`seconds`: see Aggregator; 0: there are none."""
        self._seconds = seconds
        self.handles: dict[str, Any] = {}
        """By Ray's name of the node."""

    def follow(self, nodes: Iterable[str], server: Any) -> None:
        """Starts one where a node has come, and forgets those whose node has gone, or is about to."""
        if not self._seconds:
            return
        self.handles = {name: handle for name, handle in self.handles.items() if name in nodes}
        for name in nodes:
            if name not in self.handles:
                there = NodeAffinitySchedulingStrategy(name, soft=False)
                self.handles[name] = AGGREGATOR.options(scheduling_strategy=there).remote(server, self._seconds)
