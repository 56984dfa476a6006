"""What a run with measurements in between says about itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from leap_dist.driver.reporting import _of_whole

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
