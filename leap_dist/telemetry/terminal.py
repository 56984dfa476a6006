"""The live table in the terminal during a run, which `status` prints as well."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from leap_dist.config import registry
from leap_dist.config.plurals import counted
from leap_dist.config.registry import Metric
from leap_dist.telemetry.escaping import printable
from leap_dist.telemetry.progress import duration, waiting

_STYLES = {
    "running": "green",
    "waiting": "yellow",
    "done": "bold green",
    "interrupted": "yellow",
    "failed": "bold red",
    "died": "bold red",
}
OLD_SECONDS = 30.0
"""Age in seconds from which on the age of a live run's summary is shown."""
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
        self._state = ""
        self._alerts: list[str] = []
        self._started = clock()
        self._phases: list[tuple[float, str]] = []  # (seconds since the start, what began then)
        self._first_tasks: int | None = None  # tasks that earlier launches have done
        self._trains = False  # whether a first step was made
        self._plan = ""
        self._waiting = ""  # the last reason for waiting or stopping that was printed
        self._start_shown = False

    def __enter__(self) -> LiveTable:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, phase: str) -> None:
        """Say that a phase of the start begins. It ends when the next one begins."""
        if self._phases and self._phases[-1][1] == phase:
            return
        self._phases.append((self._clock() - self._started, phase))
        with contextlib.suppress(OSError):
            if self._live is not None:
                self._live.update(self._start(), refresh=True)
            else:
                print(f"{self._phases[-1][0]:5.1f} s  {phase}", file=self._console.file, flush=True)

    def show(self, summary: dict[str, Any]) -> None:
        """Show the driver's summary. Errors of the output are ignored: training goes on without it."""
        # Alerts quote other programs, whose messages may be colored.
        summary = {**summary, "alerts": [printable(alert) for alert in summary["alerts"]]}
        trained = _trained(summary)
        self._first_tasks = trained if self._first_tasks is None else self._first_tasks
        begun = trained > self._first_tasks or any(lease["steps"] for lease in summary["leases"])
        self._trains = self._trains or begun or summary["state"] != "running"
        if not self._trains and not summary["alerts"] and not summary.get("waiting"):
            self.begin(_phase(summary))
            return
        ends = summary["state"] in _OVER and summary["state"] != self._state  # the last alerts have to be shown
        self._state = summary["state"]
        with contextlib.suppress(OSError):
            self._print_plan(summary)
            if self._live is not None:
                self._live.update(render(summary, bar=True), refresh=True)
            elif ends or self._clock() >= self._due or trained != self._tasks:
                self._due = self._clock() + self._seconds
                self._tasks = trained
                self._print(summary)

    def _start(self) -> Text:
        """Return the phases so far, each with its duration, and the current one."""
        ends = [begun for begun, _ in self._phases[1:]]
        done = [f"{end - begun:5.1f} s  {phase}\n" for end, (begun, phase) in zip(ends, self._phases, strict=False)]
        return Text.assemble(("".join(done), "dim"), f"     …   {self._phases[-1][1]}")

    def _print_plan(self, summary: dict[str, Any]) -> None:
        """Print the plan at the start, and again when its resources change; on a terminal, above the table."""
        resources = _resources(summary)
        if not resources or resources == self._plan:
            return
        self._plan = resources
        if self._live is not None:
            self._live.console.print(Text(summary["plan"], style="dim"), soft_wrap=True)
        else:
            print(summary["plan"], file=self._console.file, flush=True)

    def _print(self, summary: dict[str, Any]) -> None:
        # Not with rich, which ends the process if the reader of a pipe is gone.
        new = [alert for alert in summary["alerts"] if alert not in self._alerts]
        self._alerts = summary["alerts"]
        start = describe_start(summary)
        if start and not self._start_shown:
            self._start_shown = True
            print(start, file=self._console.file, flush=True)
        waiting = summary.get("waiting", "")
        now = [waiting or _line(summary)] if not waiting or waiting != self._waiting else []
        self._waiting = waiting
        for text in (*now, *(f"  ! {alert}" for alert in new[-3:])):
            print(text, file=self._console.file, flush=True)


def _resources(summary: dict[str, Any]) -> str:
    """Return the plan without the speed and time that were expected at the start, for a run that is training."""
    plan = str(summary.get("plan", "")) if summary["state"] == "running" else ""
    return plan.partition(";")[0]


def describe_start(summary: dict[str, Any]) -> str:
    """Return how long the start took until the first step, by parts; "" if there was none yet."""
    if summary.get("time_to_first_step") is None:
        return ""
    parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in summary["start_seconds"].items())
    return f"first step after {summary['time_to_first_step']:.1f} s: {parts}"


def _phase(summary: dict[str, Any]) -> str:
    """Return what a run does before its first step."""
    if summary["leases"]:
        return "loading games" if registry.for_summary(summary) is registry.RETURN else "loading data"
    return f"starting {counted(summary['workers_wanted'], 'worker')}"


class NoTable:
    """Shows nothing; used if a program calls the service without asking for its progress."""

    def begin(self, phase: str) -> None:
        """Do nothing."""

    def show(self, summary: dict[str, Any]) -> None:
        """Do nothing."""


def render(summary: dict[str, Any], *, now: float | None = None, bar: bool = False) -> Group:
    """Return the run's state, totals, latest alerts, and a row for every worker.

    The workers come last because rich cuts off what does not fit into the terminal.

    Args:
        summary: the driver's summary.
        now: seconds since 1970, for a summary that was read from a file; None for a new one.
        bar: whether to draw a progress bar.
    """
    rows = Table.grid(padding=(0, 2))
    rows.add_column(no_wrap=True)
    rows.add_column()
    what = "evaluation" if _is_evaluation(summary) else f"{summary['meta_learner']}, mode {summary['mode']}"
    rows.add_row(
        Text(summary["state"], style=_STYLES.get(summary["state"], "bold")), f"preset {summary['preset']}, {what}"
    )
    if summary.get("waiting"):
        rows.add_row("waiting", Text(summary["waiting"], style="yellow"))
    if plan := _resources(summary):
        rows.add_row("plan", Text(plan.removeprefix("plan: "), style="dim"))
    if bar and summary["tasks_wanted"]:
        rows.add_row("", ProgressBar(total=summary["tasks_wanted"], completed=_done(summary), width=50))
    for title, text in _facts(summary, now):
        rows.add_row(title, text)
    if out := [*summary["quarantined"], *summary["quarantined_workers"]]:
        rows.add_row("given up", Text(f"{', '.join(out)}: failed repeatedly", style="red"))
    for alert in summary["alerts"][-3:]:
        rows.add_row(Text("alert", style="yellow"), Text(alert, style="yellow"))
    if summary.get("logs") and summary["state"] not in ("done", "interrupted"):
        rows.add_row("logs", Text(summary["logs"], style="dim"))
    parts: list[RenderableType] = [rows]
    if (summary["workers"] or summary["leases"]) and summary["state"] not in ("done", "interrupted"):
        parts += ["", _worker_table(summary)]
    return Group(*parts)


def _facts(summary: dict[str, Any], now: float | None) -> Iterator[tuple[str, str]]:
    """Yield titles and texts about the progress of a run, none longer than 64 characters for usual numbers."""
    yield _noun(summary) + "s", _progress(summary)
    unit = registry.for_summary(summary).step_unit
    rate = f", {summary['steps_per_second']:,.0f} per second" if summary["state"] not in _OVER else ""
    yield "steps", f"{summary['agent_steps']:,} {unit}{rate}"
    so_far = "" if summary["state"] in _OVER else " so far"
    yield "time", f"{duration(summary['wall_seconds'])}{so_far}{_time_left(summary, now)}"
    workers = f"{summary['workers_alive']} of {summary['workers_wanted']} up"
    if summary["restarts"]:
        workers += f", {counted(summary['restarts'], 'restart')}"
    if summary["state"] not in _OVER:
        yield "workers", workers
    if summary["state"] not in _OVER and (states := Counter(summary.get("mps", {}).values())):
        yield "MPS", ", ".join(f"{state} on {counted(count, 'node')}" for state, count in states.most_common())
    troubles = [text for text in _troubles(summary) if text]
    if troubles:
        yield "trouble", ", ".join(troubles)
    if not _is_evaluation(summary) and summary["clipped"]:
        yield "clipped", f"{counted(summary['clipped'], 'contribution')}, as meta.contribution_clip asks"
    age = 0.0 if now is None else now - summary["updated"]
    if summary["state"] not in _OVER and age > OLD_SECONDS:
        yield "reported", f"{duration(age)} ago; a run reports twice a second"


def _progress(summary: dict[str, Any]) -> str:
    text = f"{summary['tasks']:,} of {summary['tasks_wanted']:,}"
    if _is_evaluation(summary):
        return text
    return f"{text}, {counted(summary['meta_updates'], 'meta-update')}{waiting(summary, ', ')}"


def _troubles(summary: dict[str, Any]) -> Iterator[str]:
    """Yield counts of what went wrong, or "" if nothing did."""

    def count(number: int, one: str, several: str) -> str:
        return f"{number:,} {one if number == 1 else several}" if number else ""

    if _is_evaluation(summary):
        yield count(len(summary["given_up"]), "agent given up", "agents given up")
        yield count(summary["leases_lost"], "agent restarted", "agents restarted")
        return
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(summary["refused"].items()))
    refused = sum(summary["refused"].values())
    yield count(refused, f"contribution refused ({reasons})", f"contributions refused ({reasons})")
    yield count(summary["server_restarts"], "server restart", "server restarts")
    if summary["state"] != "interrupted":  # a stop gives the leases back
        yield count(summary["leases_lost"], "lease lost", "leases lost")
    yield count(summary["duplicates"], "duplicate", "duplicates")
    yield count(summary["all_zero"], "all-zero contribution", "all-zero contributions")


def _line(summary: dict[str, Any]) -> str:
    """Return the progress of a run as one line, of at most 80 characters for usual numbers."""
    waits = f"+{summary['tasks_waiting']}" if summary.get("tasks_waiting") else ""  # for the next meta-update
    updates = "" if _is_evaluation(summary) else f"{counted(summary['meta_updates'], 'meta-update')}, "
    line = (
        f"{duration(summary['wall_seconds'])}  {summary['tasks']}{waits}/{summary['tasks_wanted']} {_noun(summary)}s, "
        f"{updates}{summary['agent_steps']:,} steps, {summary['steps_per_second']:,.0f}/s{_time_left(summary, None)}"
    )
    refused = 0 if _is_evaluation(summary) else sum(summary["refused"].values())
    return line + (f", {refused} refused" if refused else "")


def _time_left(summary: dict[str, Any], now: float | None) -> str:
    """Return the remaining time, less the time since the summary was written; "" for a run that has ended."""
    if summary["state"] in _OVER:
        return ""
    if summary["eta_seconds"] is None:
        return ", time left unknown"
    if 0 < summary["tasks_wanted"] <= summary["tasks"]:
        return ", about to end"
    left = summary["eta_seconds"] - (0.0 if now is None else now - summary["updated"])
    return f", {duration(left)} left" if left > 0 else ", overdue"


def _trained(summary: dict[str, Any]) -> int:
    """Return the number of tasks that are done, whether or not a meta-update has applied them."""
    return int(summary["tasks"]) + int(summary.get("tasks_waiting", 0))


def _done(summary: dict[str, Any]) -> float:
    """Return the number of tasks that are done, with running ones as fractions."""
    return float(_trained(summary) + sum(lease["steps"] / lease["steps_wanted"] for lease in summary["leases"]))


def _noun(summary: dict[str, Any]) -> str:
    return "agent" if _is_evaluation(summary) else "task"


def _is_evaluation(summary: dict[str, Any]) -> bool:
    return summary.get("kind") == "evaluation"


def _worker_table(summary: dict[str, Any]) -> Table:
    shown = registry.for_summary(summary)
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("worker", no_wrap=True)
    table.add_column("device", no_wrap=True)
    table.add_column(shown.task_noun, no_wrap=True, max_width=28)
    for name in ("done", shown.rate_unit, f"last {shown.name}", "silent"):
        table.add_column(name, justify="right", no_wrap=True)
    leases = {lease["worker"]: lease for lease in summary["leases"]}
    states = {worker["name"]: worker["state"] for worker in summary["workers"]}
    devices = {worker["name"]: worker.get("device", "") for worker in summary["workers"]}
    for name in [*states, *(worker for worker in leases if worker not in states)]:
        if name in leases:
            table.add_row(name, devices.get(name, ""), *_lease_cells(leases[name], shown))
        else:
            state = states[name]
            table.add_row(name, devices[name], Text("waiting" if state == "running" else state, style="dim"))
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
