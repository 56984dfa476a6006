"""Converts ledger lines and the driver's summary to points of TensorBoard curves."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary

from leap_dist.config import registry
from leap_dist.config.registry import ERROR, RETURN
from leap_dist.envs.games import human_normalized
from leap_dist.nn.features import STATISTICS
from leap_dist.protocol import schema
from leap_dist.protocol.messages import AT_START, RETURN_OF
from leap_dist.storage.atomic import DECODE_ERRORS, read_regular, write_atomic
from leap_dist.telemetry.tags import CURVE, OPS

NAME = "position.json"
_TAIL = 4096
_SHAPE = {
    "offset": int,
    "tail": str,
    "steps": {...: int},
    "scores": {...: float},
    "last": {...: {...: int}},
    "sizes": {...: int},
}


@dataclass
class Position:
    """State of the event files after some ledger lines."""

    offset: int = 0
    """Offset in bytes after the last ledger line whose points are in the event files."""
    tail: str = ""
    """SHA-256 of the 4 KiB of the ledger before the offset."""
    steps: dict[str, int] = field(default_factory=dict)
    """Agent steps by game in the lines so far."""
    scores: dict[str, float] = field(default_factory=dict)
    """Human-normalized score of each game's newest task."""
    last: dict[str, dict[str, int]] = field(default_factory=dict)
    """Last step written, by TensorBoard run and tag."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Sizes of the event files in bytes, by path relative to the folder `tensorboard`."""


def load(root: Path) -> Position:
    """Return the position stored in the folder `tensorboard` of a run, or the beginning if it cannot be used."""
    with suppress(OSError, *DECODE_ERRORS):
        data = json.loads(read_regular(root / NAME))
        schema.check(data, _SHAPE, "position")
        position = Position(**{name: data[name] for name in _SHAPE})
        sizes = position.sizes.items()
        if position.tail == _tail(root, position.offset) and all(_size(root / name) >= size for name, size in sizes):
            return position
    return Position()


def save(root: Path, position: Position) -> None:
    """Store a position for the next launch of the run. Raises OSError."""
    position.tail = _tail(root, position.offset)
    write_atomic(root / NAME, json.dumps(asdict(position)).encode(), "position", durable=False)


def _tail(root: Path, offset: int) -> str:
    """Return the checksum of the ledger's bytes before `offset`. Raises OSError if there are fewer."""
    start = max(0, offset - _TAIL)
    with (root.parent / "ledger.jsonl").open("rb") as file:
        data = os.pread(file.fileno(), offset - start, start)
    if offset <= 0 or len(data) < offset - start:
        raise OSError("the ledger is shorter")
    return hashlib.sha256(data).hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() and not path.is_symlink() else -1


SERVER = "server"
GAME = re.compile("[a-z0-9_]{1,80}")
"""Names that may become the name of a folder."""


class Event(NamedTuple):
    """Values of one TensorBoard run at one step."""

    run: str
    step: int
    values: list[Summary.Value]


class Projection:
    """Converts the ledger to events. It must be given all lines in order, since a game's steps add up.

    Args:
        steps: agent steps by game in earlier lines.
        scores: human-normalized score by game of its newest task in earlier lines.
    """

    def __init__(
        self, steps: Mapping[str, int] = MappingProxyType({}), scores: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        self.steps: Counter[str] = Counter(steps)
        """Agent steps by game in all lines so far."""
        self.scores = dict(scores)
        """Human-normalized score by game of its newest task that has one."""

    def events(self, lines: list[dict[str, Any]]) -> Iterator[Event]:
        """Return the events of the next lines, which must consist of whole meta-updates."""
        for version, group in itertools.groupby(lines, key=lambda line: int(line["version_after"])):
            tasks = list(group)
            values = _meta_values(tasks) | self._over_games(tasks)
            yield _event(SERVER, version, "meta", values)
            yield _event(SERVER, tasks[0]["total_steps"], "meta_frames", values)
            for task in tasks:
                if task["final"] and GAME.fullmatch(task["game"]):
                    yield from self._of_task(task)

    def _over_games(self, tasks: list[dict[str, Any]]) -> dict[str, float]:
        """Return the interquartile mean and the quartiles over games, each represented by its newest task."""
        for task in tasks:
            if task["final"]:
                self.scores |= {game: score for game, score in _scores(task).items() if math.isfinite(score)}
        if not self.scores:
            return {}
        scores = sorted(self.scores.values())
        cut = len(scores) // 4
        lower, upper = np.percentile(scores, (25, 75))
        middle = sum(scores[cut : len(scores) - cut]) / (len(scores) - 2 * cut)
        return {"score_iqm": middle, "score_lower_quartile": float(lower), "score_upper_quartile": float(upper)}

    def _of_task(self, task: dict[str, Any]) -> Iterator[Event]:
        game, path = task["game"], task["path"]
        by_step: defaultdict[int, dict[str, float]] = defaultdict(dict)
        for point in task["curve"]:
            by_step[point["steps"]] = _curve_values(game, point)
        by_step[task["steps"]] |= {
            "path_length": path["length"],
            "path_energy": path["energy"],
            "loss_term_norm": path["loss_term_norm"],
            "path_term_norm": path["path_term_norm"],
            "term_cosine": path["cosine"],
            "pull_norm": task["norm"],
        }
        for step, values in by_step.items():
            yield _event(f"game/{game}", self.steps[game] + step, "task", values)
        for point in task["curve"]:
            for one, value in _returns(point).items():
                yield _event(f"game/{one}", self.steps[game] + point["steps"], "task", _return_values(one, value))
        self.steps[game] += task["steps"]  # the next task's curve starts there


def operations(summary: dict[str, Any], failures: int) -> Event:
    """Return the state of the service from the driver's summary; `failures` counts failed writes of event files."""
    values = {
        **summary,
        **{f"{kind}_ms_{name}": value for kind in ("push", "update") for name, value in summary[f"{kind}_ms"].items()},
        "write_failures": failures,
    }
    refused = {f"refused/{reason}": count for reason, count in summary["refused"].items()}
    known = {name: values[name] for name in OPS if name in values}  # percentiles are missing until something was timed
    start = {f"start/{part}": seconds for part, seconds in summary.get("start_seconds", {}).items()}
    return _event(SERVER, int(summary["wall_seconds"]), "ops", known | refused | start | _time_shares(summary))


def _time_shares(summary: dict[str, Any]) -> dict[str, float]:
    """Return where the workers' time went in the last minute, averaged over the workers that have reported."""
    told = [worker["time_share"] for worker in summary["workers"] if worker["time_share"]]
    return {f"time_share/{part}": sum(shares[part] for shares in told) / len(told) for part in told[0]} if told else {}


def _event(run: str, step: int, group: str, values: dict[str, float]) -> Event:
    return Event(run, step, [Summary.Value(tag=f"{group}/{name}", simple_value=v) for name, v in values.items()])


def _meta_values(tasks: list[dict[str, Any]]) -> dict[str, float]:
    """Return the means over the tasks of one meta-update. Values that no task has are left out."""
    done = [task for task in tasks if task["final"]]
    of_tasks = {
        "loss": [
            task["curve"][-1]["means"]["loss"]
            for task in done
            if task["curve"] and "loss" in task["curve"][-1]["means"]
        ],
        "error": [error for task in done if (error := _error(task)) is not None],
        "score_human_normalized": [score for task in done for score in _scores(task).values()],
        "gradient_norm": [task["norm"] for task in tasks],
        "path_length": [task["path"]["length"] for task in done],
        "path_energy": [task["path"]["energy"] for task in done],
        "loss_term_norm": [task["path"]["loss_term_norm"] for task in tasks],
        "path_term_norm": [task["path"]["path_term_norm"] for task in tasks],
        "term_cosine": [task["path"]["cosine"] for task in tasks],
        "staleness": [task["staleness"] for task in tasks],
        "staleness_weight": [task["weight"] for task in tasks],
        "clip": [task["clip"] for task in tasks],
        **{f"features/{name}": _at_start(done, AT_START + name) for name in STATISTICS},
    }
    means = {name: sum(values) / len(values) for name, values in of_tasks.items() if values}
    return means | {"update_norm": tasks[0]["update_norm"], "agreement": tasks[0]["agreement"]}


def _at_start(tasks: list[dict[str, Any]], name: str) -> list[float]:
    """Return the values of a figure that a task reports at one point of its curve, for the tasks that report it."""
    return [point["means"][name] for task in tasks for point in task["curve"] if name in point["means"]]


def _error(task: dict[str, Any]) -> float | None:
    """Return the mean training error of a supervised task; None for other tasks."""
    return ERROR.task_score(task["curve"]) if registry.for_ledger([task]) is ERROR else None


def _scores(task: dict[str, Any]) -> dict[str, float]:
    """Return the human-normalized score of the last curve point with an episode, by game; empty if there is none."""
    returns: dict[str, float] = {}
    for point in task["curve"]:
        returns |= _returns(point) if point["score"] is None else {task["game"]: point["score"]}
    scores = {game: human_normalized(game, value) for game, value in returns.items()}
    return {game: score for game, score in scores.items() if score is not None}


def _returns(point: dict[str, Any]) -> dict[str, float]:
    """Return the mean returns by game in a curve point of a task of all games; empty for other tasks."""
    found = {
        name.removeprefix(RETURN_OF): value for name, value in point["means"].items() if name.startswith(RETURN_OF)
    }
    return {game: value for game, value in found.items() if GAME.fullmatch(game)}


def _curve_values(game: str, point: dict[str, Any]) -> dict[str, float]:
    values = {name: point["means"][name] for name in CURVE if name in point["means"]}
    if point["score"] is None:
        return values
    if (metric := registry.for_point(point)) is ERROR:
        return values | {metric.name: point["score"]}
    return values | _return_values(game, point["score"])


def _return_values(game: str, value: float) -> dict[str, float]:
    normalized = human_normalized(game, value)
    return {RETURN.name: value} | ({} if normalized is None else {"human_normalized": normalized})
