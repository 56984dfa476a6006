"""What an evaluation measures: one file per run, on a held-out game, from an initialization that has a label.

OUT/runs/<arm>/<game>/<seed>.json     a run, with a checksum
OUT/arms.json                         the arms in their order, and where their initializations are from
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from leap_dist.protocol import schema
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

FORMAT = 1
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,39}")  # arms and games become names of folders
_GAME = re.compile("[a-z0-9_]{1,80}")
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


@dataclasses.dataclass(frozen=True)
class TransferRun:
    """One fresh learner, trained on one game from one arm's initialization."""

    arm: str
    """Label of the initialization."""
    game: str
    seed: int
    budget: int
    """Agent steps."""
    seconds: float
    """Wall time of training."""
    ended: np.ndarray
    """(episodes,) int64, ascending: agent steps since the start of the run at which an episode ended."""
    returns: np.ndarray
    """(episodes,) float64: raw and undiscounted."""
    curve: tuple[dict[str, float], ...]
    """Means of the learner, such as loss and entropy, by ascending "steps"; may be empty."""


def save(out: Path, run: TransferRun, identity: dict[str, Any]) -> None:
    """Writes a run to its place in `out`, durably. `identity` is plain data: all that determines the run.

    Raises ValueError where the run is none that `load` would take, OSError where it cannot be written.
    """
    content = {
        "format": FORMAT,
        "arm": run.arm,
        "game": run.game,
        "seed": run.seed,
        "budget": run.budget,
        "seconds": run.seconds,
        "identity": identity,
        "episodes": {"steps": run.ended.tolist(), "returns": run.returns.tolist()},
        "curve": list(run.curve),
    }
    _parse(content)
    path = path_of(out, run.arm, run.game, run.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps(content | {"sha256": json_digest(content)})
    write_atomic(path, data.encode(), "transfer-run")
    for folder in path.parents[1:4]:  # their names too have to be there after a crash
        sync_directory(folder)


def path_of(out: Path, arm: str, game: str, seed: int) -> Path:
    """Where a run is kept."""
    return out / "runs" / arm / game / f"{seed}.json"


def load(path: Path) -> tuple[TransferRun, dict[str, Any]]:
    """A run and its identity. Raises CorruptFile, on one line, where it is damaged or not the run of that place.

    Raises OSError where it cannot be read at all.
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
    if name != f"{run.arm}/{run.game}/{run.seed}.json":
        raise CorruptFile(f"{name} holds another run: {run.arm}/{run.game}/{run.seed}")
    return run, content["identity"]


def load_all(out: Path) -> tuple[list[TransferRun], list[str]]:
    """Every run in `out`, by arm (in the order of arms.json), game and seed; and what is wrong, on one line each.

    What is damaged or cannot be read is named there, and left out.
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


def describe_arms(out: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """What arms.json says of each arm, in its order, and what is wrong with it. Without the file, nothing."""
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
    """The label. Raises ValueError where an arm cannot be called that."""
    if not _LABEL.fullmatch(label):
        raise ValueError(f"arm {label[:60]!r} is not up to 40 letters, digits and ._+-, the first a letter or digit")
    return label


def _parse(content: dict[str, Any]) -> TransferRun:
    """Raises ValueError where the content is not that of a run."""
    schema.check(content, _SHAPE, "run")
    require_label(content["arm"])
    if not _GAME.fullmatch(content["game"]):
        raise ValueError(f"game {content['game'][:60]!r} is not a name of a game")
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
    return TransferRun(
        arm=content["arm"],
        game=content["game"],
        seed=content["seed"],
        budget=content["budget"],
        seconds=content["seconds"],
        ended=ended,
        returns=returns,
        curve=tuple(curve),
    )
