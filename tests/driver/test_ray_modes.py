"""Modes and meta-learners with state of their own, on a real Ray, with server and driver killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from in_process import train
from service import SYNC, Launch, playing, same_result

from leap_dist.storage import run_directory

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]


@pytest.mark.slow
def test_persistent_heads_survive_the_death_of_server_and_driver(launch: Callable[..., Launch], tmp_path: Path) -> None:
    run = launch("heads", *SYNC, "--workers", "2", "--meta-learner", "finetune-multi", "--worker.wire", "int8")
    run.wait_for(playing)
    os.kill(run.summary()["server_pid"], signal.SIGKILL)
    run.wait_for(lambda summary: summary["server_restarts"])
    run.process.kill()
    run.process.wait()
    assert run.summary()["meta_updates"] < 5, "killed in the middle"
    resumed = launch("heads", "--resume")
    assert resumed.end() == 0, resumed.log.read_text()

    expected = train(run_directory.load_config(run.run_dir, {}), tmp_path / "plain")
    assert all(np.abs(expected.head(game)).max() > 0 for game in ("pong", "freeway"))
    same_result(run.run_dir, tmp_path / "plain")
    for name in ("heads.safetensors", "init.safetensors"):
        file = Path("checkpoints", "000005", name)
        assert (run.run_dir / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


@pytest.mark.slow
def test_with_trajectory_shifting_staleness_falls_from_the_task_to_the_push_interval(
    launch: Callable[..., Launch],
) -> None:
    """And what was streamed counts once, though the server is killed in between."""
    run = launch(
        "stream", "--preset", "smoke", "--mode", "stream", "--meta.shift", "increments", "--meta-updates", "3",
        "--task-steps", "1000", "--worker.push-interval", "100", "--workers", "2", "--worker.cpus", "0.5",
        "--server.busy-share", "1",
    )  # fmt: skip
    run.wait_for(lambda summary: summary["meta_updates"] >= 15)
    os.kill(run.summary()["server_pid"], signal.SIGKILL)
    assert run.end() == 0, run.log.read_text()
    assert run.summary()["server_restarts"] >= 1
    lines = [json.loads(line) for line in (run.run_dir / "ledger.jsonl").read_text().splitlines()]
    assert [line["version_before"] for line in lines] == list(range(60))
    for lease in {line["lease"] for line in lines}:
        own = [line for line in lines if line["lease"] == lease]
        assert [(line["seq"], line["new_steps"]) for line in own] == [(k + 1, 100) for k in range(10)]
        assert [line["final"] for line in own] == [False] * 9 + [True]
    assert len({line["worker"] for line in lines}) == 2
    since_lease = [line["version_before"] - line["lease_version"] for line in lines]
    assert sum(since_lease) / len(lines) >= 4.5, "a task's own ten pushes alone"
    # Between two pushes of a worker each version counts once, and its own do not: at most the other worker's.
    assert sum(line["staleness"] for line in lines) / len(lines) <= 1
    assert run.summary()["agent_steps"] == 6 * 1000
