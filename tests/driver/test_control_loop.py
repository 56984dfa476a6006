"""The control loop's reports, without Ray."""

import time
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError

from leap_dist.driver import control_loop, memory
from leap_dist.driver.control_loop import AWAY_SECONDS, ControlLoop, _ServerLost
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
        plan=lambda: "",
        mps={},
    )
    progress = SimpleNamespace(summary=lambda status, state, more: more)
    loop = ControlLoop(None, pool, None, progress, lambda _, summary, *rest: reports.append(summary), tmp_path, stop)
    loop._status = {"alerts": []}
    loop._report("stopping")
    assert [report["waiting"] for report in reports] == [stop.message if asked else ""]


@pytest.mark.parametrize(("start_seconds", "longest"), [(4.0, AWAY_SECONDS), (28.0, 140.0)])
def test_a_server_that_starts_slowly_may_be_away_for_longer(monkeypatch, tmp_path, start_seconds, longest):
    monkeypatch.setattr(memory, "was_killed", lambda pid, node: False)
    pool = SimpleNamespace(alerts=[])
    nodes = SimpleNamespace(clock=lambda: now, own="a")
    progress = SimpleNamespace(start=SimpleNamespace(seconds={"server": start_seconds}))
    stop = SimpleNamespace(wait=lambda seconds: None)
    loop = ControlLoop(None, pool, nodes, progress, lambda *report: None, tmp_path, stop)
    now = 1000.0
    loop._miss()
    now += longest
    loop._miss()
    assert pool.alerts == ["the server does not answer; if it died, Ray restarts it"]
    now += 1.0
    with pytest.raises(_ServerLost, match=f"the server has not answered for {longest + 1:.0f} s; what was"):
        loop._miss()


@pytest.mark.parametrize(("preempted", "lost"), [(True, False), (False, True)])
def test_a_server_whose_node_leaves_is_away_and_not_lost(monkeypatch, tmp_path, preempted, lost):
    """Ray says that it has died, but starts it again on another node."""

    def result_of(*arguments):
        error = ActorDiedError()
        error._preempted = preempted
        raise error

    monkeypatch.setattr(control_loop, "result_of", result_of)
    pool = SimpleNamespace(alerts=[], ended=[], wanted=1)
    nodes = SimpleNamespace(clock=lambda: 1000.0)
    server = SimpleNamespace(advance=SimpleNamespace(remote=lambda *arguments: "an answer"))
    loop = ControlLoop(server, pool, nodes, None, lambda *report: None, tmp_path, None)
    missed = []
    monkeypatch.setattr(loop, "_miss", lambda: missed.append(True))
    if lost:
        with pytest.raises(_ServerLost, match="the server cannot go on"):
            loop._poll()
    else:
        loop._poll()
    assert missed == ([] if lost else [True])


@pytest.mark.parametrize(("polls", "outcome"), [(0, "done"), (2, "done"), (99, "failed")])
def test_a_run_is_done_when_the_files_of_its_last_meta_update_are_written(monkeypatch, tmp_path, polls, outcome):
    """The storage may come back within some seconds. A run whose init.safetensors is old must not look complete."""
    monkeypatch.setattr(control_loop, "STOP_SECONDS", 0.05)
    pool = SimpleNamespace(alerts=[])
    stop = SimpleNamespace(wait=lambda seconds: None if polls < 99 else time.sleep(0.06))
    loop = ControlLoop(None, pool, None, None, lambda *report: None, tmp_path, stop)
    loop._status = {"files_written": polls == 0}
    asked = []

    def poll(seconds):
        asked.append(seconds)
        loop._status = {"files_written": len(asked) >= polls}

    monkeypatch.setattr(loop, "_poll", poll)
    monkeypatch.setattr(loop, "_report", lambda state: None)
    assert loop._complete("done") == outcome
    assert len(asked) == min(polls, 1 if polls == 99 else 2)
    assert [("resume the run when the storage works" in alert) for alert in pool.alerts] == [True] * (
        outcome == "failed"
    )
    loop._status = {"files_written": False}
    assert loop._complete("interrupted") == "interrupted", "what a run lacks is made up for when it is resumed"


def test_an_evaluation_has_no_such_files(tmp_path):
    loop = ControlLoop(None, None, None, None, lambda *report: None, tmp_path, None)
    loop._status = {"finished": True}
    assert loop._complete("done") == "done"
