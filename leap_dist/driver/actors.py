"""MetaServer and run_task behind Ray: the two kinds of actors, and how one calls the other."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayError

from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.envs import atari_vector
from leap_dist.evaluation import initializations
from leap_dist.evaluation.server import EvaluationServer, Run
from leap_dist.nn.device import prepare
from leap_dist.nn.profiling import NoProfiler, Profiler, Stopwatch
from leap_dist.protocol.messages import Ack, Contribution, Idle, Lease, Renewal
from leap_dist.server.meta_server import MetaServer
from leap_dist.storage.atomic import CorruptFile
from leap_dist.storage.replica import Remote, connect
from leap_dist.storage.run_lock import RunDirectoryBusy
from leap_dist.tasks.atari.video import Film, NoFilm, Play
from leap_dist.tasks.task import family_of
from leap_dist.testing import delivery_log
from leap_dist.worker.run_task import Notice, Start, run_task

log = logging.getLogger(__name__)

CALL_SECONDS = 120.0  # a worker that cannot reach the server for this long gives up and is restarted


class Gone(NamedTuple):
    """An incarnation of a worker that has ended."""

    incarnation: str
    crashed: bool
    """By itself: neither did its node end, nor was it told to."""


class Grant(NamedTuple):
    """A lease, and what its task starts from."""

    lease: Lease
    vector: ray.ObjectRef[Any]
    start: Start
    """Without its vector."""


_NO_VECTOR = np.empty(0, np.float32)


class _Actor:
    """A server behind Ray, which restarts it after a crash: its folder holds all it needs."""

    def __init__(self, *arguments: Any) -> None:
        torch.set_num_threads(1)
        self._stopping = False
        self._problem: Exception | None = None
        try:
            self._server = self._make(*arguments)
        except (RunDirectoryBusy, CorruptFile, ConfigError, OSError) as error:
            self._problem = error  # a constructor that raised would reach the driver as the text of a traceback

    def _make(self, *arguments: Any) -> Any:
        raise NotImplementedError

    def _grant(self, lease: Lease) -> Grant:
        raise NotImplementedError

    def problem(self) -> Exception | None:
        """Why the server cannot work, if so."""
        return self._problem

    def lease(self, worker: str, incarnation: str) -> Idle | Grant:
        """A lease with what it starts from."""
        if self._stopping:
            return Idle(finished=True)
        lease = self._server.lease(worker, incarnation)
        return lease if isinstance(lease, Idle) else self._grant(lease)

    def renew(self, lease_id: str, incarnation: str, steps: int) -> Ack:
        """See MetaServer."""
        return self._heed_stop(self._server.renew(lease_id, incarnation, steps))

    def push(self, contribution: Contribution) -> Ack:
        """See MetaServer."""
        return self._heed_stop(self._server.push(contribution))

    def fail(self, lease_id: str, incarnation: str, reason: str) -> Ack:
        """See MetaServer."""
        ack: Ack = self._server.fail(lease_id, incarnation, reason)
        return ack

    def advance(self, offset: int, gone: list[Gone]) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
        """Takes back what the incarnations in `gone` hold, and does what is due.

        Returns the status, ledger lines from byte `offset` on, and the offset to ask for next. Raises what keeps a
        server that was restarted from working.
        """
        if self._problem is not None:
            raise self._problem
        for one in gone:
            self._server.release(one.incarnation, crashed=one.crashed)
        self._server.tick()
        return {**self._server.status(), "server_pid": os.getpid()}, *self._server.ledger(offset)

    def stop(self) -> None:
        """From now on workers are told to finish."""
        self._stopping = True

    def leave(self) -> None:
        """Ends the process, and with it the hold on the folder: where the head is gone, nobody else does."""
        os._exit(0)

    def _heed_stop(self, ack: Ack) -> Ack:
        return replace(ack, proceed=False) if self._stopping else ack


class ServerActor(_Actor):
    """A MetaServer behind Ray."""

    def _make(self, config: Config, run_dir: Path, session: str, remote: Remote | None = None) -> MetaServer:
        self._snapshots: dict[int, ray.ObjectRef[Any]] = {}
        manifest, initial = family_of(config).initialization(config, config.seed, config.scope)
        return MetaServer(
            config,
            run_dir,
            manifest=manifest,
            initial=initial,
            session=session,
            work=time.process_time,
            replica=connect(remote, run_dir),
        )

    def _grant(self, lease: Lease) -> Grant:
        return Grant(lease, self.snapshot()[1], Start(_NO_VECTOR, self._server.head(lease.task.game)))

    def push_together(self, contributions: list[Contribution], renewals: list[Renewal]) -> list[Ack]:
        """See MetaServer."""
        return [self._heed_stop(ack) for ack in self._server.push_together(contributions, renewals)]

    def snapshot(self) -> tuple[int, ray.ObjectRef[Any]]:
        """(version, φ), one object per version, fetched once per node.

        The one before is kept for workers that are still fetching it.
        """
        version = self._server.version
        if version not in self._snapshots:
            newest = dict(list(self._snapshots.items())[-1:])
            self._snapshots = {**newest, version: ray.put(self._server.snapshot()[1])}
        return version, self._snapshots[version]


class EvaluationActor(_Actor):
    """An EvaluationServer behind Ray."""

    def _make(self, config: Config, runs: list[Run], out: Path) -> EvaluationServer:
        chosen = {run.arm.label: run.arm for run in runs}
        return EvaluationServer(config, runs, initializations.vectors(list(chosen.values())), out)

    def _grant(self, lease: Lease) -> Grant:
        vector, scope = self._server.start(lease)
        return Grant(lease, ray.put(vector), Start(_NO_VECTOR, scope=scope, evaluation=True))


class ServerClient:
    """The server as a running task sees it: calls are retried over restarts, which the protocol makes harmless.

    What a task reports goes through `aggregator`, where there is one that works.
    """

    def __init__(self, server: Any, aggregator: Any = None) -> None:
        self._server = server
        self._aggregator = aggregator

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls the server. Raises ActorUnavailableError when it stays away for CALL_SECONDS, ActorDiedError when it
        is gone for good."""
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
        """Extends the lease."""
        ack: Ack = self._report("renew", lease_id, incarnation, steps)
        return ack

    def push(self, contribution: Contribution) -> Ack:
        """Delivers a contribution; while the server's disk is full, or it has too much to do, again and again."""
        name = {"lease": contribution.lease, "seq": contribution.seq, "final": contribution.final}
        delivery_log.note("pushed", **name)
        while True:
            ack: Ack = self._report("push", contribution)
            if ack.durable:
                delivery_log.note("durable", **name)
            skipped = ack.reason == "busy" and not contribution.final  # the next one holds it
            if ack.accepted or not ack.wait or not ack.proceed or skipped:
                return ack
            time.sleep(ack.wait)

    def snapshot(self) -> tuple[int, np.ndarray]:
        """(version, φ) as they are now."""
        while True:
            version, reference = self.call("snapshot")
            with contextlib.suppress(ObjectLostError):  # the server restarted; it has a new one
                return version, ray.get(reference)

    def hurry(self) -> None:
        """From now on every report goes straight to the server: it is to be there when this worker is gone."""
        self._aggregator = None

    def _report(self, method: str, *arguments: Any) -> Any:
        aggregator = self._aggregator
        if aggregator is not None:
            try:
                return ray.get(getattr(aggregator, method).remote(*arguments))
            except RayError as error:  # whether or not it was delivered: the protocol makes that harmless
                log.warning("the node's aggregator does not answer: %s", error)
                if isinstance(error, ActorDiedError):
                    self._aggregator = None
        return self.call(method, *arguments)


class Health(NamedTuple):
    """How a worker is."""

    pid: int
    node: str
    """Ray's name of its node."""
    memory_bytes: int
    """Resident."""
    seconds: dict[str, float]
    """See Stopwatch."""
    profile: tuple[bytes, str] | None
    """The profiler's trace and its table of operators, given once."""
    plays: list[Play]
    """What was filmed since the last time, given once."""


class WorkerActor:
    """Trains one leased task after the other. With `profile` it records some updates of the first.

    `aggregators`: by node, where there are any.
    """

    def __init__(
        self,
        name: str,
        incarnation: str,
        config: Config,
        server: Any,
        aggregators: Mapping[str, Any],
        profile: bool,
    ) -> None:
        self._name = name
        self._incarnation = incarnation
        self._config = config
        self._client = ServerClient(server, aggregators.get(ray.get_runtime_context().get_node_id()))
        self._time = Stopwatch()
        self._profiler = Profiler(self._time) if profile else NoProfiler()
        self._film = NoFilm() if config.is_supervised else Film(config)
        self._notice = Notice()

    def run(self) -> list[Play]:
        """Works until the server has no more tasks, or it has to leave. Returns what was filmed and not asked for yet.

        Raises when the server is gone for good.
        """
        worker = self._config.worker
        prepare(
            worker.device, worker.threads, worker.gpus
        )  # not in the constructor: it is for the thread that computes
        pause = 0.05
        while not self._notice.given:
            with self._time("waiting"):
                answer = self._client.call("lease", self._name, self._incarnation)
                if isinstance(answer, Idle):
                    if answer.finished:
                        return self._film.hand_over()
                    time.sleep(max(pause, answer.wait))
                    pause = min(2 * pause, 0.5)
                    continue
            pause = 0.05
            self._work(answer)
        return self._film.hand_over()

    @ray.method(concurrency_group="io")
    def leave(self, seconds: float) -> None:
        """Tells the worker to be gone in so many seconds; see run_task. It takes no further task."""
        self._client.hurry()
        self._notice.give(seconds)

    @ray.method(concurrency_group="io")  # answers while `run` is busy
    def health(self) -> Health:
        """How this worker is."""
        statm = Path("/proc/self/statm")
        pages = int(statm.read_text().split()[1]) if statm.exists() else 0
        memory = pages * os.sysconf("SC_PAGE_SIZE")
        node: str = ray.get_runtime_context().get_node_id()
        profile, plays = self._profiler.hand_over(), self._film.hand_over()
        return Health(os.getpid(), node, memory, self._time.seconds(), profile, plays)

    def _work(self, grant: Grant) -> None:
        lease = grant.lease
        try:
            with self._time("waiting"):
                start = replace(grant.start, vector=ray.get(grant.vector))
        except ObjectLostError:
            return  # the server restarted since; its next lease comes with a new reference
        try:
            run_task(
                lease,
                start,
                self._config,
                self._client,
                stopwatch=self._time,
                profiler=self._profiler,
                film=self._film,
                notice=self._notice,
            )
        except RayError:
            raise  # the server's trouble, not the game's
        except Exception as error:  # whatever breaks in a task is the server's to count, not the end of the worker
            log.exception("task %s (%s) failed", lease.id, lease.task.game)
            atari_vector.rebuild()  # nothing that this task has played with is used again
            self._client.call("fail", lease.id, self._incarnation, f"{type(error).__name__}: {error}")


# Calls to the server are never retried by Ray, which may run them twice and out of order; `_ServerClient` does it.
SERVER: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(ServerActor)
EVALUATION: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(EvaluationActor)
WORKER: Any = ray.remote(num_cpus=1, max_restarts=0, concurrency_groups={"io": 1})(WorkerActor)  # type: ignore[call-overload]
