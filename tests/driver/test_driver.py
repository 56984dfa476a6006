"""The whole service through its command line, on a real Ray, with real games: faults by kill, results bit for bit."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import status_schema
from event_files import curves
from service import ROOT, SYNC, Launch, playing, same_result
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from leap_dist.nn.profiling import PARTS

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]


def test_the_run_directory_holds_all_that_was_promised(undisturbed: Path) -> None:
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert (summary["state"], summary["meta_updates"], summary["contributions_applied"]) == ("done", 5, 10)
    assert summary["partials"] > 10
    assert summary["agent_steps"] == 10 * 500
    assert summary["refused"] == {}
    status_schema.check(summary, "training")
    for name in ("config.yaml", "manifest.json", "init.safetensors", "ledger.jsonl", "progress.png"):
        assert (undisturbed / name).stat().st_size > 100, name
    assert json.loads((undisturbed / "manifest.json").read_text())["packages"]["ray"].startswith("2.60")
    assert len(curves(undisturbed)["server", "meta/path_length"]) == 5


def test_a_run_has_its_pictures_times_settings_and_end(undisturbed: Path) -> None:
    """All that comes from another process than the one that writes TensorBoard's files."""
    root = undisturbed / "tensorboard"
    server = EventAccumulator(str(root / "server"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in server.Images("meta/agreement_between_games")] == [5]
    for name in ("push_ms_p50", "push_ms_p99", "update_ms_p50", "update_ms_p99", "pushes_per_second"):
        assert server.Scalars(f"ops/{name}")[-1].value > 0, name
    assert "_hparams_/session_end_info" in server.PluginTagToContent("hparams")
    for game in ("pong", "freeway"):
        (film,) = EventAccumulator(str(root / "game" / game)).Reload().Images(f"play/{game}")
        assert (film.step, film.width, film.height) == (500, 84, 84)
        assert film.encoded_image_string.startswith(b"GIF89a")
    matrix = json.loads((undisturbed / "summary.json").read_text())["agreement_between_games"]
    assert matrix["games"] == ["freeway", "pong"]


def test_a_profile_says_where_the_time_went(undisturbed: Path) -> None:
    trace = json.loads(gzip.decompress((undisturbed / "profile" / "w0.trace.json.gz").read_bytes()))
    named = {event.get("name") for event in trace["traceEvents"] if event.get("cat") == "user_annotation"}
    assert {"emulator", "acting", "update", "leap"} <= named
    text = (undisturbed / "profile" / "w0.txt").read_text()
    assert all(re.search(rf"^{part} +[0-9.]+ s +[0-9.]+%", text, re.MULTILINE) for part in (*PARTS, "other"))
    assert "aten::convolution_backward" in text
    printed = undisturbed.with_suffix(".log").read_text()
    assert text.split("\n\n")[1] in printed
    assert f"{undisturbed}/profile/*.trace.json.gz" in printed

    shown = EventAccumulator(str(undisturbed / "tensorboard" / "server")).Reload()
    shares = {part: shown.Scalars(f"ops/time_share/{part}")[-1].value for part in (*PARTS, "other")}
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-4)
    assert min(shares[part] for part in ("emulator", "acting", "update", "leap", "waiting", "starting")) > 0


@pytest.mark.slow
def test_law_1_three_workers_give_the_bits_of_one(launch: Callable[..., Launch], undisturbed: Path) -> None:
    three = launch("three", *SYNC, "--workers", "3")
    assert three.end() == 0, three.log.read_text()
    same_result(three.run_dir, undisturbed)
    lines = [json.loads(line) for line in (three.run_dir / "ledger.jsonl").read_text().splitlines()]
    assert len({line["worker"] for line in lines}) > 1
    assert curves(three.run_dir) == curves(undisturbed)


def test_a_worker_killed_in_mid_task_and_one_stopped_beyond_its_lease_are_replaced_and_nothing_changes(
    launch: Callable[..., Launch], undisturbed: Path
) -> None:
    slow = {"LEAP_FAILPOINTS": "task.update=slow@1-100000"}
    run = launch("workers", *SYNC, "--workers", "2", "--server.lease-seconds", "10", **slow)
    first = run.wait_for(playing)
    os.kill(first, signal.SIGKILL)
    # On a slow machine a living worker may be silent for longer than its lease too, so these counts are minima.
    run.wait_for(lambda summary: summary["restarts"] and summary["leases_lost"])

    second = run.wait_for(lambda summary: (pid := playing(summary)) != first and pid)
    lost = run.summary()["leases_lost"]
    os.kill(second, signal.SIGSTOP)
    try:
        run.wait_for(lambda summary: summary["leases_lost"] > lost)
    finally:
        os.kill(second, signal.SIGCONT)
    assert run.end() == 0, run.log.read_text()
    assert any("was silent for too long" in alert for alert in run.summary()["alerts"])
    same_result(run.run_dir, undisturbed)


def test_a_killed_driver_is_resumed_with_curves_neither_lost_nor_doubled(
    launch: Callable[..., Launch], undisturbed: Path, environment: dict[str, str]
) -> None:
    run = launch("driver", *SYNC, "--workers", "2")
    run.wait_for(lambda summary: summary["server_pid"])
    second = launch("driver", "--resume")
    assert second.end() == 2
    assert "is in use by another launch (process" in second.log.read_text()

    run.wait_for(playing)  # so the first goes on
    version = run.summary()["meta_updates"]
    run.process.kill()
    run.process.wait()
    again = subprocess.run(
        [sys.executable, "launch.py", "train", "--run-dir", str(run.run_dir), "--preset", "smoke"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert again.returncode == 2
    assert "already holds a run; add --resume" in again.stderr or "is in use" in again.stderr

    resumed = launch("driver", "--resume")
    assert resumed.wait_for(lambda s: s["state"] == "running" and s["meta_updates"]) >= version
    assert resumed.end() == 0, resumed.log.read_text()
    same_result(run.run_dir, undisturbed)
    assert curves(run.run_dir) == curves(undisturbed)


@pytest.mark.slow
def test_a_job_that_is_killed_twice_and_restarted_by_the_same_command_ends_with_one_complete_run(
    launch: Callable[..., Launch], undisturbed: Path
) -> None:
    command = [*SYNC, "--workers", "2", "--resume", "auto"]
    for least in (1, 2):
        run = launch("restarted", *command)
        run.wait_for(lambda s, least=least: s["state"] == "running" and s["meta_updates"] >= least and playing(s))
        run.process.kill()
        run.process.wait()
    run = launch("restarted", *command)
    assert run.end() == 0, run.log.read_text()
    assert run.summary()["meta_updates"] == 5
    same_result(run.run_dir, undisturbed)
    assert curves(run.run_dir) == curves(undisturbed)
    assert launch("restarted", *command).end() == 0, "a complete run has nothing left to do"
    same_result(run.run_dir, undisturbed)


def interrupted_twice(launch: Callable[..., Launch]) -> Launch:
    """Interrupt a run once, then resume it and interrupt it twice. Return the first launch."""
    run = launch("interrupt", *SYNC, "--workers", "2")
    run.wait_for(playing)
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does: to everything in the foreground
    assert run.end(60) == 130, run.log.read_text()
    assert run.summary()["state"] == "interrupted"
    assert "--resume" in run.log.read_text()
    assert run.summary()["meta_updates"] < 5

    hanging = launch("interrupt", "--resume", LEAP_FAILPOINTS="task.update=hang@10")
    hanging.wait_for(lambda summary: summary["state"] == "running" and playing(summary))
    hanging.process.send_signal(signal.SIGTERM)
    hanging.wait_for(lambda summary: summary["state"] == "stopping")
    hanging.process.send_signal(signal.SIGINT)
    assert hanging.end(15) == 130, hanging.log.read_text()
    assert hanging.summary()["state"] == "interrupted"
    assert hanging.log.read_text().endswith(
        "stopped immediately; everything accepted is on disk; continue with --run-dir DIR --resume\n"
    )
    return run


@pytest.mark.slow
def test_one_signal_ends_cleanly_and_a_second_at_once(launch: Callable[..., Launch]) -> None:
    interrupted_twice(launch)


@pytest.mark.slow
def test_what_was_interrupted_is_resumed_and_nothing_changes(launch: Callable[..., Launch], undisturbed: Path) -> None:
    run = interrupted_twice(launch)
    resumed = launch("interrupt", "--resume", "--workers", "1")
    assert resumed.end() == 0, resumed.log.read_text()
    same_result(run.run_dir, undisturbed)
    assert curves(run.run_dir) == curves(undisturbed)
