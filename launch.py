"""The command line: train | evaluate | status | plot | export.

python launch.py train --preset quick               three Atari games on this machine, a few minutes
python launch.py train --help                       every setting, with its default
python launch.py evaluate --init runs/demo --init scratch     does it help, on games it never saw?
python launch.py status --run-dir runs/demo         what a run is doing, or has done
python launch.py export --init runs/demo/init.safetensors --to sb3 --out policy
                                                    the initialization for another library
"""

from __future__ import annotations

import argparse
import difflib
import json
import shlex
import sys
import time
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any, NoReturn, get_args

from leap_dist import config as configuration
from leap_dist import measure, reading, report, run_directory, working_copy
from leap_dist.config import ConfigError
from leap_dist.files import CorruptFile
from leap_dist.journal import Ledger
from leap_dist.presets import PRESET_HELP, PRESETS
from leap_dist.redaction import redact
from leap_dist.remote_lock import LockLost
from leap_dist.run_lock import RunDirectoryBusy
from leap_dist.settings import Config
from leap_dist.storage import is_url

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

_TRAIN_HELP = """\
Meta-trains an initialization: workers learn Atari games from it, the server pulls it forward along their paths.

examples:
  python launch.py train --preset quick
  python launch.py train --preset fast --games pong,freeway --workers 4 --run-dir runs/mine
  python launch.py train --preset paper --address auto --run-dir /shared/leap      (on a running Ray cluster)
  python launch.py train --preset fast --run-dir s3://bucket/mine                  (kept in object storage)
  python launch.py train --run-dir runs/mine --resume --meta-updates 200

presets:
""" + "".join(f"  {name:<10} {text}\n" for name, text in PRESET_HELP.items())

_EVALUATE_HELP = """\
Trains fresh agents from each initialization on the same games with the same seeds, and compares how they learn.

examples:
  python launch.py evaluate --init runs/mine --init scratch --out reports/mine
  python launch.py evaluate --init leap=runs/a --init tuned=runs/b/init.safetensors --init scratch \\
      --games breakout,qbert --seeds 3 --steps 200000 --out reports/three

An --init is a run directory, an init.safetensors, or scratch; LABEL= before it names its curve. Agents are set up as in
the first one's own run, unless --preset, --config or flags say otherwise. The same command again goes on where it was
left; with other arms, games or more seeds it adds to what is there.
"""

_STUDY_HELP = """\
Meta-trains with every meta-learner on the same tasks and budget, and tests each initialization on what was held out.

examples:
  python launch.py study --tasks omniglot --data-dir data --out studies/omniglot
  python launch.py study --tasks omniglot --arms leap reptile none --groups 10 20 --meta-updates 50 --out studies/small
  python launch.py study --tasks multi-cv --games mnist notmnist cifar10 --arms leap none --out studies/multi-cv
  python launch.py plot --run-dir studies/omniglot              (table and pictures of what there is)

The same command again goes on where it was left; with other arms, groups or more seeds it adds to what is there.
Several may work in one directory.
"""

_METAVARS: dict[Any, str] = {int: "N", float: "X", bool: "yes|no", str: "TEXT", tuple[str, ...]: "NAME"}

_SHORTER = {"server.on_lost": ("--on-lost",), "task_steps": ("--steps",)}

_EXIT_CODES = """\
exit codes: 0 done; 1 training could not go on (the summary says why); 2 bad input, nothing was started;
            130 interrupted by SIGINT or SIGTERM, everything accepted is saved: continue with --resume
"""


class _Parser(argparse.ArgumentParser):
    """argparse, but with one-line errors that name the nearest flag."""

    def error(self, message: str) -> NoReturn:
        _complain(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            near = difflib.get_close_matches(flag, getattr(known, "flags", ()), n=1, cutoff=0.5)
            near = near or [f for f in getattr(known, "flags", ()) if f.endswith("." + flag.lstrip("-"))][:1]
            _complain(f"{flag}: no such flag" + (f"; did you mean {near[0]}?" if near else ""))
        return known


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Returns the exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        code: int = parsed.command(parsed)
    except (ConfigError, RunDirectoryBusy, CorruptFile) as error:
        _complain(str(error))
    except KeyboardInterrupt:
        print("\nstopped at once; everything accepted is on disk, --resume goes on from there", file=sys.stderr)
        return INTERRUPTED
    except LockLost as error:
        print(f"launch.py: error: {error}", file=sys.stderr)
        return FAILED
    return code


def _complain(message: str) -> NoReturn:
    print(f"launch.py: error: {' '.join(redact(message).split())}", file=sys.stderr)
    raise SystemExit(BAD_INPUT)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="launch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="train | evaluate | status | plot | export")

    train = commands.add_parser(
        "train",
        help="meta-train an initialization",
        usage="launch.py train [--preset NAME] [--config FILE] "
        "[--run-dir DIR] [--resume] [--profile] [--SETTING VALUE ...]",
        description=_TRAIN_HELP,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    run = train.add_argument_group("the run")
    run.add_argument("--preset", help=f"where all settings start from: {', '.join(PRESETS)} (default: paper)")
    run.add_argument("--config", type=Path, metavar="FILE", help="YAML file with settings, laid over the preset")
    run.add_argument(
        "--run-dir",
        type=working_copy.location,
        metavar="DIR",
        help="where it is written: a directory, or a URL as in s3://bucket/run (default: runs/PRESET-TIME)",
    )
    run.add_argument("--resume", action="store_true", help="go on with the run in --run-dir, with its own settings")
    run.add_argument(
        "--profile", action="store_true", help="write each worker's trace and time breakdown to DIR/profile"
    )
    flags = _add_settings(train)
    train.set_defaults(command=_train, flags=[*flags, "--preset", "--config", "--run-dir", "--resume", "--profile"])

    _add_evaluate(commands)
    _add_study(commands)
    status = commands.add_parser("status", help="what a run is doing, or has done", allow_abbrev=False)
    status.add_argument("--run-dir", type=working_copy.location, required=True, metavar="DIR")
    status.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    status.set_defaults(command=_status, flags=["--run-dir", "--json"])

    plot = commands.add_parser(
        "plot", help="draw a run's progress.png, or an evaluation's report, anew from the files", allow_abbrev=False
    )
    plot.add_argument(
        "--run-dir", type=working_copy.location, required=True, metavar="DIR", help="of a run, or of an evaluation"
    )
    plot.add_argument("--out", type=Path, metavar="FILE", help="of a run: where to (default: DIR/progress.png)")
    plot.set_defaults(command=_plot, flags=["--run-dir", "--out"])

    _add_export(commands)
    return parser


def _directory(text: str) -> Path:
    """For what is not kept at a URL."""
    if is_url(text):
        _complain("out: a URL is for runs only; give a directory on this machine, and copy it afterwards")
    return Path(text)


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="compare initializations on held-out games",
        usage="launch.py evaluate --init [LABEL=]FILE|scratch [--init ...] [--games NAME ...] [--seeds N] [--steps N] "
        "[--out DIR] [--SETTING VALUE ...]",
        description=_EVALUATE_HELP,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    which = evaluate.add_argument_group("the comparison")
    which.add_argument("--init", action="append", required=True, metavar="[LABEL=]FILE|scratch", help="an arm")
    which.add_argument("--seeds", type=int, default=5, metavar="N", help="runs per arm and game (default: 5)")
    which.add_argument("--out", type=_directory, metavar="DIR", help="where to (default: reports/TIME)")
    which.add_argument("--preset", help=f"how agents are set up: {', '.join(PRESETS)} (default: as the first arm's)")
    which.add_argument("--config", type=Path, metavar="FILE", help="YAML file with settings")
    flags = _add_settings(evaluate, _OF_EVALUATIONS)
    evaluate.set_defaults(command=_evaluate, flags=[*flags, "--init", "--seeds", "--out", "--preset", "--config"])


def _add_study(commands: Any) -> None:
    study = commands.add_parser(
        "study",
        help="compare meta-learners on Omniglot or Multi-CV",
        usage="launch.py study --tasks omniglot|multi-cv --out DIR [--arms NAME ...] [--groups NAME ...] [--seeds N] "
        "[--with ARM:SETTING=VALUE ...] [--SETTING VALUE ...]",
        description=_STUDY_HELP,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    which = study.add_argument_group("the study")
    which.add_argument("--out", type=_directory, required=True, metavar="DIR", help="where to")
    which.add_argument("--arms", nargs="+", default=[], metavar="NAME", help="meta-learners, and none (default: all)")
    which.add_argument(
        "--groups", nargs="+", default=[], metavar="NAME",
        help="omniglot: numbers of pretraining alphabets (default: 4 10 20); multi-cv: data sets to hold out, one at a "
        "time (default: each of --games)",
    )  # fmt: skip
    which.add_argument("--seeds", type=int, default=3, metavar="N", help="of every arm in every group (default: 3)")
    which.add_argument("--test-steps", type=int, metavar="N", help="examples of a test (default: as in training)")
    which.add_argument(
        "--with", dest="of_arms", action="append", default=[], metavar="ARM:SETTING=VALUE", help="for one arm alone"
    )
    which.add_argument("--preset", default="paper", help="where all settings start from (default: paper)")
    which.add_argument("--config", type=Path, metavar="FILE", help="YAML file with settings, laid over the preset")
    flags = _add_settings(study)
    own = ["--out", "--arms", "--groups", "--seeds", "--test-steps", "--with", "--preset", "--config"]
    study.set_defaults(command=_study, flags=[*flags, *own])


_OF_EVALUATIONS = {
    "tasks", "games", "data_dir", "workers", "min_workers", "wait_for_nodes", "task_steps", "seed", "address",
    "insecure", "agent", "atari", "supervised", "worker", "server.lease_seconds", "server.storage",
}  # fmt: skip
"""Settings, and sections, that an evaluation has a use for."""


def _is_wanted(name: str, wanted: Container[str]) -> bool:
    """Whether a setting, or its section, is among `wanted`."""
    return name in wanted or name.split(".")[0] in wanted


def _add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="write an initialization for another library", allow_abbrev=False)
    export.add_argument(
        "--init", type=working_copy.location, required=True, metavar="FILE", help="init.safetensors of a run"
    )
    export.add_argument("--to", required=True, metavar="LIBRARY", help="sb3 (Stable-Baselines3), torch or cleanrl")
    export.add_argument("--out", type=_directory, required=True, metavar="DIR", help="where to; a new directory")
    export.add_argument(
        "--linear-seed",
        type=int,
        metavar="N",
        help="seed of a fresh linear layer, where only the convolutions were meta-learned (meta.shared convolutions)",
    )
    export.set_defaults(command=_export, flags=["--init", "--to", "--out", "--linear-seed"])


def _add_settings(parser: argparse.ArgumentParser, wanted: Container[str] | None = None) -> list[str]:
    """One flag for every setting, or those `wanted`; values stay text, `config.resolve` types and checks them."""
    groups: dict[str, Any] = {}
    flags = []
    for name, field, kind in configuration.fields():
        if name == "preset" or (wanted is not None and not _is_wanted(name, wanted)):
            continue
        section = name.rpartition(".")[0]
        if section not in groups:
            title = section or "what to train"
            groups[section] = parser.add_argument_group(title, configuration.section_help(section))
        flag = "--" + name.replace("_", "-")
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        groups[section].add_argument(
            flag,
            *_SHORTER.get(name, ()),
            dest=f"setting:{name}",
            const="yes" if kind is bool else None,
            metavar=_METAVARS.get(kind) or "{" + ",".join(get_args(kind)) + "}",
            nargs="+" if kind == tuple[str, ...] else "?" if kind is bool else None,
            help=f"{field.metadata['help']} (paper: {default})".replace("%", "%%"),
        )
        flags.append(flag)
    return flags


def _settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """The settings given as flags, by dotted name."""
    given = {name.removeprefix("setting:"): value for name, value in vars(parsed).items()
             if name.startswith("setting:") and value is not None}  # fmt: skip
    return {name: ",".join(value) if isinstance(value, list) else value for name, value in given.items()}


def _resolve(parsed: argparse.Namespace) -> tuple[Config, working_copy.Run]:
    """The configuration and the run that the flags ask for. Raises ConfigError."""
    if parsed.resume:
        if parsed.run_dir is None:
            raise ConfigError("resume: say which run with --run-dir")
        if parsed.preset or parsed.config:
            raise ConfigError("resume: a run keeps its preset and config; leave --preset and --config out")
        run = working_copy.open_run(parsed.run_dir, resume=True)
        with run.naming():
            config = run_directory.load_config(run.folder, _settings(parsed))
        for line in run_directory.changed_packages(run.folder):
            print(f"launch.py: warning: {line}", file=sys.stderr)
        return config, run
    loaded = configuration.read_yaml(parsed.config) if parsed.config else {}
    preset = parsed.preset or str(loaded.get("preset", "paper"))
    loaded.pop("preset", None)
    config = configuration.resolve(preset, loaded, _settings(parsed))
    return config, working_copy.open_run(parsed.run_dir or Path("runs") / f"{preset}-{_now()}", resume=False)


def _now() -> str:
    """For names of folders."""
    return time.strftime("%Y%m%d-%H%M%S")


def _train(parsed: argparse.Namespace) -> int:
    config, run = _resolve(parsed)
    from leap_dist import driver  # slow to import, and no other command needs Ray

    driver.check_prerequisites(config)
    with run, run.naming():
        patience = run_directory.ORPHAN_SECONDS if parsed.resume else 0.0
        run_directory.prepare(run.folder, config, patience=patience)
        run.publish()
        return _meta_train(config, run, profile=parsed.profile)


def _meta_train(config: Config, run: working_copy.Run, *, profile: bool) -> int:
    from leap_dist import launching

    outcome, latest = launching.meta_train(config, run, profile=profile)
    _conclude(run, outcome, latest)
    if profile:
        _show_profiles(run)
    return {"done": DONE, "interrupted": INTERRUPTED}.get(outcome, FAILED)


def _evaluate(parsed: argparse.Namespace) -> int:
    from leap_dist import arms, evaluation

    if not 1 <= parsed.seeds <= 1000:
        raise ConfigError(f"seeds: {parsed.seeds} is not between 1 and 1000")
    given = _settings(parsed)
    loaded = configuration.read_yaml(parsed.config) if parsed.config else {}
    others = {name for name, *_ in configuration.fields() if name != "preset" and not _is_wanted(name, _OF_EVALUATIONS)}
    loaded = {name: value for name, value in loaded.items() if name not in others}  # of a file that is for training
    labels, files = arms.read(parsed.init)
    preset = parsed.preset or (str(loaded["preset"]) if "preset" in loaded else None)
    config = arms.resolve(given, loaded, arms.settings(files, {**loaded, **given}, preset))
    chosen = arms.arms(labels, files, config)
    out = parsed.out or Path("reports") / _now()
    if run_directory.exists(out) and not run_directory.holds_evaluation(out):
        raise ConfigError(f"out: {out} holds a training run; choose another")
    runs = evaluation.plan(chosen, config, parsed.seeds)
    evaluation.missing(runs, config, out)  # what stands against it is said before anything is written
    from leap_dist import driver, launching  # slow to import

    driver.check_prerequisites(config)
    run_directory.prepare(out, config, patience=run_directory.ORPHAN_SECONDS)
    arms.write(out, chosen)
    for note in arms.notes(chosen, config):
        print(f"launch.py: note: {note}", file=sys.stderr)
    left, _ = evaluation.missing(runs, config, out)
    if len(left) < len(runs):
        print(f"{len(runs) - len(left)} of {len(runs)} runs are in {out} already")
    outcome = "done"
    if left:
        outcome = launching.evaluate(config, runs, out)
    if any(out.glob("runs/*/*/*.json")):
        _report(out)
    if outcome != "done":
        print(f"\n{outcome}: the same command goes on with the runs that are missing")
    return {"done": DONE, "interrupted": INTERRUPTED}.get(outcome, FAILED)


def _report(out: Path) -> None:
    """Builds an evaluation's report anew, and says where it is."""
    if _tasks_of(out) != Config.tasks:
        from leap_dist.study.evaluation import build
    else:
        from leap_dist.transfer.report import build
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
    loaded.pop("preset", None)
    planned = plan.make(
        preset=parsed.preset,
        given={**loaded, **_settings(parsed)},
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


def _holds_study(where: working_copy.Location) -> bool:
    return not reading.is_remote(where) and (Path(where) / "study.json").exists()


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


def _conclude(run: working_copy.Run, outcome: str, summary: dict[str, Any]) -> None:
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
        f"{measure.of_summary(summary).steps} in {summary['wall_seconds']:.0f} s\n"
        f"  initialization  {run.shown}/init.safetensors\n"
        f"  picture         {picture}\n"
        f"  ledger          {run.shown}/ledger.jsonl\n"
        f"  curves          {shlex.join([_tensorboard(), '--logdir', f'{run.shown}/tensorboard'])}"
    )
    if outcome != "done":
        print(f"  to go on        python launch.py train --run-dir {shlex.quote(run.shown)} --resume")
        for alert in summary["alerts"][-3:] if outcome == "failed" else ():
            print(f"  why             {alert}")


def _show_profiles(run: working_copy.Run) -> None:
    """Where the workers' time went; the operators stay in the files."""
    for path in sorted((run.folder / "profile").glob("*.txt")):
        name, shares, *_ = path.read_text().split("\n\n")
        print(f"\n{name}\n{shares}")
    print(
        f"\n  traces          {run.shown}/profile/*.trace.json.gz   (open them at ui.perfetto.dev, or in chrome://tracing)"
    )


def _draw(run_dir: Path, path: Path, name: str) -> Path:
    lines, _ = Ledger(run_dir / "ledger.jsonl").read(0)
    report.progress_picture(lines, path, f"Leap meta-training: {name}")
    return path


def _status(parsed: argparse.Namespace) -> int:
    if _holds_study(parsed.run_dir):
        from leap_dist.study import progress

        found = progress.progress(Path(parsed.run_dir))
        print(json.dumps(found) if parsed.json else progress.text(found))
        return DONE
    with reading.folder_of(parsed.run_dir, "config.yaml", "summary.json") as run_dir:
        summary = run_directory.read_summary(run_dir)
    if summary["state"] not in run_directory.ENDED and not reading.is_alive(parsed.run_dir):
        summary["state"] = "died"
    if parsed.json:
        print(json.dumps(summary))
    else:
        from rich.console import Console

        from leap_dist import live_table

        try:
            table = live_table.render(summary)
        except Exception as error:  # whatever a summary with wrong content runs into
            raise ConfigError(
                f"run-dir: {parsed.run_dir}/summary.json is damaged, or of another version: {str(error)[:200]}"
            ) from None
        Console().print(table)
    return DONE


def _plot(parsed: argparse.Namespace) -> int:
    if reading.is_remote(parsed.run_dir) and parsed.out is None:
        raise ConfigError("out: say with --out where the picture of a run at a URL is to go")
    if _holds_study(parsed.run_dir):
        _study_report(Path(parsed.run_dir))
        return DONE
    with reading.folder_of(parsed.run_dir, "config.yaml", "ledger.jsonl") as run_dir:
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
    from leap_dist.export import export

    init = reading.initialization(parsed.init) if isinstance(parsed.init, working_copy.Url) else parsed.init
    with working_copy.naming(init, str(parsed.init)):
        names = export(init, parsed.to, parsed.out, linear_seed=parsed.linear_seed)
    print(f"{parsed.out}: {', '.join(names)}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
