"""A small server and workers that answer at once, for tests of the protocol without Ray, Atari or torch training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from leap_dist.config import resolve
from leap_dist.contribution import Contribution, CurvePoint, Idle, Lease, PathStatistics
from leap_dist.models import Manifest
from leap_dist.server import MetaServer
from leap_dist.settings import Config

MANIFEST = Manifest(("weight", "bias"), ((2, 3), (2,)))
INITIAL = np.linspace(-1, 1, MANIFEST.size).astype(np.float32)


class Clock:
    """Monotonic seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def config(**settings: Any) -> Config:
    """The smoke preset with settings by name, dots written as two underscores."""
    return resolve("smoke", {name.replace("__", "."): value for name, value in settings.items()})


def serve(run_dir: Path, settings: Config, *, clock: Clock | None = None, session: str = "s") -> MetaServer:
    run_dir.mkdir(exist_ok=True)
    return MetaServer(settings, run_dir, manifest=MANIFEST, initial=INITIAL, session=session, clock=clock or Clock())


def pull(seed: int, start: np.ndarray) -> np.ndarray:
    """What training of the task with that seed, from `start`, would return: different for each, and not linear."""
    target = np.random.default_rng(seed).normal(size=start.shape).astype(np.float32)
    return (start - target) * (1 + np.abs(start))


def contribution(lease: Lease, vector: np.ndarray, *, seq: int = 1, final: bool = True) -> Contribution:
    return Contribution(
        lease=lease.id,
        worker=lease.worker,
        incarnation=lease.incarnation,
        manifest=MANIFEST.digest,
        base_version=lease.version,
        seq=seq,
        final=final,
        updates=10 * seq,
        steps=100 * seq,
        seconds=1.0,
        vector=vector,
        start=None,
        path=PathStatistics(4.0, 2.0, 1.0, 1.0, 0.5),
        curve=(CurvePoint(100 * seq, 1, 3.0, {"loss": 0.5}),),
    )


def grant(server: MetaServer, worker: str = "w0", incarnation: str = "i0") -> Lease:
    """A lease; fails the test where the server has none."""
    lease = server.lease(worker, incarnation)
    assert isinstance(lease, Lease)
    return lease


def finish(server: MetaServer, lease: Lease, start: np.ndarray) -> Contribution:
    """Trains the leased task and pushes the final contribution, which must be accepted."""
    done = contribution(lease, pull(lease.task.seed, start), seq=2)
    ack = server.push(done)
    assert ack.durable, ack
    return done


def work(server: MetaServer, worker: str = "w0") -> None:
    """One worker alone, to the end of the run."""
    while not isinstance(lease := server.lease(worker, "i0"), Idle):
        finish(server, lease, server.snapshot()[1])
    assert lease.finished


def ledger(run_dir: Path) -> list[dict[str, Any]]:
    """The ledger without what names workers and leases, which differ between runs that do the same."""
    lines = [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("lease", "worker", "seconds")} for line in lines]
