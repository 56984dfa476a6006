"""Rates and times that the summary tells."""

from __future__ import annotations

from typing import Any

import pytest
from protocol import Clock, config, grant, serve

from leap_dist.config import registry
from leap_dist.telemetry import progress as module
from leap_dist.telemetry.progress import SETTLED_SECONDS, WINDOW_SECONDS, Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock)
    return clock


def test_rates_are_of_the_last_half_minute_and_never_negative(clock: Clock, tmp_path: Any) -> None:
    progress, status = Progress(config(), 0.0), serve(tmp_path, config()).status()

    def rates(seconds: float, steps: int, pushes: int) -> tuple[float, float]:
        clock.now += seconds
        told = progress.summary({**status, "agent_steps": steps, "pushes": pushes}, "running", {})
        return told["steps_per_second"], told["pushes_per_second"]

    assert rates(0, 0, 0) == (0.0, 0.0)
    assert rates(10, 5_000, 20) == (500.0, 2.0)
    assert rates(WINDOW_SECONDS, 20_000, 50) == (500.0, 1.0)
    assert rates(2, 21_500, 3) == (750.0, 0.0), "a new server has counted its own pushes only"
    assert rates(4, 23_600, 11) == (600.0, 2.0)


def test_the_time_left_is_told_after_ten_seconds_of_training(clock: Clock, tmp_path: Any) -> None:
    status = {**serve(tmp_path, config()).status(), "tasks_wanted": 12, "tasks": 2}
    progress = Progress(config(), 0.0)

    def left(seconds: float, waiting: int) -> float | None:
        clock.now += seconds
        return progress.summary({**status, "tasks_waiting": waiting}, "running", {})["eta_seconds"]

    assert left(0, 0) is None
    assert left(60, 0) is None, "the workers start"
    assert left(1, 1) is None, "the first report, at which the clock starts"
    assert left(SETTLED_SECONDS - 1, 2) is None
    assert left(1, 3) == 7 * SETTLED_SECONDS / 2, "two tasks in ten seconds, and seven are left"
    assert left(SETTLED_SECONDS, 5) == 5 * SETTLED_SECONDS / 2


@pytest.mark.parametrize(("tasks", "name"), [("atari", "return"), ("omniglot", "error"), ("multi-cv", "error")])
def test_the_summary_says_what_tells_how_training_goes(tmp_path: Any, tasks: str, name: str) -> None:
    told = Progress(config(tasks=tasks), 0.0).summary(serve(tmp_path, config()).status(), "running", {})
    assert told["measure"] == name
    assert registry.for_summary(told) is registry.for_config(config(tasks=tasks))


def test_a_run_that_has_more_tasks_than_a_later_launch_asks_for_is_done(clock: Clock, tmp_path: Any) -> None:
    status = {**serve(tmp_path, config()).status(), "tasks": 4, "tasks_wanted": 2}
    progress = Progress(config(), 0.0)
    for seconds in (0, 10):
        clock.now += seconds
        told = progress.summary(status, "done", {})
        assert (told["tasks"], told["tasks_wanted"]) == (4, 4)


def test_the_start_is_timed_by_parts_until_the_first_step(clock: Clock, tmp_path: Any) -> None:
    settings = config()
    progress, server = Progress(settings, 0.0), serve(tmp_path, settings)
    for part, seconds in (("nodes", 4.0), ("server", 0.5), ("workers", 1.5)):
        clock.now += seconds
        progress.start.begin(part)

    def told(seconds: float, status: dict[str, Any], state: str = "running") -> tuple[Any, dict[str, float]]:
        clock.now += seconds
        summary = progress.summary(status, state, {})
        return summary["time_to_first_step"], summary["start_seconds"]

    before = {"ray": 4.0, "nodes": 0.5, "server": 1.5}
    assert told(1.0, server.status()) == (None, before)
    lease = grant(server)
    assert told(1.0, server.status()) == (None, {**before, "workers": 2.0})
    server.renew(lease.id, lease.incarnation, 20)
    whole = {**before, "workers": 2.0, "loading": 3.0}
    assert told(3.0, server.status()) == (11.0, whole)
    assert told(9.0, server.status()) == (11.0, whole), "it does not go on"


def test_a_launch_without_a_step_has_no_time_to_it(clock: Clock, tmp_path: Any) -> None:
    progress, status = Progress(config(), 0.0), serve(tmp_path, config()).status()
    for state in ("waiting", "stopping", "interrupted"):
        clock.now += 1.0
        assert progress.summary(status, state, {})["time_to_first_step"] is None
