"""The control loop's reports, without Ray."""

from types import SimpleNamespace

import pytest

from leap_dist.driver.control_loop import ControlLoop
from leap_dist.driver.signals import StopSignal


@pytest.mark.parametrize("asked", [False, True])
def test_only_a_run_that_was_asked_to_stop_says_what_a_second_ctrl_c_does(tmp_path, asked):
    """A run that is done goes through the same state while its workers stop."""
    stop, reports = StopSignal(), []
    stop.asked = asked
    pool = SimpleNamespace(
        alerts=[],
        waiting="",
        describe=list,
        alive=1,
        wanted=1,
        restarts=0,
        take_clips=list,
        plan=lambda status: "",
        mps={},
    )
    progress = SimpleNamespace(summary=lambda status, state, more: more)
    loop = ControlLoop(None, pool, None, progress, lambda _, summary, *rest: reports.append(summary), tmp_path, stop)
    loop._status = {"alerts": []}
    loop._report("stopping")
    assert [report["waiting"] for report in reports] == [stop.message if asked else ""]
