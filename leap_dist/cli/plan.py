"""The plan printed before the first step: what is trained, for how long, where results go, how to stop and resume."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from leap_dist.cli import console
from leap_dist.config import registry
from leap_dist.config.loading import ConfigError
from leap_dist.config.plurals import counted
from leap_dist.config.settings import Config
from leap_dist.evaluation.runs import Run as EvaluationRun
from leap_dist.storage import run_directory
from leap_dist.storage.location import Run
from leap_dist.study import games
from leap_dist.study.plan import Plan as StudyPlan
from leap_dist.telemetry.escaping import printable
from leap_dist.worker import trial

WORTH_A_TRIAL = 50_000
"""Smallest number of steps for which the plan measures this machine's speed; fewer take at most a minute."""


LONG = {"train": 30 * 86_400.0, "evaluate": 86_400.0}
"""Seconds beyond which a note says that a command takes long, which may be a mistake."""


class Estimate(NamedTuple):
    """An estimate says how long a run will take."""

    text: str
    seconds: float | None = None
    """None if it is not known."""
    rate: float | None = None
    """Steps per second of all workers, as measured; None if they were not."""


class Plan(NamedTuple):
    """The plan of a run."""

    rows: list[tuple[str, str]]
    """Pairs of title and text, the first of which is a heading without title."""
    estimate: Estimate


def print_training(config: Config, run: Run) -> Estimate:
    """Print the plan of a training run, new or resumed, and return how long it takes."""
    before: dict[str, Any] = {}
    with contextlib.suppress(ConfigError):
        before = run_directory.read_summary(run.folder)
    return _print_plan("train", training(config, run.shown, before))


def training(config: Config, shown: str, before: dict[str, Any]) -> Plan:
    """Return the plan of a training run.

    Args:
        config: the run's configuration.
        shown: path or URL of the run.
        before: summary of the run's earlier launches; empty for a new run.
    """
    unit = registry.for_config(config).step_unit
    done = int(before.get("tasks", 0))
    left = max(0, config.total_tasks - done)
    batches = f"{counted(config.meta_updates, 'meta-update')} of {counted(config.batch_tasks, 'task')}"
    length = f"{batches}, {config.steps_of_task:,} {unit} each: {config.total_tasks * config.steps_of_task:,} in all"
    if done:
        length += f"; {done:,} of {config.total_tasks:,} tasks are done"
    estimate = _estimate(config, left * config.steps_of_task, before)
    rows = [
        ("", f"{config.meta_learner} on {_names(config)}, preset {config.preset}, mode {config.mode}"),
        ("to do", length),
        ("duration", estimate.text),
        ("directory", shown),
        ("watch", f"{console.command()} status {shlex.quote(shown)}"),
        ("stop", "Ctrl-C; everything accepted by then is kept"),
        ("continue", console.resume_command(shown, config.gymnasium.modules)),
    ]
    return Plan(rows, estimate)


def print_study(plan: StudyPlan, out: Path) -> float:
    """Print the plan of a study of games, and return the seconds that it still takes; see `study`."""
    rows, seconds = study(plan, out)
    _print(rows)
    return seconds


def study(plan: StudyPlan, out: Path) -> tuple[list[tuple[str, str]], float]:
    """Return the plan of a study of games, with titles and texts as in `training`, and the seconds that it still takes.

    The seconds are measured by a trial on this machine, or if that is impossible, estimated for one with a GPU.
    """
    what, cost, done = plan.study, plan.cost, plan.steps_done(out)
    left = max(0, cost.steps - done)
    tests = plan.tests
    assert tests is not None, what.tasks
    config = plan.training(next(plan.cells()))
    lengths = _range([tests.game_steps.get(game, plan.test_steps) for game in tests.games])
    with_gpu = left / games.MACHINE_STEPS_PER_SECOND
    machines = ", ".join(f"{_words(with_gpu / number)} on {counted(number, 'machine')}" for number in (1, 8))
    rate, source = (None, "") if _follows_nodes(config) else _rate_here(config)
    seconds = None if rate is None else left / rate
    duration = "unknown" if seconds is None else f"about {_words(seconds)}, {source}"
    if not left:
        duration = "nothing is left to do"
    return [
        ("", f"study of {', '.join(what.arms)} on {counted(len(tests.games), 'game')}, preset {plan.preset}"),
        ("train", f"{counted(cost.trainings, 'initialization')}: {cost.training:,} agent steps in all"),
        ("test", f"{counted(cost.agents, 'agent')}, {lengths} agent steps each: {cost.testing:,} in all"),
        *([("done", f"{done:,} of {cost.steps:,} agent steps")] if done else []),
        ("duration", duration),
        ("with GPUs", f"about {machines} with 16 virtual cores and an H100"),
        ("directory", str(out)),
        ("watch", f"{console.command()} status {shlex.quote(str(out))}"),
        ("stop", "Ctrl-C; everything accepted by then is kept"),
        ("continue", "the same command"),
    ], with_gpu if seconds is None else seconds


def print_evaluation(config: Config, runs: Sequence[EvaluationRun], missing: Sequence[int], out: Path) -> Estimate:
    """Print the plan of an evaluation, and return how long it takes.

    `missing` has the indices of the runs that are not finished.
    """
    return _print_plan("evaluate", evaluation(config, runs, missing, out))


def evaluation(config: Config, runs: Sequence[EvaluationRun], missing: Sequence[int], out: Path) -> Plan:
    """Return the plan of an evaluation; `missing` is as in `print_evaluation`."""
    arms = list(dict.fromkeys(run.arm.label for run in runs))
    seeds = len({run.seed for run in runs})
    unit = registry.for_config(config).step_unit
    noun = registry.for_config(config).task_noun
    length = (
        f"{counted(len(runs), 'agent')} ({counted(len(arms), 'initialization')} × {counted(len(config.games), noun)} × "
        f"{counted(seeds, 'seed')}), {_range([run.steps for run in runs])} {unit} each: "
        f"{sum(run.steps for run in runs):,} in all"
    )
    if len(missing) < len(runs):
        length += f"; {len(runs) - len(missing)} of {len(runs)} are done"
    estimate = _estimate(config, sum(runs[index].steps for index in missing), {})
    rows = [
        ("", f"evaluation of {', '.join(arms)} on {_names(config)}, preset {config.preset}"),
        ("to do", length),
        ("duration", estimate.text),
        ("directory", str(out)),
        ("watch", f"{console.command()} status {shlex.quote(str(out))}"),
        ("stop", "Ctrl-C; finished agents are kept"),
        ("continue", f"the same command with --out {shlex.quote(str(out))}"),
    ]
    return Plan(rows, estimate)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _names(config: Config) -> str:
    count = counted(len(config.games), registry.for_config(config).task_noun)
    return count + (f" ({', '.join(config.games)})" if len(config.games) <= 5 else "")


def _estimate(config: Config, steps: int, before: dict[str, Any]) -> Estimate:
    """Return how long `steps` will take at the rate of earlier launches, or of a short trial."""
    if not steps:
        return Estimate("nothing is left to do", 0.0)
    rate, source = _rate_before(before), "at the rate so far"
    if rate is None and steps < WORTH_A_TRIAL:
        return Estimate("less than a minute, plus some seconds to start")
    if rate is None and _follows_nodes(config):
        return Estimate("depends on the nodes; `status` shows it after the first tasks")
    if rate is None:
        rate, source = _rate_here(config)
        if rate is None:
            return Estimate("unknown; `status` shows it after the first tasks")
    return Estimate(f"about {_words(steps / rate)}, {source}", steps / rate, rate)


def _follows_nodes(config: Config) -> bool:
    """Return whether the number of workers depends on a cluster that is not joined yet."""
    return config.workers == "auto" and config.address != "local"


def _rate_here(config: Config) -> tuple[float | None, str]:
    """Measure this machine's steps per second in a short trial. Return them, or None if it fails, and their source."""
    workers, rate = _side_by_side(config), None
    with contextlib.suppress(Exception):  # the run itself will report what is wrong
        rate = trial.steps_per_second(config)
    if rate is None:
        return None, ""
    return (
        rate * workers,
        f"at {_rounded(rate)} steps/s for each of {counted(workers, 'worker')}, measured on this machine",
    )


def _rate_before(before: dict[str, Any]) -> float | None:
    """Return the steps per second of earlier launches; None if there were too few steps to tell."""
    steps, seconds = before.get("agent_steps", 0), before.get("wall_seconds", 0.0)
    if not isinstance(steps, int) or not isinstance(seconds, int | float) or steps < WORTH_A_TRIAL or seconds < 10:
        return None
    return steps / seconds


def _side_by_side(config: Config) -> int:
    """Return how many workers train at the same time: on this machine, no more than it has processors for."""
    workers = config.total_tasks if config.workers == "auto" else config.workers
    if config.address != "local":
        return workers
    processors = len(os.sched_getaffinity(0))
    return max(1, min(workers, processors, int(processors / config.worker.cpus)))


def _words(seconds: float) -> str:
    """Return a duration in the unit that people would use."""
    for size, unit in ((86_400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 1.5 * size:
            return f"{_rounded(seconds / size)} {unit}s"
    return f"{max(10, round(seconds, -1)):.0f} seconds"


def _rounded(value: float) -> str:
    """Return a number with two significant digits."""
    return f"{float(f'{value:.2g}'):,.12g}"


def _print_plan(command: str, plan: Plan) -> Estimate:
    """Print a plan, and a note if it takes so long that it may be a mistake. Return its estimate."""
    _print(plan.rows)
    if (plan.estimate.seconds or 0.0) > LONG[command]:
        fewer = "--meta-updates or --task-steps" if command == "train" else "--task-steps, --seeds or --games"
        console.notice("note", f"this takes {_words(LONG[command])} or more; Ctrl-C stops it, and {fewer} shorten it")
    return plan.estimate


def _print(rows: Sequence[tuple[str, str]]) -> None:
    for title, text in rows:
        print(f"  {title:<10} {printable(text)}" if title else printable(text))
    print(flush=True)
