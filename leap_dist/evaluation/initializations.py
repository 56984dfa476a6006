"""What an evaluation compares: initializations by label, and the settings that all of them are trained with."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from leap_dist.config import loading as configuration
from leap_dist.config.loading import ConfigError
from leap_dist.config.presets import PRESETS, TASKS
from leap_dist.config.registry import DATA_SETS
from leap_dist.config.settings import Config
from leap_dist.evaluation.results.runs import describe_arms, require_label
from leap_dist.storage import reader
from leap_dist.storage.atomic import CorruptFile, write_atomic
from leap_dist.storage.location import Url
from leap_dist.storage.objects import is_url
from leap_dist.tasks.task import sections_of
from leap_dist.weights.initialization import Initialization, read_initialization

SCRATCH = "scratch"
"""The arm that starts from a fresh random encoder."""

_HELD_OUT = ("breakout", "qbert", "space_invaders")


@dataclass(frozen=True)
class Arm:
    """One initialization under comparison."""

    label: str
    source: str
    """Path or URL of the file, or `scratch`."""
    scope: str
    """What the file holds, see `ActorCritic.parameters_of`."""
    sha256: str = ""
    """Of the file's bytes."""
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def describe(self) -> dict[str, Any]:
        """As plain data, for arms.json."""
        about = {name: self.metadata.get(name) for name in ("meta_learner", "version", "games", "preset")}
        return {"label": self.label, "source": self.source, "scope": self.scope, "sha256": self.sha256, **about}


@dataclass(frozen=True)
class _Given:
    """An --init that names a file."""

    label: str
    path: Path
    content: Initialization
    source: str
    """What a person knows it by."""


def read(specs: Sequence[str]) -> tuple[list[str], list[_Given]]:
    """Labels in order, and the files behind those that are not `scratch`.

    A spec is `scratch`, PATH or LABEL=PATH, where PATH may be a run directory, or a URL. Raises ConfigError on a label
    that is none, or is there twice, and on a file that is not a whole initialization.
    """
    labels: list[str] = []
    files: list[_Given] = []
    for spec in specs:
        label, path, source = _parse(spec)
        if label in labels:
            raise ConfigError(f"init: there are two of the label {label!r}; give one another name with LABEL=PATH")
        labels.append(label)
        if path is not None:
            files.append(_Given(label, path, _read(path), source))
    return labels, files


def settings(files: Sequence[_Given], given: Mapping[str, Any], preset: str | None) -> dict[str, Any]:
    """What the learners' settings start from, by dotted name, `preset` among them.

    That is how the first file's own run was trained, where its run directory tells; other files must have been trained
    alike in all that is not `given`. With a `preset`, that alone counts. Raises ConfigError.
    """
    trained_on = next((file.content.tasks for file in files), Config.tasks)
    tasks = configuration.parse_value("tasks", given.get("tasks", trained_on))
    start = {"tasks": tasks, "games": _held_out(tasks, files)}
    if preset is not None:
        return {"preset": preset, **start}
    trained = {file.label: run for file in files if (run := _trained_with(file.path)) is not None}
    if not trained:
        known = (str(file.content.metadata.get("preset")) for file in files)
        return {"preset": next((name for name in known if name in TASKS.get(tasks, PRESETS)), "paper"), **start}
    (first, base), *others = trained.items()
    sections = sections_of(tasks)
    # Which characters of an alphabet are told apart, and which alphabets are held out, is the run's seed's to say.
    alone = ("task_steps", "data_dir", "seed") if "supervised" in sections else ("task_steps",)
    compared = ("seed",) if tasks == "omniglot" else ()
    for label, run in others:
        for name, value in run.items():
            differs = name not in given and value != base.get(name)
            if differs and (name.split(".")[0] in sections or name in compared) and name not in _OF_TRAINING:
                raise ConfigError(
                    f"{name}: {first} was trained with {base.get(name)}, {label} with {value}; "
                    f"say which it is with --{name.replace('_', '-')}"
                )
    wanted = {name: value for name, value in base.items() if name.split(".")[0] in sections or name in alone}
    return {"preset": base.get("preset", "paper"), **start, **wanted}


_OF_TRAINING = ("supervised.pretraining",)
"""What makes a run, but no learner."""


def _held_out(tasks: str, files: Sequence[_Given]) -> tuple[str, ...]:
    """What an evaluation is of unless something else is asked for."""
    if tasks == "atari":
        return _HELD_OUT
    if tasks == "omniglot":
        return ("held_out",)
    known = {name for file in files for name in file.content.metadata["games"]}
    return tuple(name for name in DATA_SETS if name not in known) or ("all",)


def resolve(given: Mapping[str, Any], loaded: Mapping[str, Any], base: Mapping[str, Any]) -> Config:
    """The evaluation's configuration: flags over the file over `base`. Raises ConfigError."""
    preset = str(base["preset"])
    fixed = {"meta_learner": "none", "mode": "buffered", "telemetry.gif_interval": 0}
    layers = ({name: value for name, value in layer.items() if name != "preset"} for layer in (base, loaded, given))
    return configuration.resolve(preset, *layers, fixed)


def arms(labels: Sequence[str], files: Sequence[_Given], config: Config) -> list[Arm]:
    """The arms in the order of `labels`. Raises ConfigError where a file does not fit what the agents will see."""
    by_label = {file.label: file for file in files}
    return [_arm(by_label[label], config) if label in by_label else _scratch(label) for label in labels]


def vectors(chosen: Sequence[Arm]) -> dict[str, np.ndarray]:
    """Flat, float32, by label: what the arms start from that come from a file.

    Raises ConfigError where a file is not what it was when it was chosen.
    """
    return {arm.label: _vector(arm) for arm in chosen if arm.source != SCRATCH}


def _vector(arm: Arm) -> np.ndarray:
    if is_url(arm.source):
        with tempfile.TemporaryDirectory(prefix="leap-dist-read-") as folder:  # a server's process has no clean end
            content = _read(reader.fetch_initialization(Url(arm.source), Path(folder)))
    else:
        content = _read(Path(arm.source))
    if content.sha256 != arm.sha256:
        raise ConfigError(f"init: {arm.source} has changed in the meantime; keep a copy of what is to be evaluated")
    return content.vector(content.manifest)


def write(out: Path, chosen: Sequence[Arm]) -> None:
    """Notes the arms in `out`/arms.json, before those that are there from earlier commands. Raises ConfigError."""
    before, _ = describe_arms(out)
    labels = {arm.label for arm in chosen}
    kept = [arm for arm in before if arm["label"] not in labels]
    content = json.dumps({"arms": [*(arm.describe() for arm in chosen), *kept]}, indent=1)
    try:
        write_atomic(out / "arms.json", content.encode(), "arms")
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be written ({error.strerror}); choose another") from None


def notes(chosen: Sequence[Arm], config: Config) -> list[str]:
    """What a reader of the comparison should know: games that are not new to an arm."""
    return [
        f"{', '.join(known)}: {arm.label} was meta-trained on {'it' if len(known) == 1 else 'them'}"
        for arm in chosen
        if (known := [game for game in config.games if game in (arm.metadata.get("games") or ())])
    ]


def _parse(spec: str) -> tuple[str, Path | None, str]:
    """Label, path, and what a person knows it by."""
    label, equals, path = spec.partition("=")
    if not equals or is_url(spec):
        if spec == SCRATCH:
            return SCRATCH, None, SCRATCH
        label, path = "", spec
    location = reader.cached_initialization(Url(path)) if is_url(path) else Path(path)
    if location.is_dir():
        location /= "init.safetensors"
    if not label:
        label = location.absolute().parent.name if location.name == "init.safetensors" else location.stem
    try:
        require_label(label)
    except ValueError as error:
        raise ConfigError(f"init: {error}; say LABEL=PATH") from None
    if path == SCRATCH:
        return label, None, SCRATCH
    return label, location, path if is_url(path) else str(location.absolute())


def _read(path: Path) -> Initialization:
    try:
        return read_initialization(path)
    except CorruptFile as error:
        raise ConfigError(f"init: {error}") from None
    except OSError as error:
        raise ConfigError(
            f"init: {path} cannot be read ({error.strerror}); give an init.safetensors, a run directory, or scratch"
        ) from None


def _trained_with(path: Path) -> dict[str, Any] | None:
    """Settings of the run that a file lies in, by dotted name; None where it lies alone."""
    beside = path.parent / "config.yaml"
    if path.name != "init.safetensors" or not beside.exists():
        return None
    return configuration.read_yaml(beside)


def _scratch(label: str) -> Arm:
    return Arm(label, SCRATCH, "encoder")


def _arm(file: _Given, config: Config) -> Arm:
    content = file.content
    if content.tasks != config.tasks:
        raise ConfigError(
            f"tasks: {file.label} is for tasks {content.tasks}, not {config.tasks}; compare like with like"
        )
    seen: Mapping[str, Any] = content.metadata.get("preprocessing") or {}
    for name in ("frames", "frame_skip"):
        shown = getattr(config.atari, name)
        if seen.get(name, shown) != shown:
            raise ConfigError(
                f"atari.{name}: {shown} is not what {file.label} was trained on; use --atari.{name.replace('_', '-')} "
                f"{seen[name]}"
            )
    return Arm(file.label, file.source, content.scope, content.sha256, content.metadata)
