"""The plan of a run in one line: its nodes, its workers, what limits them, and how long it takes if that is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from leap_dist.config import registry
from leap_dist.config.loading import implied_values
from leap_dist.config.plurals import counted
from leap_dist.config.settings import Config
from leap_dist.driver.placement import TASK_LIMIT, Room
from leap_dist.telemetry.progress import duration


def describe(config: Config, rooms: Sequence[Room], wanted: int, idle: int = 0) -> str:
    """Return the plan without speed and time; see `with_speed`.

    Args:
        config: the run's configuration.
        rooms: the room on each node that may get workers.
        wanted: number of workers that should run.
        idle: number of nodes without GPUs that get no workers, because all workers compute on one kind of device.
    """
    places: Counter[str] = Counter()
    for room in sorted(rooms, key=lambda room: room.device != "cuda"):  # in the order in which they are filled
        places[room.device] += min(room.workers, wanted - places.total())
    workers = places.total()
    nodes = counted(len(rooms), "node")
    text = f"plan: {nodes}, {counted(workers, 'worker')}"
    if places["cuda"]:
        text += f" ({places['cuda']} on GPUs, {places['cpu']} on processors)"
    text += f", limited by {_limit(config, rooms, workers)}"
    if idle:
        text += (
            f", {counted(idle, 'node')} without GPUs left out, because all workers compute on one kind of device "
            "(--worker.device cpu uses the processors of all nodes)"
        )
    return text


def with_speed(summary: Mapping[str, Any], config: Config, rate: float | None) -> str:
    """Return the plan of a summary with the speed that was measured before the start, and the time that follows.

    Args:
        summary: the driver's summary.
        config: the run's configuration, with the length of its tasks.
        rate: agent steps per second of all workers; None if it was not measured, which leaves the plan as it is.
    """
    plan = str(summary["plan"])
    if not rate or not plan or not summary["workers_wanted"]:
        return plan
    tasks = max(0, summary["tasks_wanted"] - summary["tasks"] - summary["tasks_waiting"])
    unit = registry.for_config(config).step_unit
    return f"{plan}; about {_rounded(rate):,.0f} {unit}/s, {duration(tasks * config.steps_of_task / rate)} to the end"


def _limit(config: Config, rooms: Sequence[Room], workers: int) -> str:
    """Return what limits the number of workers."""
    if config.workers != "auto" and workers >= config.workers:
        return _source_of_workers(config)
    if workers < sum(room.workers for room in rooms) or any(room.limit == TASK_LIMIT for room in rooms):
        return "meta.batch_size, because mode sync waits for each batch" if config.mode == "sync" else "the tasks left"
    return " and ".join(dict.fromkeys(room.limit for room in rooms)) or "nodes"


def _source_of_workers(config: Config) -> str:
    """Return what the fixed number of workers comes from: the preset, the meta-learner, or the user."""
    given = {"tasks": config.tasks}
    if implied_values(config.preset, given).get("workers") == config.workers:
        return f"workers of preset {config.preset}"
    if implied_values(config.preset, {**given, "meta_learner": config.meta_learner}).get("workers") == config.workers:
        return f"workers of {config.meta_learner}"
    return "--workers"


def _rounded(rate: float) -> float:
    """Return a rate rounded to two significant digits."""
    return round(rate, 2 - len(str(int(rate))))
