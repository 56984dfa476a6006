"""Memory of this machine: how many workers fit into it, and which processes Ray's memory monitor has killed."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.core.generated.common_pb2 import WorkerExitType  # type: ignore[attr-defined]
from ray.core.generated.gcs_pb2 import WorkerTableData  # type: ignore[attr-defined]
from ray.exceptions import RayError

from leap_dist.config.settings import Config
from leap_dist.driver.waiting import last_line

WORKER_BYTES = 500 * 2**20
"""Memory of a worker on a processor: PyTorch, Ray and 16 environments. On Atari, 400 to 440 MB were measured."""
CUDA_WORKER_BYTES = 1500 * 2**20
"""Memory of a worker on a GPU, which also holds CUDA's context and libraries. An estimate, not measured."""
WORKER_GPU_BYTES = 3 * 2**29
"""GPU memory that a worker takes at least: CUDA itself, and the graphs and activations of a few environments."""
ANSWER_SECONDS = 5.0
"""Seconds after which a question to the head node is given up."""
ADVICE = "lower --workers or --agent.envs"
GPU_ADVICE = "lower --agent.envs, or give each worker more of a GPU with --worker.gpus"

# By default Ray kills several processes at once, the server among them. Its older policy kills one at a time: the
# youngest of those that may be restarted. If workers may be restarted too, the server is the last.
MONITOR = {"RAY_worker_killing_policy_by_group": "true"}
"""Environment variables by which a local Ray spares the server when memory runs out."""


def prepare_monitor() -> None:
    """Make the next local Ray kill workers before the server when memory runs out."""
    for name, value in MONITOR.items():
        os.environ.setdefault(name, value)


def fit(config: Config, available: float | None = None, *, on_gpus: bool = False) -> tuple[Config, list[str]]:
    """Return the configuration with no more workers than this machine has memory for, and a line that says so.

    `available` is the memory in bytes; by default it is read from the system. `on_gpus` says whether the workers
    compute on GPUs. The nodes of a cluster are not examined, and a number of workers that follows the nodes' resources
    needs no correction.
    """
    if config.address != "local" or config.workers == "auto":  # placement.Need.room counts the memory itself
        return config, []
    available = _available_bytes() if available is None else available
    each = CUDA_WORKER_BYTES if on_gpus else WORKER_BYTES
    fits = max(1, int(min(available / each, config.workers)))
    if fits == config.workers:
        return config, []
    line = (
        f"{config.workers} workers requested, only {fits} started: each takes about {each >> 20} MB, and "
        f"{available / 2**30:.1f} GB are free; {ADVICE}"
    )
    return replace(config, workers=fits, min_workers=min(config.min_workers, fits)), [line]


def was_killed(pid: int | None, node: str | None) -> bool:
    """Return whether Ray's memory monitor has killed a process; False if that is not known.

    `node` is Ray's ID of the node that the process ran on. Containers number their processes from one, so that many
    processes in a cluster have the same PID, also one after the other on one node, of which only the last is meant.

    If the head node is gone, Ray's call blocks for a minute, and the driver must not wait for it: it is given up after
    `ANSWER_SECONDS`, and no other one is made meanwhile.
    """
    if pid is None or node is None or any(thread.is_alive() for thread in _asking):
        return False
    answer: list[bool] = []
    thread = threading.Thread(target=lambda: answer.append(_is_in_table(pid, node)), name="killed", daemon=True)
    _asking[:] = [thread]
    thread.start()
    thread.join(ANSWER_SECONDS)
    return any(answer)


_asking: list[threading.Thread] = []  # the last one that `was_killed` has started


def _is_in_table(pid: int, node: str) -> bool:
    with contextlib.suppress(Exception):  # the interface is not public and may change
        accessor: Any = ray._private.state.state._global_state_accessor
        workers = [WorkerTableData.FromString(raw) for raw in accessor.get_worker_table()]
        there = [worker for worker in workers if worker.pid == pid and worker.worker_address.node_id.hex() == node]
        if there:
            last = max(there, key=lambda worker: worker.start_time_ms)  # by the node's own clock
            return bool(last.exit_type == WorkerExitType.Value("NODE_OUT_OF_MEMORY"))
    return False


def explain_kill(own_bytes: int | None, all_bytes: int) -> str:
    """Return why a worker was killed, what it and all workers used, and what to set."""
    used = "" if own_bytes is None else f"; it used {own_bytes >> 20:,} MB, all workers together {all_bytes >> 20:,} MB"
    return f"was killed because the memory of its node was full{used}; {ADVICE}"


def explain_death(error: RayError) -> str:
    """Return why a worker died, with what to set if its part of a GPU's memory did not suffice."""
    advice = f"; {GPU_ADVICE}" if isinstance(error, torch.OutOfMemoryError) else ""
    return f"died: {last_line(error)}{advice}"


def _available_bytes() -> float:
    """Return how many bytes are still available, given the system's memory and the limits of this process's cgroups."""
    return min(_headroom(), default=math.inf)


def _headroom() -> Iterator[float]:
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        yield 1024.0 * int({line.split(":")[0]: line.split()[1] for line in lines}["MemAvailable"])
    for folder, limit, usage in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: there is no limit
            yield float(int(Path(folder, limit).read_text()) - int(Path(folder, usage).read_text()))
