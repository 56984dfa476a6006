"""The plan printed before the first step: what is trained, for how long, where results go, how to stop and resume."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def print_training(config: Config, run: Run) -> None:
    """Print the plan of a training run, new or resumed."""
    before: dict[str, Any] = {}
    with contextlib.suppress(ConfigError):
        before = run_directory.read_summary(run.folder)
    _print(training(config, run.shown, before))


def training(config: Config, shown: str, before: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the plan of a training run: pairs of title and text, the first of which is a heading without title.

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
    return [
        ("", f"{config.meta_learner} on {_names(config)}, preset {config.preset}, mode {config.mode}"),
        ("to do", length),
        ("duration", _duration(config, left * config.steps_of_task, before)),
        ("directory", shown),
        ("watch", f"{console.command()} status {shlex.quote(shown)}"),
        ("stop", "Ctrl-C; everything accepted by then is kept"),
        ("continue", console.resume_command(shown, config.gymnasium.modules)),
    ]


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


def print_evaluation(config: Config, runs: Sequence[EvaluationRun], missing: Sequence[int], out: Path) -> None:
    """Print the plan of an evaluation; `missing` has the indices of the runs that are not finished."""
    _print(evaluation(config, runs, missing, out))


def evaluation(
    config: Config, runs: Sequence[EvaluationRun], missing: Sequence[int], out: Path
) -> list[tuple[str, str]]:
    """Return the plan of an evaluation, with titles and texts as in `training`."""
    arms = list(dict.fromkeys(run.arm.label for run in runs))
    seeds = len({run.seed for run in runs})
    unit = registry.for_config(config).step_unit
    length = (
        f"{counted(len(runs), 'agent')} ({len(arms)} × {counted(len(config.games), 'task')} × "
        f"{counted(seeds, 'seed')}), {_range([run.steps for run in runs])} {unit} each: "
        f"{sum(run.steps for run in runs):,} in all"
    )
    if len(missing) < len(runs):
        length += f"; {len(runs) - len(missing)} of {len(runs)} are done"
    return [
        ("", f"evaluation of {', '.join(arms)} on {_names(config)}, preset {config.preset}"),
        ("to do", length),
        ("duration", _duration(config, sum(runs[index].steps for index in missing), {})),
        ("directory", str(out)),
        ("watch", f"{console.command()} status {shlex.quote(str(out))}"),
        ("stop", "Ctrl-C; finished agents are kept"),
        ("continue", f"the same command with --out {shlex.quote(str(out))}"),
    ]


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _names(config: Config) -> str:
    count = counted(len(config.games), registry.for_config(config).task_noun)
    return count + (f" ({', '.join(config.games)})" if len(config.games) <= 5 else "")


def _duration(config: Config, steps: int, before: dict[str, Any]) -> str:
    """Return how long `steps` will take at the rate of earlier launches, or of a short trial."""
    if not steps:
        return "nothing is left to do"
    rate, source = _rate_before(before), "at the rate so far"
    if rate is None and steps < WORTH_A_TRIAL:
        return "less than a minute, plus some seconds to start"
    if rate is None and _follows_nodes(config):
        return "depends on the nodes; `status` shows it after the first tasks"
    if rate is None:
        rate, source = _rate_here(config)
        if rate is None:
            return "unknown; `status` shows it after the first tasks"
    return f"about {_words(steps / rate)}, {source}"


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


def _print(rows: Sequence[tuple[str, str]]) -> None:
    for title, text in rows:
        print(f"  {title:<10} {printable(text)}" if title else printable(text))
    print(flush=True)
