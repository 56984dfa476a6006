"""The live table in the terminal during a run, which `status` prints as well."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from leap_dist.config import registry
from leap_dist.config.registry import Metric
from leap_dist.telemetry.escaping import printable

_STYLES = {
    "running": "green",
    "waiting": "yellow",
    "done": "bold green",
    "interrupted": "yellow",
    "failed": "bold red",
    "died": "bold red",
}
_OVER = ("done", "interrupted", "failed", "died")


class LiveTable:
    """Shows the progress of a run or an evaluation: a live table on a terminal, plain lines elsewhere.

    Args:
        console: console to write to; standard output by default.
        seconds: time between two plain lines while no task ends.
        clock: monotonic clock in seconds.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console()
        self._seconds = seconds
        self._clock = clock
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_interactive else None
        self._due = -math.inf
        self._tasks: int | None = None
        self._alerts: list[str] = []

    def __enter__(self) -> LiveTable:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, summary: dict[str, Any]) -> None:
        """Show the driver's summary. Errors of the output are ignored: training goes on without it."""
        # Alerts quote other programs, whose messages may be colored.
        summary = {**summary, "alerts": [printable(alert) for alert in summary["alerts"]]}
        with contextlib.suppress(OSError):
            if self._live is not None:
                self._live.update(render(summary), refresh=True)
            elif self._clock() >= self._due or summary["tasks"] != self._tasks:
                self._due = self._clock() + self._seconds
                self._tasks = summary["tasks"]
                self._print(summary)

    def _print(self, summary: dict[str, Any]) -> None:
        # Not with rich, which ends the process if the reader of a pipe is gone.
        new = [alert for alert in summary["alerts"] if alert not in self._alerts]
        self._alerts = summary["alerts"]
        now = summary.get("waiting") or f"{_progress(summary)} | {_counts(summary)}"
        for text in (now, *(f"  ! {alert}" for alert in new[-3:])):
            print(text, file=self._console.file, flush=True)


class NoTable:
    """Shows nothing; used where a program calls the service and did not ask for its progress."""

    def show(self, summary: dict[str, Any]) -> None:
        """Do nothing."""


def render(summary: dict[str, Any], *, now: float | None = None) -> Group:
    """Return the run's state, totals, latest alerts, and a row for every worker.

    The workers come last because rich cuts off what does not fit into the terminal. `now` is the current time in
    seconds since 1970, for a summary that was read from a file; without it, the summary is taken to be new.
    """
    what = "evaluation" if _is_evaluation(summary) else f"{summary['meta_learner']}, mode {summary['mode']}"
    state = Text.assemble(
        (summary["state"], _STYLES.get(summary["state"], "bold")),
        f"  preset {summary['preset']}, {what}, updated ",
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(summary["updated"])),
    )
    waiting = [Text(summary["waiting"], style="yellow")] if summary.get("waiting") else []
    parts: list[RenderableType] = [state, *waiting, Text(_progress(summary, now)), Text(_counts(summary))]
    if not _is_evaluation(summary):
        parts.append(_health(summary))
    if out := [*summary["quarantined"], *summary["quarantined_workers"]]:
        parts.append(Text("quarantined after repeated failures: " + ", ".join(out), style="red"))
    parts += [Text(f"! {alert}", style="yellow") for alert in summary["alerts"][-3:]]
    return Group(*parts, _worker_table(summary))


def _progress(summary: dict[str, Any], now: float | None = None) -> str:
    updates = "" if _is_evaluation(summary) else f", meta-updates {summary['meta_updates']}"
    return (
        f"{'runs' if _is_evaluation(summary) else 'tasks'} {summary['tasks']}/{summary['tasks_wanted']}{updates}"
        f" | {registry.for_summary(summary).step_unit} {summary['agent_steps']:,}, {summary['steps_per_second']:,.0f}/s"
        f" | elapsed {_duration(summary['wall_seconds'])}{_time_left(summary, now)}"
    )


def _time_left(summary: dict[str, Any], now: float | None) -> str:
    """Return the remaining time, which goes on passing after the summary was written; "" for a run that has ended."""
    if summary["state"] in _OVER:
        return ""
    if summary["eta_seconds"] is None:
        return ", ETA unknown"
    age = 0.0 if now is None else now - summary["updated"]
    return f", ETA {_duration(summary['eta_seconds'] - age)}"


def _is_evaluation(summary: dict[str, Any]) -> bool:
    return summary.get("kind") == "evaluation"


def _counts(summary: dict[str, Any]) -> str:
    workers = f"workers {summary['workers_alive']}/{summary['workers_wanted']}, restarts {summary['restarts']}"
    if _is_evaluation(summary):
        return f"{len(summary['given_up'])} given up, {summary['leases_lost']} begun again | {workers}"
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(summary["refused"].items()))
    return (
        f"contributions: {summary['contributions_applied']} applied, {summary['contributions_waiting']} waiting, "
        f"{sum(summary['refused'].values())} refused{f' ({reasons})' if reasons else ''} | {workers}"
    )


def _health(summary: dict[str, Any]) -> Text:
    """Return a line with the age of the checkpoint and counts of trouble, dim while all are zero."""
    troubles = (
        (summary["server_restarts"], "server restart", "server restarts"),
        (summary["leases_lost"], "lease lost", "leases lost"),
        (summary["duplicates"], "duplicate", "duplicates"),
        (summary["clipped"], "clipped", "clipped"),
        (summary["all_zero"], "all zeros", "all zeros"),
    )
    counts = ", ".join(f"{count} {one if count == 1 else several}" for count, one, several in troubles)
    style = "" if any(count for count, *_ in troubles) else "dim"
    return Text(f"checkpoint {_duration(summary['checkpoint_age'])} old | {counts}", style=style)


def _worker_table(summary: dict[str, Any]) -> Table:
    shown = registry.for_summary(summary)
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("worker")
    table.add_column(shown.task_noun)
    for name in ("task done", shown.rate_unit, f"last {shown.name}", "silent"):
        table.add_column(name, justify="right", no_wrap=True)
    leases = {lease["worker"]: lease for lease in summary["leases"]}
    states = {worker["name"]: worker["state"] for worker in summary["workers"]}
    for name in [*states, *(worker for worker in leases if worker not in states)]:
        if name in leases:
            table.add_row(name, *_lease_cells(leases[name], shown))
        else:
            state = states[name]
            table.add_row(name, Text("waiting" if state == "running" else state, style="dim"))
    return table


def _lease_cells(lease: dict[str, Any], shown: Metric) -> tuple[str, ...]:
    scores = [point["score"] for point in lease["curve"] if point["score"] is not None]
    return (
        f"{lease['game']}, {lease['arm']}, seed {lease['seed']}" if "arm" in lease else lease["game"],
        f"{lease['steps'] / lease['steps_wanted']:.0%}",
        f"{lease['steps'] / lease['seconds']:,.0f}" if lease["seconds"] else "",
        shown.format(scores[-1]) if scores else "",
        f"{lease['silent_seconds']:.0f} s",
    )


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=max(0, round(seconds))))
