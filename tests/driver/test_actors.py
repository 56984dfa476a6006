"""The actors as plain objects, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
from protocol import config
from ray.exceptions import ObjectLostError

from leap_dist.driver import actors
from leap_dist.driver.actor_messages import NO_VECTOR, Grant
from leap_dist.driver.actors import ServerActor, WorkerActor
from leap_dist.protocol.messages import Lease
from leap_dist.worker.start import Start


class Client:
    """Calls a server in this process."""

    def __init__(self, server: ServerActor) -> None:
        self._server = server

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._server, method)(*arguments)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServerActor:
    monkeypatch.setattr(actors, "redact_output", lambda: None)
    monkeypatch.setattr(actors.torch, "set_num_threads", lambda _: None)
    found = ServerActor(config(), tmp_path, "session")
    assert found.problem() is None
    return found


@pytest.mark.parametrize("stack", [1, 3])
def test_a_worker_whose_leases_came_from_a_lost_server_gives_all_of_them_back(
    server: ServerActor, monkeypatch: pytest.MonkeyPatch, stack: int
) -> None:
    """The initialization that they start from is gone. Leases that it kept would expire, and it would be killed."""

    def lose(_: object) -> Any:
        raise ObjectLostError("ff" * 28, None, "")

    worker = WorkerActor("w0", "i0", config(), profile=False)
    worker._client = Client(server)  # type: ignore[assignment]
    grants = []
    for number in range(stack):
        suffix = f"/{number}" if number else ""
        lease = server._server.lease(f"w0{suffix}", f"i0{suffix}")
        assert isinstance(lease, Lease)
        grants.append(Grant(lease, object(), Start(NO_VECTOR)))  # type: ignore[arg-type]
    other = server._server.lease("w1", "i1")
    monkeypatch.setattr(ray, "get", lose)
    worker._work(grants)
    assert [held["lease"] for held in server._server.status()["leases"]] == [other.id]
    again = server._server.lease("w0", "i0")
    assert again.task.index == grants[0].lease.task.index, "it runs first"
