"""Shared parts of the server's benchmarks: realistic contributions, client actors and a local Ray."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray

from leap_dist.config.loading import resolve
from leap_dist.config.settings import Config
from leap_dist.driver.actors import SERVER
from leap_dist.driver.cluster import connect
from leap_dist.envs import atari_vector
from leap_dist.nn.actor_critic import initialization
from leap_dist.nn.flat_vector import Manifest
from leap_dist.protocol.messages import Contribution, CurvePoint, Lease, PathStatistics
from leap_dist.server.meta_server import MetaServer

CURVE_POINTS = 20  # learning-curve points of a task of the paper's length, at the default push interval


def config(**settings: Any) -> Config:
    """Return the fast preset in mode buffered, with leases, run and staleness limit that outlast the benchmark."""
    endless = {
        "mode": "buffered",
        "meta_updates": 100_000,
        "meta.max_staleness": 100_000,
        "server.lease_seconds": 1e6,
        "server.pushes_per_second": 1e6,
    }
    return resolve("fast", endless, {name.replace("__", "."): value for name, value in settings.items()})


def encoder() -> tuple[Manifest, np.ndarray]:
    """Return the manifest of the preset's encoder and a random vector in place of a pull-forward gradient."""
    manifest, _ = initialization(atari_vector.channels(config().atari.frames), 0)
    return manifest, np.random.default_rng(0).normal(scale=1e-3, size=manifest.size).astype(np.float32)


def plain_server(run_dir: Path, **settings: Any) -> MetaServer:
    """Return a server without Ray, in a newly created run directory."""
    run_dir.mkdir()
    chosen = config(**settings)
    manifest, initial = initialization(atari_vector.channels(chosen.atari.frames), chosen.seed)
    return MetaServer(chosen, run_dir, manifest=manifest, initial=initial)


def server_actor(run_dir: Path, **settings: Any) -> Any:
    """Return a started server actor, in a newly created run directory."""
    return server_of(config(**settings), run_dir)


def server_of(chosen: Config, run_dir: Path) -> Any:
    """Return a started server actor with the given configuration."""
    run_dir.mkdir()
    server = SERVER.remote(chosen, run_dir, "benchmark")
    assert ray.get(server.problem.remote()) is None
    return server


@contextlib.contextmanager
def local_ray() -> Iterator[None]:
    """Start Ray as the driver does, in a temporary folder, and shut it down on exit."""
    with tempfile.TemporaryDirectory(
        prefix="ld", ignore_cleanup_errors=True
    ) as folder:  # short, because Ray puts sockets below it
        os.environ.update(HOME=folder, RAY_TMPDIR=folder)
        connect(config())
        try:
            yield
        finally:
            ray.shutdown()


def contribution(lease: Lease, manifest: str, vector: np.ndarray, seq: int, *, final: bool = False) -> Contribution:
    """Return the contribution that a worker would push for a lease. `manifest` is the manifest's digest."""
    means = {"loss": 0.5, "policy_loss": 0.1, "value_loss": 0.8, "entropy": 1.2}
    return Contribution(
        lease=lease.id,
        worker=lease.worker,
        incarnation=lease.incarnation,
        manifest=manifest,
        base_version=lease.version,
        seq=seq,
        final=final,
        updates=100 * seq,
        steps=8_000 * seq,
        seconds=10.0 * seq,
        vector=vector,
        start=None,
        path=PathStatistics(energy=4.0, length=2.0, loss_term_norm=1.0, path_term_norm=1.0, cosine=0.5),
        curve=tuple(CurvePoint(50_000 * (k + 1), 7, 123.0, dict(means)) for k in range(CURVE_POINTS)),
    )


class Final(NamedTuple):
    """One delivered task: seconds of its lease and push, and whether the push triggered a meta-update."""

    lease: float
    push: float
    updated: bool


def finals(call: Callable[..., Any], worker: str, manifest: str, vector: np.ndarray, count: int) -> list[Final]:
    """Lease `count` tasks and push a final contribution for each. `call` invokes a server method by name."""
    done = []
    for _ in range(count):
        started = time.perf_counter()
        answer = call("lease", worker, "i")
        leased = time.perf_counter()
        lease = answer if isinstance(answer, Lease) else answer[0]
        ack = call("push", contribution(lease, manifest, vector, 1, final=True))
        assert ack.durable, ack
        done.append(Final(leased - started, time.perf_counter() - leased, ack.version > lease.version))
    return done


class Bare:
    """Ray actor that does the least possible with an array."""

    def take(self, vector: np.ndarray) -> int:
        """Return the length of the vector."""
        return len(vector)


class Client:
    """Client that pushes as a worker does, waiting for each answer before the next call."""

    def __init__(self, name: str) -> None:
        self._name = name
        manifest, self._vector = encoder()
        self._manifest = manifest.digest
        self._open: dict[Any, tuple[Lease, int]] = {}  # by server: the current lease and its last seq

    def bare(self, actor: Any, seconds: float) -> float:
        """Return the calls per second of a `Bare` actor."""
        return _rate(lambda: ray.get(actor.take.remote(self._vector)), seconds)

    def partials(self, server: Any, seconds: float) -> float:
        """Return the partial contributions per second, all for one lease."""
        lease, seq = self._open.get(server) or (ray.get(server.lease.remote(self._name, "i"))[0], 0)

        def push() -> None:
            nonlocal seq
            seq += 1
            ack = ray.get(server.push.remote(contribution(lease, self._manifest, self._vector, seq)))
            assert (ack.accepted, ack.durable) == (True, False), ack

        rate = _rate(push, seconds)
        self._open[server] = lease, seq
        return rate

    def finals(self, server: Any, count: int) -> list[Final]:
        """Lease and deliver `count` tasks through Ray; see the module's function `finals`."""

        def call(method: str, *arguments: Any) -> Any:
            return ray.get(getattr(server, method).remote(*arguments))

        return finals(call, self._name, self._manifest, self._vector, count)


def _rate(call: Callable[[], object], seconds: float) -> float:
    started, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < seconds:
        call()
        count += 1
    return count / elapsed
