"""The Ray actors of training: the server, which wraps MetaServer, and the workers, which call run_task."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import ObjectLostError, RayError

from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.driver.actor_messages import NO_VECTOR, EndedWorker, Grant, WorkerHealth
from leap_dist.driver.clients import ServerClient
from leap_dist.driver.mps import PIPES
from leap_dist.envs import atari_vector
from leap_dist.nn.device import is_of_gpu, prepare
from leap_dist.nn.profiling import NoProfiler, Profiler, Stopwatch
from leap_dist.protocol.messages import Ack, Contribution, Idle, Lease, Renewal
from leap_dist.server.meta_server import MetaServer
from leap_dist.storage.atomic import CorruptFile
from leap_dist.storage.locks import RunDirectoryBusy
from leap_dist.storage.redaction import redact_output
from leap_dist.storage.replica import Remote, connect
from leap_dist.storage.run_directory import has_begun
from leap_dist.tasks.atari.video import Clip, NoVideo, VideoRecorder
from leap_dist.tasks.task import family_of
from leap_dist.weights.warm_start import initial_vector
from leap_dist.worker.preemption import PreemptionNotice
from leap_dist.worker.run_stack import run_leases
from leap_dist.worker.start import Start

log = logging.getLogger(__name__)


class ServerProcess:
    """A server in a Ray actor. Ray restarts the actor after a crash; the server restores itself from its directory."""

    def __init__(self, *arguments: Any) -> None:
        redact_output()
        torch.set_num_threads(1)
        self._stopping = False
        self._problem: Exception | None = None
        try:
            self._server = self._make(*arguments)
        except (RunDirectoryBusy, CorruptFile, ConfigError, OSError) as error:
            self._problem = error  # if the constructor raised, the driver would only see the text of a traceback

    def _make(self, *arguments: Any) -> Any:
        raise NotImplementedError

    def _grant(self, lease: Lease) -> Grant:
        raise NotImplementedError

    def problem(self) -> Exception | None:
        """Return the error that keeps the server from working, or None."""
        return self._problem

    def lease(self, worker: str, incarnation: str) -> Idle | Grant:
        """Grant a task with everything that it starts from, or tell the worker to wait or to finish."""
        if self._stopping or self._problem is not None:
            return Idle(finished=True)
        lease = self._server.lease(worker, incarnation)
        return lease if isinstance(lease, Idle) else self._grant(lease)

    def renew(self, lease_id: str, incarnation: str, steps: int) -> Ack:
        """Extend a lease; see MetaServer.renew."""
        return self._with_stop(self._server.renew(lease_id, incarnation, steps))

    def push(self, contribution: Contribution) -> Ack:
        """Take a contribution; see MetaServer.push."""
        return self._with_stop(self._server.push(contribution))

    def fail(self, lease_id: str, incarnation: str, reason: str) -> Ack:
        """Record that a task raised an error; see MetaServer.fail."""
        ack: Ack = self._server.fail(lease_id, incarnation, reason)
        return ack

    def release(self, incarnation: str) -> None:
        """Take back all leases of a worker that cannot begin its tasks; see MetaServer.release."""
        self._server.release(incarnation)

    def advance(
        self, offset: int, ended: list[EndedWorker], workers: int = 0
    ) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
        """Take back the leases of ended workers, record how many workers there should be, and do periodic work.

        Returns the status, the ledger's lines from byte `offset` on, and the offset to ask for next. Raises the error
        that keeps a restarted server from working.
        """
        if self._problem is not None:
            raise self._problem
        self._server.expect(workers)
        for worker in ended:
            self._server.release(worker.incarnation, crashed=worker.crashed)
        self._server.tick()
        return {**self._server.status(), "server_pid": os.getpid()}, *self._server.ledger(offset)

    def stop(self) -> None:
        """Tell all workers to finish when they next ask or report."""
        self._stopping = True

    def leave(self) -> None:
        """End the process and release the directory. Needed when the head node is gone: Ray cannot do it then."""
        os._exit(0)

    def _with_stop(self, ack: Ack) -> Ack:
        return replace(ack, proceed=False) if self._stopping else ack


class ServerActor(ServerProcess):
    """A MetaServer in a Ray actor."""

    def _make(
        self, config: Config, run_dir: Path, session: str, remote: Remote | None = None, init: str = ""
    ) -> MetaServer:
        self._snapshots: dict[int, ray.ObjectRef[Any]] = {}
        family = family_of(config)
        manifest, initial = family.initialization(config, config.seed, config.scope)
        if not has_begun(run_dir) and (start := initial_vector(config, init)) is not None:
            initial = start
        work, preprocessing, replica = time.process_time, family.preprocessing(config), connect(remote, run_dir)
        more: dict[str, Any] = {"work": work, "preprocessing": preprocessing, "replica": replica}
        return MetaServer(config, run_dir, manifest=manifest, initial=initial, session=session, **more)

    def _grant(self, lease: Lease) -> Grant:
        return Grant(lease, self.snapshot()[1], Start(NO_VECTOR, self._server.head(lease.task.game)))

    def push_together(self, contributions: list[Contribution], renewals: list[Renewal]) -> list[Ack]:
        """Take what an aggregator delivers; see MetaServer.push_together."""
        return [self._with_stop(ack) for ack in self._server.push_together(contributions, renewals)]

    def snapshot(self) -> tuple[int, ray.ObjectRef[Any]]:
        """Return the version and a reference to φ: one object per version, which Ray fetches once per node."""
        version = self._server.version
        if version not in self._snapshots:
            newest = dict(list(self._snapshots.items())[-1:])  # kept for workers that are still fetching it
            self._snapshots = {**newest, version: ray.put(self._server.snapshot()[1])}
        return version, self._snapshots[version]


class WorkerActor:
    """A worker in a Ray actor: trains one leased task after another.

    Args:
        name: name of the worker; it survives restarts.
        incarnation: ID of this process of the worker.
        config: the run's configuration.
        profile: whether to profile a few updates of the first task.
        mps_pipes: directory of the pipes of the node's MPS daemon; empty without one.
    """

    def __init__(self, name: str, incarnation: str, config: Config, profile: bool, mps_pipes: str = "") -> None:
        if mps_pipes:  # CUDA reads it when it starts, which is later
            os.environ[PIPES] = mps_pipes
        redact_output()
        self._name = name
        self._incarnation = incarnation
        self._config = config
        self._client = ServerClient(None)
        self._time = Stopwatch()
        self._profiler = Profiler(self._time) if profile else NoProfiler()
        self._video = NoVideo() if config.is_supervised else VideoRecorder(config)
        self._notice = PreemptionNotice()

    def run(self, server: Any, aggregators: Mapping[str, Any]) -> list[Clip]:
        """Work until no tasks are left or the node is about to leave. Raises when the server is gone for good.

        `server` is the server's handle; `aggregators` maps Ray's node IDs to the handles of the nodes' aggregators.
        Returns the recorded episodes that no health report has contained.
        """
        self._client = ServerClient(server, aggregators.get(ray.get_runtime_context().get_node_id()))
        worker, pause = self._config.worker, 0.05
        prepare(worker.device, worker.threads, worker.gpus)  # must run in the thread that computes
        while not self._notice.given:
            with self._time("waiting"):
                grants, idle = self._client.lease(self._name, self._incarnation, worker.stack)
                if not grants and idle is not None:
                    if idle.finished:
                        break
                    time.sleep(max(pause, idle.wait))
                    pause = min(2 * pause, 0.5)
                    continue
            pause = 0.05
            self._work(grants)
        return self._video.take_clips()

    @ray.method(concurrency_group="io")
    def leave(self, seconds: float) -> None:
        """Tell the worker to leave within `seconds`: it takes no new task, and ends this one only if time allows."""
        self._client.bypass_aggregator()
        self._notice.give(seconds)

    @ray.method(concurrency_group="io")  # answers while `run` is busy
    def health(self) -> WorkerHealth:
        """Return a health report with everything that was recorded since the last one."""
        recording, clips = self._profiler.take_recording(), self._video.take_clips()
        return WorkerHealth.of_this_process(self._time.seconds(), recording, clips)

    def _work(self, grants: list[Grant]) -> None:
        try:
            with self._time("waiting"):
                given = [(grant.lease, replace(grant.start, vector=ray.get(grant.vector))) for grant in grants]
        except ObjectLostError:  # the server has restarted; its next leases come with new references
            self._client.call("release", self._incarnation)
            return
        observers = self._time, self._profiler, self._video, self._notice
        run_leases(given, self._config, self._client, self._fail, *observers)

    def _fail(self, lease: Lease, error: Exception) -> None:
        """Report a task that raised: the server counts failed tasks, and the worker goes on."""
        if isinstance(error, RayError) or is_of_gpu(error):
            raise error  # the server has failed, or the GPU, for which no game is to be blamed
        log.error("task %s (%s) failed", lease.id, lease.task.game, exc_info=error)
        atari_vector.rebuild()  # emulators that this task has used may be broken
        self._client.call("fail", lease.id, lease.incarnation, f"{type(error).__name__}: {error}")


# Ray never retries calls to the server, because it might run them twice and out of order; ServerClient retries them.
SERVER: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(ServerActor)
WORKER: Any = ray.remote(num_cpus=1, max_restarts=0, concurrency_groups={"io": 1})(WorkerActor)  # type: ignore[call-overload]
