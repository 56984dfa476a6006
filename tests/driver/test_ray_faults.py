"""Faults at named points of the whole service, on a real Ray, compared bit for bit with the undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from protocol import ledger
from service import ROOT, SYNC, Launch, playing, same_result

from leap_dist.driver.nodes import GONE_SECONDS
from leap_dist.testing import delivery_log

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]

KILLS = (
    "lease.acknowledge=kill@2",
    "journal.written=kill@2",
    "push.acknowledge=kill@3",
    "update.applied=kill@1",
    "checkpoint.renamed=kill@2",
    "ledger.written=kill@2",
)
"""Of the server, each in another of its lives."""


def test_a_server_killed_again_and_again_and_a_worker_that_hangs_change_nothing(
    launch: Callable[..., Launch], undisturbed: Path, tmp_path: Path
) -> None:
    (tmp_path / "audit").mkdir()
    fired = tmp_path / "fired"
    faults = ",".join((*KILLS, "task.update=hang@40"))
    more = {"LEAP_FAILPOINTS": faults, "LEAP_FAILPOINTS_FIRED": str(fired), "LEAP_AUDIT": str(tmp_path / "audit")}
    run = launch("faults", *SYNC, "--workers", "2", "--server.lease-seconds", "10", **more)
    assert run.end(400) == 0, run.log.read_text()
    assert set(fired.read_text().splitlines()) == set(faults.split(","))
    summary = run.summary()
    assert summary["server_restarts"] >= 1
    assert summary["leases_lost"] >= 1
    assert any("was silent for too long" in alert for alert in summary["alerts"])
    assert summary["quarantined"] == summary["quarantined_workers"] == []
    same_result(run.run_dir, undisturbed)
    promised = {event["lease"] for event in delivery_log.read(tmp_path / "audit") if event["event"] == "durable"}
    applied = [line.split('"lease": "')[1].split('"')[0] for line in (run.run_dir / "ledger.jsonl").open()]
    assert len(applied) == len(set(applied)) == 10
    assert promised <= set(applied)


def test_a_game_that_raises_again_and_again_is_quarantined_and_status_says_so(launch: Callable[..., Launch]) -> None:
    run = launch("raises", "--preset", "smoke", "--workers", "1", LEAP_FAILPOINTS="task.start=raise@1-4")
    assert run.end() == 0, run.log.read_text()
    (game,) = run.summary()["quarantined"]
    assert {line["game"] for line in ledger(run.run_dir)} == {"pong", "freeway"} - {game}
    assert len(ledger(run.run_dir)) == 4
    status = subprocess.run(
        [sys.executable, "launch.py", "status", "--run-dir", str(run.run_dir)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert f"given up {game}: failed repeatedly" in " ".join(status.split())
    assert f"{game} is quarantined after 3 failures in a row; the last one: RuntimeError: failpoint task.start" in (
        " ".join(status.split())
    )


@pytest.mark.slow
def test_workers_on_which_every_game_fails_are_stopped_and_the_run_says_why(launch: Callable[..., Launch]) -> None:
    games = "pong,freeway,breakout,assault"
    broken = {"LEAP_FAILPOINTS": "task.start=raise@1-100"}
    run = launch("broken", "--preset", "smoke", "--games", games, "--workers", "1", **broken)
    assert run.end() == 1, run.log.read_text()
    summary = run.summary()
    assert (summary["state"], summary["quarantined_workers"], summary["quarantined"]) == ("failed", ["w0"], [])
    assert summary["workers"][0]["state"] == "quarantined"
    assert "reason          every worker is in quarantine; find out what failed on them" in run.log.read_text()


def processes(title: str, home: str) -> list[int]:
    """Of a Ray that was started with this HOME, by what they call themselves."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if title in (folder / "cmdline").read_text() and f"HOME={home}\0" in (folder / "environ").read_text():
                found.append(int(folder.name))
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


@pytest.mark.slow
def test_aggregators_change_nothing_and_one_that_is_killed_loses_nothing(
    launch: Callable[..., Launch], undisturbed: Path, environment: dict[str, str]
) -> None:
    slow = {"LEAP_FAILPOINTS": "task.update=slow@1-1000000"}
    run = launch("gathered", *SYNC, "--workers", "2", "--server.gather-seconds", "0.7", **slow)
    run.wait_for(playing)
    (aggregator,) = processes("ray::AggregatorActor", environment["HOME"])
    os.kill(aggregator, signal.SIGKILL)
    assert run.end() == 0, run.log.read_text()
    same_result(run.run_dir, undisturbed)
    alone = json.loads((undisturbed / "summary.json").read_text())
    assert run.summary()["pushes"] < alone["pushes"], "several at a time"
    assert run.summary()["restarts"] == 0


@pytest.mark.slow
def test_a_driver_that_was_stopped_for_longer_than_it_waits_for_the_head_goes_on(
    launch: Callable[..., Launch], undisturbed: Path
) -> None:
    """As by Ctrl-Z or a laptop's lid."""
    run = launch("stopped", *SYNC, "--workers", "1", LEAP_FAILPOINTS="task.update=slow@1-1000000")
    run.wait_for(playing)
    run.process.send_signal(signal.SIGSTOP)
    time.sleep(GONE_SECONDS + 4)
    run.process.send_signal(signal.SIGCONT)
    assert run.end() == 0, run.log.read_text()
    assert "head node is gone" not in run.log.read_text()
    same_result(run.run_dir, undisturbed)


def test_a_run_directory_that_is_removed_ends_the_run_with_one_line(launch: Callable[..., Launch]) -> None:
    run = launch("removed", *SYNC, "--workers", "1", LEAP_FAILPOINTS="task.update=slow@1-1000000")
    run.wait_for(lambda summary: summary["workers_alive"] == 1)
    run.run_dir.rename(run.run_dir.with_name("elsewhere"))
    assert run.end(60) == 1, run.log.read_text()
    said = run.log.read_text()
    line = f"run-dir: {run.run_dir} was removed while the run was using it; nothing more can be saved there"
    assert said.endswith(f"launch.py: error: {line}\n")
    assert "Traceback" not in said
