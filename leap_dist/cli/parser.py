"""The commands and their flags. Mistakes are reported in one line."""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from leap_dist import __version__
from leap_dist.cli import argument_types as types
from leap_dist.cli import console, mistakes
from leap_dist.cli.help_texts import COMPLETION, ENJOY, EVALUATE, EXIT_CODES, MAIN, OTHER_WORDS, STUDY, TRAIN
from leap_dist.cli.setting_flags import DEFAULT_PRESET, Formatter, Once, add_settings
from leap_dist.config.loading import DECISIVE
from leap_dist.config.validation import did_you_mean

LIBRARIES = {"sb3": "example.py", "torch": "load.py", "cleanrl": "agent.py"}
"""The libraries that an initialization can be exported to, each with the exported program that demonstrates it."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line (by default, that of this process).

    Values of settings remain text; `settings` returns them, and `leap_dist.config.loading` checks them. A mistake ends
    the program with one line and exit code 2.
    """
    given = mistakes.without_words_for_flags(list(sys.argv[1:] if arguments is None else arguments))
    if not given:
        console.complain(f"name a command: {', '.join(NAMES)}; --help says what they are for")
    if given[0].startswith("-") and given[0] not in mistakes.FLAGS_ALONE:
        console.complain("name a command before the flags; for example, train --preset smoke")
    if not given[0].startswith("-") and given[0] not in NAMES:
        meant = OTHER_WORDS.get(given[0])
        near = f"; did you mean {meant}?" if meant else did_you_mean(given[0], NAMES)
        near = near or f"; choose from {', '.join(NAMES)}"
        console.complain(f"{given[0][:80]}: no such command{near}")
    parser = build(console.program(), _help_asked(given))
    command = next((one for one in commands_of(parser) if one.prog.split()[-1] == given[0]), None)
    if command is not None and not _is_help_asked(given):
        mistakes.refuse_unknown_flags(given, long_flags(command))
    parsed, unknown = parser.parse_known_args(given)
    if parsed.command == "evaluate":
        mistakes.require_initializations(parsed.init, unknown)
    if unknown and unknown[0].startswith("-"):
        console.complain(mistakes.no_such_flag(unknown[0], parsed.flags))
    if unknown:
        console.complain(f"{unknown[0][:80]}: unexpected argument; flags begin with --")
    if hasattr(parsed, "place"):
        _settle_place(parsed)
    return parsed


def settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return the settings given as flags, by dotted name."""
    given = {name.removeprefix("setting:"): value for name, value in vars(parsed).items()
             if name.startswith("setting:") and value is not None}  # fmt: skip
    return {name: ",".join(value) if isinstance(value, list) else value for name, value in given.items()}


class _Parser(argparse.ArgumentParser):
    """An argument parser that reports mistakes in one line."""

    def error(self, message: str) -> NoReturn:
        console.complain(message.removeprefix("argument "))


class Help(NamedTuple):
    """The help that a command line asks for."""

    everything: bool = False
    """Whether the help lists every setting."""
    preset: str = ""
    """Preset whose values are shown as defaults; "" for that of the command."""
    choices: tuple[tuple[str, str], ...] = ()
    """Names and values of settings on the command line on which the defaults of others depend."""


_NO_HELP = Help()


def _is_help_asked(given: Sequence[str]) -> bool:
    return not {"-h", "--help", "--help-all"}.isdisjoint(given)


def _help_asked(given: Sequence[str]) -> Help:
    def value(flag: str) -> str:
        after = [word for before, word in itertools.pairwise(given) if before == flag]
        joined = [word.partition("=")[2] for word in given if word.startswith(f"{flag}=")]
        return next(iter(after + joined), "")

    if not _is_help_asked(given):
        return _NO_HELP
    choices = ((name, value("--" + name.replace("_", "-"))) for name in DECISIVE)
    return Help("--help-all" in given, value("--preset"), tuple(choice for choice in choices if choice[1]))


@functools.cache
def build(program: str, help: Help = _NO_HELP) -> argparse.ArgumentParser:
    """Return the parser of the whole command line, for a program of this name."""
    parser = _Parser(prog=program, description=_text(MAIN), formatter_class=Formatter, usage="%(prog)s COMMAND ...")
    parser.add_argument("--version", action="version", version=f"leap-dist {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", prog=program)
    for name, add in _COMMANDS.items():
        command = add(functools.partial(_add_command, commands, name), help)
        command.set_defaults(flags=long_flags(command))
    return parser


def _text(text: str) -> str:
    return text.replace("{command}", console.command())


def _add_command(commands: Any, name: str, title: str, **more: Any) -> _Parser:
    made: _Parser = commands.add_parser(name, help=title, allow_abbrev=False, formatter_class=Formatter, **more)
    made.register("action", None, Once)
    return made


def _add_train(command: Callable[..., _Parser], help: Help) -> _Parser:
    train = command(
        "meta-train an initialization",
        usage="%(prog)s [--preset NAME] [--run-dir DIR] [--SETTING VALUE ...]",
        description=_text(TRAIN),
        epilog=EXIT_CODES,
    )
    run = train.add_argument_group("the run")
    _add_preset(run, DEFAULT_PRESET["train"])
    run.add_argument(
        "--run-dir", type=types.location, metavar="DIR", help="directory or URL (default: runs/PRESET-TIME)"
    )
    run.add_argument(
        "--resume",
        nargs="?",
        type=types.auto,
        const=True,
        default=False,
        metavar="auto",
        help="continue the run in --run-dir; auto: start it if there is none",
    )
    run.add_argument("--profile", nargs=0, default=False, help="write profiles of the workers to DIR/profile")
    _add_settings(train, "train", help)
    return train


def _add_evaluate(command: Callable[..., _Parser], help: Help) -> _Parser:
    evaluate = command(
        "compare initializations on held-out games",
        usage="%(prog)s --init [LABEL=]INIT [--init ...] [--SETTING VALUE ...]",
        description=_text(EVALUATE),
        epilog=EXIT_CODES,
    )
    comparison = evaluate.add_argument_group("the comparison")
    comparison.add_argument(
        "--init",
        type=types.initialization,
        action="append",
        default=[],
        metavar="[LABEL=]INIT",
        help="initialization: `scratch`, a file, a run directory, a URL or pretrained:NAME; repeat for more",
    )
    comparison.add_argument(
        "--seeds", type=types.whole_number, default=5, metavar="N", help="runs per arm and game (default: 5)"
    )
    _add_game_steps(comparison)
    comparison.add_argument(
        "--out", type=types.directory, metavar="DIR", help="output directory (default: reports/TIME)"
    )
    _add_preset(comparison, "that of the first --init")
    _add_settings(evaluate, "evaluate", help)
    return evaluate


def _add_game_steps(comparison: argparse._ArgumentGroup) -> None:
    comparison.add_argument(
        "--game-steps",
        nargs="+",
        action="extend",
        default=[],
        metavar="GAME=N",
        help="agent steps for individual games, instead of --task-steps",
    )


def _add_study(command: Callable[..., _Parser], help: Help) -> _Parser:
    study = command(
        "compare meta-learners on Atari, Omniglot or Multi-CV",
        usage="%(prog)s --tasks NAME --out DIR [--SETTING VALUE ...]",
        description=_text(STUDY),
        epilog=EXIT_CODES,
    )
    comparison = study.add_argument_group("the study")
    comparison.add_argument("--out", type=types.directory, required=True, metavar="DIR", help="output directory")
    comparison.add_argument(
        "--arms",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="meta-learners; `none`: random initialization (default: those of the paper)",
    )
    comparison.add_argument(
        "--groups",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="atari: sets of training games (default: seed24); omniglot: numbers of pretraining alphabets (default: "
        "4 10 20); multi-cv: data sets to hold out, one at a time (default: each of --games)",
    )
    comparison.add_argument(
        "--seeds",
        type=types.whole_number,
        default=3,
        metavar="N",
        help="number of seeds per arm and group (default: 3)",
    )
    comparison.add_argument(
        "--test-steps",
        type=types.whole_number,
        metavar="N",
        help="steps of a test (default: as in training)",
    )
    comparison.add_argument(
        "--test-seeds",
        type=types.whole_number,
        metavar="N",
        help="atari: number of agents for each initialization and game (default: 1)",
    )
    _add_game_steps(comparison)
    comparison.add_argument("--yes", nargs=0, default=False, help="start even if it takes more than a day")
    comparison.add_argument(
        "--with",
        dest="of_arms",
        action="append",
        default=[],
        metavar="ARM:SETTING=VALUE",
        help="setting for one arm only; repeat for more",
    )
    _add_preset(comparison, DEFAULT_PRESET["study"])
    _add_settings(study, "study", help)
    return study


def _add_status(command: Callable[..., _Parser], _: Help) -> _Parser:
    status = command("show how a run or an evaluation is going")
    _add_place(status, "run_dir", "--run-dir", "DIR", "directory or URL of a run, an evaluation or a study")
    status.add_argument("--json", nargs=0, default=False, help="print one JSON object instead of a table")
    return status


def _add_plot(command: Callable[..., _Parser], _: Help) -> _Parser:
    plot = command("redraw the picture, or rebuild the report")
    _add_place(
        plot, "run_dir", "--run-dir", "DIR", "directory of a run, an evaluation or a study; a run's URL with --out"
    )
    plot.add_argument("--phone", nargs=0, default=False, help="draw a tall picture, DIR/progress-phone.png")
    plot.add_argument(
        "--out", type=types.directory, metavar="FILE", help="picture of the run (default: DIR/progress.png)"
    )
    return plot


def _add_export(command: Callable[..., _Parser], _: Help) -> _Parser:
    export = command(
        "write an initialization for another library",
        description=_text("Write an initialization for another library.\n\nexample:\n"
                          "  {command} export runs/mine --to sb3 --out policy"),
    )  # fmt: skip
    _add_place(export, "init", "--init", "RUN", "run directory, init.safetensors, or URL of one of them")
    export.add_argument(
        "--to", required=True, metavar="LIBRARY", help=f"{', '.join(LIBRARIES)}; sb3 is Stable-Baselines3"
    )
    export.add_argument(
        "--out",
        type=types.directory,
        required=True,
        metavar="DIR",
        help="output directory; must be new or empty",
    )
    export.add_argument(
        "--linear-seed",
        type=types.whole_number,
        metavar="N",
        help="seed of a new linear layer, if only the convolutions were meta-learned (meta.shared convolutions)",
    )
    return export


def _add_enjoy(command: Callable[..., _Parser], _: Help) -> _Parser:
    enjoy = command("watch an agent play, or record a video", description=_text(ENJOY))
    what = "run directory, init.safetensors, URL, `scratch`, or directory of an evaluation"
    _add_place(enjoy, "init", "--init", "WHAT", what)
    enjoy.add_argument("--game", metavar="NAME", help="game to play (default: breakout, or the evaluation's first)")
    enjoy.add_argument("--arm", metavar="LABEL", help="initialization whose agent plays (default: the first one's)")
    enjoy.add_argument("--out", type=types.directory, metavar="FILE", help="video to write: NAME.gif or NAME.mp4")
    steps = "agent steps of training before an agent from an initialization plays (default: 20000)"
    enjoy.add_argument("--steps", type=types.whole_number, metavar="N", help=steps)  # None tells that it was not given
    for flag, default, text in (
        ("--episodes", 1, "number of episodes"),
        ("--seconds", 30, "maximum length of the video, in seconds of play"),
        ("--seed", 0, "seed of the agent and of the episodes"),
    ):
        enjoy.add_argument(
            flag, type=types.whole_number, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    return enjoy


def _add_games(command: Callable[..., _Parser], _: Help) -> _Parser:
    return _with_name(command("list games, sets of games, and scores"), "a game, or a set of games")


def _add_presets(command: Callable[..., _Parser], _: Help) -> _Parser:
    return _with_name(command("list presets, and what each changes"), "a preset")


def _add_weights(command: Callable[..., _Parser], _: Help) -> _Parser:
    return _with_name(command("list the initializations of this package"), "an initialization")


def _with_name(listing: _Parser, what: str) -> _Parser:
    """Let a listing be of one thing."""
    listing.add_argument("name", nargs="?", metavar="NAME", help=f"show only {what} of this name")
    return listing


def _add_completion(command: Callable[..., _Parser], _: Help) -> _Parser:
    completion = command("print a script for tab completion", description=COMPLETION)
    completion.add_argument("shell", metavar="SHELL", help="bash, zsh or tcsh")
    return completion


def long_flags(command: argparse.ArgumentParser) -> list[str]:
    """Return the flags of a command that begin with two dashes."""
    return [flag for flag in command._option_string_actions if flag.startswith("--")]


def commands_of(whole: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parser of every command."""
    for action in whole._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


_COMMANDS: dict[str, Callable[[Callable[..., _Parser], Help], _Parser]] = {
    "train": _add_train,
    "evaluate": _add_evaluate,
    "status": _add_status,
    "enjoy": _add_enjoy,
    "plot": _add_plot,
    "export": _add_export,
    "study": _add_study,
    "games": _add_games,
    "presets": _add_presets,
    "weights": _add_weights,
    "completion": _add_completion,
}
NAMES = tuple(_COMMANDS)
"""The commands."""


def _add_place(command: _Parser, name: str, flag: str, metavar: str, help: str) -> None:
    """Let a command take a path or URL as its only positional argument, or with a flag. See `_settle_place`."""
    command.add_argument("place", type=types.location, nargs="?", metavar=metavar, help=help)
    command.add_argument(
        flag, dest=name, type=types.location, metavar=metavar, help=f"the same as {metavar} without a flag"
    )
    command.set_defaults(place_flag=flag, place_name=name, place_metavar=metavar)


def _settle_place(parsed: argparse.Namespace) -> None:
    """Store the path or URL under the name of its flag, whichever way it was given."""
    by_flag = getattr(parsed, parsed.place_name)
    if (parsed.place is None) == (by_flag is None):
        twice = f"takes one path or URL, alone or with {parsed.place_flag}"
        problem = "needs a path or URL" if by_flag is None else twice
        console.complain(f"{parsed.command}: {problem}; for example, {parsed.command} runs/mine")
    setattr(parsed, parsed.place_name, by_flag if parsed.place is None else parsed.place)


def _add_preset(group: Any, default: str) -> None:
    group.add_argument("--preset", metavar="NAME", help=f"name of a preset (default: {default})")
    group.add_argument("--config", type=types.path, metavar="FILE", help="YAML file; its settings override the preset")


def _add_settings(parser: _Parser, command: str, help: Help) -> None:
    """Add the flags of the settings, and --help-all."""
    parser.add_argument("--help-all", action="help", help="show every setting, and exit")
    add_settings(parser, command, everything=help.everything, preset=help.preset, choices=dict(help.choices))
