"""The command line: what each command does. leap_dist/cli/parser.py has its flags."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from leap_dist.cli import parser
from leap_dist.config import loading as configuration
from leap_dist.config import metrics
from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.storage import location, reader, remote_run, run_directory
from leap_dist.storage.atomic import CorruptFile
from leap_dist.storage.ledger import Ledger
from leap_dist.storage.remote_lock import LockLost
from leap_dist.storage.run_lock import RunDirectoryBusy
from leap_dist.telemetry import pictures

DONE, FAILED, INTERRUPTED = 0, 1, 130


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Returns the exit code."""
    parsed = parser.parser(COMMANDS).parse_args(arguments)
    try:
        code: int = parsed.command(parsed)
    except (ConfigError, RunDirectoryBusy, CorruptFile) as error:
        parser.complain(str(error))
    except KeyboardInterrupt:
        print("\nstopped at once; everything accepted is on disk, --resume goes on from there", file=sys.stderr)
        return INTERRUPTED
    except LockLost as error:
        print(f"launch.py: error: {error}", file=sys.stderr)
        return FAILED
    return code


def _resolve(parsed: argparse.Namespace) -> tuple[Config, location.Run]:
    """The configuration and the run that the flags ask for. Raises ConfigError."""
    if parsed.resume:
        if parsed.run_dir is None:
            raise ConfigError("resume: say which run with --run-dir")
        if parsed.preset or parsed.config:
            raise ConfigError("resume: a run keeps its preset and config; leave --preset and --config out")
        run = remote_run.open_run(parsed.run_dir, resume=True)
        with run.translated_errors():
            config = run_directory.load_config(run.folder, parser.settings(parsed))
        for line in run_directory.changed_packages(run.folder):
            print(f"launch.py: warning: {line}", file=sys.stderr)
        return config, run
    loaded = configuration.read_yaml(parsed.config) if parsed.config else {}
    preset = parsed.preset or str(loaded.get("preset", "paper"))
    loaded.pop("preset", None)
    config = configuration.resolve(preset, loaded, parser.settings(parsed))
    return config, remote_run.open_run(parsed.run_dir or Path("runs") / f"{preset}-{_now()}", resume=False)


def _now() -> str:
    """For names of folders."""
    return time.strftime("%Y%m%d-%H%M%S")


def _train(parsed: argparse.Namespace) -> int:
    config, run = _resolve(parsed)
    from leap_dist.driver import driver  # slow to import, and no other command needs Ray

    driver.check_prerequisites(config)
    with run, run.translated_errors():
        patience = run_directory.ORPHAN_SECONDS if parsed.resume else 0.0
        run_directory.prepare(run.folder, config, patience=patience)
        run.publish()
        return _meta_train(config, run, profile=parsed.profile)


def _meta_train(config: Config, run: location.Run, *, profile: bool) -> int:
    from leap_dist.driver import reporting

    outcome, latest = reporting.train(config, run, profile=profile)
    _conclude(run, outcome, latest)
    if profile:
        _show_profiles(run)
    return {"done": DONE, "interrupted": INTERRUPTED}.get(outcome, FAILED)


def _evaluate(parsed: argparse.Namespace) -> int:
    from leap_dist.evaluation import initializations, server

    if not 1 <= parsed.seeds <= 1000:
        raise ConfigError(f"seeds: {parsed.seeds} is not between 1 and 1000")
    given = parser.settings(parsed)
    loaded = configuration.read_yaml(parsed.config) if parsed.config else {}
    others = {name for name, *_ in configuration.fields()} - {"preset"}
    others = {name for name in others if not parser.is_of_evaluations(name)}
    loaded = {name: value for name, value in loaded.items() if name not in others}  # of a file that is for training
    labels, files = initializations.read(parsed.init)
    preset = parsed.preset or (str(loaded["preset"]) if "preset" in loaded else None)
    config = initializations.resolve(given, loaded, initializations.settings(files, {**loaded, **given}, preset))
    chosen = initializations.arms(labels, files, config)
    out = parsed.out or Path("reports") / _now()
    if run_directory.exists(out) and not run_directory.holds_evaluation(out):
        raise ConfigError(f"out: {out} holds a training run; choose another")
    runs = server.plan(chosen, config, parsed.seeds)
    server.missing(runs, config, out)  # what stands against it is said before anything is written
    from leap_dist.driver import driver, reporting  # slow to import

    driver.check_prerequisites(config)
    run_directory.prepare(out, config, patience=run_directory.ORPHAN_SECONDS)
    initializations.write(out, chosen)
    for note in initializations.notes(chosen, config):
        print(f"launch.py: note: {note}", file=sys.stderr)
    left, _ = server.missing(runs, config, out)
    if len(left) < len(runs):
        print(f"{len(runs) - len(left)} of {len(runs)} runs are in {out} already")
    outcome = "done"
    if left:
        outcome = reporting.evaluate(config, runs, out)
    if any(out.glob("runs/*/*/*.json")):
        _report(out)
    if outcome != "done":
        print(f"\n{outcome}: the same command goes on with the runs that are missing")
    return {"done": DONE, "interrupted": INTERRUPTED}.get(outcome, FAILED)


def _report(out: Path) -> None:
    """Builds an evaluation's report anew, and says where it is."""
    if _tasks_of(out) != Config.tasks:
        from leap_dist.evaluation.report.images import build
    else:
        from leap_dist.evaluation.report.games import build
    for warning in _built(build, out):
        print(f"launch.py: note: {warning}", file=sys.stderr)
    print("\n" + "\n".join(f"  {title:<15} {text}" for title, text in _report_files(out)))


def _report_files(out: Path) -> Iterator[tuple[str, str]]:
    page = out / "report.html"
    yield "report", f"{page}   (and report.md)" if page.exists() else f"{out / 'report.md'}"
    yield "pictures", f"{out / 'figures'}"
    yield "numbers", f"{out / 'results.csv'}, {out / 'results.json'}"
    if (out / "tensorboard").exists():
        yield "curves", shlex.join([_tensorboard(), "--logdir", str(out / "tensorboard")])


def _tasks_of(out: Path) -> str:
    """What an evaluation's tasks are; Atari games where that cannot be read."""
    try:
        return str(configuration.read_yaml(out / "config.yaml").get("tasks", Config.tasks))
    except ConfigError:
        return Config.tasks


def _study(parsed: argparse.Namespace) -> int:
    from leap_dist.study import plan, run  # slow to import

    loaded = configuration.read_yaml(parsed.config) if parsed.config else {}
    planned = plan.make(
        preset=parsed.preset or str(loaded.get("preset", "paper")),
        given={**{n: v for n, v in loaded.items() if n != "preset"}, **parser.settings(parsed)},
        arms=[arm for text in parsed.arms for arm in text.split(",")],
        groups=[group for text in parsed.groups for group in text.split(",")],
        seeds=parsed.seeds,
        of_arms=plan.parse_of_arms(parsed.of_arms),
        test_steps=parsed.test_steps,
    )
    outcome = run.run(planned, parsed.out, lambda text: print(text, flush=True))
    if outcome == "done":
        _study_report(parsed.out)
    else:
        print(f"\n{outcome}: the same command goes on with what is missing")
    return {"done": DONE, "interrupted": INTERRUPTED}.get(outcome, FAILED)


def _holds_study(where: location.Location) -> bool:
    return not reader.is_remote(where) and (Path(where) / "study.json").exists()


def _study_report(out: Path) -> None:
    """Builds a study's tables and pictures anew, and says where they are."""
    from leap_dist.study.report import build

    for warning in _built(build, out):
        print(f"launch.py: note: {warning}", file=sys.stderr)
    print(
        f"\n  tables          {out / 'table.md'}\n"
        f"  pictures        {out / 'figures'}\n"
        f"  numbers         {out / 'results.csv'}, {out / 'results.json'}"
    )


def _built(build: Callable[[Path], list[str]], out: Path) -> list[str]:
    try:
        return build(out)
    except OSError as error:
        raise ConfigError(f"out: the report in {out} cannot be written: {error}") from None


def _tensorboard() -> str:
    """The command that belongs to this Python."""
    path = Path(sys.executable).with_name("tensorboard")
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _conclude(run: location.Run, outcome: str, summary: dict[str, Any]) -> None:
    """Draws the picture, and says what there is and how to look at it.

    The summary is the one that was shown last, not the one on disk: a full disk may hold an older one, or none.
    """
    try:
        _draw(run.folder, run.folder / "progress.png", run.folder.name if run.remote is None else run.shown)
        picture = f"{run.shown}/progress.png"
    except OSError as error:
        picture = f"could not be written: {error}"
    print(
        f"\n{outcome}: {summary['tasks']} of {summary['tasks_wanted']} tasks, {summary['meta_updates']} meta-updates, "
        f"{summary['contributions_applied']} contributions, {summary['agent_steps']:,} "
        f"{metrics.for_summary(summary).step_unit} in {summary['wall_seconds']:.0f} s\n"
        f"  initialization  {run.shown}/init.safetensors\n"
        f"  picture         {picture}\n"
        f"  ledger          {run.shown}/ledger.jsonl\n"
        f"  curves          {shlex.join([_tensorboard(), '--logdir', f'{run.shown}/tensorboard'])}"
    )
    if outcome != "done":
        print(f"  to go on        python launch.py train --run-dir {shlex.quote(run.shown)} --resume")
        for alert in summary["alerts"][-3:] if outcome == "failed" else ():
            print(f"  why             {alert}")


def _show_profiles(run: location.Run) -> None:
    """Where the workers' time went; the operators stay in the files."""
    for path in sorted((run.folder / "profile").glob("*.txt")):
        name, shares, *_ = path.read_text().split("\n\n")
        print(f"\n{name}\n{shares}")
    print(
        f"\n  traces          {run.shown}/profile/*.trace.json.gz   (open them at ui.perfetto.dev, or in chrome://tracing)"
    )


def _draw(run_dir: Path, path: Path, name: str) -> Path:
    lines, _ = Ledger(run_dir / "ledger.jsonl").read(0)
    pictures.progress_picture(lines, path, f"Leap meta-training: {name}")
    return path


def _status(parsed: argparse.Namespace) -> int:
    if _holds_study(parsed.run_dir):
        from leap_dist.study import progress

        found = progress.progress(Path(parsed.run_dir))
        print(json.dumps(found) if parsed.json else progress.text(found))
        return DONE
    with reader.local_copy(parsed.run_dir, "config.yaml", "summary.json") as run_dir:
        summary = run_directory.read_summary(run_dir)
    if summary["state"] not in run_directory.ENDED and not reader.is_alive(parsed.run_dir):
        summary["state"] = "died"
    if parsed.json:
        print(json.dumps(summary))
    else:
        from rich.console import Console

        from leap_dist.telemetry import terminal

        try:
            table = terminal.render(summary)
        except Exception as error:  # whatever a summary with wrong content runs into
            raise ConfigError(
                f"run-dir: {parsed.run_dir}/summary.json is damaged, or of another version: {str(error)[:200]}"
            ) from None
        Console().print(table)
    return DONE


def _plot(parsed: argparse.Namespace) -> int:
    if reader.is_remote(parsed.run_dir) and parsed.out is None:
        raise ConfigError("out: say with --out where the picture of a run at a URL is to go")
    if _holds_study(parsed.run_dir):
        _study_report(Path(parsed.run_dir))
        return DONE
    with reader.local_copy(parsed.run_dir, "config.yaml", "ledger.jsonl") as run_dir:
        if not run_directory.exists(run_dir):
            raise ConfigError(f"run-dir: {run_dir} holds no run")
        run_directory.refuse_links(run_dir)
        if run_directory.holds_evaluation(run_dir):
            _report(run_dir)
            return DONE
        try:
            print(_draw(run_dir, parsed.out or run_dir / "progress.png", run_dir.name))
        except OSError as error:
            raise ConfigError(f"run-dir: the picture of {run_dir} cannot be drawn: {error}") from None
    return DONE


def _export(parsed: argparse.Namespace) -> int:
    from leap_dist.weights.export import export

    init = reader.cached_initialization(parsed.init) if isinstance(parsed.init, location.Url) else parsed.init
    with location.translated_errors(init, str(parsed.init)):
        names = export(init, parsed.to, parsed.out, linear_seed=parsed.linear_seed)
    print(f"{parsed.out}: {', '.join(names)}")
    return DONE


COMMANDS: dict[str, parser.Command] = {
    "train": _train,
    "evaluate": _evaluate,
    "study": _study,
    "status": _status,
    "plot": _plot,
    "export": _export,
}
