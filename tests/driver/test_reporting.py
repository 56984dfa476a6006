"""What a run with measurements in between says about itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from protocol import Clock

from leap_dist.config.loading import resolve
from leap_dist.driver.reporting import _of_whole, _train_with_validation
from leap_dist.evaluation.early_stopping import History, Measurement
from leap_dist.storage import run_directory

PART = {"state": "running", "tasks": 100, "tasks_wanted": 150, "eta_seconds": 60.0, "mode": "sync"}


def test_a_part_of_a_run_is_reported_as_the_whole():
    whole = _of_whole(PART, 400)
    assert whole == {**PART, "tasks_wanted": 400, "eta_seconds": 360.0}, "50 tasks a minute, and 300 to go"


@pytest.mark.parametrize("eta", [None, 0.0])
def test_a_part_that_is_done_goes_on_after_the_measurement(eta):
    done = {**PART, "state": "done", "tasks": 150, "eta_seconds": eta}
    assert _of_whole(done, 400) == {**done, "state": "running", "tasks_wanted": 400}


def test_a_run_that_has_made_more_wants_no_less():
    assert _of_whole({**PART, "state": "interrupted"}, 90) == {
        **PART,
        "state": "interrupted",
        "tasks_wanted": 100,
        "eta_seconds": 0.0,
    }


def test_the_time_of_a_run_contains_that_of_its_measurements(tmp_path: Path) -> None:
    """Parts of 10 s, each with a measurement of 5 s after it, of which the third is interrupted and made again."""
    given = {"tasks": "omniglot", "meta_updates": 6, "early_stopping.interval": 2, "supervised.pretraining": 20}
    config, clock = resolve("smoke", given), Clock()
    run_directory.prepare(tmp_path, config)
    (tmp_path / "init.safetensors").write_bytes(b"")
    answers = iter(["done", "done", "interrupted", "done"])

    def train_until(end: int) -> tuple[str, dict[str, Any]]:
        clock.now += 10
        summary = {**PART, "wall_seconds": run_directory.wall_seconds(tmp_path) + 10}
        run_directory.write_summary(tmp_path, summary)
        return "done", summary

    def measure(end: int, history: History) -> str:
        clock.now += 5
        if (answer := next(answers)) == "done":
            history.add(tmp_path, Measurement(end, 0.5))
        return answer

    began = clock.now
    for state in ("interrupted", "done"):
        outcome, summary = _train_with_validation(config, tmp_path, train_until, measure, clock)
        assert outcome == summary["state"] == state
        assert run_directory.wall_seconds(tmp_path) == summary["wall_seconds"] == clock.now - began
    assert clock.now - began == 60


def test_a_start_waits_for_no_library_that_it_does_not_need_yet(tmp_path: Path) -> None:
    """Each takes a second or a large part of one: matplotlib draws later, and torch.optim brings torch's compiler."""
    code = f"""
import sys
from pathlib import Path
import leap_dist.cli.commands, leap_dist.cli.plan, leap_dist.cli.results, leap_dist.driver.reporting
from leap_dist.config.loading import resolve
from leap_dist.driver.actors import ServerActor
from leap_dist.storage import run_directory
config, folder = resolve("smoke"), Path({str(tmp_path)!r}) / "run"
run_directory.prepare(folder, config)
assert ServerActor(config, folder, "session").problem() is None
print(*[name for name in ("matplotlib", "torch._dynamo", "sklearn", "pandas") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
