"""The driver: starts the server and the workers as Ray actors and runs the control loop.

    driver ── starts ──► ServerActor (one, restarted by Ray)         holds MetaServer
       └──── starts ──► WorkerActor (many, restarted by the driver)  each: lease → run_task → push, until told to stop

When the driver dies, all actors die with it, and `--resume` continues from the run directory.
"""

from __future__ import annotations

import contextlib
import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import ray
import torch

from leap_dist.config.settings import Config
from leap_dist.driver import metrics
from leap_dist.driver.actors import SERVER
from leap_dist.driver.cluster import abandon, connect, disconnect
from leap_dist.driver.control_loop import ControlLoop, Record
from leap_dist.driver.errors import HeadLost
from leap_dist.driver.evaluation_actor import EVALUATION
from leap_dist.driver.nodes import Nodes
from leap_dist.driver.placement import fit_resources, gpus_per_worker
from leap_dist.driver.pool import Pool
from leap_dist.driver.preflight import check_nodes
from leap_dist.driver.server_start import ServerPlan, start_server, wait_for_server
from leap_dist.driver.signals import INTERRUPTED, stop_signal
from leap_dist.evaluation.runs import Run
from leap_dist.storage.replica import Remote
from leap_dist.storage.run_directory import has_begun
from leap_dist.tasks.task import family_of
from leap_dist.telemetry import trackers
from leap_dist.telemetry.progress import Progress
from leap_dist.weights.warm_start import absolute_source, initial_vector

Announce = Callable[[str], None]
"""Called with each phase of the start as it begins."""


def check_prerequisites(config: Config) -> None:
    """Check what can be checked before Ray starts.

    Raises ConfigError if this machine lacks GPUs, data or a tracker's package that the configuration asks for.
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

    Raises RunDirectoryBusy or CorruptFile if the server cannot use the directory, ConfigError if there is no
    cluster or it lacks what the configuration asks for, ClusterError if the server does not start.
    """
    run_dir, config = run_dir.absolute(), _with_absolute_data_dir(config)  # other processes start elsewhere
    movable = remote is None and config.server.storage == "shared"
    if not has_begun(run_dir):
        initial_vector(config)  # raises errors before Ray starts
    is_sync = config.mode == "sync"
    most = math.ceil((config.batch_tasks if is_sync else config.total_tasks) / config.worker.stack)
    arguments = config, run_dir, uuid.uuid4().hex, remote, absolute_source(config.init)
    plan = ServerPlan(SERVER, arguments, run_dir, movable, most, is_sync, ledger_offset)
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
    """Perform the missing runs of an evaluation in `out`. Signals, result and errors are as in `train`."""
    workers = config.workers if config.workers == "auto" else min(config.workers, len(runs))
    server = replace(config.server, gather_seconds=0.0)  # there is nothing to gather
    config = replace(config, workers=workers, min_workers=min(config.min_workers, len(runs)), server=server)
    out, config = out.absolute(), _with_absolute_data_dir(config)
    movable = config.server.storage == "shared"
    plan = ServerPlan(EVALUATION, (config, list(runs), out, uuid.uuid4().hex), out, movable, len(runs), one_kind=True)
    return _operate(config, plan, record, announce, wall_seconds_before)


def _with_absolute_data_dir(config: Config) -> Config:
    return replace(config, data_dir=str(Path(config.data_dir).absolute()))


@contextlib.contextmanager
def session(config: Config) -> Iterator[None]:
    """Keep one connection to Ray for everything that is trained and evaluated in this context.

    Raises ConfigError, see `connect`. If the cluster's head node is gone, `train` and `evaluate` raise HeadLost in this
    context, instead of returning "failed".
    """
    with stop_signal() as stop:
        stop.check()
        connect(config)
        try:
            stop.check()
            yield
        finally:
            disconnect()


def _operate(
    config: Config,
    plan: ServerPlan,
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
    config: Config, plan: ServerPlan, record: Record, announce: Announce, progress: Progress, profiles: Path | None
) -> str:
    """Run the server, the workers and the control loop on the cluster that this process is connected to."""
    with stop_signal() as stop:
        stop.check()
        nodes = Nodes()
        pool = server = None
        progress.start.begin("nodes")
        progress.places |= metrics.places()
        announce(metrics.describe(progress.places))
        try:
            checks, usable = check_nodes(config, nodes, plan.folder if plan.movable else None, stop, announce)
            most, one_kind = plan.most_workers, plan.one_kind and config.worker.device == "auto"
            config, alerts = fit_resources(config, usable, one_kind=one_kind)
            pool = Pool(config, nodes, profiles, alerts, checks=checks, most_workers=most, one_kind=one_kind)
            pool.require_capacity()
            announce("starting the server and the workers")
            progress.start.begin("server")
            server = start_server(plan)
            pool.open(server)
            wait_for_server(server, plan, stop)
            progress.start.begin("workers")
            outcome = ControlLoop(server, pool, nodes, progress, record, plan.folder, stop, plan.ledger_offset).run()
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
