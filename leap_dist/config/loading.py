"""Load a configuration: presets, overrides, validation, and reading and writing YAML.

YAML files and command-line flags both go through `resolve`, so that a mistake gets the same one-line answer wherever it
was made. settings.py declares the settings themselves.
"""

from __future__ import annotations

import dataclasses
import math
import os
import reprlib
import shlex
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from leap_dist.config import files, registry
from leap_dist.config.presets import DEFAULTS, OF_META_LEARNERS, OPTIMIZERS, PRESETS, TASKS
from leap_dist.config.settings import Config
from leap_dist.config.validation import conflicts, did_you_mean

LARGEST = 10**12
"""Largest whole number that a setting may have. As agent steps, it would keep a thousand GPUs busy for a year."""


class ConfigError(ValueError):
    """A setting is wrong. The message is one line with the field, the value, and the nearest valid choice."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


# Settings that may change when a run resumes: how long, where and how it runs. All others define what is learned.
_FREE_ON_RESUME = {
    "preset", "workers", "min_workers", "wait_for_nodes", "meta_updates", "address", "insecure", "data_dir",
    "gymnasium.modules",
}  # fmt: skip
_FREE_SECTIONS_ON_RESUME = {"worker", "server", "telemetry"}


def fields(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Yield (dotted name, field, type) for every setting of all sections."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from fields(kind, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + field.name, field, kind


def section_help(section: str) -> str:
    """Return the first line of a section's docstring; empty for the top level."""
    for field in dataclasses.fields(Config):
        if field.name == section:
            return (type(field.default).__doc__ or "").splitlines()[0]
    return ""


_FIELDS = {name: (field, kind) for name, field, kind in fields()}


def resolve(preset: str, *overrides: Mapping[str, Any]) -> Config:
    """Apply overrides to a preset in order, and validate the result as a whole.

    Args:
        preset: name of the preset.
        overrides: values by dotted name, as text or already of the field's type.

    Raises:
        ConfigError: a preset, field or game is unknown, a value has the wrong type or is out of range, or settings do
            not go together.
    """
    given: dict[str, Any] = {}
    for override in overrides:
        given.update({name.replace("-", "_"): value for name, value in override.items()})
    values = {**implied_values(preset, given), **given}
    if values.setdefault("preset", preset) != preset:
        raise ConfigError(f"preset: {_display(values['preset'])} is not {preset!r}, on which the settings are based")
    tree: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        require_known(name)
        section, _, leaf = name.rpartition(".")
        tree.setdefault(section, {})[leaf] = parse_value(name, value)
    top = tree.pop("", {})
    for section, settings in tree.items():
        top[section] = dataclasses.replace(getattr(Config, section), **settings)
    config = Config(**top)
    _check(config)
    return config


def _left_out(own: Mapping[str, Any], given: Mapping[str, Any], chosen: Mapping[str, Any]) -> set[str]:
    """Return the names of a meta-learner's `own` settings that do not suit the mode, shift or optimizer chosen."""
    mode = str(chosen["mode"])
    if "meta.optimizer" in own and mode in OPTIMIZERS:
        return set(own)
    # In trajectory shifting, nothing limits what arrives.
    found = {"meta.contribution_clip", "meta.max_norm"} if chosen["meta.shift"] == "trajectory" else set()
    if "meta.optimizer" in given and given["meta.optimizer"] != own.get("meta.optimizer"):
        return found | {"meta.learning_rate", "meta.max_norm"}
    of_mode = next((settings for name, value, settings in DEFAULTS if (name, value) == ("mode", mode)), {})
    if own.get("meta.learning_rate", 0.0) > of_mode.get("meta.learning_rate", math.inf):
        found.add("meta.learning_rate")
    return found


DECISIVE = ("tasks", "meta.optimizer", *dict.fromkeys(name for name, *_ in DEFAULTS))
"""Settings, besides the preset, on which the defaults of other settings depend."""


def implied_values(preset: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a preset, and the choices of DECISIVE in `given`, imply for other settings, by dotted name.

    Settings that are missing from the result keep their own defaults, and `given` takes precedence over it. Raises
    ConfigError if there is no such preset for these tasks.
    """
    values = _preset_values(preset, given)
    chosen = {name: {**values, **given}.get(name, default(name)) for name, *_ in DEFAULTS}
    for name, choice, settings in DEFAULTS:
        if chosen[name] == choice:
            # Learning rates chosen for one optimizer do not suit another.
            other = "meta.optimizer" in settings and (
                given.get("meta.optimizer", settings["meta.optimizer"]) != settings["meta.optimizer"]
            )
            values.update({n: v for n, v in settings.items() if not (other and n.startswith("meta."))})
    tasks = str({**values, **given}.get("tasks", Config.tasks))
    own = OF_META_LEARNERS.get((tasks, preset), {}).get(str(chosen["meta_learner"]), {})
    left_out = _left_out(own, given, chosen)
    values.update({n: v for n, v in own.items() if n not in left_out})
    return values


def _preset_values(preset: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in which a preset differs from the defaults, for the kind of tasks in `given`.

    Raises ConfigError if there is no such preset.
    """
    known = dict.fromkeys([*PRESETS, *(name for presets in TASKS.values() for name in presets)])
    tasks = parse_value("tasks", given.get("tasks", Config.tasks))
    if preset not in known:
        near = did_you_mean(preset, known) or f"; choose from {', '.join(TASKS.get(tasks, PRESETS))}"
        raise ConfigError(f"preset: no preset {_display(preset)}{near}")
    if tasks not in TASKS and preset not in PRESETS:
        raise ConfigError(f"preset: {preset} does not exist for tasks {tasks}; choose {', '.join(PRESETS)}")
    if tasks not in TASKS:
        return dict(PRESETS[preset])
    if preset not in TASKS[tasks]:
        raise ConfigError(f"preset: {preset} does not exist for tasks {tasks}; choose {', '.join(TASKS[tasks])}")
    return dict(TASKS[tasks][preset])


def _check(config: Config) -> None:
    """Expand the names of the tasks, and check settings against each other. Raises ConfigError."""
    try:
        games = registry.expand(config.tasks, config.games, seed=config.seed, pretraining=config.supervised.pretraining)
    except ValueError as error:
        raise ConfigError(f"games: {error}") from None
    object.__setattr__(config, "games", games)
    for conflict in conflicts(config):
        raise ConfigError(conflict)


_SYNONYMS = {"gpu": "cuda", "gpus": "cuda", "nvidia": "cuda"}
"""Words that people write for a choice of another name."""


def parse_value(name: str, value: Any) -> Any:
    """Convert a value to the type of a field and check its range. Raises ConfigError."""
    field, kind = _FIELDS[name]
    if get_origin(kind) is Union:  # a number, or a word in its place
        number, word = get_args(kind)
        if isinstance(value, str) and value in get_args(word):
            return value
        return _number(name, value, number, field.metadata, get_args(word))
    if get_origin(kind) is Literal:
        choices, switch = get_args(kind), field.metadata["switch"]
        if switch is not None and value not in choices and (on := _parse_bool(value)) is not None:
            return switch[on]
        if value not in choices:
            near = did_you_mean(_SYNONYMS.get(value.lower(), value), choices) if isinstance(value, str) else ""
            raise ConfigError(f"{name}: {_display(value)} is not one of {', '.join(choices)}{near}")
        return value
    if get_origin(kind) is tuple:
        items = value.replace(",", " ").split() if isinstance(value, str) else value
        wrong = not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items)
        if wrong or (not items and field.default):
            raise ConfigError(f"{name}: {_display(value)} is not a list of names")
        return tuple(items)
    if kind is bool:
        if (parsed := _parse_bool(value)) is None:
            raise ConfigError(f"{name}: {_display(value)} is neither true nor false")
        return parsed
    if kind is str:
        if not isinstance(value, str):
            raise ConfigError(f"{name}: {_display(value)} is not text")
        return os.path.expanduser(value) if name in ("data_dir", "init") else value
    return _number(name, value, kind, field.metadata)


def _parse_bool(value: Any) -> bool | None:
    """Return the boolean that a value or a word stands for, or None if it stands for neither."""
    words = {"true": True, "yes": True, "false": False, "no": False}
    parsed = words.get(value.lower()) if isinstance(value, str) else value
    return parsed if isinstance(parsed, bool) else None


def _number(name: str, value: Any, kind: type, limits: Mapping[str, Any], words: Sequence[str] = ()) -> int | float:
    wanted = "a whole number" if kind is int else "a number"
    wrong = f"is neither {', '.join(words)} nor {wanted}" if words else f"is not {wanted}"
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"{name}: {_display(value)} {wrong}")
    try:
        number = _parse_number(value) if isinstance(value, str) else value
        if not math.isfinite(number) or (kind is int and number != int(number)):
            raise ValueError
    except (ValueError, OverflowError):
        raise ConfigError(f"{name}: {_display(value)} {wrong}") from None
    if number < limits["low"]:
        raise ConfigError(f"{name}: {_display(number)} is too small; the smallest valid value is {limits['low']:,}")
    if number <= limits["above"]:
        raise ConfigError(f"{name}: {_display(number)} is too small; it must be greater than {limits['above']}")
    high = min(limits["high"], LARGEST) if kind is int else limits["high"]
    if number > high:
        raise ConfigError(f"{name}: {_display(number)} is too large; the largest valid value is {high:,}")
    return int(number) if kind is int else float(number)


def _display(value: Any) -> str:
    """Return a value as text of at most 70 characters for an error message."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    try:
        text = str(value) if isinstance(value, int | float) else reprlib.repr(value)
    except ValueError:  # such a number inside a list
        text = f"a {type(value).__name__} with a number too long to print"
    return text if len(text) <= 70 else f"{text[:67]}..."


def parse_whole_number(text: str) -> int:
    """Parse a whole number, which may be written as 1e9. Raises ValueError or OverflowError."""
    number = _parse_number(text)
    if number != int(number):
        raise ValueError
    return int(number)


def _parse_number(text: str) -> int | float:
    """Parse an integer exactly, whatever its size, and anything else as a float. Raises ValueError."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as nested plain data, the content of config.yaml."""
    data = dataclasses.asdict(config)
    data["games"] = list(config.games)
    return data


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML; `read_yaml` and `resolve` turn it back into an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the values of a YAML file by dotted name, ready for `resolve`. Raises ConfigError."""
    try:
        data = files.load(path)
    except Exception as error:  # see `files.load`
        reason = error.strerror if isinstance(error, OSError) else str(error) or type(error).__name__
        raise ConfigError(f"config: cannot read {path}: {str(reason)[:200]}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"config: {path} holds a {type(data).__name__}, not settings by name")
    flat: dict[str, Any] = {}
    for name, value in data.items():
        settings = {f".{leaf}": inner for leaf, inner in value.items()} if isinstance(value, dict) else {"": value}
        for leaf, inner in settings.items():
            if (full := f"{name}{leaf}".replace("-", "_")) in flat:
                raise ConfigError(f"{full[:80]}: given twice in {path}")
            flat[full] = inner
    return flat


FOR_EVALUATIONS = {
    "tasks", "games", "data_dir", "workers", "min_workers", "wait_for_nodes", "task_steps", "seed", "address",
    "insecure", "agent", "atari", "gymnasium", "supervised", "worker", "server.lease_seconds", "server.storage",
}  # fmt: skip
"""Settings, and whole sections of settings, that apply to evaluations."""


def is_for_evaluations(name: str) -> bool:
    """Return whether a setting applies to evaluations. Raises ConfigError if there is no such setting."""
    require_known(name)
    return is_among(name, FOR_EVALUATIONS)


def is_among(name: str, wanted: Container[str]) -> bool:
    """Return whether a setting, or its whole section, is in `wanted`."""
    return name in wanted or name.split(".")[0] in wanted


def require_known(name: str) -> None:
    """Raise ConfigError, with the nearest name, if there is no setting of that name."""
    if name not in _FIELDS:
        raise ConfigError(f"{name[:80]}: no such setting{did_you_mean(name, _FIELDS)}")


def check_game_steps(lengths: Mapping[str, int], games: Sequence[str], steps_per_update: int) -> None:
    """Raise ConfigError if a length is out of range or belongs to a game that is not in `games`."""
    for game, steps in lengths.items():
        if game not in games:
            near = did_you_mean(game[:40], games)
            raise ConfigError(f"game_steps: {game[:40]!r} is not one of the games {', '.join(games)}{near}")
        if steps < 2 * steps_per_update:
            raise ConfigError(f"game_steps: {game}={steps} is less than two updates of {steps_per_update} steps")
        if steps > LARGEST:
            raise ConfigError(
                f"game_steps: {game}={_display(steps)} is too large; the largest valid value is {LARGEST:,}"
            )


def incompatibilities(old: Config, new: Config) -> list[str]:
    """List the changes that prevent a run from resuming with `new` instead of `old`, each as "field: old -> new"."""
    before, after = _flat(old), _flat(new)
    return [
        f"{name}: {before[name]} -> {after[name]}" for name in before if _is_fixed(name) and before[name] != after[name]
    ]


def fixed_settings(config: Config) -> dict[str, Any]:
    """Return the settings that define what a run learns, by dotted name, as JSON-compatible data."""
    values = {name: value for name, value in _flat(config).items() if _is_fixed(name)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def same_setting(name: str, old: Any, new: Any) -> bool:
    """Return whether a value in a run's files, perhaps written by an earlier version, is equivalent to `new`."""
    if old == new or _FIELDS[name][0].metadata["switch"] is None:
        return bool(old == new)
    return bool(parse_value(name, old) == new)


def _is_fixed(name: str) -> bool:
    return name not in _FREE_ON_RESUME and name.split(".")[0] not in _FREE_SECTIONS_ON_RESUME


def completed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings from a run's file. Newer settings that it lacks get their defaults, not a preset's values.

    A file without `tasks` is returned unchanged, because no run with images can have written it.
    """
    if "tasks" not in saved:
        return dict(saved)
    missing = {name: default(name) for name in _FIELDS if name not in saved and name != "preset"}
    return {**missing, **saved}


def without_code(saved: Mapping[str, Any], given: Collection[str], source: str) -> dict[str, Any]:
    """Return the settings from a run's file without the modules to import, which only the user can name.

    A run directory may be somebody else's, and may even bring a module of that name. Raises ConfigError if the file
    names modules and the user does not: `given` are the names of the settings that the user gives.
    """
    name = "gymnasium.modules"
    if (wanted := parse_value(name, saved.get(name, ()))) and name not in given:
        raise ConfigError(
            f"{name}: {source} names {', '.join(wanted)}, and importing a module runs its code; if you trust it, add "
            f"--{name} {shlex.join(wanted)}"
        )
    return {key: value for key, value in saved.items() if key != name}


def default(name: str) -> Any:
    """Return the default of a setting as plain data."""
    value = _FIELDS[name][0].default
    return list(value) if isinstance(value, tuple) else value


def _flat(config: Config) -> dict[str, Any]:
    return {name: look_up(config, name) for name in _FIELDS}


def look_up(config: Any, name: str) -> Any:
    """Return the value of a setting by its dotted name."""
    for part in name.split("."):
        config = getattr(config, part)
    return config
