"""The command `completion`: prints a script that lets a shell complete commands, flags and values."""

from __future__ import annotations

import argparse
from typing import Any, Literal, get_args, get_origin

from leap_dist.cli import parser
from leap_dist.config import loading
from leap_dist.config.loading import ConfigError
from leap_dist.config.presets import PRESETS, TASKS
from leap_dist.config.validation import did_you_mean
from leap_dist.envs import games
from leap_dist.study.games import PRESET as FIGURE_4

SHELLS = ("bash", "zsh", "tcsh")
_DIRECTORIES = ("run_dir", "out")
_FILES = ("init", "config", "place")


def completion(parsed: argparse.Namespace) -> int:
    """Print the script for a shell. Raises ConfigError if the shell is unknown, or the package shtab is missing."""
    if parsed.shell not in SHELLS:
        near = did_you_mean(parsed.shell, SHELLS)
        raise ConfigError(f"shell: {parsed.shell[:80]!r} is not one of {', '.join(SHELLS)}{near}")
    try:
        import shtab
    except ImportError:
        raise ConfigError("shell: completion needs the package shtab; pip install 'leap-dist[completion]'") from None
    whole = parser.build("leap-dist", parser.Help(everything=True))
    for command in parser.commands_of(whole):
        for action in command._actions:
            _describe(action, shtab)
    print(shtab.complete(whole, shell=parsed.shell))
    return 0


def _describe(action: Any, shtab: Any) -> None:
    """Tell shtab which values a flag takes."""
    if action.dest in _DIRECTORIES:
        action.complete = shtab.DIRECTORY
    elif action.dest in _FILES:
        action.complete = shtab.FILE
    elif choices := _choices(action.dest):
        action.choices = choices


def _choices(name: str) -> tuple[str, ...]:
    """Return the values that a flag takes, if they can be listed."""
    kinds = {f"setting:{setting}": kind for setting, _, kind in loading.fields()}
    kind = kinds.get(name)
    if get_origin(kind) is Literal:
        return get_args(kind)
    if name in ("setting:games", "game"):
        return (*games.SETS, *games.available()) if name == "setting:games" else games.available()
    presets = tuple(dict.fromkeys([*PRESETS, *(name for known in TASKS.values() for name in known), FIGURE_4]))
    return {"preset": presets, "to": tuple(parser.LIBRARIES), "shell": SHELLS}.get(name, ())
