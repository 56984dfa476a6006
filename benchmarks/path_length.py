"""Measure how the training path's length changes over meta-steps, for leap, reptile, fomaml and none on toy tasks.

    python -m benchmarks.path_length
    python -m benchmarks.path_length --meta-steps 20 --seeds 2 --out path-length.png --json
    python -m benchmarks.path_length --streams --out streams.png

There are three families of tasks: quadratics, quadratics whose steep members lie apart from the flat ones, and
sinusoids. A meta-step is Algorithm 1 (mode sync, SGD, no clipping) on fresh tasks, with the same number of rollouts per
task for every arm. The results come from held-out tasks, the same for all arms: ordinary training from the current φ,
its path length (equation 4) and its final loss. With `--streams`, the arms are those of mode stream on sinusoids: φ
moves ten times in a meta-step, and running tasks follow it in one of two ways, or not at all (`meta.shift`).

Each arm's meta learning rate is chosen from five candidates by two runs with other seeds and other held-out tasks.
Among the rates whose final loss is below their initial loss, the one with the shortest mean path over the run is
chosen.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from benchmarks.toy import FAMILIES, Point, Quadratic, configuration, measure, meta_step, shortest, stream
from leap_dist.server.meta_optimizer import MetaOptimizer

ARMS: dict[str, dict[str, Any]] = {
    "leap, energy": {"meta_learner": "leap", "leap.metric": "energy"},
    "leap, length": {"meta_learner": "leap", "leap.metric": "length"},
    "reptile": {"meta_learner": "reptile"},
    "fomaml": {"meta_learner": "fomaml"},
    "none": {"meta_learner": "none"},
}
STREAMS: dict[str, dict[str, Any]] = {
    name: {"meta_learner": "reptile", "mode": "stream", "worker.push_interval": 3, "meta.shift": shift}
    for name, shift in (("no shift", "no"), ("increments", "increments"), ("trajectory", "trajectory"))
}
"""Arms of mode stream, with Reptile as in arXiv 2102.07215."""
_GRID = (1, 3, 10, 30, 100)  # candidate rates as multiples of the arm's smallest rate in its family
_END = 5  # number of last meta-steps that count as the end of a run
_TUNING_SEEDS = (1_000_001, 1_000_002)
# Okabe and Ito's colors, which are distinguishable with color blindness.
_STYLES: dict[str, dict[str, Any]] = {
    "leap, energy": {"color": "#0072B2", "marker": "o"},
    "leap, length": {"color": "#56B4E9", "marker": "s"},
    "reptile": {"color": "#D55E00", "marker": "^"},
    "fomaml": {"color": "#009E73", "marker": "D"},
    "none": {"color": "0.4", "linestyle": "--"},
    "no shift": {"color": "0.4", "linestyle": "--"},
    "increments": {"color": "#E69F00", "marker": "^"},
    "trajectory": {"color": "#0072B2", "marker": "o"},
}


@dataclass(frozen=True)
class Size:
    """Size of a run."""

    meta_steps: int
    tasks: int
    """Number of tasks |B| per meta-step; as many are held out."""
    rollouts: int
    """Number of rollouts K per task, including those that fomaml holds out."""


@dataclass(frozen=True)
class Run:
    """Meta-learning of one initialization. A tuning run is measured only ten times."""

    family: str
    arm: str
    rate: float
    seed: int
    size: Size

    def points(self) -> list[Point]:
        """Return the points before the first and after each measured meta-step; infinite after divergence."""
        family, steps = FAMILIES[self.family], self.size.meta_steps
        interval = max(1, steps // 10) if self.seed in _TUNING_SEEDS else 1
        config = configuration({**ARMS, **STREAMS}[self.arm], self.size.rollouts, self.rate)
        initialization = MetaOptimizer(config.mode, config.meta, family.start(self.seed))
        measured = initialization.vector
        points = [self._point(measured)]
        for step in range(steps):
            if points[-1] != _DIVERGED:
                tasks = _task_seeds(self.seed, step, count=self.size.tasks)
                advance = stream if config.mode == "stream" else meta_step
                advance(config, family.learners(initialization.vector, tasks), initialization)
            if (step + 1) % interval == 0:
                same = np.array_equal(initialization.vector, measured)
                measured = initialization.vector
                points.append(points[-1] if same else self._point(measured))
        return points

    def _point(self, vector: np.ndarray) -> Point:
        held_out = held_out_tasks(self.size, self.seed if self.seed in _TUNING_SEEDS else 0)
        point = measure(FAMILIES[self.family].learners(vector, held_out), self.size.rollouts)
        return point if all(map(math.isfinite, point)) else _DIVERGED


_DIVERGED = Point(math.inf, math.inf, math.inf)


def held_out_tasks(size: Size, tuning_seed: int = 0) -> list[int]:
    """Return the seeds of the held-out tasks, which tuning runs do not share with the others."""
    return _task_seeds(2**31 + tuning_seed, count=size.tasks)


def _task_seeds(*key: int, count: int) -> list[int]:
    seeds: list[int] = np.random.SeedSequence(key).generate_state(count).tolist()
    return seeds


@dataclass(frozen=True)
class Result:
    """Results of one arm in one family."""

    tuning: dict[float, float]
    """Mean path length over the tuning runs by rate; empty for none, which has no rate."""
    rate: float
    points: np.ndarray
    """Length, energy and loss of each seed and meta-step, with shape (seeds, meta-steps + 1, 3)."""

    @property
    def start(self) -> Point:
        """Mean over the seeds before the first meta-step."""
        return Point(*self.points[:, 0].mean(0).tolist())

    @property
    def end(self) -> Point:
        """Mean over the seeds and the last meta-steps."""
        return Point(*self.points[:, 1:][:, -_END:].mean((0, 1)).tolist())

    @property
    def falls(self) -> list[int]:
        """Return the number of meta-steps of each seed in which the path became shorter."""
        counts: list[int] = (self.points[:, 1:, 0] < self.points[:, :-1, 0]).sum(1).tolist()
        return counts


def study(size: Size, seeds: int, processes: int, *, streams: bool = False) -> dict[str, dict[str, Result]]:
    """Run all arms of all families, or those of mode stream on sinusoids, after choosing their rates."""
    chosen = ["sinusoids"] if streams else list(FAMILIES)
    arms = [(family, arm) for family in chosen for arm in (STREAMS if streams else ARMS)]
    tuning = _points(
        [Run(*key, rate, s, size) for key in arms for rate in _grid(*key) for s in _TUNING_SEEDS], processes
    )
    tuned = {
        key: {rate: np.stack([tuning[Run(*key, rate, seed, size)] for seed in _TUNING_SEEDS]) for rate in _grid(*key)}
        for key in arms
    }
    rates = {key: _chosen(tuned[key]) for key in arms}
    points = _points([Run(*key, rates[key], seed, size) for key in arms for seed in range(seeds)], processes)
    results: dict[str, dict[str, Result]] = {family: {} for family in chosen}
    for key in arms:
        of_arm = np.stack([points[Run(*key, rates[key], seed, size)] for seed in range(seeds)])
        lengths = {rate: float(curves[:, 1:, 0].mean()) for rate, curves in tuned[key].items()}
        results[key[0]][key[1]] = Result(lengths, rates[key], of_arm)
    return results


def _grid(family: str, arm: str) -> list[float]:
    smallest = FAMILIES[family].smallest_rates
    return [round(smallest[arm] * factor, 9) for factor in _GRID] if arm in smallest else []


def _points(runs: Sequence[Run], processes: int) -> dict[Run, np.ndarray]:
    if processes == 1:
        return {run: np.array(run.points()) for run in runs}
    with ProcessPoolExecutor(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return {run: np.array(points) for run, points in zip(runs, pool.map(Run.points, runs), strict=True)}


def _chosen(curves: dict[float, np.ndarray]) -> float:
    """Return the rate with the shortest mean paths among those that end at a lower loss than they start with."""

    def order(rate: float) -> tuple[bool, float]:
        means = curves[rate].mean(0)
        return not means[-1, 2] < means[0, 2], means[1:, 0].mean()

    return min(curves, key=order) if curves else 1.0


def shortest_paths(size: Size) -> dict[str, float]:
    """Return the shortest path length that any φ reaches on the held-out tasks, for each family of quadratics."""
    least = {}
    for name, family in FAMILIES.items():
        seeds = held_out_tasks(size)
        quadratics = [x for x in family.learners(family.start(0), seeds) if isinstance(x, Quadratic)]
        if quadratics:
            best = shortest(quadratics, size.rollouts)
            least[name] = measure(family.learners(best, seeds), size.rollouts).length
    return least


def table(results: dict[str, dict[str, Result]], shortest: dict[str, float]) -> str:
    """Format a Markdown table of means over the seeds; "end" also averages over the last meta-steps."""
    lines = [
        "| tasks | arm | rate, range | path length, start | end | shorter after | loss after K updates, start | end |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family, of_family in results.items():
        for arm, result in of_family.items():
            grid = sorted(result.tuning)
            rate = f"{result.rate:g}, {grid[0]:g}–{grid[-1]:g}" if grid else "–"
            start, end, steps = result.start, result.end, result.points.shape[1] - 1
            lengths = f"{start.length:.2f} | {end.length:.2f} | {np.mean(result.falls):.0f} of {steps}"
            lines.append(f"| {family} | {arm} | {rate} | {lengths} | {start.loss:.3f} | {end.loss:.3f} |")
        if family in shortest:
            lines.append(f"| {family} | shortest for any φ | | | {shortest[family]:.2f} | | | |")
    return "\n".join(lines)


def as_json(results: dict[str, dict[str, Result]], shortest: dict[str, float], size: Size) -> str:
    """Format all values as JSON, with null for values that are not finite."""

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value if math.isfinite(value) else None

    families = {
        family: {
            "shortest": shortest.get(family),
            "arms": {
                arm: {
                    "rate": result.rate if result.tuning else None,
                    "tuning": {f"{rate:g}": plain(length) for rate, length in result.tuning.items()},
                    "falls": result.falls,
                    **{name: plain(result.points[..., i].tolist()) for i, name in enumerate(Point._fields)},
                }
                for arm, result in of_family.items()
            },
        }
        for family, of_family in results.items()
    }
    return json.dumps({"size": dataclasses.asdict(size), "families": families}, allow_nan=False)


def draw(results: dict[str, dict[str, Result]], shortest: dict[str, float], size: Size, path: Path) -> None:
    """Draw one column per family, path length above loss, each with the mean and range of the seeds."""
    figure = Figure(figsize=(4.2 * len(results), 7.0), dpi=120, layout="constrained")
    panels = figure.subplots(2, len(results), squeeze=False, sharex=True)
    for column, (family, of_family) in enumerate(results.items()):
        upper, lower = panels[:, column]
        upper.set_title(family, fontsize=11)
        for axes, values in ((upper, "length"), (lower, "loss")):
            for arm, result in of_family.items():
                _line(axes, result.points[..., Point._fields.index(values)], arm)
        if family in shortest:
            label = "shortest of any φ on these tasks"
            upper.axhline(shortest[family], color="black", linestyle=":", linewidth=1.4, label=label)
            upper.set_ylim(bottom=0.9 * shortest[family])
    panels[0, 0].set_ylabel("path length (log scale)", fontsize=10)
    panels[1, 0].set_ylabel(f"loss after {size.rollouts} updates (log scale)", fontsize=10)
    for axes in panels[1]:
        axes.set_xlabel("meta-step", fontsize=10)
    figure.suptitle(
        "Training on held-out tasks from the initialization after each meta-step: mean and range of the seeds"
    )
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    figure.savefig(path, format="png")


def _line(axes: Axes, values: np.ndarray, arm: str) -> None:
    """Draw one arm's mean and range; `values` has shape (seeds, meta-steps + 1)."""
    steps = np.arange(values.shape[1])
    style = {"linewidth": 1.5, "markersize": 4.5, "markevery": max(1, len(steps) // 10), **_STYLES[arm]}
    axes.fill_between(steps, values.min(0), values.max(0), color=style["color"], alpha=0.2, linewidth=0)
    axes.plot(steps, values.mean(0), label=arm, **style)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.tick_params(which="both", labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Run the benchmark, draw the picture and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meta-steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=10, help="tasks per meta-step; as many are held out")
    parser.add_argument("--rollouts", type=int, default=30, help="rollouts per task (K), of which fomaml holds out 4")
    parser.add_argument("--streams", action="store_true", help="compare the arms of mode stream, on sinusoids")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("docs/path-length.png"), help="path of the picture to draw")
    parser.add_argument("--json", action="store_true", help="print all values instead of the table")
    arguments = parser.parse_args()
    started = time.monotonic()
    size = Size(arguments.meta_steps, arguments.tasks, arguments.rollouts)
    results = study(size, arguments.seeds, arguments.processes, streams=arguments.streams)
    shortest = shortest_paths(size)
    draw(results, shortest, size, arguments.out)
    if arguments.json:
        print(as_json(results, shortest, size))
    else:
        print(table(results, shortest))
        print(f"{arguments.seeds} seeds, {size}, {time.monotonic() - started:.0f} s on {arguments.processes} processes")


if __name__ == "__main__":
    main()
