"""The actors as plain objects: which errors a worker reports as a task's, which end it, and what it gives back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from protocol import config
from ray.exceptions import ObjectLostError, RayActorError

from leap_dist.config.loading import resolve
from leap_dist.driver import actors
from leap_dist.driver.actor_messages import NO_VECTOR, Grant
from leap_dist.driver.actors import ServerActor, WorkerActor
from leap_dist.nn.device import NoGpu
from leap_dist.protocol.messages import Lease, Task
from leap_dist.tasks.task import family_of
from leap_dist.worker import run_task
from leap_dist.worker.start import Start

LEASE = Lease("lease", Task(0, "pong", 0, seed=0, steps=400), "w0", "i0", 0, 60.0)
VECTOR = np.zeros(8, np.float32)


class Failing:
    """A worker whose task raises, and what it tells the server."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.reported: list[tuple[Any, ...]] = []
        monkeypatch.setattr(actors.ray, "get", lambda vector: vector)
        monkeypatch.setattr(actors, "redact_output", lambda: None)
        self.config = resolve("smoke", settings)
        self.actor = WorkerActor("w0", "i0", self.config, False)
        monkeypatch.setattr(self.actor._client, "call", lambda *arguments: self.reported.append(arguments))

    def work(self, vector: Any = VECTOR) -> None:
        self.actor._work([Grant(LEASE, vector, Start(NO_VECTOR))])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        torch.AcceleratorError("CUDA error: unspecified launch failure"),
        NoGpu("worker.device is cuda, but torch finds no GPU here"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
        RuntimeError("No CUDA GPUs are available"),
        RuntimeError("Found no NVIDIA driver on your system."),
        RayActorError(),
    ],
)
def test_no_game_is_blamed_for_the_gpu_or_the_server(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    worker = Failing(monkeypatch)

    def learner(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(run_task, "make_learner", learner)
    with pytest.raises(type(error)):
        worker.work()
    assert worker.reported == []


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
        ValueError("CUDA error"),
        OSError("no ROM"),
    ],
)
def test_an_error_of_a_task_is_reported_and_the_worker_goes_on(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    worker = Failing(monkeypatch)

    def learner(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(run_task, "make_learner", learner)
    worker.work()
    assert worker.reported == [("fail", "lease", "i0", f"{type(error).__name__}: {error}")]


@pytest.mark.emulator
def test_a_worker_whose_gpu_is_lost_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real way to it: the learner asks torch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    worker = Failing(monkeypatch, **{"worker.device": "cuda"})
    _, vector = family_of(worker.config).initialization(worker.config, 0, worker.config.scope)
    with pytest.raises(NoGpu):
        worker.work(vector)
    assert worker.reported == []


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
