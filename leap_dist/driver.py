"""The driver: puts the server and the workers into Ray actors and runs the control loop. The only module with Ray.

    driver ── starts ──► ServerActor (one, restarted by Ray)      holds MetaServer
       └──── starts ──► WorkerActor (many, restarted by the driver)   each: lease → run_task → push, until told to stop

If the driver dies, everything dies with it, and `--resume` continues from the run directory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from envs import atari
from leap_dist.checkpoint import CorruptFile, RunDirectoryBusy
from leap_dist.config import ConfigError
from leap_dist.contribution import Ack, Contribution, Idle, Lease
from leap_dist.models import initialization
from leap_dist.progress import Progress
from leap_dist.server import MetaServer
from leap_dist.settings import Config
from leap_dist.stop_signal import StopSignal
from leap_dist.worker import Start, run_task

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
RECONCILE_SECONDS = 5.0
CALL_SECONDS = 120.0  # a worker that cannot reach the server for this long gives up and is restarted
STOP_SECONDS = 20.0  # how long a clean stop waits for the workers
LONGEST_BACKOFF = 30.0  # seconds before a worker that keeps dying is started again
HEALTHY_SECONDS = 60.0  # a worker that lived this long does not keep dying
LOCAL_OBJECT_STORE = 512 * 2**20  # snapshots of a few megabytes need no more, and Ray would reserve a third of memory


class ServerActor:
    """A MetaServer behind Ray. Ray restarts it after a crash; the run directory holds all it needs."""

    def __init__(self, config: Config, run_dir: Path, session: str) -> None:
        torch.set_num_threads(1)
        self._stopping = False
        self._snapshots: dict[int, ray.ObjectRef[Any]] = {}
        self._problem: Exception | None = None
        try:
            channels = atari.channels(config.atari.frames)
            manifest, initial = initialization(channels, config.seed, config.scope)
            self._server = MetaServer(config, run_dir, manifest=manifest, initial=initial, session=session)
        except (RunDirectoryBusy, CorruptFile, OSError) as error:
            self._problem = error  # a constructor that raised would reach the driver as the text of a traceback

    def problem(self) -> Exception | None:
        """Why the server cannot work, if so."""
        return self._problem

    def lease(self, worker: str, incarnation: str) -> Idle | tuple[Lease, ray.ObjectRef[Any], np.ndarray | None]:
        """A lease with a reference to the snapshot that it starts from, and the game's head where heads persist."""
        if self._stopping:
            return Idle(finished=True)
        lease = self._server.lease(worker, incarnation)
        return lease if isinstance(lease, Idle) else (lease, self.snapshot()[1], self._server.head(lease.task.game))

    def snapshot(self) -> tuple[int, ray.ObjectRef[Any]]:
        """(version, φ), one object per version, fetched once per node.

        The one before is kept for workers that are still fetching it.
        """
        version = self._server.version
        if version not in self._snapshots:
            newest = dict(list(self._snapshots.items())[-1:])
            self._snapshots = {**newest, version: ray.put(self._server.snapshot()[1])}
        return version, self._snapshots[version]

    def renew(self, lease_id: str, incarnation: str, steps: int) -> Ack:
        """See MetaServer."""
        return self._heed_stop(self._server.renew(lease_id, incarnation, steps))

    def push(self, contribution: Contribution) -> Ack:
        """See MetaServer."""
        return self._heed_stop(self._server.push(contribution))

    def fail(self, lease_id: str, incarnation: str, reason: str) -> Ack:
        """See MetaServer."""
        return self._server.fail(lease_id, incarnation, reason)

    def advance(self, offset: int, gone: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
        """Takes back what the incarnations in `gone` hold, and makes the meta-updates that are due.

        Returns the status, ledger lines from byte `offset` on, and the offset to ask for next.
        """
        for incarnation in gone:
            self._server.release(incarnation)
        self._server.tick()
        return {**self._server.status(), "server_pid": os.getpid()}, *self._server.ledger(offset)

    def stop(self) -> None:
        """From now on workers are told to finish."""
        self._stopping = True

    def _heed_stop(self, ack: Ack) -> Ack:
        return replace(ack, proceed=False) if self._stopping else ack


class _ServerClient:
    """The server as a running task sees it: calls are retried over restarts, which the protocol makes harmless."""

    def __init__(self, server: Any) -> None:
        self._server = server

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
        ack: Ack = self.call("renew", lease_id, incarnation, steps)
        return ack

    def push(self, contribution: Contribution) -> Ack:
        """Delivers a contribution; while the server's disk is full, again and again."""
        while True:
            ack: Ack = self.call("push", contribution)
            if ack.reason != "storage" or not ack.proceed:
                return ack
            time.sleep(1.0)

    def snapshot(self) -> tuple[int, np.ndarray]:
        """(version, φ) as they are now."""
        while True:
            version, reference = self.call("snapshot")
            with contextlib.suppress(ObjectLostError):  # the server restarted; it has a new one
                return version, ray.get(reference)


class WorkerActor:
    """Trains one leased task after the other."""

    def __init__(self, name: str, incarnation: str, config: Config, server: Any) -> None:
        self._name = name
        self._incarnation = incarnation
        self._config = config
        self._client = _ServerClient(server)

    def run(self) -> None:
        """Works until the server has no more tasks. Raises when the server is gone for good."""
        # Here and not in the constructor: both settings belong to the thread that computes.
        torch.set_num_threads(self._config.worker.threads)
        torch.set_flush_denormal(True)
        pause = 0.05
        while True:
            answer = self._client.call("lease", self._name, self._incarnation)
            if isinstance(answer, Idle):
                if answer.finished:
                    return
                time.sleep(pause)
                pause = min(2 * pause, 0.5)
                continue
            pause = 0.05
            self._work(*answer)

    @ray.method(concurrency_group="io")  # answers while `run` is busy
    def health(self) -> tuple[int, int]:
        """Process, and resident memory in bytes."""
        pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
        return os.getpid(), pages * os.sysconf("SC_PAGE_SIZE")

    def _work(self, lease: Lease, snapshot: ray.ObjectRef[Any], head: np.ndarray | None) -> None:
        try:
            start = Start(ray.get(snapshot), head)
        except ObjectLostError:
            return  # the server restarted since; its next lease comes with a new reference
        try:
            run_task(lease, start, self._config, self._client)
        except RayError:
            raise  # the server's trouble, not the game's
        except Exception as error:  # whatever breaks in a task is the server's to count, not the end of the worker
            log.exception("task %s (%s) failed", lease.id, lease.task.game)
            self._client.call("fail", lease.id, self._incarnation, f"{type(error).__name__}: {error}")


# Calls to the server are never retried by Ray, which may run them twice and out of order; `_ServerClient` does it.
_SERVER: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(ServerActor)
_WORKER: Any = ray.remote(num_cpus=1, max_restarts=0, concurrency_groups={"io": 1})(WorkerActor)  # type: ignore[call-overload]


@dataclass
class _Slot:
    """A place in the pool, and the actor that fills it."""

    name: str
    incarnation: str = ""
    actor: Any = None
    run: ray.ObjectRef[Any] | None = None
    health: ray.ObjectRef[Any] | None = None
    pid: int | None = None
    memory_bytes: int | None = None
    started: float = 0.0
    failures: int = 0
    not_before: float = 0.0
    done: bool = False


class Pool:
    """Keeps as many workers running as were asked for and fit, and replaces those that die."""

    def __init__(self, config: Config, gpus: float) -> None:
        self._config = config
        self._gpus = gpus
        self._server: Any = None
        self._slots: list[_Slot] = []
        self._reconciled = -RECONCILE_SECONDS
        self.restarts = 0
        self.gone: list[str] = []
        """Incarnations that ended and whose leases the server has not been told to take back yet."""
        self.alerts: deque[str] = deque(maxlen=100)

    def require_room(self) -> None:
        """Raises ConfigError where no node can take a worker; notes where fewer fit than were asked for."""
        fits = self.room()
        if fits == 0:
            raise ConfigError(
                f"worker.cpus: no node has room for a worker with {self._config.worker.cpus:g} CPUs and {self._gpus:g} "
                f"GPUs; the cluster has {ray.cluster_resources().get('CPU', 0):g} CPUs"
            )
        if fits < self.wanted:
            self.alerts.append(f"{self.wanted} workers asked for, {fits} fit; a lower worker.cpus shares processors")

    def open(self, server: Any) -> None:
        """From now on `tend` starts workers for `server`."""
        self._server = server

    @property
    def wanted(self) -> int:
        """Workers asked for."""
        return self._config.workers

    def tend(self) -> None:
        """Starts, checks and replaces workers; never waits."""
        now = time.monotonic()
        if now - self._reconciled >= RECONCILE_SECONDS:
            self._reconciled = now
            while len(self._slots) < min(self.wanted, self.room()):
                self._slots.append(_Slot(f"w{len(self._slots)}"))
        for slot in self._slots:
            if slot.run is not None:
                self._check(slot, slot.run, now)
            if slot.run is None and not slot.done and now >= slot.not_before:
                self._start(slot)

    def room(self) -> int:
        """How many workers the nodes that are alive have resources for."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus, gpus = self._config.worker.cpus, self._gpus
        return sum(
            int(min(node.get("CPU", 0) / cpus, node.get("GPU", 0) / gpus if gpus else float("inf")) + 1e-9)
            for node in nodes
        )

    def describe(self) -> list[dict[str, Any]]:
        """Every worker as plain data."""
        return [{"name": s.name, "state": _state(s), "pid": s.pid, "memory_bytes": s.memory_bytes} for s in self._slots]

    def abandon(self) -> None:
        """Gives up all workers: what they hold is to be taken back."""
        self.gone += [slot.incarnation for slot in self._slots]

    @property
    def done(self) -> bool:
        """Every worker has been told that there is nothing left, and returned."""
        return all(slot.done for slot in self._slots)

    @property
    def alive(self) -> int:
        """Workers whose process has answered."""
        return sum(_state(slot) == "running" for slot in self._slots)

    def _start(self, slot: _Slot) -> None:
        worker = _WORKER.options(num_cpus=self._config.worker.cpus, num_gpus=self._gpus)
        slot.incarnation = uuid.uuid4().hex
        slot.actor = worker.remote(slot.name, slot.incarnation, self._config, self._server)
        slot.started = time.monotonic()
        slot.run = slot.actor.run.remote()
        slot.health = slot.actor.health.remote()

    def _check(self, slot: _Slot, run: ray.ObjectRef[Any], now: float) -> None:
        if slot.health is not None and ray.wait([slot.health], timeout=0)[0]:
            try:
                slot.pid, slot.memory_bytes = ray.get(slot.health)
                slot.health = slot.actor.health.remote()
            except RayError:
                slot.health = None  # `run` fails too, and says why
        if not ray.wait([run], timeout=0)[0]:
            return
        try:
            ray.get(run)
            slot.done = True
        except RayError as error:
            self.restarts += 1
            slot.failures = slot.failures + 1 if now - slot.started < HEALTHY_SECONDS else 1
            backoff = min(2.0 ** (slot.failures - 1), LONGEST_BACKOFF)
            slot.not_before = now + backoff
            self.gone.append(slot.incarnation)
            self.alerts.append(f"{slot.name} died and is restarted in {backoff:.0f} s: {_last_line(error)}")
            if not isinstance(error, RayActorError):
                ray.kill(slot.actor)  # `run` raised, but the process still lives
        slot.actor = slot.run = slot.health = slot.pid = slot.memory_bytes = None


def _state(slot: _Slot) -> str:
    if slot.done:
        return "done"
    if slot.run is None:
        return "restarting" if slot.failures else "starting"
    return "running" if slot.pid is not None else "starting"


def connect(config: Config) -> None:
    """Starts Ray on this machine, or joins a running cluster. Raises ConfigError where none answers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    common: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if config.address == "local":
        ray.init("local", include_dashboard=False, object_store_memory=LOCAL_OBJECT_STORE, **common)
        return
    try:
        ray.init(config.address, **common)
    except ConnectionError as error:
        raise ConfigError(
            f"address: no Ray cluster answers at {config.address!r} ({error}); start one, or use local"
        ) from None


def gpus_per_worker(config: Config, total_gpus: float) -> float:
    """GPUs to reserve for a worker: as configured, else an even share of what there is, else none.

    Raises ConfigError where GPUs are asked for and there are too few.
    """
    wanted = config.worker
    if wanted.device == "cpu" or (wanted.device == "auto" and not wanted.gpus and not total_gpus):
        return 0.0
    if total_gpus < max(wanted.gpus, 1e-9):
        field = "worker.gpus" if wanted.gpus else "worker.device"
        value = f"{wanted.gpus:g}" if wanted.gpus else wanted.device
        raise ConfigError(f"{field}: {value} asked for, but there are {total_gpus:g} GPUs; use --worker.device cpu")
    return wanted.gpus or min(1.0, total_gpus / config.workers)


def check_hardware(config: Config) -> None:
    """Before Ray starts on this machine: raises ConfigError where GPUs are asked for that it does not have."""
    if config.address == "local":
        gpus_per_worker(config, torch.cuda.device_count())


Record = Callable[[list[dict[str, Any]], dict[str, Any]], None]
"""Called about twice a second with the ledger's new lines and the summary."""


def train(config: Config, run_dir: Path, record: Record, *, wall_seconds_before: float = 0.0) -> str:
    """Meta-trains until all meta-updates are made. Returns "done", "interrupted" or "failed".

    SIGINT or SIGTERM once: workers stop at their next report, everything accepted is on disk. Twice: KeyboardInterrupt.
    Raises RunDirectoryBusy or CorruptFile where the server cannot use the run directory, ConfigError where there is no
    cluster or it lacks what is asked for.
    """
    progress = Progress(config, wall_seconds_before)
    connect(config)
    stop = StopSignal()
    try:
        gpus = gpus_per_worker(config, ray.cluster_resources().get("GPU", 0.0))
        config = replace(config, worker=replace(config.worker, device="cuda" if gpus else "cpu"))
        pool = Pool(config, gpus)
        pool.require_room()
        server = _start_server(config, run_dir)
        pool.open(server)
        return _Control(server, pool, progress, record, stop).loop()
    finally:
        stop.restore()
        ray.shutdown()


def _start_server(config: Config, run_dir: Path) -> Any:
    """On the driver's own node, if it has room: the run directory is there."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    server = _SERVER.options(scheduling_strategy=here).remote(config, run_dir, uuid.uuid4().hex)
    problem = ray.get(server.problem.remote())
    if isinstance(problem, OSError):
        raise ConfigError(f"run-dir: {run_dir} cannot be used: {problem}")
    if problem is not None:
        raise problem
    return server


class _ServerLost(RuntimeError):
    """The server died and cannot be restarted, or is broken."""


class _Control:
    """The control loop: polls the server, tends the pool, reports."""

    def __init__(self, server: Any, pool: Pool, progress: Progress, record: Record, stop: StopSignal) -> None:
        self._server = server
        self._pool = pool
        self._progress = progress
        self._record = record
        self._stop = stop
        self._status: dict[str, Any] = {}
        self._lines: list[dict[str, Any]] = []
        self._offset = 0
        self._server_restarts = 0

    def loop(self) -> str:
        """Runs until the work is done, a stop was asked for, or the server is lost for good."""
        try:
            return self._loop()
        except _ServerLost as error:
            if not self._status:  # it never worked: there is nothing to report but the reason
                raise ConfigError(f"run-dir: {error}") from None
            self._pool.alerts.append(str(error))
            self._report("failed")
            return "failed"

    def _loop(self) -> str:
        while not self._stop.asked:
            self._pool.tend()
            self._poll()
            if self._status.get("finished"):
                return self._wind_down("done" if self._status["complete"] else "failed")
            self._report("running")
            self._stop.wait(POLL_SECONDS)
        return self._wind_down("interrupted")

    def _wind_down(self, outcome: str) -> str:
        """Lets the workers end their tasks, then reports for the last time."""
        deadline = time.monotonic() + STOP_SECONDS
        try:
            ray.get(self._server.stop.remote(), timeout=STOP_SECONDS)
        except RayError:
            deadline = 0.0  # no use in waiting for workers that wait for the server
        while not self._pool.done and time.monotonic() < deadline:
            self._pool.tend()
            self._report("stopping")
            self._stop.wait(0.1)
        self._pool.abandon()
        self._poll()
        self._report(outcome)
        return outcome

    def _poll(self) -> None:
        """Fetches status and new ledger lines. While the server restarts, what is known stays."""
        gone = list(self._pool.gone)
        try:
            status, lines, offset = ray.get(self._server.advance.remote(self._offset, gone), timeout=60)
        except ActorUnavailableError:
            self._server_restarts += 1
            self._pool.alerts.append("the server died; Ray restarts it from the run directory")
            self._stop.wait(1.0)
            return
        except GetTimeoutError:
            self._pool.alerts.append("the server has not answered for a minute")
            return
        except (ActorDiedError, RayTaskError) as error:
            raise _ServerLost(f"the server cannot go on: {_last_line(error)}") from None
        del self._pool.gone[: len(gone)]
        self._status, self._offset = status, offset
        self._lines += lines

    def _report(self, state: str) -> None:
        if not self._status:
            return
        lines, self._lines = self._lines, []
        more = {
            "alerts": [*self._status["alerts"], *self._pool.alerts],
            "workers": self._pool.describe(),
            "workers_alive": self._pool.alive,
            "workers_wanted": self._pool.wanted,
            "restarts": self._pool.restarts,
            "server_restarts": self._server_restarts,
        }
        self._record(lines, self._progress.summary(self._status, state, more))


def _last_line(error: BaseException) -> str:
    """Ray's errors are tracebacks; their last line says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
