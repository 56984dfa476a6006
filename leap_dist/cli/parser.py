"""What may be typed: every command with its flags, and one-line answers to what may not."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, NoReturn, get_args

from leap_dist.config import loading as configuration
from leap_dist.config.presets import PRESET_HELP, PRESETS
from leap_dist.storage import location
from leap_dist.storage.objects import is_url
from leap_dist.storage.redaction import redact

BAD_INPUT = 2
Command = Callable[[argparse.Namespace], int]

_HELP = """Meta-learns initializations with Leap, on Atari games, Omniglot or Multi-CV.

python launch.py train --preset quick               three Atari games on this machine, a few minutes
python launch.py train --help                       every setting, with its default
python launch.py evaluate --init runs/demo --init scratch     does it help, on games it never saw?
python launch.py study --tasks omniglot --out studies/omniglot          all meta-learners, on alphabets
python launch.py status --run-dir runs/demo         what a run is doing, or has done
python launch.py export --init runs/demo/init.safetensors --to sb3 --out policy
                                                    the initialization for another library
"""

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
        complain(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            near = difflib.get_close_matches(flag, getattr(known, "flags", ()), n=1, cutoff=0.5)
            near = near or [f for f in getattr(known, "flags", ()) if f.endswith("." + flag.lstrip("-"))][:1]
            complain(f"{flag}: no such flag" + (f"; did you mean {near[0]}?" if near else ""))
        return known


def complain(message: str) -> NoReturn:
    """Says on one line what is wrong, and ends the program."""
    print(f"launch.py: error: {' '.join(redact(message).split())}", file=sys.stderr)
    raise SystemExit(BAD_INPUT)


def parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Of the whole command line. `commands`: what runs each command, by its name; called with what was parsed."""
    whole = _Parser(prog="launch.py", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    below = whole.add_subparsers(required=True, metavar=" | ".join(commands))

    train = below.add_parser(
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
        type=location.location,
        metavar="DIR",
        help="where it is written: a directory, or a URL as in s3://bucket/run (default: runs/PRESET-TIME)",
    )
    run.add_argument("--resume", action="store_true", help="go on with the run in --run-dir, with its own settings")
    run.add_argument(
        "--profile", action="store_true", help="write each worker's trace and time breakdown to DIR/profile"
    )
    flags = _add_settings(train)
    own = ["--preset", "--config", "--run-dir", "--resume", "--profile"]
    train.set_defaults(command=commands["train"], flags=[*flags, *own])

    _add_evaluate(below, commands["evaluate"])
    _add_study(below, commands["study"])
    status = below.add_parser("status", help="what a run is doing, or has done", allow_abbrev=False)
    status.add_argument("--run-dir", type=location.location, required=True, metavar="DIR")
    status.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    status.set_defaults(command=commands["status"], flags=["--run-dir", "--json"])

    plot = below.add_parser(
        "plot", help="draw a run's progress.png, or an evaluation's report, anew from the files", allow_abbrev=False
    )
    plot.add_argument(
        "--run-dir", type=location.location, required=True, metavar="DIR", help="of a run, or of an evaluation"
    )
    plot.add_argument("--out", type=Path, metavar="FILE", help="of a run: where to (default: DIR/progress.png)")
    plot.set_defaults(command=commands["plot"], flags=["--run-dir", "--out"])

    _add_export(below, commands["export"])
    return whole


def _directory(text: str) -> Path:
    """For what is not kept at a URL."""
    if is_url(text):
        complain("out: a URL is for runs only; give a directory on this machine, and copy it afterwards")
    return Path(text)


def _add_evaluate(below: Any, command: Command) -> None:
    evaluate = below.add_parser(
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
    evaluate.set_defaults(command=command, flags=[*flags, "--init", "--seeds", "--out", "--preset", "--config"])


def _add_study(below: Any, command: Command) -> None:
    study = below.add_parser(
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
    which.add_argument("--preset", help="where all settings start from (default: paper)")
    which.add_argument("--config", type=Path, metavar="FILE", help="YAML file with settings, laid over the preset")
    flags = _add_settings(study)
    own = ["--out", "--arms", "--groups", "--seeds", "--test-steps", "--with", "--preset", "--config"]
    study.set_defaults(command=command, flags=[*flags, *own])


_OF_EVALUATIONS = {
    "tasks", "games", "data_dir", "workers", "min_workers", "wait_for_nodes", "task_steps", "seed", "address",
    "insecure", "agent", "atari", "supervised", "worker", "server.lease_seconds", "server.storage",
}  # fmt: skip
"""Settings, and sections, that an evaluation has a use for."""


def is_of_evaluations(name: str) -> bool:
    """Whether an evaluation has a use for a setting."""
    return _is_wanted(name, _OF_EVALUATIONS)


def _is_wanted(name: str, wanted: Container[str]) -> bool:
    """Whether a setting, or its section, is among `wanted`."""
    return name in wanted or name.split(".")[0] in wanted


def _add_export(below: Any, command: Command) -> None:
    export = below.add_parser("export", help="write an initialization for another library", allow_abbrev=False)
    export.add_argument(
        "--init", type=location.location, required=True, metavar="FILE", help="init.safetensors of a run"
    )
    export.add_argument("--to", required=True, metavar="LIBRARY", help="sb3 (Stable-Baselines3), torch or cleanrl")
    export.add_argument("--out", type=_directory, required=True, metavar="DIR", help="where to; a new directory")
    export.add_argument(
        "--linear-seed",
        type=int,
        metavar="N",
        help="seed of a fresh linear layer, where only the convolutions were meta-learned (meta.shared convolutions)",
    )
    export.set_defaults(command=command, flags=["--init", "--to", "--out", "--linear-seed"])


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
            help=f"{field.metadata['help']} (default: {default})".replace("%", "%%"),
        )
        flags.append(flag)
    return flags


def settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """The settings given as flags, by dotted name."""
    given = {name.removeprefix("setting:"): value for name, value in vars(parsed).items()
             if name.startswith("setting:") and value is not None}  # fmt: skip
    return {name: ",".join(value) if isinstance(value, list) else value for name, value in given.items()}
