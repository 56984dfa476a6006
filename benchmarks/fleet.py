"""Simulate one point of benchmarks/scale.py, a given fleet with given settings, and summarize the server's load."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import clients
from benchmarks.rig import resident
from benchmarks.service import Disk, Measured, RayCost, Sampled, Samples, Taken
from benchmarks.simulation import SETTLING_SECONDS, Simulation
from benchmarks.traffic import Clock, Load, Tally
from leap_dist.config.loading import resolve
from leap_dist.config.settings import Config
from leap_dist.envs import atari_vector
from leap_dist.nn.actor_critic import initialization
from leap_dist.nn.flat_vector import Manifest
from leap_dist.protocol.messages import Contribution, Lease
from leap_dist.protocol.quantization import BLOCK
from leap_dist.server.meta_server import MetaServer

SPEEDS = {
    "air_raid": 1356, "amidar": 1892, "assault": 1884, "asterix": 2103, "atlantis": 1762, "beam_rider": 1693,
    "bowling": 2254, "carnival": 1669, "crazy_climber": 2310, "demon_attack": 2160, "enduro": 1474, "freeway": 1276,
    "gopher": 1617, "ms_pacman": 1615, "name_this_game": 1802, "phoenix": 2132, "pong": 1943, "pooyan": 1713,
    "skiing": 1927, "time_pilot": 1941, "tutankham": 1753, "up_n_down": 1136, "video_pinball": 1463,
    "wizard_of_wor": 1749,
}  # fmt: skip
"""Agent steps per CPU second of the loop in benchmarks/worker.py, by game.

Measured with the preset fast from a random initialization, on the machine that docs/scaling.md names: the median of
three measurements of thirty updates.
"""

_NOTHING = np.empty(0, np.float32)
HEADER_BYTES = 3000  # size on the wire of a contribution without its vector: names, statistics, learning curve
CALIBRATION_LEASES = 32
CALIBRATION_ROUNDS = 2
TOGETHER = (1, 6)  # numbers of contributions in the deliveries that are measured


def configuration(workers: int, **settings: Any) -> Config:
    """Return an endless configuration of the preset fast for `workers`. |B| is a sixteenth of them, at least 16."""
    chosen = {
        "workers": workers,
        "meta_updates": 1_000_000,
        "meta.batch_size": max(16, workers // 16),
        "meta.max_staleness": 10**9,
    }
    return resolve("fast", chosen | {name.replace("__", "."): value for name, value in settings.items()})


class PathContent:
    """Contributions of realistic form and length: multiples of one vector, regardless of the path.

    Args:
        full_size: Length of the vector that counts as sent, however short the vector that the server gets.
        bare: Whether to leave out vectors that nobody reads.
    """

    def __init__(self, config: Config, manifest: Manifest, full_size: int, *, bare: bool) -> None:
        self.snapshot_bytes = 4 * full_size
        self._digest = manifest.digest
        self._rollout = config.agent.envs * config.agent.unroll
        self._bits = config.wire_bits
        self._bare = bare and not config.prefixes_count
        self._wire = wire_bytes(full_size, self._bits)
        self._vector = np.random.default_rng(0).normal(scale=1e-3, size=manifest.size).astype(np.float32)
        self._made: dict[int, Contribution] = {}  # templates by seq, to be completed

    def lease(self, lease: Lease) -> None:
        """Do nothing, because no contribution depends on φ."""

    def contribution(self, lease: Lease, seq: int, rollouts: int, final: bool) -> Contribution:
        """Return a contribution that grows with every push, like a sum along a path; see `Content.contribution`."""
        made = clients.contribution(lease, self._digest, _NOTHING, seq, final=final)
        made = replace(made, curve=made.curve[:seq], steps=rollouts * self._rollout)
        if self._bare and not final:
            return made
        if seq not in self._made:
            whole = replace(made, vector=self._vector * np.float32(seq))
            self._made[seq] = whole if self._bits == 32 else whole.quantized(self._bits)
        return replace(made, vector=self._made[seq].vector, packed=self._made[seq].packed)

    def received(self, made: Contribution) -> Callable[[], Contribution]:
        """Return a function that unpacks a quantized contribution; other contributions need no copy."""
        if made.packed is None:
            return lambda: made
        header, arrays = made.header(), made.arrays()
        return lambda: Contribution.from_parts(header, arrays)

    def bytes(self, made: Contribution) -> int:
        """Return the length of the contribution on the wire; see `Content.bytes`."""
        return HEADER_BYTES + (self._wire if made.vector.size else 0)


def wire_bytes(size: int, bits: int) -> int:
    """Return the bytes of a vector with `size` numbers, including one scale per block for quantized vectors."""
    return size * bits // 8 + (0 if bits == 32 else 4 * -(-size // BLOCK))


@dataclass(frozen=True)
class Encoder:
    """Parameters to meta-learn: those of the preset's encoder, or a small replacement."""

    manifest: Manifest
    initial: np.ndarray

    @classmethod
    def full(cls, config: Config) -> Encoder:
        """Return the preset's own encoder."""
        return cls(*initialization(atari_vector.channels(config.atari.frames), config.seed, config.scope))

    @classmethod
    def small(cls) -> Encoder:
        """Return a replacement with sixteen numbers."""
        manifest = Manifest.of({"stand-in": torch.zeros(16)})
        return cls(manifest, np.ones(manifest.size, np.float32))


def calibrate(config: Config, encoder: Encoder, run_dir: Path, disk: Disk, bare: bool) -> Samples:
    """Sample every kind of call without Ray's share, on a separate server in a newly created directory."""
    found, batched = Samples(), config.mode in ("sync", "buffered")
    for batch in (4, 24) if batched else (config.meta.batch_size,):
        changed = {"meta.batch_size": batch, "workers": 10_000, "server.pushes_per_second": 1e6}
        chosen = resolve(config.preset, {**_flat(config), **changed})
        (where := run_dir / f"{batch}").mkdir(parents=True)
        server = MetaServer(chosen, where, manifest=encoder.manifest, initial=encoder.initial)
        measured = Measured(disk, RayCost())
        content = PathContent(config, encoder.manifest, 0, bare=bare)
        updates: list[Taken] = []
        for _ in range(CALIBRATION_ROUNDS if batched else 1):
            leases = []
            for number in range(CALIBRATION_LEASES):
                took = measured("lease", 0, partial(server.lease, f"w{number}", "i"))
                found.note("lease", took)
                leases.append(took.answer)
            for seq in (1, 2, 3):
                for lease in leases:
                    made = content.contribution(lease, seq, seq, final=seq == 3)
                    version = server.version
                    received = content.received(made)
                    took = measured("push", 0, lambda received=received, server=server: server.push(received()))  # type: ignore[misc]
                    assert took.answer.accepted, took.answer
                    if batched and server.version > version:
                        updates.append(took)
                    else:
                        found.note("final" if seq == 3 else "partial", took)
                    if seq < 3:
                        found.note("renew", measured("renew", 0, partial(server.renew, lease.id, "i", 1)))
        usable = not batched or batch > max(TOGETHER)  # otherwise each delivery would make a meta-update
        for count in TOGETHER if usable else ():
            found.together[count] = _delivery(server, measured, content, count, batched)
        server.close()
        shutil.rmtree(where)
        if batched:
            mean = np.mean([(one.cpu_seconds, one.seconds - one.cpu_seconds) for one in updates], axis=0)
            found.updates[batch] = tuple((mean - found.mean("final")).tolist())
    return found


def _delivery(
    server: MetaServer, measured: Measured, content: PathContent, count: int, batched: bool
) -> tuple[float, float]:
    """Return (CPU, disk) seconds of a delivery of `count` final contributions, without batch meta-updates."""
    found = []
    while len(found) < CALIBRATION_ROUNDS:
        leases = [server.lease(f"w{number}", "i") for number in range(count)]
        received = [content.received(content.contribution(lease, 1, 1, True)) for lease in leases]  # type: ignore[arg-type]
        before = server.version
        took = measured("together", 0, lambda received=received: server.push_together([one() for one in received]))  # type: ignore[misc]
        assert all(ack.durable for ack in took.answer), took.answer
        if not batched or server.version == before:
            found.append((took.cpu_seconds, took.seconds - took.cpu_seconds))
    cpu, disk = np.mean(found, axis=0).tolist()
    return cpu, disk


def _flat(config: Config) -> dict[str, Any]:
    """Return the settings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in asdict(config).items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return {name: value for name, value in flat.items() if name != "preset"}


@dataclass(frozen=True)
class Point:
    """Specification of one measurement."""

    name: str
    config: Config
    load: Load
    ray: RayCost
    window: float
    """Length of the measured window in simulated seconds."""
    warm_up: float = 1.2
    """Length of the warm-up in tasks. Below one task, the staleness has not settled and is not reported."""
    full: bool = False
    """Whether every call uses full vectors on a real disk, instead of samples of such calls."""
    bare: bool = True
    """Whether partial contributions carry no vector if nobody reads it."""


def measure(point: Point, folder: Path, disk: Disk, samples: dict[str, tuple[Samples, Samples]]) -> dict[str, Any]:
    """Simulate one point. Missing `samples` are measured first and stored under the settings that they depend on."""
    config, started, before = point.config, time.perf_counter(), resident_bytes()
    full = Encoder.full(config)
    size = full.initial.nbytes
    encoder = full if point.full else Encoder.small()
    clock = Clock(-SETTLING_SECONDS - point.warm_up * task_seconds(config, point.load))
    memory = Path("/dev/shm")
    small_folder = None if point.full or not memory.is_dir() else memory
    with tempfile.TemporaryDirectory(prefix="scale-", dir=small_folder or folder) as where:
        run_dir = Path(where) / "run"
        run_dir.mkdir()
        service = _service(point, full, Path(where), folder, disk, samples)
        work = service.work if point.load.paced else None
        server = MetaServer(config, run_dir, manifest=encoder.manifest, initial=encoder.initial, clock=clock, work=work)
        if isinstance(service, Sampled):
            service.server = server
        content = PathContent(config, encoder.manifest, full.initial.size, bare=point.bare)
        simulation = Simulation(config, server, clock, service, point.load, content, config.seed)
        simulation.run(0.0)
        warm, at_start = time.perf_counter() - started, server.status()
        simulation.tally = Tally()
        disk_bytes, waiting = [], []
        for part in range(1, 6):
            simulation.run(point.window * part / 5)
            disk_bytes.append(journal_entries(run_dir) * wire_bytes(full.initial.size, config.wire_bits))
            waiting.append(server.status()["contributions_waiting"])
        status = server.status()
        outcome = summary(point, simulation, at_start, status)
        outcome |= {
            "journal GB": max(disk_bytes) / 1e9,
            "waiting": max(waiting),
            "vectors in memory GB": held_vectors(config, server, max(waiting)) * size / 1e9,
            "memory MB": (resident_bytes() - before) / 1e6 if point.full else None,
            "real seconds": time.perf_counter() - started,
            "warm-up real seconds": warm,
        }
        server.close()
    gc.collect()
    return outcome


def _service(
    point: Point, full: Encoder, small_dir: Path, full_dir: Path, disk: Disk, samples: dict[str, Any]
) -> Measured:
    config = point.config
    if point.full:
        return Measured(disk, point.ray)
    key = f"{config.mode} {config.server.on_lost} {config.meta.optimizer} {config.worker.wire} {point.bare}"
    if key not in samples:
        samples[key] = (
            calibrate(config, full, full_dir / "calibration", disk, point.bare),
            calibrate(config, Encoder.small(), small_dir / "calibration", disk, point.bare),
        )
    of_full, of_small = samples[key]
    return Sampled(disk, point.ray, full=of_full, small=of_small, batch=config.meta.batch_size, seed=config.seed)


def summary(point: Point, simulation: Simulation, before: dict[str, Any], status: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of the measured window."""
    tally, window, workers = simulation.tally, point.window, point.load.workers
    calls, seconds = tally.calls, sum(tally.seconds.values())
    staleness = [line["staleness"] for line in tally.lines]
    delays = {kind: percentiles(tally.delays[kind], 1e3) for kind in ("final", "partial", "renew", "together")}
    shares = {kind: spent / window for kind, spent in sorted(tally.seconds.items(), key=lambda one: -one[1])}
    return {
        "name": point.name,
        "workers": workers,
        "batch": point.config.meta.batch_size,
        "meta-updates/s": calls["update"] / window,
        "meta-updates/h": 3600 * calls["update"] / window,
        "finals/s": (calls["final"] + calls["gathered finals"]) / window,
        "partials/s": (calls["partial"] + calls["gathered partials"]) / window,
        "deliveries/s": calls["together"] / window,
        "renewals/s": calls["renew"] / window,
        "MB/s in": tally.bytes_in / 1e6 / window,
        "MB/s out": tally.bytes_out / 1e6 / window,
        "busy": seconds / window,
        "cpu": tally.cpu_seconds / window,
        "link": tally.network_seconds / window,
        "busy with": shares,
        "delay ms": delays,
        "round trips ms": {kind: percentiles(tally.round_trips[kind], 1e3) for kind in ("final", "partial", "renew")},
        "time waiting": sum(sum(t) for kind, t in tally.round_trips.items() if kind != "poll") / (workers * window),
        "expired": status["leases_lost"] - before["leases_lost"],
        "failures": tally.failures,
        "queued at the end": simulation.queued,
        "staleness": percentiles(staleness, 1.0) if point.warm_up >= 1 else None,
        "refused": dict(tally.refused),
        "quarantined": status["quarantined"],
        "saturates first": bottleneck(seconds / window, tally.network_seconds / window, shares),
    }


def bottleneck(busy: float, link: float, shares: dict[str, float]) -> str:
    """Return the resource that is closest to its limit and, for the server, its most expensive kind of call."""
    return f"server: {next(iter(shares), 'nothing')}" if busy >= link else "network link of the server"


def percentiles(values: Sequence[float], scale: float) -> dict[str, float] | None:
    """Return the median, 90th and 99th percentiles, and the maximum."""
    if not values:
        return None
    found = [float(scale * one) for one in np.percentile(values, (50, 90, 99, 100))]
    return dict(zip(("p50", "p90", "p99", "max"), found, strict=True))


def task_seconds(config: Config, load: Load) -> float:
    """Return the mean duration of a task over games, without stragglers, in seconds."""
    return float(np.mean([config.task_steps / load.speeds[game] for game in config.games]))


def journal_entries(run_dir: Path) -> int:
    """Return the number of contributions in the journal."""
    return sum(1 for _ in (run_dir / "journal").glob("contribution-*"))


def held_vectors(config: Config, server: MetaServer, waiting: int) -> int:
    """Return the number of vectors that the server holds.

    It holds those of waiting contributions and, if prefixes count, one for each open lease that has pushed.
    """
    leases = server.status()["leases"]
    keeps = config.server.on_lost == "keep"
    return waiting + (sum(bool(lease["curve"]) for lease in leases) if keeps else 0)


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes."""
    return resident(os.getpid()) or 0
