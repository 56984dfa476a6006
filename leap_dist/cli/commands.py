"""The commands besides `train`: evaluate, study, status, plot and export. Each returns its exit code."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from leap_dist.cli import console, output, parser, resolve
from leap_dist.config.loading import ConfigError
from leap_dist.driver.signals import check_stop
from leap_dist.storage import location, reader, run_directory
from leap_dist.telemetry.escaping import printable_tree


def evaluate(parsed: argparse.Namespace) -> int:
    """Compare initializations on held-out tasks."""
    config, arms, out = resolve.evaluation(parsed)
    from leap_dist.driver import driver, reporting
    from leap_dist.evaluation import initializations, runs

    planned = runs.plan(arms, config, parsed.seeds, initializations.first_seed(parser.settings(parsed), config))
    runs.missing(planned, config, out)  # raises errors before anything is written
    driver.check_prerequisites(config)
    check_stop()  # before anything is written
    with run_directory.claimed(out):
        run_directory.prepare(out, config, patience=run_directory.ORPHAN_SECONDS)
        initializations.write(out, arms)
        output.print_notes(initializations.notes(arms, config))
        missing, _ = runs.missing(planned, config, out)
        if len(missing) < len(planned):
            print(f"{len(planned) - len(missing)} of {len(planned)} runs are in {out} already")
        outcome = reporting.evaluate(config, planned, out) if missing else "done"
        if any(out.glob("runs/*/*/*.json")):
            output.print_evaluation(out)
    if outcome != "done":
        print(f"\n{outcome}: the same command continues with the missing runs")
    return console.EXIT_CODES[outcome]


def study(parsed: argparse.Namespace) -> int:
    """Compare meta-learners on Omniglot or Multi-CV."""
    from leap_dist.study import plan, run

    preset, loaded = resolve.file_settings(parsed)
    planned = plan.make(
        preset=preset or "paper",
        given={**loaded, **parser.settings(parsed)},
        arms=[arm for text in parsed.arms for arm in text.split(",")],
        groups=[group for text in parsed.groups for group in text.split(",")],
        seeds=parsed.seeds,
        of_arms=plan.parse_of_arms(parsed.of_arms),
        test_steps=parsed.test_steps,
    )
    outcome = run.run(planned, parsed.out, lambda text: print(text, flush=True))
    if outcome == "done":
        output.print_study(parsed.out)
    else:
        print(f"\n{outcome}: the same command continues with what is missing")
    return console.EXIT_CODES[outcome]


def status(parsed: argparse.Namespace) -> int:
    """Show the state of a run, an evaluation or a study."""
    where = location.location(parsed.run_dir)
    if output.holds_study(where):
        from leap_dist.study import spec

        found = spec.progress(Path(where))
        print(json.dumps(found) if parsed.json else spec.progress_text(printable_tree(found)))
        return 0
    with reader.local_copy(where, "config.yaml", "summary.json") as run_dir:
        summary = run_directory.read_summary(run_dir)
    if summary["state"] not in run_directory.ENDED and not reader.is_alive(where):
        summary["state"] = "died"
    if parsed.json:
        print(json.dumps(summary))
        return 0
    from rich.console import Console

    from leap_dist.telemetry import terminal

    try:
        table = terminal.render(printable_tree(summary), now=time.time())
    except Exception as error:  # the summary may hold anything
        raise ConfigError(
            f"run-dir: {where}/summary.json is damaged, or of another version: {str(error)[:200]}"
        ) from None
    Console().print(table)
    return 0


def plot(parsed: argparse.Namespace) -> int:
    """Draw the picture of a run, or the report of an evaluation or study, again."""
    where = location.location(parsed.run_dir)
    if reader.is_remote(where) and parsed.out is None:
        raise ConfigError("out: name a file with --out, because the run is at a URL")
    if output.holds_study(where):
        output.print_study(Path(where))
        return 0
    with reader.local_copy(where, "config.yaml", "ledger.jsonl") as run_dir:
        if not run_directory.exists(run_dir):
            raise ConfigError(f"run-dir: {run_dir} holds no run")
        run_directory.refuse_links(run_dir)
        if run_directory.holds_evaluation(run_dir):
            output.print_evaluation(run_dir)
            return 0
        try:
            print(output.draw_progress(run_dir, parsed.out or run_dir / "progress.png", run_dir.name))
        except OSError as error:
            raise ConfigError(f"run-dir: the picture of {run_dir} cannot be drawn: {error}") from None
    return 0


def export(parsed: argparse.Namespace) -> int:
    """Write an initialization in the format of another library."""
    from leap_dist.weights.export import export as write

    where = location.location(parsed.init)
    init = reader.cached_initialization(where) if isinstance(where, location.Url) else where
    with location.translated_errors(init, str(where)):
        names = write(init, parsed.to, parsed.out, linear_seed=parsed.linear_seed)
    print(f"{parsed.out}: {', '.join(names)}")
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "evaluate": evaluate,
    "study": study,
    "status": status,
    "plot": plot,
    "export": export,
}
