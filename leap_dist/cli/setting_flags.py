"""Flags for the settings: which ones a command has, which ones its short help shows, and with which defaults."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args, get_origin

from leap_dist.cli import console
from leap_dist.config import loading, registry
from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.envs.games import HELD_OUT
from leap_dist.study import games
from leap_dist.study.arms import DEFAULT_ARMS

_METAVARS: dict[Any, str] = {int: "N", float: "X", bool: "yes|no", str: "TEXT", tuple[str, ...]: "NAME"}

_ALIASES = {
    "server.on_lost": "--on-lost", "task_steps": "--steps", "telemetry.tracker": "--tracker", "worker.mps": "--mps",
}  # fmt: skip
_OWN_METAVARS = {"init": "SOURCE"}
"""Placeholders in the help of settings whose type does not suffice."""

_SHORT = {
    "tasks": "atari, omniglot, gymnasium, …",
    "games": "see `{command} games`",
    "meta_updates": "number of meta-updates",
    "meta.batch_size": "tasks in a meta-update",
    "task_steps": "agent steps in a task",
    "meta_learner": "leap, reptile, fomaml, …",
    "mode": "sync, buffered, async, …",
    "meta.learning_rate": "learning rate of the meta-update",
    "agent.learning_rate": "learning rate of the agents",
    "agent.envs": "parallel environments of an agent",
    "data_dir": "directory with one folder for each data set",
    "init": "RUN, FILE, pretrained:NAME",
    "seed": "seed of everything random",
    "workers": "number of workers; auto: what fits",
    "worker.device": "auto, cpu or cuda",
    "address": "Ray: local, auto or HOST:PORT",
}
"""One-line help texts for the settings that people usually change."""

_SHORT_OF_TASKS: dict[str, dict[str, str]] = {
    "omniglot": {"games": "alphabets, or sets of them"},
    "multi-cv": {"games": "data sets, or all"},
    "gymnasium": {"games": "IDs of environments"},
    "images": {"games": "data sets: files NAME.npz in --data-dir"},
}
"""Help texts for other kinds of tasks where they differ."""

_SHORT_OF_STUDIES = {
    "tasks": "atari, omniglot or multi-cv",
    "games": "games to test on, or data sets",
    "workers": "auto: as many as fit",
}
"""Help texts of the command `study` where they differ."""

_HELD_OUT = {
    "atari": f"default: {','.join(HELD_OUT['seed24'])}",
    "omniglot": "default: held_out",
    **dict.fromkeys(registry.OWN, "default: those of training"),
}
"""Texts about the tasks of an evaluation, by kind."""

SHOWN = {
    "train": tuple(name for name in _SHORT if name != "data_dir"),
    "evaluate": ("games", "task_steps", "seed", "workers", "worker.device", "address"),
    "study": ("tasks", "games", "data_dir", "meta_updates", "workers"),
}
"""The settings in the short help of a command, in their order there."""

DEFAULT_PRESET = {"train": "quick", "study": "paper"}
"""The preset of a command without --preset. Evaluations take that of their first --init."""


class Once(argparse.Action):
    """Store a value, or True for a flag that takes none, and refuse a second one."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store the value of this flag. See argparse.Action."""
        seen = vars(namespace).setdefault("seen", set())
        if self.dest in seen:
            console.complain(f"{option_string}: given twice; give it once")
        seen.add(self.dest)
        setattr(namespace, self.dest, True if self.nargs == 0 else values)


class Switch(Once):
    """Store "yes" for --FLAG and "no" for --no-FLAG. `--FLAG yes` and `--FLAG no` are accepted as well."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store the answer that this flag gives. See argparse.Action."""
        negative = str(option_string).startswith("--no-")
        if negative and values != self.const:
            console.complain(f"{option_string}: takes no value; leave out {str(values)[:40]!r}")
        super().__call__(parser, namespace, "no" if negative else values, option_string)


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help formatter with one column for flags and one for texts. Switches are shown without a value."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, Switch):
            return ", ".join(action.option_strings)
        return super()._format_action_invocation(action)


def add_settings(
    parser: argparse.ArgumentParser, command: str, *, everything: bool, preset: str, choices: Mapping[str, str]
) -> None:
    """Add a flag for every setting that applies to a command.

    Args:
        parser: parser of the command.
        command: train, evaluate or study.
        everything: whether the help lists all settings rather than only those that people usually change.
        preset: preset whose values the help shows as defaults; "" for the command's own.
        choices: values of those settings on the command line on which the defaults of others depend.
    """
    default = _defaults(command, preset, choices)
    order = {name: place for place, name in enumerate(() if everything else SHOWN[command])}
    fields = sorted(loading.fields(), key=lambda found: order.get(found[0], len(order)))
    groups: dict[str, Any] = {}
    short = _SHORT | (_SHORT_OF_STUDIES if command == "study" else _SHORT_OF_TASKS.get(choices.get("tasks", ""), {}))
    for name, field, kind in fields:
        if name == "preset" or (command == "evaluate" and not loading.is_for_evaluations(name)):
            continue
        section = name.rpartition(".")[0] if everything else ""
        if section not in groups:
            title = section or ("tasks and workers" if everything else "settings")
            groups[section] = parser.add_argument_group(title, loading.section_help(section) if everything else None)
        text = field.metadata["help"] if everything else short.get(name, "")
        shown = everything or name in order
        is_list = isinstance(field.default, tuple)
        more: dict[str, Any] = {"action": "extend" if is_list else None, "nargs": "+" if is_list else None}
        if kind is bool:
            more = {"action": Switch, "nargs": "?", "const": "yes"}
        is_shown = everything or kind in _METAVARS or get_origin(kind) is Union
        metavar = _OWN_METAVARS.get(name) or (_metavar(kind) if is_shown else "NAME")
        add = groups[section].add_argument
        add(
            "--" + name.replace("_", "-"),
            *(["--no-" + name.replace("_", "-")] if kind is bool else []),
            dest=f"setting:{name}",
            metavar=metavar,
            help=_text(text, default(name)) if shown else argparse.SUPPRESS,
            **more,
        )
        if name in _ALIASES:
            about = f"the same as --{name.replace('_', '-')}" if everything else argparse.SUPPRESS
            add(_ALIASES[name], dest=f"setting:{name}", metavar=metavar, help=about)


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Union:
        number, word = get_args(kind)
        return "|".join((_METAVARS[number], *get_args(word)))
    return _METAVARS.get(kind) or "{" + ",".join(get_args(kind)) + "}"


def _text(text: str, default: str) -> str:
    return f"{text} ({default})".replace("{command}", console.command()).replace("%", "%%")


def _defaults(command: str, preset: str, choices: Mapping[str, str]) -> Callable[[str], str]:
    """Return a function that maps a setting's name to the text about its default.

    A mistake in `preset` or `choices` is not reported here: the command itself does that, unless it shows its help.
    """
    if command == "study":
        return _defaults_of_studies(preset or DEFAULT_PRESET["study"], choices.get("tasks", ""))
    ours = {"workers", "min_workers", "wait_for_nodes", "seed", "address", "insecure", "worker", "server"}
    implied: dict[str, Any] = {}
    if command == "train":
        implied = {**_implied(preset or DEFAULT_PRESET["train"], choices), **choices}
    elif preset:
        evaluated = {"tasks": choices.get("tasks", Config.tasks), "meta_learner": "none", "mode": "buffered"}
        implied = {**_implied(preset, evaluated), **evaluated}

    def default(name: str) -> str:
        if command == "train" and name == "games" and choices.get("tasks") in registry.OWN:
            return "required"
        if command == "evaluate" and name == "games":
            return _HELD_OUT.get(choices.get("tasks", Config.tasks), "default: those not trained on")
        if command == "evaluate" and not preset and not loading.is_among(name, ours):
            return "default: that of the first --init"
        if name == "init":
            return "default: a random one"
        return f"default: {_plain(implied.get(name, loading.default(name)))}"

    return default


def _defaults_of_studies(preset: str, tasks: str) -> Callable[[str], str]:
    """Return the same for studies, whose defaults depend on the kind of tasks and on the arm."""
    kinds = [tasks] if tasks else list(DEFAULT_ARMS)
    implied = {}
    for kind in kinds:
        played = {"games": tuple(games.FIGURE_4)} if kind == "atari" else {}
        of_kind = "paper" if (kind, preset) == ("atari", games.PRESET) else preset
        implied[kind] = [
            {**_implied(of_kind, {"tasks": kind, "meta_learner": arm}), **played}
            for arm in DEFAULT_ARMS.get(kind, ("leap",))
            if arm != "none"  # it is not trained
        ]

    def default(name: str) -> str:
        if name == "tasks":
            return "required"
        found = [{_plain(values.get(name, loading.default(name))) for values in implied[kind]} for kind in kinds]
        if any(values != found[0] for values in found):
            return "default: depends on --tasks"
        return "default: depends on the arm" if len(found[0]) > 1 else f"default: {found[0].pop()}"

    return default


def _implied(preset: str, given: Mapping[str, str]) -> dict[str, Any]:
    with contextlib.suppress(ConfigError):
        return loading.implied_values(preset, given)
    return {}


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (",".join(value) if isinstance(value, list | tuple) else str(value)) or "none"
