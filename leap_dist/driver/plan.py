"""The plan of a run in one line: its nodes, its workers, what limits them, and how long it may take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from leap_dist.config import registry
from leap_dist.config.loading import implied_values
from leap_dist.config.plurals import counted
from leap_dist.config.settings import Config
from leap_dist.driver.nodes import Node
from leap_dist.driver.placement import TASK_LIMIT, Need, Room, can_be_joined
from leap_dist.telemetry.progress import duration

STEPS_PER_SECOND = {"cpu": 1_600.0, "cuda": 1_700.0}
"""Agent steps per second of one worker on Atari, by device: on one core, and on a GPU, which waits for the emulator.

From docs/performance.md. Machines differ by up to a factor of two, and so do games.
"""


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
    """Return the plan of a summary with the expected speed, and the time that follows from it.

    Args:
        summary: the driver's summary.
        config: the run's configuration, with the length of its tasks.
        rate: agent steps per second of all workers, if they were measured on this machine before the start. On a
            cluster and on GPUs, the speed of other machines takes its place; else, nothing is added to the plan.
    """
    plan = str(summary.get("plan", ""))
    typical = None if rate else _typical_rate(summary.get("workers", ()), config)
    expected = rate or typical
    if not expected or not plan or not summary["workers_wanted"]:
        return plan
    tasks = max(0, summary["tasks_wanted"] - summary["tasks"] - summary["tasks_waiting"])
    unit = registry.for_config(config).step_unit
    source = ", as fast as on other machines" if typical else ""
    left = duration(tasks * config.steps_of_task / expected)
    return f"{plan}; about {_rounded(expected):,.0f} {unit}/s{source}, {left} to the end"


def _typical_rate(workers: Iterable[Mapping[str, Any]], config: Config) -> float | None:
    """Return how fast such workers were elsewhere; None if that is not known, or does not matter on this machine."""
    devices = [worker["device"] for worker in workers if worker["device"]]
    if config.tasks != "atari" or not (can_be_joined(config) or "cuda" in devices):
        return None
    share = min(1.0, config.worker.cpus)  # workers that reserve half a processor have half of it, if all are busy
    return share * sum(STEPS_PER_SECOND[device] for device in devices)


def idle_nodes(need: Need, nodes: Iterable[Node]) -> int:
    """Return how many nodes get no workers because they have no GPU, if all workers must compute on GPUs."""
    if need.device != "cuda":
        return 0
    on_processors = need._replace(device="cpu", gpus=0.0)
    return sum(on_processors.on(node).workers > 0 for node in nodes if not node.resources.get("GPU"))


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
