"""The arms of an evaluation: the initializations to compare, and the settings with which learners are trained.

OUT/arms.json                               the arms in their order, with the origin of each initialization
OUT/initializations/<label>.safetensors     copy of each file: a run that is still training replaces its own
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from leap_dist.config import loading as configuration
from leap_dist.config import pretrained
from leap_dist.config.loading import ConfigError
from leap_dist.config.presets import PRESETS, TASKS
from leap_dist.config.registry import DATA_SETS, OWN
from leap_dist.config.settings import Config
from leap_dist.envs.games import HELD_OUT, SETS
from leap_dist.protocol import schema
from leap_dist.storage import reader
from leap_dist.storage.atomic import DECODE_ERRORS, CorruptFile, one_line, read_packed, read_regular, write_atomic
from leap_dist.storage.location import Url
from leap_dist.storage.objects import is_url
from leap_dist.tasks.task import family_named
from leap_dist.weights.initialization import Initialization, initialization_of, read_bytes

SCRATCH = "scratch"
"""Source of an arm that starts from a new random encoder with every seed."""

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,39}")  # labels become names of folders


@dataclass(frozen=True)
class Arm:
    """One initialization under comparison."""

    label: str
    source: str
    """Absolute path or URL of the file, `pretrained:NAME`, or `scratch`."""
    scope: str
    """Name of the set of parameters that the file holds; see `ActorCritic.parameters_of`."""
    sha256: str = ""
    """SHA-256 of the file's bytes."""
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)
    data: bytes = field(default=b"", compare=False, repr=False)
    """The file's bytes; empty if they are to be read from `source`."""
    replaced: bool = field(default=False, compare=False)
    """Whether `source` has changed since the evaluation began, so that `data` is the evaluation's own copy."""
    learning_rate: float | None = None
    """Learning rate of this arm's runs; None for that of the configuration."""

    def describe(self) -> dict[str, Any]:
        """Return the arm as JSON-compatible data, for arms.json."""
        about = {name: self.metadata.get(name) for name in ("meta_learner", "version", "games", "preset")}
        return {"label": self.label, "source": self.source, "scope": self.scope, "sha256": self.sha256, **about}


@dataclass(frozen=True)
class InitFile:
    """An initialization file that the user named with `--init`."""

    label: str
    path: Path
    content: Initialization
    source: str
    """Absolute path, URL or `pretrained:NAME`, as reports show it."""
    data: bytes = b""
    """The file's bytes."""
    replaced: bool = False
    """Whether the file has changed since the evaluation began, so that this is the evaluation's own copy."""

    @property
    def test_steps(self) -> int | None:
        """Length of the runs by which weights of the package were tested; None for all others, or if unknown."""
        names = {f"{pretrained.PREFIX}{one.name}": one for one in pretrained.available()}
        return names[self.source].test_steps if self.source in names else None


def read(specs: Sequence[str], out: Path | None = None) -> tuple[list[str], list[InitFile]]:
    """Return the labels in order, and the files of all arms but those that start from `scratch`.

    A spec is `scratch`, PATH or LABEL=PATH, where PATH may also be a run directory, a URL or `pretrained:NAME`, or an
    encoder of another library (`leap_dist.weights.foreign`). If the evaluation in `out` has trained agents from a file
    that has changed since, its own copy is read. Raises ConfigError if a label is invalid or occurs twice, or if a file
    is not a complete initialization.
    """
    labels: list[str] = []
    files: list[InitFile] = []
    for spec in specs:
        label, path, source = _parse(spec)
        if label in labels:
            raise ConfigError(f"init: two initializations have the label {label!r}; rename one with LABEL=PATH")
        labels.append(label)
        if path is not None:
            content, data = _read(path, source)
            files.append(_as_begun(InitFile(label, path, content, source, data), out))
    return labels, files


def settings(files: Sequence[InitFile], given: Mapping[str, Any], preset: str | None) -> dict[str, Any]:
    """Return the base settings of the learners by dotted name, including `preset`.

    Without a `preset` they are those of the run that made the first file, if its run directory is known. All other
    files must then come from runs with the same settings, apart from those in `given`. Weights that come with the
    package may have been tested for longer than a training task: then the base has `test_steps`. Raises ConfigError.
    """
    trained_on = next((file.content.tasks for file in files), Config.tasks)
    tasks = configuration.parse_value("tasks", given.get("tasks", trained_on))
    for file in files:
        _require_tasks(file, tasks)
    sections = family_named(tasks).sections
    trained = {file.label: run for file in files if (run := _trained_with(file.path)) is not None}
    start = {"tasks": tasks, "games": _held_out(tasks, files)}
    if "supervised" in sections:
        start |= _data_seed(tasks, trained, given)
    if preset is not None:
        return {"preset": preset, **start}
    if not trained:
        known = (str(file.content.metadata.get("preset")) for file in files)
        return {"preset": next((name for name in known if name in TASKS.get(tasks, PRESETS)), "paper"), **start}
    (first, base), *others = trained.items()
    alone = ("task_steps", "data_dir") if "supervised" in sections else ("task_steps",)
    for label, run in others:
        for name, value in run.items():
            differs = name not in given and value != base.get(name)
            if differs and name.split(".")[0] in sections and name not in _TRAINING_ONLY:
                raise ConfigError(
                    f"{name}: {first} was trained with {base.get(name)}, {label} with {value}; "
                    f"choose one with --{name.replace('_', '-')}"
                )
    wanted = {name: value for name, value in base.items() if name.split(".")[0] in sections or name in alone}
    wanted = configuration.without_code(wanted, given, f"the run of {first}")
    tested = next((file.test_steps for file in files if file.label == first), None)
    return {"preset": base.get("preset", "paper"), **start, **wanted, **({"test_steps": tested} if tested else {})}


_TRAINING_ONLY = ("supervised.pretraining",)
"""Settings of meta-training that do not affect a learner."""


def _data_seed(tasks: str, trained: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the seed of the first file's run, if it is known: it determined which data the run did not train on.

    In Omniglot these are alphabets, so that runs with other seeds cannot be compared on them. Raises ConfigError.
    """
    seeds = {label: run.get("seed", Config.seed) for label, run in trained.items()}
    first = next(iter(seeds), "")
    for label, seed in seeds.items() if tasks == "omniglot" and "games" not in given else ():
        if seed != seeds[first]:
            raise ConfigError(
                f"seed: {first} was trained with {seeds[first]}, {label} with {seed}, so that other alphabets were "
                "held out; evaluate them separately, or name alphabets with --games"
            )
    return {"seed": seeds[first]} if seeds else {}


def _held_out(tasks: str, files: Sequence[InitFile]) -> tuple[str, ...]:
    """Return the games, alphabets or data sets that are evaluated by default."""
    if tasks == "omniglot":
        return ("held_out",)
    known = {name: None for file in files for name in file.content.metadata["games"]}
    if tasks == "atari":
        trained = next((name for name, games in SETS.items() if set(games) == set(known)), "seed24")
        return HELD_OUT[trained]
    if tasks in OWN:  # only the user knows which tasks there are
        return tuple(known) or Config.games
    return tuple(name for name in DATA_SETS if name not in known) or ("all",)


def resolve(given: Mapping[str, Any], loaded: Mapping[str, Any], base: Mapping[str, Any]) -> Config:
    """Return the configuration: flags take precedence over the config file, which takes precedence over `base`.

    For images, flag `seed` is left out: the seed of the configuration draws the held-out data; see `first_seed`. A
    learning rate that is given takes precedence over the rate of tests in `base`, and a length over `test_steps`.
    Raises ConfigError.
    """
    preset = str(base["preset"])
    fixed: dict[str, Any] = {"meta_learner": "none", "mode": "buffered", "telemetry.gif_interval": 0}
    if "supervised.learning_rate" in {**loaded, **given}:
        base = {**base, "supervised.test_learning_rate": 0}
    if "supervised" in family_named(str(base["tasks"])).sections:
        given = {name: value for name, value in given.items() if name != "seed"}
    others = ("preset", "test_steps")
    layers = ({name: value for name, value in layer.items() if name not in others} for layer in (base, loaded, given))
    config = configuration.resolve(preset, *layers, fixed)
    is_given = "task_steps" in loaded or "task_steps" in given
    usual = base.get("test_steps") or config.supervised.test_steps(config.task_steps)
    steps = config.task_steps if is_given else int(usual)
    return replace(config, task_steps=steps, supervised=config.supervised.in_tests())


def first_seed(given: Mapping[str, Any], config: Config) -> int:
    """Return the seed of the first run of each arm: that of the flags or, without one, of the configuration."""
    return int(configuration.parse_value("seed", given.get("seed", config.seed)))


def arms(labels: Sequence[str], files: Sequence[InitFile], config: Config) -> list[Arm]:
    """Return the arms in the order of `labels`. Raises ConfigError if a file does not fit the agents' observations.

    Classifiers learn with the rate `supervised.test_learning_rate`, unless it is 0.
    """
    by_label = {file.label: file for file in files}
    made = [_arm(by_label[label], config) if label in by_label else Arm(label, SCRATCH, "encoder") for label in labels]
    rate = config.supervised.test_learning_rate if config.is_supervised else 0
    if rate in (0, config.supervised.learning_rate):
        return made
    return [replace(arm, learning_rate=rate) for arm in made]


def vectors(chosen: Sequence[Arm]) -> dict[str, np.ndarray]:
    """Return the flat float32 parameter vector of every arm that has a file, by label.

    Raises ConfigError if an arm comes without its file's bytes, and the file has changed since.
    """
    return {arm.label: _vector(arm) for arm in chosen if arm.source != SCRATCH}


def _vector(arm: Arm) -> np.ndarray:
    if arm.data:
        content = initialization_of(arm.data, arm.source)
    else:
        content, _ = _read(Path(arm.source), arm.source)
    if content.sha256 != arm.sha256:
        raise ConfigError(f"init: {arm.source} has changed in the meantime; evaluate a copy of it instead")
    return content.vector(content.manifest)


def write(out: Path, chosen: Sequence[Arm]) -> None:
    """Write the arms to `out`/arms.json, ahead of those from earlier commands, and copies of their files.

    Raises ConfigError.
    """
    before, _ = describe_arms(out)
    labels = {arm.label for arm in chosen}
    kept = [arm for arm in before if arm["label"] not in labels]
    content = json.dumps({"arms": [*(arm.describe() for arm in chosen), *kept]}, indent=1)
    try:
        for arm in chosen:
            if arm.data:
                (out / _COPIES).mkdir(exist_ok=True)
                write_atomic(_copy_of(out, arm.label), arm.data, "arm")
        write_atomic(out / "arms.json", content.encode(), "arms")
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be written ({error.strerror}); choose another") from None


def describe_arms(out: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the entries of `out`/arms.json in their order, and warnings; no entries if the file is missing."""
    try:
        content = json.loads(read_regular(out / "arms.json"))
        schema.check(content, {"arms": [{"label": str}]}, "arms")
        labels = [require_label(arm["label"]) for arm in content["arms"]]
        if len(set(labels)) < len(labels):
            raise ValueError("a label is given twice")
    except FileNotFoundError:
        return [], []
    except (CorruptFile, OSError, *DECODE_ERRORS) as error:
        return [], [f"arms.json is left out: {one_line(error)}"]
    return content["arms"], []


def require_label(label: str) -> str:
    """Return the label. Raises ValueError if it is not a valid label of an arm."""
    if not _LABEL.fullmatch(label):
        raise ValueError(f"arm {label[:60]!r} is not valid: a letter or digit, then up to 39 letters, digits and ._+-")
    return label


def notes(chosen: Sequence[Arm], config: Config) -> list[str]:
    """Return a line for each arm whose file has changed, or that was meta-trained on games of the evaluation."""
    changed = [
        f"{arm.source} has changed since this evaluation began, so {arm.label} stays what it was then; give another "
        "--out to evaluate the newer one"
        for arm in chosen
        if arm.replaced
    ]
    return changed + not_held_out([arm.describe() for arm in chosen], config.games)


def not_held_out(described: Sequence[Mapping[str, Any]], games: Iterable[str]) -> list[str]:
    """Return a line for each arm, as arms.json describes it, that was meta-trained on some of the `games`."""
    return [
        f"{arm['label']} was meta-trained on {', '.join(known)}, which {'is' if len(known) == 1 else 'are'} therefore "
        "not held out for it"
        for arm in described
        if (known := [game for game in games if game in (arm.get("games") or ())])
    ]


def _parse(spec: str) -> tuple[str, Path | None, str]:
    """Return the label, the path of the file (None for `scratch`), and the source."""
    label, equals, path = spec.partition("=")
    if not equals or is_url(spec):
        if spec == SCRATCH:
            return SCRATCH, None, SCRATCH
        label, path = "", spec
    location = reader.cached_initialization(Url(path)) if is_url(path) else pretrained.path_of(path)
    if not label:
        label = location.absolute().parent.name if location.name in pretrained.OF_RUNS else location.stem
    try:
        require_label(label)
    except ValueError as error:
        raise ConfigError(f"init: {error}; give LABEL=PATH") from None
    if path == SCRATCH:
        return label, None, SCRATCH
    return label, location, path if is_url(path) or pretrained.is_name(path) else str(location.absolute())


def _read(path: Path, source: str) -> tuple[Initialization, bytes]:
    """Return what the file at `path`, which errors call `source`, holds, and its bytes. Raises ConfigError."""
    try:
        data = read_bytes(path, source)  # only once: a run that is still training replaces its file
        return initialization_of(data, source), data
    except CorruptFile as error:
        raise ConfigError(f"init: {error}") from None
    except OSError as error:
        raise ConfigError(
            f"init: {source} cannot be read ({error.strerror}); {pretrained.choices(scratch=True)}"
        ) from None


_COPIES = "initializations"


def _copy_of(out: Path, label: str) -> Path:
    return out / _COPIES / f"{label}.safetensors"


def _as_begun(file: InitFile, out: Path | None) -> InitFile:
    """Return the file, or the copy with which the evaluation in `out` has trained agents, if the file has changed."""
    if out is None or not any(any((out / kind).glob(f"{file.label}/*/*.*")) for kind in ("runs", "states")):
        return file
    about = {"label": file.label, "source": file.source}
    for arm in describe_arms(out)[0]:
        if about.items() <= arm.items() and arm.get("sha256") != file.content.sha256:
            with contextlib.suppress(CorruptFile, OSError):
                data = read_packed(_copy_of(out, file.label))
                content = initialization_of(data, file.source)
                if content.sha256 == arm.get("sha256"):
                    return replace(file, content=content, data=data, replaced=True)
    return file


def _trained_with(path: Path) -> dict[str, Any] | None:
    """Return the settings of the run that made a file, by dotted name; None if the file is in no run directory."""
    beside = path.parent / "config.yaml"
    if path.name not in pretrained.OF_RUNS or not beside.exists():
        return None
    return configuration.completed(configuration.read_yaml(beside))


def _require_tasks(file: InitFile, tasks: str) -> None:
    if file.content.tasks != tasks:
        raise ConfigError(f"tasks: {file.label} is for tasks {file.content.tasks}, not {tasks}; compare like with like")


def _arm(file: InitFile, config: Config) -> Arm:
    content = file.content
    _require_tasks(file, config.tasks)
    if other := content.other_setting(config):
        raise ConfigError(
            f"{other.name}: {other.wanted} is not what {file.label} was trained with; use "
            f"--{other.name.replace('_', '-')} {other.found}"
        )
    return Arm(
        file.label, file.source, content.scope, content.sha256, content.metadata, data=file.data, replaced=file.replaced
    )
