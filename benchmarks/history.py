"""Histories for `fuzz_protocol`: random settings, simulated workers, and the result that φ should have."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from leap_dist.config.loading import resolve
from leap_dist.config.settings import Config
from leap_dist.nn.flat_vector import Manifest
from leap_dist.protocol.messages import Ack, Contribution, Lease, PathStatistics, Renewal
from leap_dist.server.meta_server import MetaServer
from leap_dist.storage.replica import NO_REPLICA, NoReplica

MANIFEST = Manifest(("weight", "bias"), ((2, 3), (2,)))
INITIAL = np.linspace(-1, 1, MANIFEST.size).astype(np.float32)
HEAD = 3
"""Length of the heads, if they persist."""
RATE = 0.3
"""Meta learning rate, of plain SGD."""
MODES: dict[str, dict[str, Any]] = {
    "sync": {},
    "buffered": {},
    "async": {},
    "fedasync": {"meta_learner": "reptile"},
    "delayed-nesterov": {},
    "stream": {},
}


def settings_of(chance: random.Random) -> Config:
    """Draw the settings of a short run."""
    mode = chance.choice(list(MODES))
    given = {
        "mode": mode,
        **MODES[mode],
        "games": "pong,freeway,assault",
        "meta_updates": chance.randint(1, 6),
        "meta.batch_size": chance.randint(1, 3),
        "meta.optimizer": "sgd",
        "meta.learning_rate": RATE,
        "meta.staleness": "constant",
        "meta.contribution_clip": 0,
        "meta.refuse_norm": 0,
        # In `stream` mode, with several workers, such a low limit would keep tasks from ever ending.
        "meta.max_staleness": 1000 if mode == "stream" else chance.choice([1, 1000]),
        "server.keep_checkpoints": chance.randint(1, 3),
        "server.on_lost": "keep" if mode == "stream" else chance.choice(["keep", "retry"]),
        "server.lease_seconds": 6,
        "worker.heartbeat_seconds": 1,
    }
    if mode in ("buffered", "stream") and chance.random() < 0.3:
        given["meta_learner"] = "finetune-multi"
    elif mode == "stream" and chance.random() < 0.3:
        given["worker.wire"] = "int8"
    return resolve("smoke", given)


def server_of(
    settings: Config, folder: Path, clock: Clock, session: str, replica: NoReplica = NO_REPLICA
) -> MetaServer:
    """Return a server on a folder."""
    return MetaServer(
        settings, folder, manifest=MANIFEST, initial=INITIAL, session=session, clock=clock, replica=replica
    )


class Clock:
    """Monotonic seconds that pass only when a history advances them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the current time."""
        return self.now


class History:
    """Everything that the workers of all launches of a run sent, and what they were promised."""

    def __init__(self, settings: Config) -> None:
        self.settings = settings
        self.sent: dict[tuple[str, int], Contribution] = {}
        """Every contribution that was ever pushed, by lease and seq."""
        self.acknowledged: set[tuple[str, int]] = set()
        """Leases and seqs of those that were acknowledged as durable."""
        self.blamed = 0
        """Leases that ended in a way that counts against their game."""

    def expected(self, lines: Sequence[dict[str, Any]]) -> np.ndarray | None:
        """Return φ computed in float64 from the ledger's contributions, or None for the mode with momentum."""
        mode, size = self.settings.mode, MANIFEST.size
        if mode == "delayed-nesterov":
            return None
        phi, newest, done = INITIAL.astype(np.float64), dict[str, np.ndarray](), 0
        while done < len(lines):
            version = lines[done]["version_after"]
            batch = [line for line in lines[done:] if line["version_after"] == version]
            done += len(batch)
            total = np.zeros(size)
            for line in batch:
                contribution = self.sent[line["lease"], line["seq"]]
                vector = contribution.vector[:size].astype(np.float64)
                if mode == "stream":
                    vector, newest[line["lease"]] = vector - newest.get(line["lease"], 0.0), vector
                if contribution.start is not None:
                    vector = vector + phi - contribution.start
                total += vector
            phi -= RATE * total / (self.settings.meta.batch_size if mode in ("async", "stream") else len(batch))
        return phi


class Player:
    """The workers of one launch, and the random events that may happen to them."""

    def __init__(self, history: History, chance: random.Random, session: str) -> None:
        self._history = history
        self._chance = chance
        self.clock = Clock()
        self._workers = [_Worker(history, f"w{i}-{session}") for i in range(chance.randint(1, 4))]

    def act(self, server: Any, *, calm: bool) -> None:
        """Cause one random event. If `calm`, a worker takes its next regular step."""
        worker = self._chance.choice(self._workers)
        dice = 1.0 if calm else self._chance.random()
        if dice < 0.08:
            worker.repeat(server, self._chance)
        elif dice < 0.12:
            worker.renew(server)
        elif dice < 0.16:
            worker.vanish(server)
        elif dice < 0.19 and self._history.blamed < 2:
            self._history.blamed += 1
            worker.fail(server)
        elif dice < 0.22 and self._history.blamed < 2:
            self._history.blamed += 1
            for _ in range(8):
                self.clock.now += 1.0
                server.tick()
        elif dice < 0.30:
            self._push_together(server)
        elif dice < 0.35:
            server.tick()
            server.status()
        else:
            worker.step(server)

    def _push_together(self, server: Any) -> None:
        ready = [worker for worker in self._workers if worker.todo]
        renewals = [worker.renewal for worker in self._workers if worker.lease and not worker.todo]
        acks = server.push_together([worker.next() for worker in ready], [one for one in renewals if one])
        for worker, ack in zip(ready, acks, strict=False):
            worker.take(ack)


class _Worker:
    """A worker with one outstanding push at a time, which it repeats until it gets an answer."""

    def __init__(self, history: History, name: str) -> None:
        self._history = history
        self._name = name
        self._incarnation = f"{name}.0"
        self.lease: Lease | None = None
        self.todo: list[Contribution] = []
        self._sent: list[Contribution] = []

    @property
    def renewal(self) -> Renewal | None:
        """Renewal of the worker's lease, or None if it has none."""
        return Renewal(self.lease.id, self._incarnation, 1) if self.lease else None

    def step(self, server: Any) -> None:
        """Lease a task, or push the next contribution."""
        if self.todo:
            self.take(server.push(self.next()))
            return
        answer = server.lease(self._name, self._incarnation)
        self.lease = answer if isinstance(answer, Lease) else None
        if self.lease is not None:
            self.todo = self._train(self.lease, server.snapshot()[1], server.head(self.lease.task.game))

    def next(self) -> Contribution:
        """Return the contribution to push."""
        contribution = self.todo[0]
        self._history.sent[contribution.lease, contribution.seq] = contribution
        self._sent.append(contribution)
        return contribution

    def take(self, ack: Ack) -> None:
        """Take the answer to a push."""
        contribution = self.todo[0]
        if ack.durable:
            self._history.acknowledged.add((contribution.lease, contribution.seq))
        if ack.accepted or not ack.wait:
            del self.todo[0]
        if not ack.proceed:
            self.todo = []

    def repeat(self, server: Any, chance: random.Random) -> None:
        """Push an earlier contribution again."""
        if self._sent:
            old = chance.choice(self._sent)
            if server.push(old).durable:
                self._history.acknowledged.add((old.lease, old.seq))

    def renew(self, server: Any) -> None:
        """Renew the lease."""
        if (renewal := self.renewal) is not None and not server.renew(*renewal).proceed:
            self.todo = []

    def fail(self, server: Any) -> None:
        """Report that the task failed."""
        if self.lease is not None:
            server.fail(self.lease.id, self._incarnation, "broken")
            self.lease, self.todo = None, []

    def vanish(self, server: Any) -> None:
        """Die, and come back as another incarnation."""
        gone, number = self._incarnation, int(self._incarnation.rpartition(".")[2]) + 1
        self._incarnation, self.lease, self.todo = f"{self._name}.{number}", None, []
        server.release(gone)

    def _train(self, lease: Lease, start: np.ndarray, head: np.ndarray | None) -> list[Contribution]:
        """Return every contribution that a lease leads to, in the order of seq."""
        settings, count, shared = self._history.settings, 1 + lease.task.index % 3, start
        if settings.keeps_heads:
            start = np.concatenate([start, np.zeros(HEAD, np.float32) if head is None else head])
        noise = np.random.default_rng(lease.task.seed).normal(size=(count, start.size)).astype(np.float32)
        path = PathStatistics(1.0, 1.0, 1.0, 1.0, 0.0)
        first = Contribution.whole(lease, MANIFEST.digest, start, path)
        made = [
            replace(
                first,
                seq=k + 1,
                final=k + 1 == count,
                steps=settings.task_steps * (k + 1) // count,
                vector=vector,
                start=shared.copy() if settings.corrects_endpoint else None,
            )
            for k, vector in enumerate(np.cumsum(noise, axis=0, dtype=np.float32))
        ]
        return made if settings.wire_bits == 32 else [one.quantized(settings.wire_bits) for one in made]
