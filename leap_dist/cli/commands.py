"""The commands besides `train`: evaluate, study, status, plot and export. Each returns its exit code."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_dist.cli import completion, console, listings, named_files, parser, setting_flags
from leap_dist.cli import enjoy as watch
from leap_dist.config import loading
from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.config.validation import did_you_mean
from leap_dist.driver.signals import check_stop
from leap_dist.telemetry.escaping import printable, printable_tree

# Everything else is imported where it is used, so that mistakes in flags are reported at once.
if TYPE_CHECKING:
    from leap_dist.evaluation.initializations import Arm
    from leap_dist.storage.location import Run


def training(parsed: argparse.Namespace) -> tuple[Config, Run]:
    """Return the configuration and the run that `train` was asked for. Raises ConfigError."""
    if parsed.resume and parsed.run_dir is None:
        raise ConfigError("resume: name the run with --run-dir")
    if parsed.resume is True and (parsed.preset or parsed.config):
        raise ConfigError("resume: a resumed run keeps its preset and config; omit --preset and --config")
    preset, loaded = file_settings(parsed)
    name, given = preset or setting_flags.DEFAULT_PRESET["train"], {**loaded, **parser.settings(parsed)}
    if parsed.resume is not True:
        config = loading.resolve(name, given)
    console.announce_loading()
    from leap_dist.storage import (  # slow to import, so only now
        location,
        manifest,
        new_directory,
        remote_run,
        run_directory,
    )

    if not parsed.run_dir:
        from leap_dist.driver import driver
        from leap_dist.weights.warm_start import initial_vector

        driver.check_prerequisites(config)  # a start that is refused leaves no directory behind
        initial_vector(config)
        where: location.Location = new_directory.create_unique(Path("runs") / f"{name}-{timestamp()}")
    else:
        where = location.location(parsed.run_dir)
    run = remote_run.open_run(where, resume=parsed.resume)
    if run.continues:
        with run.translated_errors():
            config = run_directory.load_config(run.folder, given, preset=preset)
        for line in manifest.changed_packages(run.folder):
            console.notice("warning", line)
    elif parsed.run_dir:
        from leap_dist.weights.warm_start import initial_vector

        initial_vector(config)  # raises errors before anything is written; a run that has begun needs it no more
    return config, run


def evaluation(parsed: argparse.Namespace) -> tuple[Config, list[Arm], Path]:
    """Return the configuration, the arms and the output directory that `evaluate` was asked for. Raises ConfigError."""
    if not 1 <= parsed.seeds <= 1000:
        raise ConfigError(f"seeds: {parsed.seeds:,} is not between 1 and 1,000")
    given = parser.settings(parsed)
    preset, loaded = file_settings(parsed)
    # The file may have been written for training: settings that do not apply to evaluations are ignored.
    loaded = {name: value for name, value in loaded.items() if loading.is_for_evaluations(name)}
    for name, value in given.items():
        loading.parse_value(name, value)
    if set(parsed.init) == {"scratch"} or "tasks" in given:  # otherwise the file says what kind of tasks it is for
        loading.resolve(preset or "paper", loaded, given)
    named_files.require_all(parsed.init)
    console.announce_loading()
    from leap_dist.evaluation import initializations
    from leap_dist.storage import new_directory, run_directory

    labels, files = initializations.read(parsed.init, parsed.out)
    base = initializations.settings(files, {**loaded, **given}, preset)
    config = initializations.resolve(given, loaded, base)
    arms = initializations.arms(labels, files, config)
    out = parsed.out or new_directory.create_unique(Path("reports") / timestamp(), "out")
    run_directory.require_place_of_evaluation(out)
    return config, arms, out


def file_settings(parsed: argparse.Namespace) -> tuple[str | None, dict[str, Any]]:
    """Return the preset that flags or the --config file name, and the file's other settings. Raises ConfigError.

    Prints a note about what is given twice, and so without effect.
    """
    loaded = loading.read_yaml(parsed.config) if parsed.config else {}
    in_file = loaded.pop("preset", None)
    preset = parsed.preset if parsed.preset is not None else in_file
    _note_repeated_games(parsed)
    if preset is not None and not str(preset).strip():
        raise ConfigError("preset: is empty; name a preset, or leave it out")
    if in_file is not None and preset != in_file:
        console.notice("note", f"--preset {preset} replaces preset {str(in_file)[:80]} of {parsed.config}")
    return None if preset is None else str(preset), loaded


def _note_repeated_games(parsed: argparse.Namespace) -> None:
    names = parser.settings(parsed).get("games", "").replace(",", " ").split()
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        console.notice("note", f"games: {', '.join(repeated)[:80]} is given more than once, and counts once")


def timestamp() -> str:
    """Return the local time as part of a file name."""
    return time.strftime("%Y%m%d-%H%M%S")


def game_steps(texts: Sequence[str]) -> dict[str, int]:
    """Return lengths of runs by game from texts of the form GAME=STEPS. Raises ConfigError."""
    found = {}
    for text in texts:
        game, _, steps = text.partition("=")
        if game in found:
            raise ConfigError(f"game_steps: {game[:40]!r} is given twice")
        try:
            found[game] = int(steps.replace("_", "").replace(",", ""))
        except ValueError:
            raise ConfigError(f"game_steps: {text[:60]!r} is not GAME=STEPS, as in pong=8000000") from None
    return found


def evaluate(parsed: argparse.Namespace) -> int:
    """Compare initializations on held-out tasks."""
    config, arms, out = evaluation(parsed)
    from leap_dist.cli import plan, results
    from leap_dist.driver import driver, reporting
    from leap_dist.evaluation import initializations, runs
    from leap_dist.storage import run_directory

    first = initializations.first_seed(parser.settings(parsed), config)
    planned = runs.plan(arms, config, parsed.seeds, first, game_steps(parsed.game_steps))
    runs.missing(planned, config, out)  # raises errors before anything is written
    driver.check_prerequisites(config)
    check_stop()  # before anything is written
    with run_directory.claimed(out, field="out"):
        run_directory.prepare(out, config, patience=run_directory.ORPHAN_SECONDS, field="out")
        initializations.write(out, arms)
        results.print_notes(notes := initializations.notes(arms, config))
        missing, _ = runs.missing(planned, config, out)
        rate = plan.print_evaluation(config, planned, missing, out).rate
        outcome = reporting.evaluate(config, planned, out, rate=rate) if missing else "done"
        if any(out.glob("runs/*/*/*.json")):
            results.print_evaluation(out, told=notes)
    if outcome != "done":
        print(f"\n{outcome}: the same command with --out {shlex.quote(str(out))} continues with the missing runs")
    return console.EXIT_CODES[outcome]


def study(parsed: argparse.Namespace) -> int:
    """Compare meta-learners on Atari, Omniglot or Multi-CV."""
    from leap_dist.storage import run_directory
    from leap_dist.study import games, plan, spec

    is_begun = os.path.exists(parsed.out / "study.json")
    if not is_begun:
        run_directory.require_free(parsed.out, "out")
    preset, loaded = file_settings(parsed)
    planned = plan.make(
        preset=preset or setting_flags.DEFAULT_PRESET["study"],
        given={**loaded, **parser.settings(parsed)},
        arms=[arm for text in parsed.arms for arm in text.split(",")],
        groups=[group for text in parsed.groups for group in text.split(",")],
        seeds=parsed.seeds,
        of_arms=plan.parse_of_arms(parsed.of_arms),
        test_steps=parsed.test_steps,
        test_seeds=parsed.test_seeds,
        game_steps=game_steps(parsed.game_steps),
        existing=spec.Study.read(parsed.out) if is_begun else None,
    )
    console.announce_loading()
    from leap_dist.cli import plan as printed
    from leap_dist.cli import results
    from leap_dist.study import run

    if planned.tests and printed.print_study(planned, parsed.out) > games.DAY and not parsed.yes:
        raise ConfigError("yes: this study takes more than a day on this machine; add --yes to start it")
    outcome = run.run(planned, parsed.out, lambda text: print(text, flush=True))
    if outcome == "done":
        results.print_study(parsed.out)
    else:
        print(f"\n{outcome}: the same command continues with what is missing")
    return console.EXIT_CODES[outcome]


def status(parsed: argparse.Namespace) -> int:
    """Show the state of a run, an evaluation or a study."""
    from leap_dist.cli import results
    from leap_dist.storage import location, reader, run_directory

    where = location.location(parsed.run_dir)
    if results.holds_study(where):
        from leap_dist.study import spec

        found = spec.progress(Path(where))
        print(json.dumps(found) if parsed.json else spec.progress_text(printable_tree(found)))
        return 0
    with reader.local_copy(where, "config.yaml", "summary.json") as run_dir:
        if reader.is_starting(where, run_dir):
            print(json.dumps({"state": "starting"}) if parsed.json else f"starting: {where} has not reported yet")
            return 0
        reader.require_summary(run_dir)
        summary = run_directory.read_summary(run_dir)
    if summary["state"] not in run_directory.ENDED and not reader.is_alive(where):
        summary["state"] = "died"
    if parsed.json:
        print(json.dumps(summary))
        return 0
    from rich.console import Console

    from leap_dist.telemetry import terminal

    try:
        advice = results.next_step(summary, str(where))
        table = terminal.render(printable_tree(summary), now=time.time())
    except Exception as error:  # the summary may hold anything
        raise ConfigError(
            f"run-dir: {where}/summary.json is damaged, or of another version: {str(error)[:200]}"
        ) from None
    console_of_rich = Console()
    with console_of_rich.capture() as captured:
        console_of_rich.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))
    if advice:
        print(f"{'next':<10}{printable(advice)}")  # not in the table, which would wrap a command
    return 0


def plot(parsed: argparse.Namespace) -> int:
    """Redraw the picture of a run, or rebuild the report of an evaluation or study."""
    from leap_dist.cli import results
    from leap_dist.storage import location, new_directory, reader, run_directory

    where = location.location(parsed.run_dir)
    if reader.is_remote(where) and parsed.out is None:
        raise ConfigError("out: name a file with --out, because the run is at a URL")
    if parsed.out is not None and not results.holds_study(where):
        _check_picture(parsed.out)
    if results.holds_study(where):
        _refuse_picture_flags(parsed, "a study")
        results.print_study(Path(where))
        return 0
    with reader.local_copy(where, "config.yaml", "ledger.jsonl") as run_dir:
        if not run_directory.exists(run_dir):
            raise ConfigError(f"run-dir: {run_dir} holds no run")
        run_directory.refuse_links(run_dir)
        if run_directory.holds_evaluation(run_dir):
            _refuse_picture_flags(parsed, "an evaluation")
            results.print_evaluation(run_dir)
            return 0
        try:
            name = "progress-phone.png" if parsed.phone else "progress.png"
            print(results.draw_progress(run_dir, parsed.out or run_dir / name, run_dir.name, phone=parsed.phone))
        except OSError as error:
            if parsed.out is not None:
                raise ConfigError(new_directory.cannot_be_written(parsed.out, error, "out")) from None
            raise ConfigError(f"run-dir: the picture of {run_dir} cannot be drawn: {error}") from None
    return 0


def _check_picture(out: Path) -> None:
    """Raise ConfigError unless a picture can have this path."""
    if out.suffix.lower() != ".png":
        raise ConfigError(f"out: {out} does not end in .png, the only format of the picture; give another name")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"out: there is no directory {out.parent}; make it first")


def _refuse_picture_flags(parsed: argparse.Namespace, kind: str) -> None:
    """Raise ConfigError for flags that apply only to the picture of a run."""
    for flag, given in (("out", parsed.out), ("phone", parsed.phone)):
        if given:
            raise ConfigError(f"{flag}: {parsed.run_dir} is {kind}, whose report has its own place; leave --{flag} out")


def export(parsed: argparse.Namespace) -> int:
    """Write an initialization in the format of another library."""
    from leap_dist.storage import location, reader

    if parsed.to not in parser.LIBRARIES:
        near = did_you_mean(parsed.to, parser.LIBRARIES)
        raise ConfigError(f"to: {parsed.to[:80]!r} is not one of {', '.join(parser.LIBRARIES)}{near}")
    where = location.location(parsed.init)
    if isinstance(where, Path):
        where = named_files.require(where)
    from leap_dist.weights.export import export as write

    init = reader.cached_initialization(where) if isinstance(where, location.Url) else where
    with location.translated_errors(init, str(where)):
        names = write(init, parsed.to, parsed.out, linear_seed=parsed.linear_seed)
    print(f"{parsed.out}: {', '.join(names)}")
    print(f"to check that it works: cd {shlex.quote(str(parsed.out))} && python {parser.LIBRARIES[parsed.to]}")
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "evaluate": evaluate,
    "study": study,
    "status": status,
    "plot": plot,
    "enjoy": watch.enjoy,
    "export": export,
    "games": lambda parsed: listings.games(parsed.name),
    "presets": lambda parsed: listings.presets(parsed.name),
    "weights": lambda parsed: listings.weights(parsed.name),
    "completion": completion.completion,
}
