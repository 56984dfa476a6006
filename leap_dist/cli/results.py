"""Print the result of a finished command, and where its files are."""

from __future__ import annotations

import json
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from leap_dist.cli import console
from leap_dist.config import loading, registry
from leap_dist.config.loading import ConfigError
from leap_dist.config.plurals import counted
from leap_dist.config.settings import Config
from leap_dist.storage import location, reader
from leap_dist.storage.ledger import Ledger
from leap_dist.telemetry.escaping import printable
from leap_dist.telemetry.progress import duration, tasks_done


def print_training(config: Config, run: location.Run, outcome: str, summary: dict[str, Any]) -> None:
    """Draw progress.png, and print the result of a training run and where its files are.

    The summary is the last one that was shown, not the one on disk: after a full disk, that may be older or missing.
    """
    try:
        draw_progress(run.folder, run.folder / "progress.png", run.folder.name if run.remote is None else run.shown)
        picture = f"{run.shown}/progress.png"
    except OSError as error:
        picture = f"could not be written: {error}"
    print(
        f"\n{outcome}: {tasks_done(summary)}, {counted(summary['meta_updates'], 'meta-update')}, "
        f"{summary['contributions_applied']:,} contributions, {summary['agent_steps']:,} "
        f"{registry.for_summary(summary).step_unit} in {duration(summary['wall_seconds'])}"
    )
    _print_files(
        ("initialization", f"{run.shown}/init.safetensors"),
        *((("best", f"{run.shown}/best.safetensors"),) if (run.folder / "best.safetensors").exists() else ()),
        ("picture", picture),
        ("ledger", f"{run.shown}/ledger.jsonl"),
        ("curves", _tensorboard_command(f"{run.shown}/tensorboard")),
    )
    if outcome != "done":
        _print_files(("to continue", console.resume_command(run.shown, config.gymnasium.modules)))
        _print_files(*(("reason", alert) for alert in summary["alerts"][-3:] if outcome == "failed"))


def print_finished(config: Config, run: location.Run, summary: dict[str, Any]) -> None:
    """Print that a run has nothing left to do, where its files are, and how to train longer."""
    made = summary["meta_updates"]
    print(
        f"nothing is left to do: the run has made {counted(made, 'meta-update')} (meta_updates: {config.meta_updates})"
    )
    longer = f"{console.resume_command(run.shown, config.gymnasium.modules)} --meta-updates {2 * made}"
    _print_files(("initialization", f"{run.shown}/init.safetensors"), ("to train longer", longer))


def next_step(summary: dict[str, Any], shown: str) -> str:
    """Return what the user may do next about a run or an evaluation in this state.

    Args:
        summary: its summary, in which the state "died" stands for a run without a driver.
        shown: its path or URL.
    """
    name, state = shlex.quote(shown), summary["state"]
    is_evaluation = summary.get("kind") == "evaluation"
    modules = summary.get("modules", ())
    again = f"the same command with --out {name}" if is_evaluation else console.resume_command(shown, modules)
    if state == "died":
        return f"its driver is gone; everything accepted is kept; continue with: {again}"
    if state == "failed":
        return f"see the alerts; once their cause is gone, continue with: {again}"
    if state == "interrupted":
        return f"continue with: {again}"
    if state == "done" and is_evaluation:
        return f"read {shown}/report.md"
    if state == "done":
        return f"{console.command()} evaluate --init {name} --init scratch{console.modules_flag(modules)}"
    if summary["quarantined"] or summary["quarantined_workers"]:
        return "the run continues without the quarantined games or workers; docs/reliability.md explains why"
    return ""


def print_profiles(run: location.Run) -> None:
    """Print how each worker spent its time. The operators are in the files only."""
    for path in sorted((run.folder / "profile").glob("*.txt")):
        name, shares, *_ = path.read_text().split("\n\n")
        print(f"\n{name}\n{shares}")
    print()
    _print_files(("traces", f"{run.shown}/profile/*.trace.json.gz   (open with ui.perfetto.dev or chrome://tracing)"))


def draw_progress(run_dir: Path, path: Path, name: str, *, phone: bool = False) -> Path:
    """Draw the picture of a run from its ledger, tall and narrow if `phone`. Raises OSError."""
    from leap_dist.telemetry import pictures  # matplotlib is slow to import

    lines = Ledger(run_dir / "ledger.jsonl").lines()
    format = pictures.PHONE if phone else pictures.SCREEN
    pictures.progress_picture(lines, path, f"Leap meta-training: {name}", format)
    return path


def print_evaluation(out: Path, told: Collection[str] = ()) -> None:
    """Build the report of an evaluation, and print where it is, and the notes that are not `told` yet.

    Raises ConfigError.
    """
    from leap_dist.evaluation import scoring
    from leap_dist.evaluation.report.build import build

    notes = _build(lambda folder: build(folder, scoring.of_tasks(_tasks_of(folder))), out)
    print_notes(note for note in notes if note not in told)
    print()
    print(textwrap.fill(json.loads((out / "results.json").read_text())["conclusion"], 80))
    print()
    _print_files(*_evaluation_files(out))


def _evaluation_files(out: Path) -> Iterator[tuple[str, str]]:
    page = out / "report.html"
    yield "report", f"{page}   (and report.md)" if page.exists() else f"{out / 'report.md'}"
    yield "pictures", f"{out / 'figures'}"
    yield "numbers", f"{out / 'results.csv'}, {out / 'results.json'}"
    if (out / "tensorboard").exists():
        yield "curves", _tensorboard_command(str(out / "tensorboard"))


def _tasks_of(out: Path) -> str:
    """Return the kind of tasks of an evaluation; the default if its configuration cannot be read."""
    try:
        return str(loading.read_yaml(out / "config.yaml").get("tasks", Config.tasks))
    except ConfigError:
        return Config.tasks


def holds_study(where: location.Location) -> bool:
    """Return whether a study was started in a directory."""
    return not reader.is_remote(where) and os.path.exists(Path(where) / "study.json")


def print_study(out: Path) -> None:
    """Build the tables and figures of a study, and print where they are. Raises ConfigError."""
    from leap_dist.study.report import build

    print_notes(_build(build, out))
    print()
    _print_files(
        ("tables", f"{out / 'table.md'}"),
        ("pictures", f"{out / 'figures'}"),
        ("numbers", f"{out / 'results.csv'}, {out / 'results.json'}"),
    )


def _build(build: Callable[[Path], list[str]], out: Path) -> list[str]:
    try:
        return build(out)
    except OSError as error:
        raise ConfigError(f"out: the report in {out} cannot be written: {error}") from None


def print_notes(notes: Iterable[str]) -> None:
    """Print each note to standard error, on its own line."""
    for note in notes:
        console.notice("note", note)


def _print_files(*rows: tuple[str, str]) -> None:
    for title, text in rows:
        print(f"  {title:<15} {printable(text)}")


def _tensorboard_command(logdir: str) -> str:
    """Return the command that shows `logdir`, with the TensorBoard of this Python environment."""
    path = Path(sys.executable).with_name("tensorboard")
    path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return shlex.join([str(path), "--logdir", logdir])
