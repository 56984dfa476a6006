"""A program that uses the public names, for the type checker: `make types` checks it strictly, and nobody runs it.

Every `type: ignore` is a mistake that the checker must find: strict mypy complains about one that is not needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

import numpy as np

import leap_dist
from leap_dist import Callback, Config, LiveRun, MetaUpdate, Report, Run, TaskResult


class StopAtScore(Callback):
    """A callback with the exact types of its events."""

    score: float = 0.0

    def on_task_end(self, run: LiveRun, task: TaskResult) -> None:
        assert_type(task.score, float | None)
        assert_type(task.game, str)

    def on_meta_update(self, run: LiveRun, update: MetaUpdate) -> None:
        assert_type(update.tasks, tuple[TaskResult, ...])
        if update.score is not None:
            self.score = max(self.score, update.score)
        if self.score > 100:
            run.stop()


class Mistaken(Callback):
    def on_alert(self, run: LiveRun, alert: int) -> None:  # type: ignore[override]
        """Takes a number, but alerts are text."""


def train(folder: Path) -> Run:
    settings: dict[str, Any] = {"preset": "smoke", "meta": {"learning_rate": 0.01}}
    run = leap_dist.train(settings, run_dir=folder / "run", callbacks=[StopAtScore()])
    assert_type(run, Run)
    assert_type(run.config, Config)
    assert_type(run.path, str)
    assert_type(run.initialization.tensors, dict[str, np.ndarray])
    for update in run.meta_updates():
        assert_type(update.agent_steps, int)
    try:
        leap_dist.train("smoke", resume=True)
    except leap_dist.ConfigError as error:
        print(error)
    except leap_dist.Interrupted as error:
        print(error.result)
    leap_dist.train(7)  # type: ignore[arg-type]
    leap_dist.train("smoke", callback=[StopAtScore()])  # type: ignore[call-arg]
    return run


def evaluate(run: Run) -> Report:
    report = leap_dist.evaluate({"mine": run.path, "scratch": "scratch"}, {"games": ["pong"]}, seeds=3)
    assert_type(report, Report)
    assert_type(report.numbers, dict[str, Any])
    assert_type(report.markdown, str)
    for result in report.runs():
        assert_type(result.returns, np.ndarray)
    encoder = leap_dist.load_encoder(Path(run.path) / "init.safetensors")
    assert_type(encoder.preprocessing.channels, int)
    return report
