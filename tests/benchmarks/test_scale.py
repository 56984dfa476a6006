"""The simulated fleet of benchmarks/scale.py: its own laws, and a small run of the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.convergence import Games, Outcome, Run
from benchmarks.fleet import SPEEDS, Encoder, PathContent, configuration, wire_bytes
from benchmarks.gathering import Gathering
from benchmarks.service import Given, RayCost, Sampled, Samples
from benchmarks.simulation import Simulation
from benchmarks.sizing import estimate
from benchmarks.toy import Quadratic, train
from benchmarks.toy import configuration as toy_configuration
from benchmarks.traffic import Clock, Load, Tally
from leap_dist.driver.control_loop import MAX_PAUSE_SECONDS, POLL_SECONDS, pause_after
from leap_dist.protocol.messages import Ack, Renewal
from leap_dist.server.aggregator import SOON_SECONDS
from leap_dist.server.meta_server import MetaServer

ROOT = Path(__file__).parents[2]
SHORT = {"task_steps": 40_000, "worker__push_interval": 8_000}


def simulated(
    folder: Path,
    workers: int,
    until: float,
    *,
    service: float | dict[str, float] = 0.001,
    load: dict[str, Any] | None = None,
    seed: int = 0,
    **settings: Any,
) -> tuple[Simulation, MetaServer]:
    folder.mkdir(exist_ok=True)
    config = configuration(workers, **{"meta__batch_size": 4, **SHORT, **settings})
    encoder, clock = Encoder.small(), Clock(-60.0)
    server = MetaServer(config, folder, manifest=encoder.manifest, initial=encoder.initial, clock=clock)
    content = PathContent(config, encoder.manifest, 1000, bare=True)
    fleet = Load(workers, SPEEDS, **(load or {}))
    simulation = Simulation(config, server, clock, Given(service), fleet, content, seed)
    simulation.run(until)
    return simulation, server


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    def run(name: str, seed: int) -> Any:
        simulation, _ = simulated(tmp_path / name, 8, 20.0, seed=seed, load={"hours_between_failures": 0.01})
        tally = simulation.tally
        return tally.calls, tally.delays, tally.bytes_in, tally.failures, simulation.granted

    first = run("a", 0)
    assert first == run("b", 0)
    assert first != run("c", 1)
    assert first[3] > 0, "some have failed"


@pytest.mark.parametrize(("mode", "gather"), [("buffered", 0.0), ("async", 4.0)])
def test_every_lease_is_applied_waiting_open_lost_or_refused(tmp_path: Path, mode: str, gather: float) -> None:
    simulation, server = simulated(
        tmp_path / "run", 16, 100.0, mode=mode, load={"hours_between_failures": 0.02}, server__gather_seconds=gather
    )
    status = server.status()
    ends = {
        "applied": status["tasks"],
        "waiting": status["tasks_waiting"],
        "open": len(status["leases"]),
        "lost": status["leases_lost"],
        "refused": status["refused"].get("stale", 0),
    }
    assert simulation.granted == sum(ends.values()), ends
    assert ends["applied"] > 30
    assert ends["lost"] > 3
    server.close()


def test_the_queue_is_the_one_of_theory(tmp_path: Path) -> None:
    """Calls of constant length s that come at random at a load ρ wait s ρ / (2 (1 − ρ)) on average (M/D/1)."""
    seconds = 0.004
    config = configuration(400, task_steps=10_000_000, worker__push_interval=10**9, worker__heartbeat_seconds=0.1)
    encoder, clock = Encoder.small(), Clock(-60.0)
    server = MetaServer(config, tmp_path, manifest=encoder.manifest, initial=encoder.initial, clock=clock)
    # So slow that a worker renews after each rollout, and each has a rhythm of its own: together they come at random.
    slow = {game: 0.02 * speed for game, speed in SPEEDS.items()}
    content = PathContent(config, encoder.manifest, 1000, bare=True)
    simulation = Simulation(config, server, clock, Given({"renew": seconds}), Load(400, slow, straggling=0.5), content)
    simulation.run(0.0)
    simulation.tally = Tally()
    simulation.run(60.0)
    delays = simulation.tally.delays["renew"]
    used = simulation.tally.seconds["renew"] / 60.0
    assert 0.5 < used < 0.85, used
    expected = seconds * used / (2 * (1 - used))
    assert np.mean(delays) == pytest.approx(expected, rel=0.2)
    server.close()


def test_a_refusal_s_wait_is_heeded(tmp_path: Path) -> None:
    """The server takes two partial contributions a second; forty workers would push eight."""
    simulation, server = simulated(
        tmp_path / "run", 40, 60.0, server__pushes_per_second=2.0, server__busy_share=1.0, load={"paced": False}
    )
    calls, refused = simulation.tally.calls, simulation.tally.refused
    offered = sum(speed for speed in SPEEDS.values()) / len(SPEEDS) * 40 / SHORT["worker__push_interval"]
    assert offered > 8
    assert refused["busy"] > 20
    assert calls["partial"] - refused["busy"] <= 2.0 * 85 + 5
    assert calls["partial"] < 0.6 * offered * 85, "they stay away"
    assert server.status()["leases_lost"] == 0
    server.close()


def test_lost_leases_are_heard_of_by_the_driver_or_by_their_deadline(tmp_path: Path) -> None:
    lost = {}
    for silent in (0.0, 1.0):
        load = {"hours_between_failures": 0.02, "silent": silent}
        _, server = simulated(tmp_path / f"{silent}", 12, 100.0, load=load)
        lost[silent] = server.status()
        server.close()
    assert len(lost[1.0]["silent"]) > 0
    assert lost[0.0]["silent"] == []
    assert lost[0.0]["leases_lost"] > 3


def test_what_is_gathered_waits_no_longer_than_the_real_aggregator_lets_it() -> None:
    """Known leases are answered at once; a final contribution goes SOON_SECONDS after it came."""
    gathering: Gathering[str] = Gathering(5.0)
    renewal = Renewal("a", "i", 80)
    assert gathering.take(0.0, "a", renewal, "first") is None, "a lease that nobody knows waits"
    assert gathering.due == SOON_SECONDS
    assert gathering.deliver(SOON_SECONDS) == ([], [renewal])
    assert gathering.due == float("inf"), "one at a time"
    ack = Ack(True, False, "", True, 3, 1.0)
    assert gathering.answered([ack]) == [("first", ack)]
    assert gathering.take(1.0, "a", renewal, "second") == ack
    assert gathering.due == SOON_SECONDS + 5.0


def test_samples_add_what_a_full_vector_takes_to_a_small_one_s_call(tmp_path: Path) -> None:
    from benchmarks.service import Disk

    full, small = Samples(), Samples()
    full.calls["final"], small.calls["final"] = [(0.5, 0.25)] * 3, [(0.1, 0.0)] * 3
    full.updates, small.updates = {4: (1.0, 0.0), 24: (3.0, 0.0)}, {4: (0.0, 0.0), 24: (0.0, 0.0)}
    assert full.update(14) == pytest.approx([2.0, 0.0])
    config = configuration(4)
    encoder = Encoder.small()
    with Disk() as disk:
        service = Sampled(disk, RayCost(0.125, 1.0), full=full, small=small, batch=14, seed=0)
        service.server = MetaServer(config, tmp_path, manifest=encoder.manifest, initial=encoder.initial)
        took = service("final", 2_000_000, lambda: "answer")
        assert took.answer == "answer"
        assert took.seconds == pytest.approx(0.4 + 0.25 + 0.125 + 2.0, abs=0.02)
        assert service.work() == pytest.approx(took.seconds)
        service.server.close()


def test_the_bytes_on_the_wire_are_those_of_a_packed_vector() -> None:
    vector = np.linspace(-1, 1, 1000, dtype=np.float32)
    encoder = Encoder.small()
    config = configuration(4, worker__wire="int8")
    made = PathContent(config, encoder.manifest, 16, bare=False)._made
    assert made == {}
    from leap_dist.protocol.quantization import quantize

    for bits in (16, 8):
        assert wire_bytes(1000, bits) == sum(part.nbytes for part in quantize(vector, bits))
    assert wire_bytes(1000, 32) == vector.nbytes


def test_the_driver_leaves_a_slow_server_more_time() -> None:
    assert pause_after(0.001) == POLL_SECONDS
    assert pause_after(0.2) == pytest.approx(1.8)
    assert pause_after(60.0) == MAX_PAUSE_SECONDS


def test_the_closed_form_of_a_contribution_is_what_training_gives() -> None:
    games = Games(["a", "b"])
    start = np.linspace(-1, 2, Quadratic.dimension)
    settings = toy_configuration({"meta_learner": "reptile"}, 20)
    watch = train(settings, Quadratic(start.astype(np.float32), 1, apart=2.0))
    assert np.allclose(games.pull("b", start, 20), watch.report()[0].numpy(), atol=1e-4)
    assert np.allclose(games.pull("a", games.optimum, 20) + games.pull("b", games.optimum, 20), 0.0)


@pytest.mark.parametrize("mode", ["sync", "buffered", "stream"])
def test_a_run_comes_near_the_optimum(mode: str) -> None:
    run = Run(mode, "constant", 8, 0.3, 320, batch=8)
    outcome = Outcome(run, run.records())
    assert outcome.records[0].distance == pytest.approx(1.0)
    assert outcome.distance < 0.25
    assert outcome.until(0.5) is not None


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    saved = tmp_path / "scale.json"
    command = [sys.executable, "-m", "benchmarks.scale", "--only", "load", "--workers", "3", "--modes", "buffered",
               "--full",
               "--window", "5", "--warm-up", "0.05", "--dir", str(tmp_path), "--save", str(saved)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "buffered, 3 workers: |B| 16" in done.stdout
    (row,) = json.loads(saved.read_text())["load"]
    assert row["renewals/s"] == pytest.approx(3 / 2, rel=0.35)
    assert 0 < row["busy"] < 0.2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scale.json", "scale.jsonl"], "nothing else is left"


def test_the_documented_formulas_agree_with_a_simulation(tmp_path: Path) -> None:
    settings = {"task_steps": 100_000, "worker__push_interval": 10_000, "meta__batch_size": 4}
    simulation, server = simulated(tmp_path / "run", 40, 0.0, load={"straggling": 0.0}, **settings)
    simulation.tally, seconds = Tally(), 120.0
    simulation.run(seconds)
    speed = len(SPEEDS) / sum(1 / each for each in SPEEDS.values())
    wanted = estimate(workers=40, batch=4, steps_per_second=speed, task_steps=100_000, push_interval=10_000)
    tally = simulation.tally
    pushes = (tally.calls["final"] + tally.calls["partial"]) / seconds
    assert pushes == pytest.approx(wanted.pushes_per_second, rel=0.1)
    assert tally.calls["renew"] / seconds == pytest.approx(wanted.renewals_per_second, rel=0.25)
    assert 3600 * tally.calls["update"] / seconds == pytest.approx(wanted.meta_updates_per_hour, rel=0.15)
    assert np.mean([line["staleness"] for line in tally.lines]) == pytest.approx(wanted.staleness, rel=0.2)
    server.close()
