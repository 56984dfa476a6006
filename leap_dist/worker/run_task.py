"""One lease, from snapshot to contribution: the worker's whole loop, the same for every kind of task. No Ray here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np

from leap_dist.config.settings import Config
from leap_dist.leap import meta_learners
from leap_dist.leap.learner import Learner
from leap_dist.nn.flat_vector import Manifest, add_vector, flatten
from leap_dist.nn.profiling import NoProfiler, Profiler, Stopwatch
from leap_dist.protocol.messages import Ack, Contribution, CurvePoint, Episode, Lease
from leap_dist.tasks.atari.video import Film, NoFilm
from leap_dist.tasks.starting_point import StartingPoint
from leap_dist.tasks.task import family_of
from leap_dist.testing.failpoints import failpoint


class Server(Protocol):
    """The part of the server that a running task talks to."""

    def renew(self, lease_id: str, incarnation: str, steps: int) -> Ack:
        """Extends the lease."""

    def push(self, contribution: Contribution) -> Ack:
        """Delivers a contribution."""

    def snapshot(self) -> tuple[int, np.ndarray]:
        """(version, φ) as they are now."""


@dataclass(frozen=True)
class Start:
    """What a task starts from."""

    vector: np.ndarray
    """φ, of the lease's version."""
    head: np.ndarray | None = None
    """What earlier tasks of the game added to its head, where heads persist and there were any."""
    scope: str | None = None
    """Of the parameters in `vector`; None: the configuration's."""
    evaluation: bool = False
    """Nothing is pulled forward then, and every single episode is told of at the end."""


class Notice:
    """That a worker has to be gone soon. May be given from another thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._by: float | None = None

    def give(self, seconds: float) -> None:
        """The worker has so many seconds left."""
        self._by = self._clock() + seconds

    @property
    def given(self) -> bool:
        """It has been."""
        return self._by is not None

    def leaves_time_for(self, seconds: float) -> bool:
        """Whether what takes so many seconds from now can still be done."""
        return self._by is None or self._clock() + seconds <= self._by


def make_learner(config: Config, lease: Lease, start: Start, stopwatch: Stopwatch | None = None) -> Learner:
    """The learner for a lease's task."""
    # A head that persists begins as the run and the game determine it, whichever task comes first.
    own_seed = np.random.SeedSequence((config.seed, *lease.task.game.encode())).generate_state(1)[0]
    beginning = StartingPoint(
        start.vector,
        start.scope or config.scope,
        head_seed=int(own_seed) if config.keeps_heads else None,
        head_change=start.head,
    )
    return family_of(config).learner(config, lease, beginning, stopwatch or Stopwatch())


def run_task(
    lease: Lease,
    start: Start,
    config: Config,
    server: Server,
    *,
    clock: Callable[[], float] = time.monotonic,
    stopwatch: Stopwatch | None = None,
    profiler: Profiler | NoProfiler | None = None,
    film: Film | NoFilm | None = None,
    notice: Notice | None = None,
) -> Ack | None:
    """Trains one task from φ and pushes contributions, the last of them final.

    `stopwatch`, `profiler` and `film` may go from task to task; they only watch. Once `notice` is given, the task goes
    on only while its end can be expected in time.

    Returns the answer to the final push, or None where the rest of the task is not trained: the server took the lease
    away in the meantime, or the task is to be handed over, with its path so far where prefixes count. Whatever the
    learner or the server raises goes to the caller.
    """
    stopwatch = stopwatch or Stopwatch()
    with stopwatch("starting"):
        learner = make_learner(config, lease, start, stopwatch)
    try:
        watchers = stopwatch, profiler or NoProfiler(), film or NoFilm()
        run = _Run(lease, start, learner, config, server, clock, *watchers, notice or Notice())
        return run.train()
    finally:
        learner.close()


class _Run:
    """A learner on its way through a task."""

    def __init__(
        self,
        lease: Lease,
        start: Start,
        learner: Learner,
        config: Config,
        server: Server,
        clock: Callable[[], float],
        stopwatch: Stopwatch,
        profiler: Profiler | NoProfiler,
        film: Film | NoFilm,
        notice: Notice,
    ) -> None:
        self._notice = notice
        self._lease = lease
        self._learner = learner
        self._config = config
        self._server = server
        self._clock = clock
        self._profiler = profiler
        self._film = film
        self._time = stopwatch
        self._watch = meta_learners.NoMetaLearning() if start.evaluation else meta_learners.make(config, learner)
        self._manifest = Manifest.of(learner.shared).digest
        self._started = clock()
        self._seq = 0
        self._quiet_until = self._started  # the server wants nothing but the end before that
        self._longest_silence = lease.seconds / 4  # whatever the server wants
        self._curve: list[CurvePoint] = []
        self._episodes: list[Episode] | None = [] if start.evaluation else None
        self._base_version, self._base = lease.version, start.vector  # the snapshot that was last heard of
        self._sends_start = config.corrects_endpoint

    def train(self) -> Ack | None:
        """The whole task; see run_task."""
        config, learner, watch = self._config, self._learner, self._watch
        rollout, rollouts, interval = 0, config.rollouts_per_task, config.worker.push_interval
        steps, pushed, noted, renewed = 0, 0, 0, self._clock()
        filmed_from = self._film.start(self._lease)
        failpoint("task.start")
        while rollout < rollouts:
            rollout += 1
            if rollout == filmed_from:
                learner.show(self._film.see)
            if rollout <= rollouts - config.held_back:
                loss = learner.backward()
                with self._time("leap"):
                    watch.observe(loss)
                learner.step()
                if learner.done:
                    rollouts = rollout + config.held_back
            else:
                watch.measure()
            self._profiler.step()
            failpoint("task.update")

            steps += learner.steps_per_update
            if rollout == rollouts:
                break
            if steps // config.curve_interval > noted // config.curve_interval:
                self._note(steps)
                noted = steps
            if self._notice.given and not self._notice.leaves_time_for(self._left(rollout, rollouts)):
                self._hand_over(rollout, steps)
                return None
            ack = None
            if steps // interval > pushed // interval and self._clock() >= self._quiet_until:
                ack, pushed = self._push(rollout, steps), steps
                if config.meta.shift and ack.proceed:
                    self._follow()
            elif self._must_renew(self._clock() - renewed):
                with self._time("waiting"):
                    ack = self._server.renew(self._lease.id, self._lease.incarnation, steps)
            if ack is not None:
                renewed = self._clock()
                self._quiet_until = max(self._quiet_until, renewed + ack.wait)
                if not ack.proceed:
                    return None
        watch.finish()
        if self._episodes is not None:
            self._conclude(steps)
        ack = self._push(rollouts, steps, final=True)
        if ack.durable:
            self._film.finish(self._lease)
        return ack

    def _left(self, done: int, rollouts: int) -> float:
        """Seconds to the end of the task, at the speed so far."""
        return (self._clock() - self._started) / done * (rollouts - done)

    def _hand_over(self, updates: int, steps: int) -> None:
        """Leaves the task to another worker; where prefixes count, so does all that was trained."""
        if self._config.prefixes_count:
            self._push(updates, steps)

    def _must_renew(self, silence: float) -> bool:
        """Whether the server has to hear of the task again, after so many seconds."""
        if self._clock() < self._quiet_until:
            return silence > self._longest_silence
        return silence > self._config.worker.heartbeat_seconds

    def _follow(self) -> None:
        """Continual trajectory shifting (Shin et al. 2021): moves along with φ since it was last heard of.

        A shift that is large compared with the parameters is cut: what it assumes, J = I, holds nearby only.
        """
        with self._time("waiting"):
            version, vector = self._server.snapshot()
        if version == self._base_version:
            return
        shift = vector - self._base
        self._base_version, self._base = version, vector
        size = float(np.linalg.norm(shift))
        largest = self._config.meta.max_shift * float(flatten(self._learner.shared.values()).norm())
        if size == 0:  # a version that changed nothing
            return
        if size > largest:
            shift *= np.float32(largest / size)
        self._watch.shift(add_vector(self._learner.shared, shift))

    def _note(self, steps: int, more: Mapping[str, float] = MappingProxyType({})) -> None:
        """Adds a point to the curve: of what happened since the last one."""
        progress = self._learner.progress()
        if self._episodes is not None:
            self._episodes += map(Episode, progress.ended, progress.scores)
        if means := {**progress.means, **more}:
            score = float(np.mean(progress.scores)) if progress.scores else None
            self._curve.append(CurvePoint(steps, len(progress.scores), score, means))

    def _conclude(self, steps: int) -> None:
        """The curve's last point has what shows only at the end. The lease is kept while that is looked at."""
        renewed = self._clock()

        def beat() -> None:
            nonlocal renewed
            if self._must_renew(self._clock() - renewed):
                self._server.renew(self._lease.id, self._lease.incarnation, steps)
                renewed = self._clock()

        if more := self._learner.conclude(beat):
            self._note(steps, more)

    def _push(self, updates: int, steps: int, *, final: bool = False) -> Ack:
        """Delivers what there is so far, in a new array."""
        self._note(steps)
        self._seq += 1
        with self._time("leap"):
            vector, path = self._watch.report()
            # What is not finite goes all the same: the server ends the task then.
            bare = not (final or self._config.prefixes_count) and bool(vector.isfinite().all())
            if bare:
                vector = vector.new_empty(0)
        contribution = Contribution(
            lease=self._lease.id,
            worker=self._lease.worker,
            incarnation=self._lease.incarnation,
            manifest=self._manifest,
            base_version=self._base_version,
            seq=self._seq,
            final=final,
            updates=updates,
            steps=steps,
            seconds=self._clock() - self._started,
            vector=vector.cpu().numpy(),
            start=self._base if self._sends_start and not bare else None,
            path=path,
            curve=tuple(self._curve),
            episodes=tuple(self._episodes) if final and self._episodes else (),
        )
        if self._config.wire_bits < 32:
            with self._time("leap"):
                contribution = contribution.quantized(self._config.wire_bits)
        with self._time("waiting"):
            ack = self._server.push(contribution)
        failpoint("task.pushed")
        return ack
