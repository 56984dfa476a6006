"""Measure the server's cost: pushes through Ray, durable contributions, and the memory of open leases.

    python -m benchmarks.server                                       everything, in a few minutes
    python -m benchmarks.server --only durable --dir /mnt/disk --repeats 9

    pushes    Partial contributions, which do not wait for the disk, through the real server actor. The baseline is
              a bare Ray actor that takes the same array and returns its length. One or two client actors, or the
              driver's own process, each have one push outstanding, as workers do.
    durable   Tasks leased and delivered: a final contribution is in the journal and fsynced before it is
              acknowledged. Meta-updates are included. The baseline is the disk alone, where a new file of the same
              length and its directory are written and fsynced.
    memory    256 open leases, each with partial contributions; see server_memory.py.

All arms of a part are measured in turn. The benchmark starts a local Ray in a temporary folder.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from benchmarks import clients, server_memory
from benchmarks.clients import Bare, Client, Final
from benchmarks.harness import Report, interleaved, parser, progress
from leap_dist.storage.atomic import sync_directory

SECONDS = 1.0  # duration of an arm of `pushes`
TASKS = 160  # tasks per arm of `durable`
CLIENTS = {"1 client": 1, "2 clients": 2, "the driver": 0}


def main() -> None:
    """Run the selected parts and print the report."""
    arguments = parser(__doc__, repeats=5)
    arguments.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    arguments.add_argument("--dir", type=Path, default=Path(), help="parent of the run directory (default: here)")
    chosen = arguments.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # for child processes; Ray sets it for its own
    settings = clients.config()
    report = Report(
        "Server: pushes, durable contributions, memory",
        {
            "vector": f"{clients.encoder()[1].nbytes:,} bytes ({settings.atari.frames})",
            "mode": settings.mode,
            "batch": settings.meta.batch_size,
            "optimizer": settings.meta.optimizer,
            "file system": file_system(chosen.dir),
            "niceness": f"{os.nice(0)} (Ray's processes: {min(19, os.nice(0) + 15)})",
        },
    )
    with tempfile.TemporaryDirectory(prefix=".benchmark-", dir=chosen.dir) as folder, clients.local_ray():
        for part in chosen.only:
            progress(f"--- {part}")
            (where := Path(folder).resolve() / part).mkdir()
            PARTS[part](report, where, chosen.repeats)
    report.show(chosen.json)


def measure_pushes(report: Report, folder: Path, repeats: int) -> None:
    """Run part `pushes`."""
    workers = [_client(f"w{i}") for i in range(2)]
    driver = Client("driver")
    targets = {
        "bare actor": ("bare", ray.remote(num_cpus=0)(Bare).remote()),
        "retry": ("partials", clients.server_actor(folder / "retry", server__on_lost="retry")),
        "keep": ("partials", clients.server_actor(folder / "keep", server__on_lost="keep")),
    }

    def arm(target: str, count: int) -> float:
        method, actor = targets[target]
        if count == 0:
            return float(getattr(driver, method)(actor, SECONDS))
        return sum(ray.get([getattr(worker, method).remote(actor, SECONDS) for worker in workers[:count]]))

    arms = {
        f"{target}, {name}": functools.partial(arm, target, count)
        for name, count in CLIENTS.items()
        for target in targets
    }
    samples = interleaved(arms, repeats, warmup=True)
    for name, figures in samples.items():
        report.add(name if name.startswith("bare") else f"server, on_lost {name}", "pushes/s", figures)
    for name in CLIENTS:
        for on_lost in ("retry", "keep"):
            over, under = samples[f"{on_lost}, {name}"], samples[f"bare actor, {name}"]
            report.ratio(f"server, on_lost {on_lost} / bare, {name}", over, under, target=0.7)
    for actor in [*workers, *(actor for _, actor in targets.values())]:
        ray.kill(actor)


def measure_durable(report: Report, folder: Path, repeats: int) -> None:
    """Run part `durable`."""
    actor = clients.server_actor(folder / "ray")
    workers = [_client(f"w{i}") for i in range(2)]
    length = clients.encoder()[1].nbytes + 4096
    latencies: dict[str, list[float]] = defaultdict(list)
    durable: dict[str, list[float]] = defaultdict(list)
    directories = (folder / f"plain-{k}" for k in itertools.count())

    def note(name: str, seconds: Sequence[float]) -> None:
        latencies[f"{name}: median"].append(1e3 * statistics.median(seconds))
        latencies[f"{name}: p99"].append(1e3 * float(np.percentile(seconds, 99)))

    def disk() -> float:
        seconds = write_files(folder / "files", length)
        note("disk alone: file", seconds)
        return len(seconds) / sum(seconds)

    def tasks(name: str, done: Sequence[Sequence[Final]]) -> float:
        together = list(itertools.chain(*done))
        alone = [one.push for one in together if not one.updated]
        note(f"{name}: push", [one.push for one in together])
        note(f"{name}: push, no update", alone)
        latencies[f"{name}: lease: median"].append(1e3 * statistics.median(one.lease for one in together))
        updates = [one.push - statistics.median(alone) for one in together if one.updated]
        if len(done) == 1:  # with more clients, a push may have waited for another client's
            latencies[f"{name}: a meta-update ({len(updates)} in an arm)"].append(1e3 * statistics.median(updates))
            durable[f"{name}: pushes, no update"].append(len(alone) / sum(alone))
        return sum(len(own) / sum(one.lease + one.push for one in own) for own in done)

    def plain() -> float:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return tasks("plain", [pool.apply(_plain, (next(directories),))])

    def through_ray(name: str, count: int) -> float:
        return tasks(name, ray.get([worker.finals.remote(actor, TASKS // count) for worker in workers[:count]]))

    arms = {
        "disk alone: files": disk,
        "plain: tasks": plain,
        "Ray, 1 client: tasks": functools.partial(through_ray, "Ray, 1 client", 1),
        "Ray, 2 clients: tasks": functools.partial(through_ray, "Ray, 2 clients", 2),
    }
    samples = interleaved(arms, repeats, warmup=True)
    for name, rates in samples.items():
        report.add(name, "per s", rates)
    for name, rates in durable.items():
        report.add(name, "per s", rates[1:])  # without the warm-up
    for name, values in latencies.items():
        report.add(name, "ms", values[1:])
    for name, rates in durable.items():
        report.ratio(f"{name} / 100", rates[1:], [100.0] * repeats, target=1.0)
    for name in [*samples][1:]:
        report.ratio(f"{name} / files of the disk", samples[name], samples["disk alone: files"])
    report.notes.append(
        f"An arm of `durable` is {TASKS} tasks, each with a lease and a final push; tasks/s include meta-updates. The "
        "disk's files are new and as long as a journal entry; each file and its directory are fsynced."
    )
    for one in [*workers, actor]:
        ray.kill(one)


def _plain(run_dir: Path) -> list[Final]:
    torch.set_num_threads(1)  # as the server's actor does
    server = clients.plain_server(run_dir)
    manifest, vector = clients.encoder()

    def call(method: str, *arguments: Any) -> Any:
        return getattr(server, method)(*arguments)

    clients.finals(call, "w", manifest.digest, vector, 48)  # fill the journal to its maximum length first
    return clients.finals(call, "w", manifest.digest, vector, TASKS)


def write_files(folder: Path, length: int) -> list[float]:
    """Return the seconds to write and fsync a new file and fsync its directory, for each of `TASKS` files."""
    folder.mkdir()
    data, seconds = os.urandom(length), []
    for number in range(TASKS):
        started = time.perf_counter()
        with (folder / str(number)).open("wb", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())
        sync_directory(folder)
        seconds.append(time.perf_counter() - started)
        (folder / str(number - 48)).unlink(missing_ok=True)  # a full journal has at most this many files, too
    shutil.rmtree(folder)
    return seconds


def file_system(path: Path) -> str:
    """Return the type of the file system that contains `path`, from /proc/mounts."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [(len(point), kind) for point, kind in mounts if path.resolve().is_relative_to(point)]
    return max(inside)[1]


def _client(name: str) -> Any:
    return ray.remote(num_cpus=0)(Client).remote(name)


PARTS = {"pushes": measure_pushes, "durable": measure_durable, "memory": server_memory.measure}

if __name__ == "__main__":
    main()
