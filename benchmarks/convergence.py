"""Measure how close runs on quadratic tasks come to the optimum, by mode, staleness weight and number of workers.

Time is simulated. Each game of the preset is a quadratic (toy.py). Gradient descent on f(θ) = ½ (θ−c)ᵀ A (θ−c) is known
in closed form, θ_k − c = (I − αA)^k (φ − c), and so is the contribution of Reptile, which equals Leap's for the energy
metric and λ = 0: G = φ − θ_k = M_k (φ − c) with M_k = I − (I − αA)^k. Every mode looks for the point where the mean G
over the games is zero,

    φ* = (Σ M_K)⁻¹ Σ M_K c.

Workers differ in speed, both by game and individually. The server is the real one, and its calls take no simulated
time.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import clients
from benchmarks.fleet import SPEEDS
from benchmarks.harness import progress
from benchmarks.service import Given
from benchmarks.simulation import Simulation
from benchmarks.toy import Quadratic
from benchmarks.traffic import Clock, Load
from leap_dist.config.loading import resolve
from leap_dist.config.settings import Config
from leap_dist.nn.flat_vector import Manifest
from leap_dist.protocol.messages import Contribution, Lease
from leap_dist.server.meta_server import MetaServer

UPDATES = 20  # K, gradient steps per task
APART = 2.0  # distance between the games' optima; see toy.Quadratic
PUSHES = 2  # pushes per task in mode stream
BATCH = 16
TASKS_OF_A_WORKER = 5  # minimum number of tasks per worker
RECORDS = 60  # records per run
START = 3.0  # value of each coordinate of φ₀
MOMENTUM = 0.9  # momentum of delayed-nesterov
STALENESS: Mapping[str, tuple[str, ...]] = {
    "sync": ("constant",),
    "buffered": ("constant", "polynomial", "hinge", "inverse"),
    "async": ("constant", "polynomial"),
    "fedasync": ("polynomial",),
    "delayed-nesterov": ("polynomial",),
    "stream": ("polynomial",),
}
"""Staleness weights by mode; sync has none."""
RATES = (0.1, 0.5)
"""Meta learning rates of |B| fresh contributions together. Each mode's own setting is scaled to have this effect."""


class Games:
    """One quadratic for each game, and their joint optimum."""

    def __init__(self, games: Sequence[str]) -> None:
        made = [Quadratic(np.zeros(Quadratic.dimension), seed, apart=APART) for seed in range(len(games))]
        identity = np.eye(Quadratic.dimension)
        self.centres = {game: one.c.numpy() for game, one in zip(games, made, strict=True)}
        self._steps = {
            game: identity - one.learning_rate * one.A.numpy() for game, one in zip(games, made, strict=True)
        }
        self._pulls: dict[tuple[str, int], np.ndarray] = {}
        matrices = [self.matrix(game, UPDATES) for game in games]
        right = sum(matrix @ self.centres[game] for matrix, game in zip(matrices, games, strict=True))
        self.optimum: np.ndarray = np.linalg.solve(sum(matrices), right)

    def matrix(self, game: str, updates: int) -> np.ndarray:
        """Return M_k of a game."""
        if (game, updates) not in self._pulls:
            power = np.linalg.matrix_power(self._steps[game], updates)
            self._pulls[game, updates] = np.eye(Quadratic.dimension) - power
        return self._pulls[game, updates]

    def pull(self, game: str, initialization: np.ndarray, updates: int) -> np.ndarray:
        """Return the contribution G = φ − θ_k."""
        return self.matrix(game, updates) @ (initialization - self.centres[game])


class Record(NamedTuple):
    """State of a run in progress."""

    hours: float
    version: int
    tasks: int
    """Number of tasks leased so far."""
    distance: float
    """Distance ‖φ − φ*‖ relative to the initial distance."""


class QuadraticContent:
    """Contributions computed from the quadratics; records φ's distance from the optimum every `every` leases."""

    snapshot_bytes = 0

    def __init__(self, config: Config, games: Games, manifest: Manifest, clock: Clock, every: int) -> None:
        self._config, self._games, self._digest, self._clock, self._every = config, games, manifest.digest, clock, every
        self._starts: dict[str, np.ndarray] = {}
        self._leased = 0
        self.server: MetaServer | None = None
        self.records: list[Record] = []

    def lease(self, lease: Lease) -> None:
        """Keep the lease's φ for its contributions; see `Content.lease`."""
        assert self.server is not None
        snapshot = self.server.snapshot()
        assert snapshot[0] == lease.version
        self._starts[lease.id] = snapshot[1]
        if self._leased % self._every == 0:
            self.note(snapshot)
        self._leased += 1

    def note(self, snapshot: tuple[int, np.ndarray]) -> None:
        """Append one record."""
        version, vector = snapshot
        distance = float(np.linalg.norm(vector - self._games.optimum))
        first = float(np.linalg.norm(START - self._games.optimum))
        self.records.append(Record(self._clock() / 3600, version, self._leased, distance / first))

    def contribution(self, lease: Lease, seq: int, rollouts: int, final: bool) -> Contribution:
        """Return the contribution after `rollouts` updates; see `Content.contribution`."""
        start = self._starts.pop(lease.id) if final else self._starts[lease.id]
        updates = UPDATES if final else math.floor(UPDATES * rollouts / self._config.rollouts_per_task)
        vector = self._games.pull(lease.task.game, start, updates).astype(np.float32)
        made = clients.contribution(lease, self._digest, vector, seq, final=final)
        return _replaced(made, start=start if self._config.corrects_endpoint else None)

    def received(self, made: Contribution) -> Callable[[], Contribution]:
        """Return a function that does no work, because nothing is packed."""
        return lambda: made

    def bytes(self, made: Contribution) -> int:
        """Return 0, because network traffic is irrelevant here."""
        return 0


def _replaced(made: Contribution, start: np.ndarray | None) -> Contribution:
    """Return the contribution without its learning curve, which would only cost time."""
    return Contribution(**{**vars(made), "curve": (), "start": start})


@dataclass(frozen=True)
class Run:
    """One run of the table."""

    mode: str
    staleness: str
    workers: int
    rate: float
    tasks: int
    batch: int = BATCH
    seed: int = 0
    straggling: float = 0.5

    def config(self) -> Config:
        """Return the server's configuration, with those worker settings that matter."""
        rates = {
            "fedasync": self.rate / self.batch,  # its α applies to one contribution
            "delayed-nesterov": self.rate * (1 - MOMENTUM),  # compensates for the long-term effect of momentum
        }
        settings: dict[str, Any] = {
            "mode": self.mode,
            "meta_learner": "reptile",
            "workers": self.workers,
            "seed": self.seed,
            "meta_updates": self.tasks // self.batch,
            "meta.batch_size": self.batch,
            "meta.optimizer": "sgd",
            "meta.learning_rate": rates.get(self.mode, self.rate),
            "meta.staleness": self.staleness,
            "meta.max_staleness": 10**9,
            "meta.contribution_clip": 0.0,
            "meta.refuse_norm": 0.0,
            "worker.push_interval": 1_000_000 // PUSHES if self.mode == "stream" else 10**9,
            "worker.heartbeat_seconds": 1e8,
            "server.lease_seconds": 1e9,
            "server.pushes_per_second": 1e6,
            "server.keep_checkpoints": 1,
        }
        if self.mode == "delayed-nesterov":
            settings |= {"meta.momentum": MOMENTUM, "meta.nesterov": True}
        return resolve("fast", settings)

    def records(self) -> list[Record]:
        """Simulate the run to its end."""
        torch.set_num_threads(1)
        config, clock = self.config(), Clock()
        games, manifest = Games(config.games), Manifest.of({"theta": torch.zeros(Quadratic.dimension)})
        content = QuadraticContent(config, games, manifest, clock, max(1, self.tasks // RECORDS))
        memory = Path("/dev/shm")
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as run_dir:
            initial = np.full(Quadratic.dimension, START, np.float32)
            server = MetaServer(config, Path(run_dir), manifest=manifest, initial=initial, clock=clock)
            forget_the_disk(server)
            content.server = server
            load = Load(
                self.workers, SPEEDS, straggling=self.straggling, latency=0.0, between_tasks=0.0, longest_pause=60.0
            )
            simulation = Simulation(config, server, clock, Given(0.0), load, content, self.seed, poll_seconds=math.inf)
            until = 0.0
            while not server.finished:
                until += 30.0
                simulation.run(until)
            content.note(server.snapshot())
            server.close()
        return content.records


def forget_the_disk(server: MetaServer) -> None:
    """Turn off durability: only the final φ matters in a run of thousands of meta-updates."""

    def nothing(*_: Any, **__: Any) -> None:
        """Do nothing instead of writing a file."""

    state: Any = server._state
    state.checkpoints.save = state._write_ledger = nothing
    for name in ("write", "discard", "open_lease", "close_lease"):
        setattr(state.backlog.journal, name, nothing)


class Outcome(NamedTuple):
    """Outcome of one run."""

    run: Run
    records: list[Record]

    @property
    def distance(self) -> float:
        """Return the final distance: the mean over the last tenth of the tasks, or infinity if the run diverged."""
        last = [one.distance for one in self.records[-RECORDS // 10 :]]
        return float(np.mean(last)) if all(map(math.isfinite, last)) else math.inf

    def until(self, distance: float) -> Record | None:
        """Return the first record from which on the distance stays below `distance`."""
        after = [one.distance <= distance for one in self.records]
        first = len(after) - sum(1 for _ in itertools.takewhile(bool, reversed(after)))
        return self.records[first] if first < len(after) else None


def outcomes(workers: Sequence[int], tasks: int, processes: int) -> list[Outcome]:
    """Return the outcomes of all runs, keeping the better rate for each mode, weight and number of workers."""
    cells = [(mode, weight) for mode, weights in STALENESS.items() for weight in weights]

    def length(count: int) -> int:
        return max(tasks, TASKS_OF_A_WORKER * count)

    runs = [
        Run(mode, staleness, count, rate, length(count))
        for (mode, staleness), count, rate in itertools.product(cells, workers, RATES)
        if mode != "sync" or count <= 100  # workers beyond |B| would have nothing to do
    ]
    # In mode buffered, more workers are best used for a larger |B|.
    runs += [
        Run("buffered", "polynomial", count, rate, length(count), batch=count // 8)
        for count, rate in itertools.product(workers, RATES)
        if count // 8 > BATCH
    ]
    found = []
    with ProcessPoolExecutor(processes) as pool:
        under_way = {pool.submit(run.records): run for run in runs}
        for done in as_completed(under_way):
            found.append(Outcome(under_way[done], done.result()))
            progress(f"{len(found)} of {len(runs)}: {under_way[done]}: {found[-1].distance:.3g}")
    best: dict[Any, Outcome] = {}
    for one in found:
        key = (one.run.mode, one.run.staleness, one.run.workers, one.run.batch)
        if key not in best or one.distance < best[key].distance:
            best[key] = one
    return sorted(best.values(), key=lambda one: runs.index(one.run))


def table(found: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return one row for each run."""
    rows = []
    for one in found:
        near = one.until(0.1)
        rows.append(
            {
                "mode": one.run.mode,
                "staleness weight": one.run.staleness,
                "workers": one.run.workers,
                "batch": one.run.batch,
                "rate": one.run.rate,
                "distance": one.distance,
                "hours": one.records[-1].hours,
                "meta-updates": one.records[-1].version,
                "tasks until 0.1": near.tasks if near else None,
                "hours until 0.1": near.hours if near else None,
            }
        )
    return rows


COLOURS: Mapping[str, str] = {
    "sync": "0.4",
    "buffered": "#0072B2",
    "async": "#D55E00",
    "fedasync": "#009E73",
    "delayed-nesterov": "#CC79A7",
    "stream": "#56B4E9",
}


def draw(found: Sequence[Outcome], path: Path, save: Callable[..., None] | None = None) -> None:
    """Draw the distance over simulated hours with polynomial weights, one panel for each number of workers."""
    from matplotlib.figure import Figure

    counts = sorted({one.run.workers for one in found})
    figure = Figure(figsize=(3.2 * len(counts) + 0.8, 3.2), layout="constrained")
    axes = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    for panel, count in zip(axes, counts, strict=True):
        for one in found:
            run = one.run
            if run.workers == count and run.staleness == ("constant" if run.mode == "sync" else "polynomial"):
                larger = run.batch != BATCH
                panel.plot(
                    [r.hours for r in one.records],
                    [r.distance for r in one.records],
                    color=COLOURS[run.mode],
                    linestyle="--" if larger else "-",
                    label=f"{run.mode}, |B| = {run.batch}" if larger else run.mode,
                    linewidth=1.2,
                )
        panel.set(
            xscale="log",
            yscale="log",
            title=f"{count:,} workers",
            xlabel="simulated hours",
            ylim=(1e-3, 3),
            xlim=(0.1, 100),
        )
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("distance to φ*, first = 1")
    axes[-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)
