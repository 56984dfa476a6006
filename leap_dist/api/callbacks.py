"""Callbacks of a training run or an evaluation, and the events that they receive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from leap_dist.config import registry
from leap_dist.config.settings import Config
from leap_dist.driver.signals import StopSignal


@dataclass(frozen=True)
class TaskResult:
    """One finished task whose contribution is part of φ."""

    game: str
    """Game, environment, alphabet or data set."""
    task: int
    """Index of the task in the run, from 0."""
    visit: int
    """Number of earlier tasks of the same game."""
    worker: str
    steps: int
    """Length of the task in agent steps (or examples)."""
    seconds: float
    """Wall time of training."""
    score: float | None
    """Mean raw return over the second half of the task, or mean training error; None if no episode ended."""
    loss: float | None
    """Last mean loss of the task."""
    path_length: float
    """Length of the gradient path, which meta-learning shortens."""
    path_energy: float
    """Energy of the gradient path."""
    staleness: int
    """Number of meta-updates between the start of the task and the application of its contribution."""
    weight: float
    """Weight of the contribution in its meta-update."""
    norm: float
    """Norm of the contribution."""

    @classmethod
    def of_line(cls, line: dict[str, Any]) -> TaskResult:
        """Return the task result described by a ledger line whose contribution was final."""
        curve = line["curve"]
        return cls(
            game=line["game"],
            task=line["task"],
            visit=line["visit"],
            worker=line["worker"],
            steps=line["steps"],
            seconds=line["seconds"],
            score=registry.for_ledger([line]).task_score(curve),
            loss=curve[-1]["means"].get("loss") if curve else None,
            path_length=line["path"]["length"],
            path_energy=line["path"]["energy"],
            staleness=line["staleness"],
            weight=line["weight"],
            norm=line["norm"],
        )


@dataclass(frozen=True)
class MetaUpdate:
    """One meta-update, as the ledger records it."""

    version: int
    """Number of meta-updates so far, this one included."""
    agent_steps: int
    """Agent steps (or examples) of all contributions applied so far."""
    update_norm: float
    """Norm of the change of φ."""
    agreement: float
    """Agreement of the contributions: mean cosine between them."""
    contributions: int
    """Number of contributions that it applied."""
    tasks: tuple[TaskResult, ...]
    """Tasks that ended with it. In mode `stream`, a meta-update may also apply pushes of running tasks."""

    @property
    def path_length(self) -> float | None:
        """Mean path length over the tasks that ended with this meta-update, or None if there were none."""
        return sum(task.path_length for task in self.tasks) / len(self.tasks) if self.tasks else None

    @property
    def score(self) -> float | None:
        """Mean score over the tasks that ended with this meta-update, or None if no episode ended."""
        scores = [task.score for task in self.tasks if task.score is not None]
        return sum(scores) / len(scores) if scores else None

    @classmethod
    def of_lines(cls, lines: Sequence[dict[str, Any]]) -> MetaUpdate:
        """Return the meta-update described by these ledger lines, which must all have the same version."""
        last = lines[-1]
        return cls(
            version=last["version_after"],
            agent_steps=last["total_steps"],
            update_norm=last["update_norm"],
            agreement=last["agreement"],
            contributions=len(lines),
            tasks=tuple(TaskResult.of_line(line) for line in lines if line["final"]),
        )


class LiveRun:
    """A run in progress, as callbacks see it.

    Args:
        path: path or URL of the run or evaluation.
        folder: local directory of its files. For a run at a URL this is a working copy, which is removed at the end.
        config: configuration of the run.
        stop: the signal that requests a stop.
    """

    def __init__(self, path: str, folder: Path, config: Config, stop: StopSignal) -> None:
        self.path = path
        self.folder = folder
        self.config = config
        self.summary: dict[str, Any] = {}
        """The newest summary, with the same content as summary.json; empty before the first report."""
        self.stopped = False
        """Whether a callback has requested a stop."""
        self._stop = stop

    def stop(self) -> None:
        """Request a clean stop: everything accepted is saved, and `train` returns a run with outcome "stopped"."""
        self.stopped = self._stop.asked = True


class Callback:
    """Base class of callbacks. Override the methods you need; by default, they all do nothing.

    Methods are called one at a time, from the thread that called `train` or `evaluate`, while the workers continue. If
    one raises an exception, the run ends cleanly, with everything accepted saved, and `train` re-raises the exception.
    """

    def on_start(self, run: LiveRun) -> None:
        """Handle the start, before Ray is started or joined. An exception here prevents the start."""

    def on_task_end(self, run: LiveRun, task: TaskResult) -> None:
        """Handle a finished task, once the meta-update that contains it is durable."""

    def on_meta_update(self, run: LiveRun, update: MetaUpdate) -> None:
        """Handle a meta-update. Each meta-update of this launch is reported exactly once, in order."""

    def on_alert(self, run: LiveRun, alert: str) -> None:
        """Handle a message for the user, for example that a worker died."""

    def on_report(self, run: LiveRun) -> None:
        """Handle a new `run.summary`; called about twice a second."""

    def on_end(self, run: LiveRun, outcome: str) -> None:
        """Handle the end. `outcome` is "done", "stopped" (by a callback), "interrupted" (by a signal) or "failed"."""


class Dispatcher:
    """Passes the events of a run to callbacks. If one raises, the exception is kept as `error` and the run stops.

    Args:
        callbacks: the callbacks, in the order in which they are called.
        run: the run that they receive.

    Raises TypeError if anything other than a `Callback` is given.
    """

    def __init__(self, callbacks: Iterable[Callback], run: LiveRun) -> None:
        self._callbacks = list(callbacks)
        for callback in self._callbacks:
            if not isinstance(callback, Callback):
                raise TypeError(f"callbacks: {callback!r:.80} is not an instance of leap_dist.Callback")
        self._run = run
        self.version = 0
        """Number of meta-updates that need not be reported, because earlier launches of the run made them."""
        self._alerts: set[str] = set()
        self.error: BaseException | None = None

    def start(self) -> None:
        """Call `on_start`."""
        for callback in self._callbacks:
            callback.on_start(self._run)

    def record(self, lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        """Pass new events to the callbacks. Once a callback has raised an exception, none is called any more."""
        self._run.summary = summary
        if self.error is not None:
            return
        try:
            self._record(lines, summary)
        except BaseException as error:
            self.error = error
            self._run.stop()

    def end(self, outcome: str) -> str:
        """Call `on_end` and return the outcome: "stopped" if a callback asked for it, "failed" if a callback raised."""
        if self.error is not None:
            outcome = "failed"
        elif outcome == "interrupted" and self._run.stopped:
            outcome = "stopped"
        for callback in self._callbacks:
            callback.on_end(self._run, outcome)
        return outcome

    def _record(self, lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        for version, group in groupby(lines, key=lambda line: int(line["version_after"])):
            if version <= self.version:
                continue
            self.version = version
            update = MetaUpdate.of_lines(list(group))
            for callback in self._callbacks:
                for task in update.tasks:
                    callback.on_task_end(self._run, task)
                callback.on_meta_update(self._run, update)
        for alert in summary["alerts"]:
            if alert not in self._alerts:
                self._alerts.add(alert)
                for callback in self._callbacks:
                    callback.on_alert(self._run, alert)
        for callback in self._callbacks:
            callback.on_report(self._run)
