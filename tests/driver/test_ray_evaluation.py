"""`launch.py evaluate` on a real Ray: killed, gone on with, and the same whatever the workers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from initialization_files import written
from service import ROOT, Launch

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]


def results(out: Path) -> dict[str, Any]:
    """Every run's result by name, without what the clock said."""
    found = {}
    for path in sorted(out.glob("runs/*/*/*.json")):
        run = json.loads(path.read_text())
        found["/".join(path.parts[-3:])] = {k: v for k, v in run.items() if k not in ("seconds", "sha256")}
    return found


def killed_and_gone_on(launch, environment, tmp_path) -> tuple[list[str], Launch]:
    """Kill an evaluation and go on with it. Return what is compared, and the launch that finished it."""
    (tmp_path / "trained").mkdir()
    written(tmp_path / "trained")
    comparison = ["--init", f"leap={tmp_path / 'trained'}", "--init", "scratch", "--preset", "smoke", "--steps", "2000",
                  "--games", "pong,ms_pacman", "--seeds", "2", "--worker.cpus", "0.5"]  # fmt: skip
    killed = launch("killed", *comparison, "--workers", "2", LEAP_FAILPOINTS="task.update=slow@1-1000000")
    killed.wait_for(lambda summary: summary["tasks"] >= 1 and summary["leases"])
    killed.process.kill()
    killed.end()
    before = results(killed.run_dir)
    assert 1 <= len(before) < 7
    again = launch("killed", *comparison, "--workers", "2")
    assert again.end() == 0, again.log.read_text()
    found = re.search(r"(\d) of 8 are done", again.log.read_text())
    assert found, again.log.read_text()
    assert int(found[1]) >= len(before)  # a server outlives its driver by a moment
    after = results(killed.run_dir)
    assert {name: after[name] for name in before} == before
    assert len(after) == 8
    for name in ("report.md", "report.html", "results.csv", "results.json"):
        assert (again.run_dir / name).stat().st_size > 0
    command = [sys.executable, "launch.py", "status", "--json", "--run-dir", str(again.run_dir)]
    told = json.loads(subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True).stdout)
    assert (told["state"], told["tasks"], told["tasks_wanted"]) == ("done", 8, 8)
    return comparison, again


def test_an_evaluation_that_is_killed_goes_on(launch, environment, tmp_path):
    killed_and_gone_on(launch, environment, tmp_path)


@pytest.mark.slow
def test_an_evaluation_that_was_killed_ends_as_if_nothing_had_been(launch, environment, tmp_path):
    comparison, again = killed_and_gone_on(launch, environment, tmp_path)
    whole = launch("whole", *comparison, "--workers", "1")
    assert whole.end() == 0, whole.log.read_text()
    assert results(again.run_dir) == results(whole.run_dir), "the same, bit for bit, whichever worker came after which"
