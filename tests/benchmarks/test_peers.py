"""What `benchmarks.peers` does around the systems that it measures."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import peers
from benchmarks.harness import Report
from benchmarks.peers_arms import Stopwatch, environment_id, network
from benchmarks.peers_arms.service import steps_between
from leap_dist.nn.actor_critic import Encoder

GIVEN = argparse.Namespace(envs=16, warmup=2.0, seconds=5.0)


def summary(updated: float, **workers: tuple[int, float]) -> dict:
    """With a lease per worker: (steps, silent seconds)."""
    leases = [
        {"lease": f"lease of {name}", "worker": name, "steps": steps, "silent_seconds": silent}
        for name, (steps, silent) in workers.items()
    ]
    return {"updated": updated, "leases": leases}


def test_a_workers_steps_are_put_against_the_time_between_its_own_reports():
    before = summary(100.0, w0=(1_000, 0.0), w1=(5_000, 1.0))  # at 100 and 99
    after = summary(110.0, w0=(9_000, 2.0), w1=(17_000, 1.0))  # at 108 and 109
    steps, seconds = steps_between(before, after)
    assert steps == 8_000 + 12_000
    assert steps / seconds == pytest.approx(8_000 / 8 + 12_000 / 10)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (summary(9.0, w0=(10, 0.0)), "again"),
        (summary(9.0, w1=(90, 0.0)), "changed"),
        (summary(9.0), "changed"),
    ],
)
def test_a_service_that_did_not_go_on_gives_no_figure(after, message):
    with pytest.raises(ValueError, match=message):
        steps_between(summary(1.0, w0=(10, 0.0)), after)


def test_steps_count_from_the_end_of_the_warm_up(capsys):
    stopwatch = Stopwatch(warmup=10.0, seconds=5.0)
    readings = [(0.0, 0), (50.0, 0), (60.0, 40), (69.0, 400), (71.0, 500), (75.9, 900), (77.0, 1_100)]
    assert [stopwatch.done(*reading) for reading in readings] == [False] * 6 + [True]
    stopwatch.show()
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"agent_steps": 600, "seconds": 6.0}
    assert peers.result(f"Welcome\n{printed}Good bye\n") == 100.0


def test_a_stopwatch_that_was_never_started_shows_nothing():
    stopwatch = Stopwatch(warmup=10.0, seconds=5.0)
    assert not stopwatch.done(100.0, 7)
    with pytest.raises(RuntimeError, match="warm-up"):
        stopwatch.show()
    assert peers.result("Welcome\n") is None


def test_the_best_of_a_systems_own_modes_is_what_ours_is_put_against():
    rates = {
        "ours": [4_000.0, 4_400.0],
        "sb3-dummy": [900.0, 900.0],
        "sb3-subproc-2n": [1_000.0, 1_100.0],
        "sb3-ale-vector-2n": [2_000.0, 2_000.0],
    }
    assert peers.best(rates, "sb3") == "sb3-subproc-2n"
    assert peers.best(rates, "rllib") is None
    report = Report("", {})
    peers.add_ratios(report, "pong", rates)
    assert report.ratios == {"pong: ours / sb3-subproc-2n": ([4.0, 4.0], 4.0, False)}
    peers.add_ratios(report, "boxing", {"impala-1": [1.0]})
    assert len(report.ratios) == 1


def test_every_arm_is_a_script_that_is_told_the_game_and_the_environments():
    for arm in peers.ARMS.values():
        words = peers.command(GIVEN, arm, Path("python"), "pong")
        assert (peers.ROOT / words[2].replace(".", "/")).with_suffix(".py").exists()
        assert words[words.index("--envs") + 1] == str(16 * arm.times)
        assert words[words.index("--game") + 1] == "pong"


def test_the_peers_network_is_ours():
    theirs, ours = network.encoder(4), Encoder(4)
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        other.data.copy_(own.data)
    frames = torch.rand(3, 4, 84, 84)
    assert torch.allclose(theirs(frames), ours(frames), atol=1e-5)
    assert ours.features == network.FEATURES


def test_games_have_their_gymnasium_names():
    assert environment_id("ms_pacman") == "ale_py:ALE/MsPacman-v5"
    assert environment_id("pong") == "ale_py:ALE/Pong-v5"


def test_a_missing_environment_is_said_before_anything_is_measured(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.peers",
        "--arms",
        "sb3-dummy",
        "--sb3-python",
        str(tmp_path / "python"),
    ]
    done = subprocess.run(command, cwd=peers.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert str(tmp_path / "python") in done.stderr
    assert "make bench" in done.stderr


def test_an_arm_that_fails_says_why_in_one_line(tmp_path):
    arm = peers.Arm("sb3", "dummy")
    bare = tmp_path / "python"  # an interpreter without any packages
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(SystemExit, match=r"make bench.*No module named 'stable_baselines3'"):
        peers.measure(GIVEN, arm, {"sb3": bare}, "pong")


def test_what_takes_too_long_is_ended():
    # A process that was started in the background of a script is born deaf to interrupts.
    code = "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, start_new_session=True)
    assert peers.finish(process, 0.5) is None
    assert process.returncode is not None
