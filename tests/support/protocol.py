"""A small server and workers that answer at once, for tests of the protocol without Ray, Atari or torch training."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from leap_dist.config.loading import resolve
from leap_dist.config.settings import Config
from leap_dist.nn.flat_vector import Manifest
from leap_dist.protocol.messages import Ack, Contribution, CurvePoint, Idle, Lease, PathStatistics, Task
from leap_dist.server.meta_server import MetaServer
from leap_dist.storage.replica import NO_REPLICA, NoReplica
from leap_dist.tasks.task import family_of

MANIFEST = Manifest(("weight", "bias"), ((2, 3), (2,)))
INITIAL = np.linspace(-1, 1, MANIFEST.size).astype(np.float32)
HEAD = 3
"""Length of the heads, where they persist."""

MODES: dict[str, dict[str, Any]] = {
    "sync": {"mode": "sync"},
    "buffered": {"mode": "buffered"},
    "async": {"mode": "async"},
    "fedasync": {"mode": "fedasync", "meta_learner": "reptile"},
    "delayed-nesterov": {"mode": "delayed-nesterov"},
    "stream": {"mode": "stream"},
}
"""Each with a meta-learner that it goes with."""


class Clock:
    """Monotonic seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float, server: Any) -> None:
        """Let time pass while the server is running."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(self.now + 1.0, until)
            server.tick()


@contextlib.contextmanager
def fast_folder() -> Iterator[Path]:
    """A directory in memory, where there is one: a process that is killed loses nothing that it has written."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def config(**settings: Any) -> Config:
    """The smoke preset with settings by name, dots written as two underscores."""
    return resolve("smoke", {name.replace("__", "."): value for name, value in settings.items()})


def serve(
    run_dir: Path,
    settings: Config,
    *,
    clock: Clock | None = None,
    session: str = "s",
    work: Callable[[], float] | None = None,
    replica: NoReplica = NO_REPLICA,
) -> MetaServer:
    run_dir.mkdir(exist_ok=True)
    return MetaServer(
        settings,
        run_dir,
        manifest=MANIFEST,
        initial=INITIAL,
        session=session,
        clock=clock or Clock(),
        work=work,
        preprocessing=family_of(settings).preprocessing(settings),
        replica=replica,
    )


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


class Worker:
    """A worker with one push under way at a time, which it sends again, the same, until it has an answer.

    `pushes` of a task, the last of them final, reach its end in as many parts; each is cumulative.
    """

    def __init__(self, settings: Config, name: str = "w0", pushes: Callable[[Task], int] = lambda task: 1) -> None:
        self._config = settings
        self.name = name
        self._pushes = pushes
        self.lease: Lease | None = None
        self.todo: list[Contribution] = []
        """The present lease's contributions that are not answered yet."""
        self.pushed: Contribution | None = None
        """The newest contribution sent, answered or not."""
        self.sent: dict[tuple[str, int], Contribution] = {}
        """All that were ever sent, by lease and seq."""

    def step(self, server: MetaServer) -> Ack | Lease | Idle:
        """Leases a task, or delivers one contribution."""
        if not self.todo:
            lease = server.lease(self.name, self.name)
            if isinstance(lease, Lease):
                self.lease = lease
                self.todo = self.train(lease, server.snapshot()[1], server.head(lease.task.game))
            return lease
        self.pushed = self.todo[0]
        self.sent[self.pushed.lease, self.pushed.seq] = self.pushed
        ack = server.push(self.pushed)
        if ack.reason != "storage":
            del self.todo[0]
        if not ack.proceed:
            self.todo = []
        return ack

    def train(self, lease: Lease, start: np.ndarray, head: np.ndarray | None) -> list[Contribution]:
        """Every contribution that comes of a lease, in the order of seq."""
        count, shared = self._pushes(lease.task), start
        if self._config.keeps_heads:
            start = np.concatenate([start, np.zeros(HEAD, np.float32) if head is None else head])
        parts = [pull(lease.task.seed + k, start) / np.float32(count) for k in range(count)]
        cumulative = np.cumsum(parts, axis=0, dtype=np.float32)
        if self._config.meta_learner == "none":
            cumulative = np.empty((count, 0), np.float32)
        sent = [
            replace(
                contribution(lease, cumulative[k], seq=k + 1, final=k + 1 == count),
                steps=self._config.task_steps * (k + 1) // count,
                start=shared.copy() if self._config.corrects_endpoint else None,
            )
            for k in range(count)
        ]
        return sent if self._config.wire_bits == 32 else [one.quantized(self._config.wire_bits) for one in sent]


def drive(server: MetaServer, workers: Sequence[Worker], turns: int | None = None) -> None:
    """Lets the workers step in turn: to the end of the run, or for so many turns."""
    for turn in range(10_000 if turns is None else turns):
        if server.finished:
            return
        workers[turn % len(workers)].step(server)
    assert turns is not None, "the run does not end"


def ledger(run_dir: Path) -> list[dict[str, Any]]:
    """The ledger without what names workers, devices and leases, which differ between runs that do the same."""
    lines = [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("lease", "worker", "device", "seconds")} for line in lines]
