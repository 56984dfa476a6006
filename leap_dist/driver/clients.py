"""Client of the server actor. Every call may be repeated, because the protocol makes repeated calls harmless."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

import numpy as np
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayError

from leap_dist.protocol.messages import Ack, Contribution
from leap_dist.testing import delivery_log

log = logging.getLogger(__name__)

CALL_SECONDS = 120.0
"""How long calls are retried. A worker that cannot reach the server for this long gives up and is restarted."""


class ServerClient:
    """The server as a running task sees it: calls are retried while the server restarts.

    Args:
        server: handle of the server actor.
        aggregator: handle of the node's aggregator, through which renewals and contributions go while it works.
    """

    def __init__(self, server: Any, aggregator: Any = None) -> None:
        self._server = server
        self._aggregator = aggregator

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the server.

        Raises ActorUnavailableError when the server stays away for CALL_SECONDS, ActorDiedError when it is gone for
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
