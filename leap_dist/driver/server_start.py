"""Where the server runs, and how it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from leap_dist.config.loading import ConfigError
from leap_dist.driver.signals import StopSignal
from leap_dist.driver.waiting import first_answer

SERVER_START_SECONDS = 600.0
"""How long the server may take to start. It reads the whole run directory, and Ray restarts it when it is killed."""


class ServerPlan(NamedTuple):
    """Which server to start, and where."""

    actor: Any
    arguments: tuple[Any, ...]
    folder: Path
    movable: bool
    """Whether other nodes share the folder, so that the server may restart there."""
    most_workers: int
    """Number of workers beyond which some would never have a task."""
    one_kind: bool
    """Whether all workers must compute on the same kind of device."""
    ledger_offset: int = 0
    """Offset in bytes of the first ledger line to record."""


def start_server(plan: ServerPlan) -> Any:
    """Start the server without waiting, on the driver's own node if possible, where the folder certainly exists."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=plan.movable)
    return plan.actor.options(scheduling_strategy=here).remote(*plan.arguments)


def wait_for_server(server: Any, plan: ServerPlan, stop: StopSignal) -> None:
    """Wait until the server works.

    Raises the error that keeps it from working, ClusterError if it does not start in time.
    """
    problem = first_answer(server.problem, SERVER_START_SECONDS, stop)
    if isinstance(problem, OSError):
        raise ConfigError(f"run-dir: {plan.folder} cannot be used: {problem}")
    if problem is not None:
        raise problem
