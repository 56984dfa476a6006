"""The driver: starts the server and the workers as Ray actors and runs the control loop.

    driver ── starts ──► ServerActor (one, restarted by Ray)         holds MetaServer
       └──── starts ──► WorkerActor (many, restarted by the driver)  each: lease → run_task → push, until told to stop

When the driver dies, all actors die with it, and `--resume` continues from the run directory.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.driver.actors import SERVER
from leap_dist.driver.cluster import abandon, connect, disconnect
from leap_dist.driver.control_loop import ControlLoop, Record
from leap_dist.driver.errors import HeadLost
from leap_dist.driver.evaluation_actor import EVALUATION
from leap_dist.driver.nodes import Nodes
from leap_dist.driver.placement import fit_resources, gpus_per_worker
from leap_dist.driver.pool import Pool
from leap_dist.driver.preflight import check_nodes
from leap_dist.driver.signals import INTERRUPTED, StopSignal, stop_signal
from leap_dist.driver.waiting import first_answer
from leap_dist.evaluation.runs import Run
from leap_dist.storage.replica import Remote
from leap_dist.storage.run_directory import has_begun
from leap_dist.tasks.task import family_of
from leap_dist.telemetry import trackers
from leap_dist.telemetry.progress import Progress
from leap_dist.weights.warm_start import initial_vector

SERVER_START_SECONDS = 600.0
"""How long the server may take to start. It reads the whole run directory, and Ray restarts it when it is killed."""


Announce = Callable[[str], None]
"""Called with each phase of the start as it begins."""


def check_prerequisites(config: Config) -> None:
    """Check what can be checked before Ray starts.

    Raises ConfigError where this machine lacks the GPUs or the data that the configuration asks for.
    """
    trackers.check(config)
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
    ledger_offset: int = 0,
    announce: Announce = lambda _: None,
) -> str:
    """Meta-train until all meta-updates are done. Returns "done", "interrupted" or "failed".

    The first SIGINT, SIGTERM or SIGHUP stops the workers at their next report, with everything accepted on disk, or
    raises Stopped if none has started yet. The second signal raises KeyboardInterrupt.

    Args:
        config: the run's configuration.
        run_dir: prepared directory of the run.
        record: called about twice a second with what is new.
        wall_seconds_before: duration of the run's earlier launches.
        profile: whether to write every worker's profiler trace and time breakdown to `run_dir/profile`.
        remote: where the run is kept, when `run_dir` is only a working copy on this node.
        ledger_offset: offset in bytes of the first ledger line to record.
        announce: called with each phase of the start as it begins.

    Raises RunDirectoryBusy or CorruptFile where the server cannot use the directory, ConfigError where there is no
    cluster or it lacks what the configuration asks for, ClusterError where the server does not start.
    """
    run_dir, config = run_dir.absolute(), _with_absolute_data_dir(config)  # other processes start elsewhere
    movable = remote is None and config.server.storage == "shared"
    initial = None if has_begun(run_dir) else initial_vector(config)
    plan = _ServerPlan(SERVER, (config, run_dir, uuid.uuid4().hex, remote, initial), run_dir, movable, ledger_offset)
    return _operate(config, plan, record, announce, wall_seconds_before, run_dir / "profile" if profile else None)


def evaluate(
    config: Config,
    runs: Sequence[Run],
    out: Path,
    record: Record,
    *,
    wall_seconds_before: float = 0.0,
    announce: Announce = lambda _: None,
) -> str:
    """Perform the missing runs of an evaluation in `out`. Signals, result and errors are those of `train`."""
    workers = min(config.workers, len(runs))
    server = replace(config.server, gather_seconds=0.0)  # there is nothing to gather
    config = replace(config, workers=workers, min_workers=min(config.min_workers, workers), server=server)
    out, config = out.absolute(), _with_absolute_data_dir(config)
    movable = config.server.storage == "shared"
    plan = _ServerPlan(EVALUATION, (config, list(runs), out, uuid.uuid4().hex), out, movable)
    return _operate(config, plan, record, announce, wall_seconds_before)


def _with_absolute_data_dir(config: Config) -> Config:
    return replace(config, data_dir=str(Path(config.data_dir).absolute()))


@contextlib.contextmanager
def session(config: Config) -> Iterator[None]:
    """Keep one connection to Ray for everything that is trained and evaluated in this context.

    Raises ConfigError, see `connect`. In the context, `train` and `evaluate` raise HeadLost instead of failing when
    the cluster's head node is gone.
    """
    with stop_signal() as stop:
        stop.check()
        connect(config)
        try:
            stop.check()
            yield
        finally:
            disconnect()


class _ServerPlan(NamedTuple):
    """Which server to start, and where."""

    actor: Any
    arguments: tuple[Any, ...]
    folder: Path
    movable: bool
    """Whether other nodes share the folder, so that the server may restart there."""
    ledger_offset: int = 0
    """Offset in bytes of the first ledger line to record."""


def _operate(
    config: Config,
    plan: _ServerPlan,
    record: Record,
    announce: Announce,
    wall_seconds_before: float = 0.0,
    profiles: Path | None = None,
) -> str:
    """Run the server, the workers and the control loop until the work is done, in the current session or a new one."""
    progress = Progress(config, wall_seconds_before)
    if ray.is_initialized():
        return _work(config, plan, record, announce, progress, profiles)
    local = config.address == "local"
    announce("starting Ray on this machine" if local else f"joining the Ray cluster at {config.address}")
    try:
        with session(config):
            return _work(config, plan, record, announce, progress, profiles)
    except HeadLost as error:
        return error.outcome


def _work(
    config: Config,
    plan: _ServerPlan,
    record: Record,
    announce: Announce,
    progress: Progress,
    profiles: Path | None,
) -> str:
    """Run the server, the workers and the control loop on the cluster that this process is connected to."""
    with stop_signal() as stop:
        stop.check()
        nodes = Nodes()
        pool = server = None
        try:
            config, alerts = fit_resources(config, list(nodes.view.staying.values()))
            pool = Pool(config, nodes, profiles, alerts)
            pool.require_capacity()
            if config.address != "local":
                announce("checking the nodes")
                data_dir = Path(config.data_dir) if config.is_supervised else None
                pool.alerts += check_nodes(nodes.view.staying, plan.folder if plan.movable else None, data_dir, stop)
            announce("starting the server")
            server = _start_server(plan, stop)
            pool.open(server)
            offset = plan.ledger_offset
            outcome = ControlLoop(server, pool, nodes, progress, record, plan.folder, stop, offset).run()
            if nodes.head_is_gone:
                raise HeadLost(outcome)
            return outcome
        finally:
            if nodes.head_is_gone:
                abandon(exit_code=INTERRUPTED if stop.asked else 1)
            else:
                if pool is not None:
                    pool.close()
                nodes.close()
                if server is not None:
                    ray.kill(server)


def _start_server(plan: _ServerPlan, stop: StopSignal) -> Any:
    """Start the server, on the driver's own node if possible: the folder certainly exists there.

    Raises the error that keeps the server from working, ClusterError where it does not start in time.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=plan.movable)
    server = plan.actor.options(scheduling_strategy=here).remote(*plan.arguments)
    problem = first_answer(server.problem, SERVER_START_SECONDS, stop)
    if isinstance(problem, OSError):
        raise ConfigError(f"run-dir: {plan.folder} cannot be used: {problem}")
    if problem is not None:
        raise problem
    return server
