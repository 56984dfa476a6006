"""The commands that list what can be named on the command line: games, presets, and initializations."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from leap_dist.cli import console
from leap_dist.config import loading, pretrained, registry
from leap_dist.config.loading import ConfigError
from leap_dist.config.plurals import counted
from leap_dist.config.presets import DEFAULTS, OF_META_LEARNERS, PRESET_HELP, PRESETS, TASKS
from leap_dist.config.registry import OWN
from leap_dist.config.validation import did_you_mean
from leap_dist.envs.games import CRASHING, HELD_OUT, SETS, available, expand, reference_scores
from leap_dist.study.games import FIGURE_4
from leap_dist.study.games import PRESET as FIGURE_4_PRESET

_ORIGIN = {
    "seed24": "meta-training games of the paper's first version, which holds out three",
    "camera25": "meta-training games of the camera-ready version, which holds out two",
    "moving4": "games on which agents improve within 500,000 steps, chosen by a rule that holds out five",
}


def games(name: str | None = None) -> int:
    """Print the sets of games, and a line for each game with its sets and reference scores.

    With the name of a set or game, print only its games or its line. Raises ConfigError for another name.
    """
    if name is not None:
        try:
            shown = expand((name,))
        except ValueError as error:
            raise ConfigError(f"games: {error}") from None
        _print_games(shown)
        return 0
    print("Sets of games; --games accepts these names too:\n")
    for name, members in SETS.items():
        _print_wrapped(f"{name:<10}", f"{len(members)} {_ORIGIN[name]} ({', '.join(HELD_OUT[name])}).")
    print()
    _print_wrapped(
        "",
        "Scores are mean returns of random play and of a person over episodes with 30 no-op starts, as published "
        "with DQN Zoo. A human-normalized score is 0 for the first and 1 for the second.",
    )
    print()
    _print_games(available())
    print()
    _print_wrapped("", f"Cannot be played, because they crash the emulator: {', '.join(CRASHING)}.")
    return 0


def _print_games(names: Sequence[str]) -> None:
    columns = " ".join(f"{name:<9}" for name in SETS)
    print(f"{'game':<20} {columns} {'random':>10} {'human':>10}")
    scores = reference_scores()
    for game in names:
        roles = " ".join(f"{_role(game, name):<9}" for name in SETS)
        numbers = [f"{scores[game][kind]:,.1f}" if game in scores else "-" for kind in ("random", "human")]
        print(f"{game:<20} {roles} {numbers[0]:>10} {numbers[1]:>10}")


def _role(game: str, name: str) -> str:
    return "train" if game in SETS[name] else "held out" if game in HELD_OUT[name] else "-"


def presets(name: str | None = None) -> int:
    """Print each preset, what it is for, its length, and the settings that differ from the defaults.

    With a name, print only the presets of that name. Raises ConfigError if there is none.
    """
    if name is not None:
        return _presets_of_name(name)
    print(f"Presets of Atari games. `{console.command()} train` alone takes quick.")
    for name, values in PRESETS.items():
        _print_preset(name, PRESET_HELP[name], values, "atari")
    print(f"\n{FIGURE_4_PRESET}: only for `study --tasks atari`, to repeat the paper's figure 4")
    lengths = ", ".join(f"{game} {steps:,}" for game, steps in FIGURE_4.items())
    _print_wrapped("   ", f"as paper; agent steps of a test: {lengths} (`paper` and `paper-5m` test as long)")
    for kind, known in TASKS.items():
        print(f"\nPresets of --tasks {kind}, each on top of the settings of `paper-async`:")
        if kind in OWN:
            print("(--games has no default here: name your own tasks with it)")
        for name, values in known.items():
            _print_preset(name, "", values, kind)
    print("\nChoices that change other defaults:")
    for setting, choice, values in DEFAULTS:
        flag = setting.replace("_", "-")
        _print_preset(f"--{flag} {choice}", "", values)
    print("\nMeta-learners with settings of their own:")
    found: dict[tuple[str, str, str], list[str]] = {}
    for (kind, preset), of_learners in OF_META_LEARNERS.items():
        for learner, values in of_learners.items():
            found.setdefault((kind, learner, _changes(values)), []).append(preset)
    for (kind, learner, text), names in found.items():
        every = names == list(PRESETS if kind == "atari" else TASKS[kind])
        where = "" if every else f", preset {', '.join(names)}"
        print()
        _print_wrapped("", f"--tasks {kind} --meta-learner {learner}{where}")
        _print_wrapped("   ", text)
    return 0


def _presets_of_name(name: str) -> int:
    if name in PRESETS:
        _print_preset(name, PRESET_HELP[name], PRESETS[name], "atari", first="")
    of_kinds = {kind: known[name] for kind, known in TASKS.items() if name in known}
    for kind, values in of_kinds.items():
        first = "" if name not in PRESETS and kind == next(iter(of_kinds)) else "\n"
        _print_preset(f"{name} of --tasks {kind}", "", values, kind, first=first)
    if name not in PRESETS and not of_kinds:
        known = dict.fromkeys([*PRESETS, *(preset for presets in TASKS.values() for preset in presets)])
        near = did_you_mean(name, known) or f"; choose from {', '.join(known)}"
        raise ConfigError(f"presets: no preset {name[:80]!r}{near}")
    return 0


def _print_preset(name: str, purpose: str, values: Mapping[str, Any], kind: str = "", first: str = "\n") -> None:
    """Print a preset of this kind of tasks, or without `kind`, settings that belong to a choice."""
    print(f"{first}{name}{f': {purpose}' if purpose else ''}")
    if kind:
        _print_wrapped("   ", _length(values, kind))
    changes = _changes({key: value for key, value in values.items() if key != "tasks"})
    if changes or kind:
        _print_wrapped("   ", changes or "only defaults")


def _length(values: Mapping[str, Any], kind: str) -> str:
    """Return how long a run with these settings is."""
    updates, batch, steps = (
        values.get(key, loading.default(key)) for key in ("meta_updates", "meta.batch_size", "task_steps")
    )
    ends = ("supervised.patience", "supervised.patience_steps", "supervised.epochs")
    most = "at most " if any(values.get(key) for key in ends) else ""
    unit = registry.for_tasks(kind).step_unit
    return f"{updates:,} meta-updates of {counted(batch, 'task')}, {most}{steps:,} {unit} each"


def _changes(values: Mapping[str, Any]) -> str:
    changed = {key: value for key, value in values.items() if value != loading.default(key)}
    return ", ".join(f"{key} {_shown(value)}" for key, value in changed.items())


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(value) if isinstance(value, tuple) else str(value)


def weights(name: str | None = None) -> int:
    """Print the initializations that come with the package, or the one of this name. Raises ConfigError."""
    found = list(pretrained.available())
    if name is not None:
        wanted, known = name.removeprefix(pretrained.PREFIX), [one.name for one in found]
        if wanted not in known:
            near = did_you_mean(wanted, known) or f"; the command `weights` lists the {len(known)} that there are"
            raise ConfigError(f"weights: no initialization {name[:80]!r}{near}")
        found = [one for one in found if one.name == wanted]
    if not found:
        print("No initialization comes with this version.")
        _print_wrapped("", f"`{console.command()} train` makes one: runs/NAME/init.safetensors. --init takes its path.")
        return 0
    print("Initializations that come with the package; --init takes pretrained:NAME:\n")
    width = max(len(one.name) for one in found)
    for one in found:
        _print_wrapped(f"{one.name:<{width}}", f"{one.summary} License: {one.license}.")
    return 0


def _print_wrapped(first: str, text: str) -> None:
    """Print `first` and a text, wrapped at 80 characters, with later lines aligned below the start of the text."""
    start = f"{first} " if first else ""
    indent = " " * len(start)
    print(textwrap.fill(text, 80, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False))
