"""The runs of an evaluation: which ones are planned, and the file that each one writes.

OUT/runs/<arm>/<game>/<seed>.json     one run, with a checksum
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from leap_dist.config.loading import ConfigError, check_game_steps, default
from leap_dist.config.settings import Config
from leap_dist.evaluation.initializations import Arm, describe_arms, require_label
from leap_dist.protocol import schema
from leap_dist.protocol.messages import Contribution
from leap_dist.storage.atomic import (
    DECODE_ERRORS,
    CorruptFile,
    NewerFormat,
    json_digest,
    one_line,
    read_regular,
    sync_directory,
    write_atomic,
)
from leap_dist.tasks.task import family_of

FORMAT = 1
_GAME = re.compile("[a-z0-9_]{1,80}")  # games become names of folders
_PLAIN = ("arm", "game", "seed", "budget", "seconds")  # fields that are the same in a file
_SHAPE = {
    "arm": str,
    "game": str,
    "seed": int,
    "budget": int,
    "seconds": float,
    "identity": {},
    "episodes": {"steps": [int], "returns": [float]},
    "curve": [{"steps": float, ...: float}],
}


# Planned runs -----------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A planned run: one fresh learner on one game, from one arm's initialization."""

    arm: Arm
    game: str
    """Game, alphabet or data set."""
    seed: int
    steps: int
    """Length of the run in agent steps, or in examples."""

    @property
    def name(self) -> str:
        """Name of the run in messages."""
        return f"{self.arm.label} on {self.game} with seed {self.seed}"

    def identity(self, config: Config) -> dict[str, Any]:
        """Return everything that determines the run, as data that survives a round trip through JSON."""
        own = {} if self.arm.learning_rate is None else {"learning_rate": self.arm.learning_rate}
        return {
            "init": self.arm.sha256 or self.arm.source,
            "steps": self.steps,
            "precision": config.worker.precision,
            **family_of(config).identity(config, self.game),
            **own,
        }


def plan(
    arms: Sequence[Arm],
    config: Config,
    seeds: int,
    first: int | None = None,
    steps_of: Mapping[str, int] = MappingProxyType({}),
) -> list[Run]:
    """Return all runs, seed by seed, so that an evaluation that ends early can still compare all arms.

    The `seeds` seeds are consecutive, starting with `first`, by default the seed of the configuration. `steps_of` has
    the lengths of the runs of individual games; those of all others are `config.task_steps`. Raises ConfigError if it
    names a game that is not evaluated, or a length that is too short.
    """
    check_game_steps(steps_of, config.games, config.steps_per_update)
    start = config.seed if first is None else first
    return [
        Run(arm, game, seed, steps_of.get(game, config.task_steps))
        for seed in range(start, start + seeds)
        for game in config.games
        for arm in arms
    ]


def missing(runs: Sequence[Run], config: Config, out: Path) -> tuple[list[int], list[str]]:
    """Return the indices of the runs that have no result in `out` yet, and a warning for each damaged result.

    Raises ConfigError if `out` holds a result that was made with other settings, even one of an arm not in `runs`.
    """
    left, warnings = [], []
    common, lengths = _shared_settings(runs[0].identity(config)), {run.game: run.steps for run in runs}
    planned = {path_of(out, run.arm.label, run.game, run.seed) for run in runs}
    for path in sorted(set(out.glob("runs/*/*/*.json")) - planned):
        with contextlib.suppress(CorruptFile, OSError):
            other, identity = load(path)
            steps = {"steps": lengths.get(other.game, identity.get("steps"))}
            _require_same(other.arm, other.game, _shared_settings(identity), {**common, **steps}, out)
    for index, run in enumerate(runs):
        try:
            _, identity = load(path_of(out, run.arm.label, run.game, run.seed))
        except FileNotFoundError:
            left.append(index)
        except (CorruptFile, OSError) as error:
            left.append(index)
            warnings.append(f"{run.name} is run again: {error}")
        else:
            _require_same(run.arm.label, run.game, identity, run.identity(config), out)
    return left, warnings


def _require_same(arm: str, game: str, found: Mapping[str, Any], wanted: Mapping[str, Any], out: Path) -> None:
    """Raise ConfigError if a result of `arm` on `game` was made with other settings, or from another initialization."""
    newer = {name: default(name) for name in wanted if "." in name and name not in found}  # it had their defaults
    found = {**newer, **found}
    for setting in sorted(wanted.keys() | found.keys()):
        if wanted.get(setting) == found.get(setting):
            continue
        if setting == "init":
            raise ConfigError(
                f"out: {out} has results of another initialization called {arm}; choose another --out or label"
            )
        name = {"steps": "task_steps", "precision": "worker.precision"}.get(setting, setting)
        raise ConfigError(
            f"out: {out} has results on {game} with {name} {str(found.get(setting))[:40]}, not "
            f"{str(wanted.get(setting))[:40]}; choose another --out, or use the same settings"
        )


def _shared_settings(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of an identity that the runs of all arms and games share."""
    return {name: value for name, value in identity.items() if name not in ("init", "data", "learning_rate")}


# Results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunResult:
    """Result of a run that has ended."""

    arm: str
    """Label of the initialization."""
    game: str
    """Game, alphabet or data set."""
    seed: int
    budget: int
    """Length of the run, in agent steps or examples."""
    seconds: float
    """Wall time of training."""
    ended: np.ndarray
    """Ascending steps at which an episode (or a batch) ended, int64 of shape (episodes,)."""
    returns: np.ndarray
    """Raw undiscounted returns (or errors of batches), float64 of shape (episodes,)."""
    curve: tuple[dict[str, float], ...]
    """Means of the learner, such as loss and entropy, by ascending "steps"; may be empty."""

    @property
    def name(self) -> str:
        """Name of the run in messages."""
        return f"{self.arm}/{self.game}/{self.seed}"


def result_of(run: Run, contribution: Contribution) -> RunResult:
    """Return the result of a run from the last contribution of its worker."""
    return RunResult(
        arm=run.arm.label,
        game=run.game,
        seed=run.seed,
        budget=contribution.steps,
        seconds=contribution.seconds,
        ended=np.array([episode.steps for episode in contribution.episodes], np.int64),
        returns=np.array([episode.score for episode in contribution.episodes], np.float64),
        curve=tuple({"steps": point.steps, **point.means} for point in contribution.curve),
    )


def path_of(out: Path, arm: str, game: str, seed: int) -> Path:
    """Return the path of a run's file."""
    return out / "runs" / arm / game / f"{seed}.json"


def save(out: Path, run: RunResult, identity: dict[str, Any]) -> None:
    """Write a run to its file in `out`, durably, with everything that determines it (`identity`, JSON-compatible).

    Raises ValueError if `load` would not accept the run, and OSError if it cannot be written.
    """
    content = {
        "format": FORMAT,
        **{name: getattr(run, name) for name in _PLAIN},
        "identity": identity,
        "episodes": {"steps": run.ended.tolist(), "returns": run.returns.tolist()},
        "curve": list(run.curve),
    }
    _parse(content)
    path = path_of(out, run.arm, run.game, run.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps(content | {"sha256": json_digest(content)})
    write_atomic(path, data.encode(), "transfer-run")
    for folder in path.parents[1:4]:  # new folders must survive a crash too
        sync_directory(folder)


def load(path: Path) -> tuple[RunResult, dict[str, Any]]:
    """Return a run and its identity.

    Raises CorruptFile, with a message of one line, if the file is damaged or belongs elsewhere, and OSError if
    it cannot be read.
    """
    name = "/".join(path.parts[-3:])
    try:
        content = json.loads(read_regular(path))
        schema.check(content, {"format": int, "sha256": str}, "run")
        if content["format"] > FORMAT:
            raise NewerFormat(f"{name}: format {content['format']} is newer than {FORMAT}; update leap-dist")
        if content.pop("sha256") != json_digest(content):
            raise CorruptFile(f"{name} is damaged: its checksum does not match")
        run = _parse(content)
    except DECODE_ERRORS as error:
        raise CorruptFile(f"{name} is not a run, or damaged: {one_line(error)}") from None
    if name != f"{run.name}.json":
        raise CorruptFile(f"{name} holds another run: {run.name}")
    return run, content["identity"]


def load_all(out: Path) -> tuple[list[RunResult], list[str]]:
    """Return every run in `out`, by arm (in the order of arms.json), game and seed, and warnings of one line each.

    Files that are damaged or cannot be read are left out, with a warning.
    """
    runs, warnings = [], []
    for path in sorted(out.glob("runs/*/*/*.json")):
        try:
            runs.append(load(path)[0])
        except (CorruptFile, OSError) as error:
            warnings.append(f"left out: {one_line(error)}")
    described, more = describe_arms(out)
    place = {arm["label"]: number for number, arm in enumerate(described)}
    runs.sort(key=lambda run: (place.get(run.arm, len(place)), run.arm, run.game, run.seed))
    return runs, warnings + more


def _parse(content: dict[str, Any]) -> RunResult:
    """Return the run that `content` describes. Raises ValueError if it describes none."""
    schema.check(content, _SHAPE, "run")
    require_label(content["arm"])
    if not _GAME.fullmatch(content["game"]):
        raise ValueError(f"game {content['game'][:60]!r} is not the name of a game")
    ended = np.array(content["episodes"]["steps"], np.int64)
    returns = np.array(content["episodes"]["returns"], np.float64)
    if len(ended) != len(returns):
        raise ValueError(f"{len(ended)} episodes ended, {len(returns)} have a return")
    if not np.isfinite(returns).all():
        raise ValueError("a return is not a number")
    curve = content["curve"]
    for what, steps in (("episodes", ended.tolist()), ("curve", [point["steps"] for point in curve])):
        if not all(a <= b for a, b in itertools.pairwise([0, *steps])):
            raise ValueError(f"steps of {what} do not ascend from 0")
    if not (content["seed"] >= 0 and content["budget"] > 0 and 0 <= content["seconds"] < float("inf")):
        raise ValueError("seed, budget or seconds are out of range")
    return RunResult(**{name: content[name] for name in _PLAIN}, ended=ended, returns=returns, curve=tuple(curve))
