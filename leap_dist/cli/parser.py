"""The commands and their flags, with one-line answers to mistakes."""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from leap_dist import __version__
from leap_dist.cli import console
from leap_dist.config import loading
from leap_dist.config.presets import PRESET_HELP, PRESETS
from leap_dist.config.validation import did_you_mean

MAIN = """\
Meta-learn initializations with Leap, on Atari games, Omniglot or Multi-CV.

{command} train --preset quick                                  three Atari games on this machine, a few minutes
{command} train --help                                          every setting, with its default
{command} evaluate --init runs/demo --init scratch              does it help, on games it never saw?
{command} study --tasks omniglot --out studies/omniglot         compare all meta-learners on alphabets
{command} status --run-dir runs/demo                            state of a run
{command} export --init runs/demo/init.safetensors --to sb3 --out policy
    (writes the initialization for another library)
"""

TRAIN = """\
Meta-train an initialization: workers learn Atari games from it, and the server pulls it forward along their paths.

examples:
  {command} train --preset quick
  {command} train --preset fast --games pong,freeway --workers 4 --run-dir runs/mine
  {command} train --preset paper --address auto --run-dir /shared/leap      (on a running Ray cluster)
  {command} train --preset fast --run-dir s3://bucket/mine                  (kept in object storage)
  {command} train --run-dir runs/mine --resume --meta-updates 200

presets:
""" + "".join(f"  {name:<10} {text}\n" for name, text in PRESET_HELP.items())

EVALUATE = """\
Train new agents from each initialization, on the same games with the same seeds, and compare how they learn.

examples:
  {command} evaluate --init runs/mine --init scratch --out reports/mine
  {command} evaluate --init leap=runs/a --init tuned=runs/b/init.safetensors --init scratch \\
      --games breakout,qbert --seeds 3 --steps 200000 --out reports/three

The agents get the settings of the run of the first --init, unless --preset, --config or flags say otherwise. The same
command continues an interrupted evaluation; with other initializations or games, or more seeds, it adds to the results.
"""

STUDY = """\
Meta-train with every meta-learner on the same tasks and budget, and test each initialization on held-out tasks.

examples:
  {command} study --tasks omniglot --data-dir data --out studies/omniglot
  {command} study --tasks omniglot --arms leap reptile none --groups 10 20 --meta-updates 50 --out studies/small
  {command} study --tasks multi-cv --games mnist notmnist cifar10 --arms leap none --out studies/multi-cv
  {command} plot --run-dir studies/omniglot              (tables and figures of the results so far)

The same command continues an interrupted study; with other arms or groups, or more seeds, it adds to the results.
Several processes may work on one study.
"""

EXIT_CODES = """\
exit codes: 0 done; 1 training could not go on (the summary has the reason); 2 bad input, nothing was started;
            130 interrupted by SIGINT or SIGTERM, everything accepted is saved: continue with --resume
"""


NAMES = ("train", "evaluate", "study", "status", "plot", "export")
"""The commands."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

_METAVARS: dict[Any, str] = {int: "N", float: "X", bool: "yes|no", str: "TEXT", tuple[str, ...]: "NAME"}

_SHORT_FLAGS = {"server.on_lost": ("--on-lost",), "task_steps": ("--steps",)}

_FOR_EVALUATIONS = {
    "tasks", "games", "data_dir", "workers", "min_workers", "wait_for_nodes", "task_steps", "seed", "address",
    "insecure", "agent", "atari", "gymnasium", "supervised", "worker", "server.lease_seconds", "server.storage",
}  # fmt: skip
"""Settings, and whole sections of settings, that have a meaning for evaluations."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line (by default, that of this process).

    Values of settings remain text; `settings` returns them, and `leap_dist.config.loading` checks them. A mistake ends
    the program with one line and exit code 2.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and not given[0].startswith("-") and given[0] not in NAMES:
        choices = f"; choose from {', '.join(NAMES)}"
        console.complain(f"{given[0][:80]}: no such command{did_you_mean(given[0], NAMES) or choices}")
    parsed, unknown = build(console.program()).parse_known_args(given)
    if unknown:
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("-"):
            console.complain(f"{flag[:80]}: unexpected argument; flags begin with --")
        console.complain(f"{flag[:80]}: no such flag{did_you_mean(flag, parsed.flags)}")
    return parsed


def settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return the settings given as flags, by dotted name."""
    given = {name.removeprefix("setting:"): value for name, value in vars(parsed).items()
             if name.startswith("setting:") and value is not None}  # fmt: skip
    return {name: ",".join(value) if isinstance(value, list) else value for name, value in given.items()}


def is_for_evaluations(name: str) -> bool:
    """Return whether a setting has a meaning for evaluations."""
    return _is_in(name, _FOR_EVALUATIONS)


def _is_in(name: str, wanted: Container[str]) -> bool:
    """Return whether a setting, or its whole section, is in `wanted`."""
    return name in wanted or name.split(".")[0] in wanted


class _Parser(argparse.ArgumentParser):
    """An argument parser that answers mistakes in one line."""

    def error(self, message: str) -> NoReturn:
        console.complain(message.removeprefix("argument "))


class _Once(argparse.Action):
    """Store a value, or True for a flag that takes none, and refuse a second one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        seen = vars(namespace).setdefault("seen", set())
        if self.dest in seen:
            console.complain(f"{option_string}: given twice; give it once")
        seen.add(self.dest)
        setattr(namespace, self.dest, True if self.nargs == 0 else values)


@functools.cache
def build(program: str) -> argparse.ArgumentParser:
    """Return the parser of the whole command line, for a program of this name."""
    parser = _Parser(prog=program, description=_text(MAIN), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"leap-dist {__version__}")
    commands = parser.add_subparsers(required=True, dest="command", metavar=" | ".join(NAMES))
    for add in (_add_train, _add_evaluate, _add_study, _add_status, _add_plot, _add_export):
        command = add(commands)
        command.set_defaults(flags=[flag for flag in command._option_string_actions if flag.startswith("--")])
    return parser


def _text(text: str) -> str:
    return text.replace("{command}", console.command())


def _add_command(commands: Any, name: str, title: str, **more: Any) -> _Parser:
    made: _Parser = commands.add_parser(
        name, help=title, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **more
    )
    made.register("action", None, _Once)
    return made


def _add_train(commands: Any) -> _Parser:
    train = _add_command(
        commands,
        "train",
        "meta-train an initialization",
        usage="%(prog)s [--preset NAME] [--config FILE] [--run-dir DIR] [--resume] [--profile] [--SETTING VALUE ...]",
        description=_text(TRAIN),
        epilog=EXIT_CODES,
    )
    run = train.add_argument_group("the run")
    _add_preset(run, "all settings", "paper")
    run.add_argument(
        "--run-dir",
        type=_location,
        metavar="DIR",
        help="output directory, or a URL such as s3://bucket/run (default: runs/PRESET-TIME)",
    )
    run.add_argument("--resume", nargs=0, default=False, help="continue the run in --run-dir, with its own settings")
    run.add_argument(
        "--profile", nargs=0, default=False, help="write a trace and a time breakdown of each worker to DIR/profile"
    )
    _add_settings(train)
    return train


def _add_evaluate(commands: Any) -> _Parser:
    evaluate = _add_command(
        commands,
        "evaluate",
        "compare initializations on held-out games",
        usage="%(prog)s --init [LABEL=]FILE|scratch [--init ...] [--games NAME ...] [--seeds N] [--steps N] "
        "[--out DIR] [--SETTING VALUE ...]",
        description=_text(EVALUATE),
        epilog=EXIT_CODES,
    )
    comparison = evaluate.add_argument_group("the comparison")
    comparison.add_argument(
        "--init",
        type=_initialization,
        action="append",
        required=True,
        metavar="[LABEL=]FILE|scratch",
        help="initialization to evaluate: a file, a run directory, or `scratch`; repeat for more; prefix with LABEL= "
        "to name it",
    )
    comparison.add_argument(
        "--seeds", type=_whole_number, default=5, metavar="N", help="number of runs per arm and game (default: 5)"
    )
    comparison.add_argument("--out", type=_directory, metavar="DIR", help="output directory (default: reports/TIME)")
    _add_preset(comparison, "the agents' settings", "that of the first --init")
    _add_settings(evaluate, _FOR_EVALUATIONS)
    return evaluate


def _add_study(commands: Any) -> _Parser:
    study = _add_command(
        commands,
        "study",
        "compare meta-learners on Omniglot or Multi-CV",
        usage="%(prog)s --tasks omniglot|multi-cv --out DIR [--arms NAME ...] [--groups NAME ...] [--seeds N] "
        "[--with ARM:SETTING=VALUE ...] [--SETTING VALUE ...]",
        description=_text(STUDY),
        epilog=EXIT_CODES,
    )
    comparison = study.add_argument_group("the study")
    comparison.add_argument("--out", type=_directory, required=True, metavar="DIR", help="output directory")
    comparison.add_argument(
        "--arms",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="meta-learners to compare; `none` trains from a random initialization (default: all)",
    )
    comparison.add_argument(
        "--groups",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="omniglot: numbers of pretraining alphabets (default: 4 10 20); multi-cv: data sets to hold out, one at a "
        "time (default: each of --games)",
    )
    comparison.add_argument(
        "--seeds", type=_whole_number, default=3, metavar="N", help="number of seeds per arm and group (default: 3)"
    )
    comparison.add_argument(
        "--test-steps", type=_whole_number, metavar="N", help="examples in a test (default: as in training)"
    )
    comparison.add_argument(
        "--with",
        dest="of_arms",
        action="append",
        default=[],
        metavar="ARM:SETTING=VALUE",
        help="setting for one arm only; repeat for more",
    )
    _add_preset(comparison, "all settings", "paper")
    _add_settings(study)
    return study


def _add_status(commands: Any) -> _Parser:
    status = _add_command(commands, "status", "show the state of a run, an evaluation or a study")
    status.add_argument(
        "--run-dir", type=_location, required=True, metavar="DIR", help="directory or URL of the run, or of the others"
    )
    status.add_argument("--json", nargs=0, default=False, help="print one JSON object instead of a table")
    return status


def _add_plot(commands: Any) -> _Parser:
    plot = _add_command(commands, "plot", "draw progress.png, or the report of an evaluation or study, again")
    plot.add_argument(
        "--run-dir", type=_location, required=True, metavar="DIR", help="directory of a run, an evaluation or a study"
    )
    plot.add_argument("--out", type=_directory, metavar="FILE", help="picture of the run (default: DIR/progress.png)")
    return plot


def _add_export(commands: Any) -> _Parser:
    export = _add_command(commands, "export", "write an initialization for another library")
    export.add_argument("--init", type=_location, required=True, metavar="FILE", help="path or URL of init.safetensors")
    export.add_argument("--to", required=True, metavar="LIBRARY", help="sb3 (Stable-Baselines3), torch or cleanrl")
    export.add_argument(
        "--out", type=_directory, required=True, metavar="DIR", help="output directory; must not exist yet"
    )
    export.add_argument(
        "--linear-seed",
        type=_whole_number,
        metavar="N",
        help="seed of a new linear layer, if only the convolutions were meta-learned (meta.shared convolutions)",
    )
    return export


def _add_preset(group: Any, purpose: str, default: str) -> None:
    group.add_argument(
        "--preset", metavar="NAME", help=f"preset for {purpose}: {', '.join(PRESETS)} (default: {default})"
    )
    group.add_argument("--config", type=_path, metavar="FILE", help="YAML file with settings, applied over the preset")


def _add_settings(parser: argparse.ArgumentParser, wanted: Container[str] | None = None) -> None:
    """Add a flag for every setting, or for those in `wanted`."""
    groups: dict[str, Any] = {}
    for name, field, kind in loading.fields():
        if name == "preset" or (wanted is not None and not _is_in(name, wanted)):
            continue
        section = name.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(section or "tasks and workers", loading.section_help(section))
        is_list = isinstance(field.default, tuple)
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        groups[section].add_argument(
            "--" + name.replace("_", "-"),
            *_SHORT_FLAGS.get(name, ()),
            dest=f"setting:{name}",
            action="extend" if is_list else None,
            const="yes" if kind is bool else None,
            metavar=_METAVARS.get(kind) or "{" + ",".join(get_args(kind)) + "}",
            nargs="+" if is_list else "?" if kind is bool else None,
            help=f"{field.metadata['help']} (default: {default})".replace("%", "%%"),
        )


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a whole number") from None


def _location(text: str) -> str:
    """Check a path or URL, and expand `~` in a path."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; name a file or directory")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is in a home directory that is not known; write it in full")
    return expanded


def _initialization(text: str) -> str:
    """Check [LABEL=]PATH, and expand `~` in the path. The shell expands it only at the start of a word."""
    label, equals, path = text.partition("=")
    if equals and not _URL.match(text):
        return f"{label}={_location(path)}"
    return _location(text)


def _path(text: str) -> Path:
    return Path(_location(text))


def _directory(text: str) -> Path:
    if _URL.match(text):
        console.complain("out: a URL is for runs only; give a directory on this machine, and copy it afterwards")
    return _path(text)
