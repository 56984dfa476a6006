"""The driver: puts the server and the workers into Ray actors and runs the control loop. The only module with Ray.

    driver ── starts ──► ServerActor (one, restarted by Ray)      holds MetaServer
       └──── starts ──► WorkerActor (many, restarted by the driver)   each: lease → run_task → push, until told to stop

If the driver dies, everything dies with it, and `--resume` continues from the run directory.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.driver.actors import EVALUATION, SERVER
from leap_dist.driver.auth import prepare_local, prepare_to_join
from leap_dist.driver.control_loop import Control, Record
from leap_dist.driver.nodes import Nodes
from leap_dist.driver.placement import total_with_autoscaler
from leap_dist.driver.pool import Pool
from leap_dist.driver.preflight import check_nodes
from leap_dist.driver.signals import StopSignal
from leap_dist.evaluation.server import Run
from leap_dist.storage.replica import Remote
from leap_dist.tasks.task import family_of
from leap_dist.telemetry.progress import Progress

CODE = Path(__file__).parents[1]
LOCAL_OBJECT_STORE = 512 * 2**20  # snapshots of a few megabytes need no more, and Ray would reserve a third of memory


def connect(config: Config) -> None:
    """Starts Ray on this machine, or joins a running cluster.

    Raises ConfigError where none answers, or it does not let us in; see `access`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    common: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if config.address == "local":
        prepare_local()
        ray.init("local", include_dashboard=False, object_store_memory=LOCAL_OBJECT_STORE, **common)
        return
    address = prepare_to_join(config.address, insecure=config.insecure)
    if RAY_JOB_CONFIG_JSON_ENV_VAR not in os.environ:  # `ray job submit` ships its working directory
        common["runtime_env"] = {"py_modules": [str(CODE)]}
    try:
        ray.init(address, **common)
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(
            f"address: the cluster at {address!r} answers, but cannot be joined from here ({error}); "
            "run this on one of its nodes, with the same versions of Python and Ray"
        ) from None


def gpus_per_worker(config: Config, total_gpus: float) -> float:
    """GPUs to reserve for a worker: as configured, else an even share of what there is, else none.

    Where nodes are waited for, what is asked for may come with them.

    Raises ConfigError where GPUs are asked for and there are too few.
    """
    wanted = config.worker
    if wanted.device == "cpu" or (wanted.device == "auto" and not wanted.gpus and not total_gpus):
        return 0.0
    if total_gpus < max(wanted.gpus, 1e-9):
        if config.wait_for_nodes and config.address != "local":
            return wanted.gpus or 1.0
        field = "worker.gpus" if wanted.gpus else "worker.device"
        value = f"{wanted.gpus:g}" if wanted.gpus else wanted.device
        raise ConfigError(f"{field}: {value} asked for, but there are {total_gpus:g} GPUs; use --worker.device cpu")
    return wanted.gpus or min(1.0, total_gpus / config.workers)


def check_prerequisites(config: Config) -> None:
    """Before Ray starts: raises ConfigError where this machine lacks the GPUs, or the data, that are asked for."""
    family_of(config).check(config)
    if config.address == "local":
        gpus_per_worker(config, torch.cuda.device_count())


def train(
    config: Config,
    run_dir: Path,
    record: Record,
    *,
    wall_seconds_before: float = 0.0,
    profile: bool = False,
    remote: Remote | None = None,
) -> str:
    """Meta-trains until all meta-updates are made. Returns "done", "interrupted" or "failed".

    With `profile`, every worker's trace and breakdown go to `run_dir/profile`. With `remote`, `run_dir` is a working
    copy on this node, and what makes the run durable is kept there too.

    SIGINT or SIGTERM once: workers stop at their next report, everything accepted is on disk. Twice: KeyboardInterrupt.
    Raises RunDirectoryBusy or CorruptFile where the server cannot use the run directory, ConfigError where there is no
    cluster or it lacks what is asked for.
    """
    run_dir, config = run_dir.absolute(), _with_absolute_data_dir(config)  # other processes start elsewhere
    movable = remote is None and config.server.storage == "shared"
    start = _Start(SERVER, (config, run_dir, uuid.uuid4().hex, remote), run_dir, movable)
    return _operate(config, start, record, wall_seconds_before, run_dir / "profile" if profile else None)


def evaluate(
    config: Config, runs: Sequence[Run], out: Path, record: Record, *, wall_seconds_before: float = 0.0
) -> str:
    """Makes the runs of an evaluation that are not in `out` yet. Returns "done", "interrupted" or "failed".

    Signals and errors are those of `train`.
    """
    workers = min(config.workers, len(runs))
    server = replace(config.server, gather_seconds=0.0)  # there is nothing to gather
    config = replace(config, workers=workers, min_workers=min(config.min_workers, workers), server=server)
    out, config = out.absolute(), _with_absolute_data_dir(config)
    start = _Start(EVALUATION, (config, list(runs), out), out, movable=config.server.storage == "shared")
    return _operate(config, start, record, wall_seconds_before)


def _with_absolute_data_dir(config: Config) -> Config:
    return replace(config, data_dir=str(Path(config.data_dir).absolute()))


class _Start(NamedTuple):
    """How to start a server."""

    actor: Any
    arguments: tuple[Any, ...]
    folder: Path
    movable: bool
    """Other nodes have the folder too."""


class HeadLost(RuntimeError):
    """The cluster's head is gone in the middle of a session. The process will end without Ray's own shutting down."""


@contextlib.contextmanager
def session(config: Config) -> Iterator[None]:
    """One connection to Ray for all that is trained and evaluated in here. Raises ConfigError, see `connect`.

    In it, `train` and `evaluate` raise HeadLost where they would have failed with the cluster.
    """
    connect(config)
    lost = False
    try:
        yield
    except HeadLost:
        lost = True
        raise
    finally:
        if not lost:
            ray.shutdown()


def _operate(
    config: Config, start: _Start, record: Record, wall_seconds_before: float = 0.0, profiles: Path | None = None
) -> str:
    """Server, workers and control loop, until the work is done."""
    progress = Progress(config, wall_seconds_before)
    in_session = ray.is_initialized()
    if not in_session:
        connect(config)
    stop = StopSignal()
    nodes = Nodes()
    pool = server = None
    try:
        total = total_with_autoscaler("GPU", list(nodes.view.staying.values()), config.address)
        gpus = gpus_per_worker(config, total)
        config = replace(config, worker=replace(config.worker, device="cuda" if gpus else "cpu", gpus=gpus))
        pool = Pool(config, nodes, profiles)
        pool.require_room()
        if config.address != "local":
            data_dir = Path(config.data_dir) if config.is_supervised else None
            pool.alerts += check_nodes(nodes.view.staying, start.folder if start.movable else None, data_dir)
        server = _start_server(start)
        pool.open(server)
        outcome = Control(server, pool, nodes, progress, record, stop).loop()
        if in_session and nodes.head_is_gone:
            raise HeadLost("the cluster's head is gone: the same command goes on, on another cluster")
        return outcome
    finally:
        stop.restore()
        if nodes.head_is_gone:
            atexit.register(_leave_ray)
        else:
            if pool is not None:
                pool.close()
            nodes.close()
            if not in_session:
                ray.shutdown()
            elif server is not None:
                ray.kill(server)


def _leave_ray() -> None:
    """Ends the process without Ray's own shutting down, which would wait a minute for a head that is gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _start_server(start: _Start) -> Any:
    """On the driver's own node, if it has room: the folder is there."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=start.movable)
    server = start.actor.options(scheduling_strategy=here).remote(*start.arguments)
    problem = ray.get(server.problem.remote())
    if isinstance(problem, OSError):
        raise ConfigError(f"run-dir: {start.folder} cannot be used: {problem}")
    if problem is not None:
        raise problem
    return server
