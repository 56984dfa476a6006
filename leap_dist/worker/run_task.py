"""One lease, from snapshot to final contribution: the worker's loop, the same for every kind of task. No Ray here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np

from leap_dist.config.settings import Config
from leap_dist.leap import meta_learners
from leap_dist.leap.learner import Learner
from leap_dist.nn.flat_vector import Manifest, add_vector, flatten
from leap_dist.nn.profiling import NoProfiler, Profiler, Stopwatch
from leap_dist.protocol.messages import Ack, Contribution, Lease
from leap_dist.tasks.atari.video import NoVideo, VideoRecorder
from leap_dist.testing.failpoints import failpoint
from leap_dist.worker.curve import LearningCurve
from leap_dist.worker.heartbeat import Heartbeat, Renewer
from leap_dist.worker.preemption import PreemptionNotice
from leap_dist.worker.start import Start, make_learner
from leap_dist.worker.task_state import StateKeeper, StateServer
from leap_dist.worker.trajectory import limited_shift


class Server(Renewer, StateServer, Protocol):
    """The part of the server that a running task talks to."""

    def push(self, contribution: Contribution) -> Ack:
        """Deliver a contribution."""

    def snapshot(self) -> tuple[int, np.ndarray]:
        """Return the current version and φ, flat float32."""


def run_task(
    lease: Lease,
    start: Start,
    config: Config,
    server: Server,
    *,
    clock: Callable[[], float] = time.monotonic,
    stopwatch: Stopwatch | None = None,
    profiler: Profiler | NoProfiler | None = None,
    video: VideoRecorder | NoVideo | None = None,
    notice: PreemptionNotice | None = None,
) -> Ack | None:
    """Train one task from φ and push contributions, the last of them final.

    `stopwatch`, `profiler` and `video` only observe; they may be used for several tasks in turn. Once `notice` is
    given, training continues only while the task is expected to end in time.

    Returns:
        The reply to the final push; None if the task was not trained to its end, because the server took the lease
        away or because another worker has to finish it. In the latter case the path so far is pushed where the mode
        accepts prefixes.

    Raises:
        Whatever the learner or the server raises.
    """
    stopwatch = stopwatch or Stopwatch()
    with stopwatch("starting"):
        beat = Heartbeat([lease], server, config.worker.heartbeat_seconds, clock)
        learner = make_learner(config, lease, start, stopwatch, beat)
    try:
        observers = stopwatch, profiler or NoProfiler(), video or NoVideo()
        task = TaskRun(lease, start, learner, config, server, clock, *observers, notice or PreemptionNotice())
        for _ in task.updates():
            pass
        return task.ack
    finally:
        learner.close()


class TaskRun:
    """The state of one task while it is trained."""

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
        video: VideoRecorder | NoVideo,
        notice: PreemptionNotice,
    ) -> None:
        self.ack: Ack | None = None  # what `run_task` returns
        self._notice = notice
        if start.evaluation:  # in which games may differ in length
            config = replace(config, task_steps=lease.task.steps)
        self._lease = lease
        self._learner = learner
        self._config = config
        self._server = server
        self._clock = clock
        self._profiler = profiler
        self._video = video
        self._time = stopwatch
        self._evaluation = start.evaluation
        self._meta_learner = meta_learners.NoMetaLearning() if start.evaluation else meta_learners.make(config, learner)
        self._manifest = Manifest.of(learner.shared).digest
        self._curve = LearningCurve(learner, config.curve_interval, keeps_episodes=start.evaluation)
        self._seq = 0
        self._base_version, self._base = lease.version, start.vector  # the newest snapshot that was received
        self._started = clock()
        self._heartbeat = Heartbeat([lease], server, config.worker.heartbeat_seconds, clock)
        self._states = StateKeeper(lease, start, learner, self._curve, server, config.worker.state_seconds, clock)
        self._started -= self._states.seconds

    def updates(self) -> Iterator[None]:
        """Train the whole task, and yield before each gradient, so that several tasks can compute theirs together."""
        config, learner, meta_learner, beat = self._config, self._learner, self._meta_learner, self._heartbeat
        rollout, rollouts, interval = self._states.rollouts, config.rollouts_per_task, config.worker.push_interval
        steps = pushed = self._states.steps
        first_filmed = self._video.start(self._lease)
        failpoint("task.start")
        while rollout < rollouts:
            rollout += 1
            if rollout == first_filmed:
                learner.show(self._video.add_frame)
            if rollout <= rollouts - config.held_back:
                yield
                loss = learner.backward()
                with self._time("leap"):
                    meta_learner.observe(loss)
                learner.step()
                if learner.done:
                    rollouts = rollout + config.held_back
            else:
                meta_learner.observe_held_back()
            self._profiler.step()
            failpoint("task.update")

            steps += learner.steps_per_update
            if rollout == rollouts:
                break
            if self._curve.is_due(steps):
                self._curve.add(steps, self._learner.interim(partial(beat, steps)) if self._evaluation else {})
            ack = None
            if steps // interval > pushed // interval and beat.may_push:
                ack, pushed = self._push(rollout, steps), steps
                if config.meta.shift != "no" and ack.proceed and not self._evaluation:
                    self._follow()
            elif beat.is_due:
                with self._time("waiting"):
                    ack = self._server.renew(self._lease.id, self._lease.incarnation, steps)
            if ack is not None:
                beat.heard(ack.wait)
                if not ack.proceed:
                    self._save(rollout, steps)
                    return
            if self._notice.given and not self._notice.leaves_time_for(self._seconds_left(rollout, rollouts)):
                if config.prefixes_count and pushed < steps:
                    self._push(rollout, steps)
                self._save(rollout, steps)
                return
            if self._states.is_due:
                self._save(rollout, steps)
        meta_learner.finish()
        if self._evaluation and (more := self._learner.conclude(partial(beat, steps))):
            self._curve.add(steps, more)
        self.ack = self._push(rollouts, steps, final=True)
        if self.ack.durable:
            self._video.finish(self._lease)

    def _seconds_left(self, done: int, rollouts: int) -> float:
        """Estimate the time to the end of the task from the speed so far."""
        return (self._clock() - self._started) / done * (rollouts - done)

    def _save(self, rollouts: int, steps: int) -> None:
        """Store the state of an evaluation's task on the server."""
        with self._time("waiting"):
            self._states.save(rollouts, steps, self._clock() - self._started)
        self._heartbeat.heard()

    def _follow(self) -> None:
        """Add the change of φ since the last snapshot to the parameters (trajectory shifting, Shin et al. 2021)."""
        with self._time("waiting"):
            version, vector = self._server.snapshot()
        if version == self._base_version:
            return
        shift = vector - self._base
        self._base_version, self._base = version, vector
        if shift.any():  # otherwise the meta-update changed nothing
            self._meta_learner.shift(
                add_vector(self._learner.shared, limited_shift(shift, self._learner, self._config))
            )

    def _push(self, updates: int, steps: int, *, final: bool = False) -> Ack:
        """Push the contribution so far, in a new array."""
        self._curve.add(steps)
        self._seq += 1
        with self._time("leap"):
            vector, path = self._meta_learner.report()
            # A vector that is not finite is sent in any case: the server then ends the task.
            without_vector = not (final or self._config.prefixes_count) and bool(vector.isfinite().all())
            if without_vector:
                vector = vector.new_empty(0)
            if final and self._evaluation and not self._config.is_supervised:  # the agent itself, to be watched
                vector = flatten((*self._learner.shared.values(), *self._learner.local.values()))
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
            start=self._base if self._config.corrects_endpoint and not without_vector else None,
            path=path,
            curve=tuple(self._curve.points),
            episodes=tuple(self._curve.episodes) if final else (),
            device=vector.device.type,
        )
        if self._config.wire_bits < 32 and not self._evaluation:
            with self._time("leap"):
                contribution = contribution.quantized(self._config.wire_bits)
        with self._time("waiting"):
            ack = self._server.push(contribution)
        failpoint("task.pushed")
        return ack
