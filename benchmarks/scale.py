"""Measure how many workers one server can serve, up to ten thousand, and which optimizations help.

The real server runs in simulated time.

    python -m benchmarks.scale                                          everything, in about an hour
    python -m benchmarks.scale --only load --workers 10 100 1000        one part, for these numbers of workers
    python -m benchmarks.scale --only arms --modes stream --picture docs/scaling-gains.png

    load          the server and its workers without optimizations, for growing numbers of workers
    arms          the effect of each optimization, alone and combined, by number of workers and mode
    agreement     the same point measured with full vectors on a real disk, and with samples of such calls
    anchor        the cost of Ray per call, and fake workers on real Ray compared with their simulation
    convergence   distance to a known optimum by mode, staleness weight and number of workers; see convergence.py

Workers train as fast as benchmarks/worker.py measured for each game (fleet.SPEEDS), times --speed. The server's calls
are executed one after the other, and their CPU time and disk waits are measured. Ray adds --ray-call and --ray-vector
to each, by default what `anchor` measured on the machine of docs/scaling.md. Every other assumption is an option. Times
are simulated and rates are per simulated second; shares of the server's time hold for this machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks import arms, convergence
from benchmarks.fleet import SPEEDS, Point, configuration, measure
from benchmarks.harness import command, hardware, parser, progress
from benchmarks.service import Disk, RayCost
from benchmarks.traffic import Load

RAY_CALL, RAY_VECTOR = 3.3e-4, 0.9e-4
"""Seconds of the server's time that Ray adds per call and per megabyte, as measured by part `anchor`."""


def main() -> None:
    """Run the selected parts and print the results."""
    chosen = arguments().parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"command": command(), "hardware": hardware(), "settings": settings(chosen)}
    with tempfile.TemporaryDirectory(prefix=".benchmark-", dir=chosen.dir) as folder, Disk() as disk:
        bench = Bench(chosen, Path(folder).resolve(), disk)
        for part in chosen.only:
            progress(f"--- {part}")
            result[part] = PARTS[part](bench)
            if chosen.save:
                chosen.save.write_text(json.dumps(result, indent=1, default=str))
    print(json.dumps(result, indent=1, default=str) if chosen.json else text(result))


def arguments() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    made = parser(__doc__, repeats=3)
    made.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    made.add_argument("--workers", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    made.add_argument("--modes", nargs="+", default=["buffered", "stream"], help="modes for `arms`")
    made.add_argument("--arms", nargs="+", choices=arms.ARMS, default=list(arms.ARMS), help="arms to measure in `arms`")
    made.add_argument("--batch", type=int, default=0, help="|B|; by default a sixteenth of the workers, at least 16")
    made.add_argument(
        "--window", type=float, default=60.0, help="length of the measured window in simulated seconds (default 60)"
    )
    made.add_argument("--warm-up", type=float, default=1.2, help="length of the warm-up in tasks (default 1.2)")
    made.add_argument("--full", action="store_true", help="use full vectors and a real disk instead of samples")
    made.add_argument(
        "--speed", type=float, default=1.0, help="factor on the measured speeds, for example for GPU workers"
    )
    made.add_argument("--straggling", type=float, default=0.25, help="σ of the workers' lognormal slowdown")
    made.add_argument("--mtbf", type=float, default=100.0, help="mean hours between failures of a worker (default 100)")
    made.add_argument("--latency", type=float, default=0.5, help="one-way network latency in ms (default 0.5)")
    made.add_argument(
        "--worker-link", type=float, default=1.0, help="bandwidth of a worker's link in Gbit/s (default 1)"
    )
    made.add_argument(
        "--server-link", type=float, default=10.0, help="bandwidth of the server's link in Gbit/s (default 10)"
    )
    made.add_argument("--workers-per-node", type=int, default=8)
    made.add_argument("--ray-call", type=float, default=RAY_CALL, help="seconds that Ray adds per call")
    made.add_argument("--ray-vector", type=float, default=RAY_VECTOR, help="seconds that Ray adds per megabyte")
    made.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings to override")
    made.add_argument(
        "--fake-workers", type=int, nargs="+", default=[8, 24, 48], help="numbers of fake workers for `anchor`"
    )
    made.add_argument("--fake-window", type=float, default=20.0, help="measured seconds per number of fake workers")
    made.add_argument("--tasks", type=int, default=3200, help="tasks per run of `convergence`")
    made.add_argument("--processes", type=int, default=1, help="processes for `convergence`")
    made.add_argument("--dir", type=Path, default=Path(), help="parent of the run directory (default: here)")
    made.add_argument("--picture", type=Path, help="path of the picture of `arms` or `convergence`")
    made.add_argument("--save", type=Path, help="JSON file to update with the results after each part")
    return made


def settings(chosen: argparse.Namespace) -> dict[str, Any]:
    """Return the command-line choices as plain data."""
    return {
        name: value if isinstance(value, (int, float, list)) else str(value) for name, value in vars(chosen).items()
    }


class Bench:
    """State that all parts share."""

    def __init__(self, chosen: argparse.Namespace, folder: Path, disk: Disk) -> None:
        self.chosen, self.folder, self.disk = chosen, folder, disk
        self.ray = RayCost(chosen.ray_call, chosen.ray_vector)
        self._samples: dict[str, Any] = {}

    def load(self, workers: int) -> Load:
        """Return the load of a fleet with `workers` workers."""
        chosen = self.chosen
        return Load(
            workers,
            {game: chosen.speed * speed for game, speed in SPEEDS.items()},
            workers_per_node=chosen.workers_per_node,
            straggling=chosen.straggling,
            hours_between_failures=chosen.mtbf,
            latency=chosen.latency / 1e3,
            worker_bandwidth=chosen.worker_link * 1.25e8,
            server_bandwidth=chosen.server_link * 1.25e8,
        )

    def point(self, name: str, mode: str, workers: int, arm: str, **settings: Any) -> Point:
        """Return one point of the table."""
        batch = self.chosen.batch or (16 if mode == "stream" else max(16, workers // 16))
        gain = arms.ARMS[arm]
        chosen = self.chosen
        own = dict(one.split("=", 1) for one in chosen.set)
        given = {"mode": mode, "meta__batch_size": batch, **gain.settings, **settings}
        given |= {name.replace(".", "__"): yaml.safe_load(value) for name, value in own.items()}
        config = configuration(workers, **given)
        load = replace(self.load(workers), **gain.load)
        return Point(name, config, load, self.ray, chosen.window, chosen.warm_up, chosen.full, **gain.point)

    def measure(self, point: Point) -> dict[str, Any]:
        """Simulate one point and print its progress line."""
        found = measure(point, self.folder, self.disk, self._samples)
        progress(f"{line(found)}  [{found['real seconds']:.0f} s]")
        if self.chosen.save:  # so that results can be read before the other points are done
            with self.chosen.save.with_suffix(".jsonl").open("a") as file:
                file.write(json.dumps(found, default=str) + "\n")
        return found


def measure_load(bench: Bench) -> list[dict[str, Any]]:
    """Run part `load`."""
    return [
        bench.measure(bench.point(f"{mode}, {workers:,} workers", mode, workers, "before"))
        for mode in bench.chosen.modes
        for workers in bench.chosen.workers
    ]


def measure_arms(bench: Bench) -> list[dict[str, Any]]:
    """Run part `arms`."""
    found = [
        {"arm": arm, "mode": mode}
        | bench.measure(bench.point(f"{mode}, {workers:,} workers, {arm}", mode, workers, arm))
        for mode in bench.chosen.modes
        for workers in bench.chosen.workers
        for arm in bench.chosen.arms
    ]
    if bench.chosen.picture and bench.chosen.only == ["arms"]:
        arms.draw(found, bench.chosen.picture)
    return found


def measure_agreement(bench: Bench) -> list[dict[str, Any]]:
    """Run part `agreement`."""
    found = []
    for workers in bench.chosen.workers:
        for full in (True, False):
            name = f"{workers:,} workers, {'full vectors' if full else 'samples'}"
            found.append(bench.measure(replace(bench.point(name, "buffered", workers, "before"), full=full)))
    return found


def measure_anchor(bench: Bench) -> list[dict[str, Any]]:
    """Run part `anchor`."""
    from benchmarks import anchor  # imported here because it starts Ray

    chosen = bench.chosen
    return anchor.measure(bench.folder, bench.disk, chosen.repeats, chosen.fake_workers, chosen.fake_window)


def measure_convergence(bench: Bench) -> list[dict[str, Any]]:
    """Run part `convergence`."""
    chosen = bench.chosen
    found = convergence.outcomes([n for n in chosen.workers if n <= 1000], chosen.tasks, chosen.processes)
    if chosen.picture and chosen.only == ["convergence"]:
        convergence.draw(found, chosen.picture)
    return convergence.table(found)


PARTS: Mapping[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "load": measure_load,
    "arms": measure_arms,
    "agreement": measure_agreement,
    "anchor": measure_anchor,
    "convergence": measure_convergence,
}


def line(found: Mapping[str, Any]) -> str:
    """Format a point as one line."""
    delay = found["delay ms"]["renew"] or {"p50": 0.0, "p99": 0.0}
    return (
        f"{found['name']}: |B| {found['batch']}, {found['meta-updates/h']:.0f} meta-updates/h, "
        f"{found['finals/s']:.3g} + {found['partials/s']:.3g} pushes/s, {found['renewals/s']:.3g} renewals/s, "
        f"{found['MB/s in']:.3g} MB/s, busy {found['busy']:.2f}, workers wait {found['time waiting']:.1%}, "
        f"a renewal waits {delay['p50']:.0f} ms, p99 {delay['p99']:.0f}, expired {found['expired']}"
    )


def text(result: Mapping[str, Any]) -> str:
    """Format the results as text tables."""
    machine = result["hardware"]
    lines = [result["command"], f"{machine['processor']}, {machine['cores']} cores; load {machine['load']:.2f}"]
    for part in PARTS:
        if part in result:
            lines += ["", part]
            lines += ["  " + (line(row) if "delay ms" in row else _row(row)) for row in result[part]]
    return "\n".join(lines)


def _row(row: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
    )


if __name__ == "__main__":
    main()
