"""The plan that a start prints: what, where to, how long, how to stop, and how to go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from leap_dist.cli import plan
from leap_dist.config.loading import resolve
from leap_dist.evaluation import runs
from leap_dist.evaluation.initializations import Arm
from leap_dist.storage import location, run_directory
from leap_dist.worker import trial


@pytest.fixture(autouse=True)
def two_processors(monkeypatch):
    monkeypatch.setattr(plan.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(plan.console, "command", lambda: "leap-dist")


@pytest.fixture
def rate(monkeypatch):
    """What trials measure, and how often they are made."""
    made = []
    monkeypatch.setattr(trial, "steps_per_second", lambda config: made.append(config) or 1000.0)
    return made


def test_a_new_run_says_what_where_to_and_how_long(rate):
    assert plan.training(resolve("quick"), "runs/my run", {}).rows == [
        ("", "leap on 3 games (assault, asterix, ms_pacman), preset quick, mode buffered"),
        ("to do", "10 meta-updates of 3 tasks, 10,000 agent steps each: 300,000 in all"),
        ("duration", "about 2.5 minutes, at 1,000 steps/s for each of 2 workers, measured on this machine"),
        ("directory", "runs/my run"),
        ("watch", "leap-dist status 'runs/my run'"),
        ("stop", "Ctrl-C; everything accepted by then is kept"),
        ("continue", "leap-dist train --run-dir 'runs/my run' --resume"),
    ]


@pytest.mark.parametrize(
    ("preset", "overrides", "duration"),
    [
        ("smoke", {}, "less than a minute, plus some seconds to start"),
        ("paper", {}, "about 9.3 days, at"),
        ("fast", {"meta_updates": 1}, "about 2.2 hours, at"),
        ("quick", {"workers": 1}, "about 5 minutes, at 1,000 steps/s for each of 1 worker,"),
        ("quick", {"workers": 8}, "about 2.5 minutes, at 1,000 steps/s for each of 2 workers,"),
        ("quick", {"workers": 8, "worker.cpus": 0.25}, "about 2.5 minutes, at"),
        ("quick", {"workers": 8, "worker.cpus": 2}, "about 5 minutes, at"),
        ("quick", {"workers": 8, "address": "auto"}, "about 40 seconds, at 1,000 steps/s for each of 8 workers,"),
    ],
)
def test_the_duration_is_in_words(rate, preset, overrides, duration):
    assert dict(plan.training(resolve(preset, overrides), "runs/x", {}).rows)["duration"].startswith(duration)
    assert len(rate) == (preset != "smoke"), "less than a minute is not worth a trial"


def test_a_resumed_run_knows_its_rate(rate):
    before = {"tasks": 12, "agent_steps": 120_000, "wall_seconds": 60.0}
    lines = dict(plan.training(resolve("quick"), "runs/x", before).rows)
    assert lines["to do"].endswith("300,000 in all; 12 of 30 tasks are done")
    assert lines["duration"] == "about 1.5 minutes, at the rate so far"
    ended = plan.training(resolve("quick"), "x", {**before, "tasks": 30}).estimate
    assert ended == ("nothing is left to do", 0.0, None)
    assert not rate
    for damaged in ({**before, "agent_steps": "x"}, {**before, "wall_seconds": None}, {**before, "wall_seconds": 0}):
        assert "measured on this machine" in dict(plan.training(resolve("quick"), "x", damaged).rows)["duration"]


def test_a_trial_that_fails_leaves_the_duration_open(monkeypatch):
    def fail(config):
        raise RuntimeError("no emulator")

    for measure in (fail, lambda config: None):
        monkeypatch.setattr(trial, "steps_per_second", measure)
        assert dict(plan.training(resolve("quick"), "x", {}).rows)["duration"].startswith("unknown; `status`")


def test_the_rate_that_was_measured_is_told_to_the_run(rate):
    assert plan.training(resolve("quick"), "x", {}).estimate[1:] == (150.0, 2000.0)
    before = {"tasks": 12, "agent_steps": 120_000, "wall_seconds": 60.0}
    assert plan.training(resolve("quick"), "x", before).estimate[1:] == (90.0, 2000.0)
    assert plan.training(resolve("smoke"), "x", {}).estimate[1:] == (None, None)


@pytest.mark.parametrize(("meta_updates", "noted"), [(100, False), (1_000_000_000, True)])
def test_a_run_of_months_gets_a_note(capsys, rate, tmp_path, meta_updates, noted):
    config = resolve("fast", {"meta_updates": meta_updates, "task_steps": 10_000})
    run_directory.prepare(tmp_path, config)
    plan.print_training(config, location.Run(tmp_path))
    assert ("note: this takes 30 days or more; Ctrl-C stops it" in capsys.readouterr().err) == noted


def test_an_evaluation_of_more_than_a_day_gets_a_note(capsys, rate):
    for steps, noted in ((100_000, False), (100_000_000, True)):
        config = resolve("quick", {"games": ("pong",), "meta_learner": "none", "task_steps": steps})
        planned = runs.plan([Arm("scratch", "scratch", "encoder")], config, 5)
        plan.print_evaluation(config, planned, range(5), Path("reports/x"))
        assert ("note: this takes 24 hours or more" in capsys.readouterr().err) == noted


def test_an_evaluation_says_what_is_left(rate):
    config = resolve("quick", {"games": ("pong", "qbert"), "meta_learner": "none", "task_steps": 100_000})
    planned = runs.plan([Arm("leap", "/x", "encoder"), Arm("scratch", "scratch", "encoder")], config, 5)
    lines = dict(plan.evaluation(config, planned, range(15), Path("reports/x")).rows)
    assert lines[""] == "evaluation of leap, scratch on 2 games (pong, qbert), preset quick"
    assert lines["to do"] == (
        "20 agents (2 initializations × 2 games × 5 seeds), 100,000 agent steps each: 2,000,000 in all; "
        "5 of 20 are done"
    )
    assert lines["duration"].startswith("about 12 minutes, at 1,000 steps/s")
    assert lines["continue"] == "the same command with --out reports/x"


def test_what_is_printed_comes_before_the_first_step(capsys, tmp_path):
    config = resolve("smoke")
    run_directory.prepare(tmp_path, config)
    plan.print_training(config, location.Run(tmp_path))
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "leap on 2 games (pong, freeway), preset smoke, mode buffered"
    assert f"  directory  {tmp_path}" in lines
