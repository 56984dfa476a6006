"""Rates and times that the summary tells."""

from __future__ import annotations

from typing import Any

import pytest
from protocol import Clock, config, serve

from leap_dist.config import registry
from leap_dist.telemetry import progress as module
from leap_dist.telemetry.progress import WINDOW_SECONDS, Progress


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
