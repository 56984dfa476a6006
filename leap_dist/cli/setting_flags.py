"""Flags for the settings: which ones a command has, which ones its short help shows, and with which defaults."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import Any, Union, get_args, get_origin

from leap_dist.cli import console
from leap_dist.config import loading
from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config

_METAVARS: dict[Any, str] = {int: "N", float: "X", bool: "yes|no", str: "TEXT", tuple[str, ...]: "NAME"}

_ALIASES = {
    "server.on_lost": "--on-lost", "task_steps": "--steps", "telemetry.tracker": "--tracker", "worker.mps": "--mps",
}  # fmt: skip

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
    "init": "FILE, run directory or pretrained:NAME",
    "seed": "seed of everything random",
    "workers": "number of workers; auto: what fits",
    "worker.device": "auto, cpu or cuda",
    "address": "Ray: local, auto or HOST:PORT",
}
"""One-line help texts for the settings that people usually change."""

_SHORT_OF_STUDIES = {
    "tasks": "atari, omniglot or multi-cv",
    "games": "games to test on, or data sets",
}
"""Help texts of the command `study` where they differ."""

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
    parser: argparse.ArgumentParser, command: str, *, everything: bool, preset: str = "", tasks: str = ""
) -> None:
    """Add a flag for every setting that applies to a command.

    Args:
        parser: parser of the command.
        command: train, evaluate or study.
        everything: whether the help lists all settings rather than only those that people usually change.
        preset: preset whose values the help shows as defaults; "" for the command's own.
        tasks: kind of tasks of these defaults; "" for the command's own.
    """
    default = _defaults(command, preset, tasks)
    order = {name: place for place, name in enumerate(() if everything else SHOWN[command])}
    fields = sorted(loading.fields(), key=lambda found: order.get(found[0], len(order)))
    groups: dict[str, Any] = {}
    for name, field, kind in fields:
        if name == "preset" or (command == "evaluate" and not loading.is_for_evaluations(name)):
            continue
        section = name.rpartition(".")[0] if everything else ""
        if section not in groups:
            title = section or ("tasks and workers" if everything else "settings")
            groups[section] = parser.add_argument_group(title, loading.section_help(section) if everything else None)
        short = _SHORT | (_SHORT_OF_STUDIES if command == "study" else {})
        text = field.metadata["help"] if everything else short.get(name, "")
        shown = everything or name in order
        is_list = isinstance(field.default, tuple)
        more: dict[str, Any] = {"action": "extend" if is_list else None, "nargs": "+" if is_list else None}
        if kind is bool:
            more = {"action": Switch, "nargs": "?", "const": "yes"}
        metavar = _metavar(kind) if everything or kind in _METAVARS or get_origin(kind) is Union else "NAME"
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


def _defaults(command: str, preset: str, tasks: str) -> Callable[[str], str]:
    """Return a function that maps a setting's name to the text about its default."""
    values = {"evaluate": {"games": "breakout,qbert,space_invaders"}, "study": {"tasks": "none"}}.get(command, {})
    ours = {"workers", "min_workers", "wait_for_nodes", "seed", "address", "insecure", "worker", "server"}
    from_preset: dict[str, Any] = {}
    if command != "evaluate" or preset:
        kind = tasks or ("omniglot" if command == "study" else Config.tasks)
        with contextlib.suppress(ConfigError):  # a mistake, which the command itself reports
            from_preset = {"tasks": kind, **loading.preset_values(preset or DEFAULT_PRESET[command], {"tasks": kind})}

    def default(name: str) -> str:
        if name in values or name in from_preset:
            value = values.get(name) or from_preset[name]
        elif command == "evaluate" and not preset and not loading.is_among(name, ours):
            return "default: that of the first --init"
        else:
            value = loading.default(name)
        return f"default: {_plain(value)}"

    return default


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (",".join(value) if isinstance(value, list | tuple) else str(value)) or "none"
