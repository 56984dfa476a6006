"""One lease, from snapshot to contribution: the worker's whole loop, the same for every kind of task. No Ray here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from leap_dist import meta_learners
from leap_dist.config import Config
from leap_dist.contribution import Ack, Contribution, CurvePoint, Lease
from leap_dist.learners import Learner
from leap_dist.learners.a2c import A2C
from leap_dist.models import Manifest


class Server(Protocol):
    """The part of the server that a running task talks to."""

    def renew(self, lease_id: str, incarnation: str, steps: int) -> Ack:
        """Extends the lease."""

    def push(self, contribution: Contribution) -> Ack:
        """Delivers a contribution."""


def make_learner(config: Config, lease: Lease, vector: np.ndarray) -> Learner:
    """The learner for a lease's task, its encoder starting from the snapshot `vector`."""
    return A2C(
        lease.task.game, vector, seed=lease.task.seed, agent=config.agent, settings=config.atari, worker=config.worker
    )


def run_task(
    lease: Lease,
    vector: np.ndarray,
    config: Config,
    server: Server,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Ack | None:
    """Trains one task from φ = `vector` and pushes contributions, the last of them final.

    Returns the answer to the final push, or None where the server took the lease away in the meantime: the rest of
    the task is not trained then. Whatever the learner or the server raises goes to the caller.
    """
    learner = make_learner(config, lease, vector)
    try:
        return _train(learner, lease, config, server, clock)
    finally:
        learner.close()


def _train(learner: Learner, lease: Lease, config: Config, server: Server, clock: Callable[[], float]) -> Ack | None:
    pull = meta_learners.make(config, learner.encoder.parameters())
    reporter = _Reporter(lease, Manifest.of(learner.encoder).digest, learner, pull, clock)
    steps, renewed = 0, clock()
    for update in range(1, config.updates_per_task + 1):
        loss = learner.backward()
        pull.observe(loss)
        learner.step()

        steps += learner.steps_per_update
        ack = None
        if steps // config.worker.push_interval > (steps - learner.steps_per_update) // config.worker.push_interval:
            ack = server.push(reporter.contribution(update, steps))
        elif clock() - renewed > config.worker.heartbeat_seconds:
            ack = server.renew(lease.id, lease.incarnation, steps)
        if ack is not None:
            renewed = clock()
            if not ack.proceed:
                return None
    pull.close(learner.evaluate() if config.leap.final_loss else None)
    return server.push(reporter.contribution(config.updates_per_task, steps, final=True))


class _Reporter:
    """Numbers a lease's contributions and gathers its learning curve."""

    def __init__(
        self,
        lease: Lease,
        manifest: str,
        learner: Learner,
        pull: meta_learners.MetaLearner,
        clock: Callable[[], float],
    ) -> None:
        self._lease = lease
        self._manifest = manifest
        self._learner = learner
        self._pull = pull
        self._clock = clock
        self._started = clock()
        self._seq = 0
        self._curve: list[CurvePoint] = []

    def contribution(self, updates: int, steps: int, *, final: bool = False) -> Contribution:
        """The pull so far. The vector is a new array."""
        progress = self._learner.progress()
        if progress.means:
            score = float(np.mean(progress.scores)) if progress.scores else None
            self._curve.append(CurvePoint(steps, len(progress.scores), score, progress.means))
        self._seq += 1
        return Contribution(
            lease=self._lease.id,
            worker=self._lease.worker,
            incarnation=self._lease.incarnation,
            manifest=self._manifest,
            seq=self._seq,
            final=final,
            updates=updates,
            steps=steps,
            seconds=self._clock() - self._started,
            vector=self._pull.vector().cpu().numpy(),
            path=self._pull.statistics(),
            curve=tuple(self._curve),
        )
