"""Measure the memory of a server with many open leases, each with partial contributions: part `memory` of server.py.

A server with server.on_lost retry should hold no vector of an open lease, and one with keep only the newest of each. In
each of two rounds every lease pushes anew; the second round should add nothing.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmarks import clients
from benchmarks.harness import Report, interleaved
from leap_dist.protocol.messages import Lease

LEASES = 256
PUSHES = 3
"""Number of partial contributions per lease and round."""
MEGABYTE = 1e6


def measure(report: Report, folder: Path, repeats: int) -> None:
    """Add the memory figures to `report`. Requires a running Ray."""
    vectors = LEASES * clients.encoder()[1].nbytes / MEGABYTE
    found: dict[str, list[list[float]]] = {}

    def arm(kind: str, on_lost: str) -> float:
        runs = found.setdefault(f"{kind}, {on_lost}", [])
        run_dir = folder / f"{kind}-{on_lost}-{len(runs)}"
        if kind == "Ray":
            runs.append(_through_ray(on_lost, run_dir))
        else:  # a fresh process, so that memory is not reused
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                runs.append(pool.apply(_plain, (on_lost, run_dir)))
        return runs[-1][2] - runs[-1][1]

    arms = itertools.product(("plain", "Ray"), ("retry", "keep"))
    interleaved({f"{kind}, {on_lost}: MB": functools.partial(arm, kind, on_lost) for kind, on_lost in arms}, repeats)
    for name, runs in found.items():
        opened, leased, first, second = np.transpose(runs)
        report.add(f"{name}: resident, no lease", "MB", opened.tolist())
        report.add(f"{name}: resident, {LEASES} leases", "MB", leased.tolist())
        report.add(f"{name}: growth by {PUSHES} pushes of each", "MB", (first - leased).tolist())
        report.add(f"{name}: growth by {PUSHES} more", "MB", (second - first).tolist())
    for name, runs in found.items():
        _, leased, first, second = np.transpose(runs)
        growth, more = (first - leased).tolist(), (second - first).tolist()
        whole = [vectors] * len(runs)
        if name.endswith("keep"):
            near = [min(one, vectors) for one in growth], [max(one, vectors) for one in growth]
            report.ratio(f"{name}: growth against {LEASES} vectors", *near, target=0.8)
        else:
            report.ratio(f"{name}: growth / {LEASES} vectors", growth, whole, target=0.02, at_most=True)
        report.ratio(f"{name}: growth by more / {LEASES} vectors", more, whole, target=0.02, at_most=True)
    report.notes.append(
        f"predicted growth: keep {vectors:.0f} MB, one vector per open lease; retry 0, the rest being a few kB of "
        "statistics per lease. The ratio 'growth against' is "
        "the smaller of measured and predicted growth divided by the larger."
    )
    report.notes.append(
        "Plain: total resident memory after malloc_trim. Ray: the actor's anonymous memory, without object-store pages."
    )


def _plain(on_lost: str, run_dir: Path) -> list[float]:
    server = clients.plain_server(run_dir, server__on_lost=on_lost)

    def resident() -> float:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # return free memory to the system, so that only live memory counts
        return _status("self", "VmRSS")

    return _rounds(lambda method, *arguments: getattr(server, method)(*arguments), resident)


def _through_ray(on_lost: str, run_dir: Path) -> list[float]:
    server = clients.server_actor(run_dir, server__on_lost=on_lost)
    process = ray.get(server.advance.remote(0, []))[0]["server_pid"]

    def call(method: str, *arguments: Any) -> Any:
        return ray.get(getattr(server, method).remote(*arguments))

    sizes = _rounds(call, lambda: _status(process, "RssAnon"))
    ray.kill(server)
    return sizes


def _rounds(call: Any, resident: Any) -> list[float]:
    """Return the megabytes before leasing, with all leases open, and after each of two rounds of pushes."""
    manifest, vector = clients.encoder()
    sizes = [resident()]
    answers = [call("lease", f"w{i}", "i") for i in range(LEASES)]
    leases = [answer if isinstance(answer, Lease) else answer[0] for answer in answers]
    sizes.append(resident())
    for number in range(2):
        for seq in range(number * PUSHES + 1, (number + 1) * PUSHES + 1):
            for lease in leases:
                ack = call("push", clients.contribution(lease, manifest.digest, vector, seq))
                assert (ack.accepted, ack.durable) == (True, False), ack
        sizes.append(resident())
    return sizes


def _status(process: int | str, field: str) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":")) / MEGABYTE
