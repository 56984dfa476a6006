"""The definition of a study, the layout of its folder, and its progress.

OUT/study.json               the definition
OUT/GROUP/seedN/ARM/         a training run; arm none has no such run
OUT/GROUP/seedN/test/        an evaluation, whose arms are named after the meta-learners

A group is a set of training games, or a column of the paper's tables: a number of pretraining alphabets, or a held-out
data set.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leap_dist.config.loading import ConfigError
from leap_dist.config.registry import DATA_SETS
from leap_dist.protocol import schema
from leap_dist.storage import run_directory
from leap_dist.storage.atomic import DECODE_ERRORS, CorruptFile, one_line, read_regular, write_atomic

FORMAT = 1
ARMS = ("leap", "reptile", "fomaml", "finetune-multi", "finetune-single", "multitask", "none")
"""Meta-learners, in the order of all tables."""
_SHAPE = {
    "format": int,
    "tasks": str,
    "arms": [str],
    "groups": [str],
    "seeds": [int],
    "games": [str],
    "settings": {...: {...: object}},
    "test": {...: object},
    "meta_updates": int,
    "batch_size": int,
    "task_steps": int,
}
_TESTS_OF_GAMES = {"games": [str], "game_steps": {...: int}, "seeds": int, ...: object}


@dataclasses.dataclass(frozen=True)
class Study:
    """A comparison of meta-learners. Every arm is trained and evaluated in every group with every seed."""

    tasks: str
    """Setting `tasks`: "atari", "omniglot" or "multi-cv"."""
    arms: tuple[str, ...]
    """Meta-learners, a subset of ARMS in its order."""
    groups: tuple[str, ...]
    """Sets of training games, numbers of pretraining alphabets, or names of held-out data sets."""
    seeds: tuple[int, ...]
    """Seeds of meta-training. In Omniglot they also draw the pretraining and the held-out alphabets."""
    settings: dict[str, dict[str, Any]]
    """Settings of each arm's meta-training, by dotted name."""
    meta_updates: int
    batch_size: int
    """Number of tasks in a meta-update."""
    task_steps: int
    """Number of examples in a task."""
    games: tuple[str, ...] = ()
    """Data sets of Multi-CV. The runs of a group train on all but the one that is held out."""
    test: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of the evaluations, which are the same for all arms. For Atari, also what `games.Tests` has."""

    @classmethod
    def read(cls, out: Path) -> Study:
        """Read `out`/study.json. Raises ConfigError, with a message of one line, if it is missing or invalid."""
        try:
            return _parse(json.loads(read_regular(out / "study.json")))
        except FileNotFoundError:
            raise ConfigError(f"out: {out} holds no study") from None
        except (CorruptFile, OSError, *DECODE_ERRORS) as error:
            raise ConfigError(
                f"out: {out}/study.json is not the file of a study, or is damaged: {one_line(error)}"
            ) from None

    def write(self, out: Path) -> None:
        """Write `out`/study.json, durably. Raises ValueError if `read` would refuse it, and OSError."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        text = json.dumps(content, indent=1) + "\n"
        _parse(json.loads(text))
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "study.json", text.encode(), "study")

    def comparisons(self) -> Iterator[tuple[str, int]]:
        """Yield every group with every seed, group by group."""
        for group in self.groups:
            for seed in self.seeds:
                yield group, seed


def training_of(out: Path, group: str, seed: int, arm: str) -> Path:
    """Return the run directory of an arm."""
    return out / group / f"seed{seed}" / arm


def evaluation_of(out: Path, group: str, seed: int) -> Path:
    """Return the folder of the evaluation of all arms."""
    return out / group / f"seed{seed}" / "test"


def agents_done(out: Path, group: str, seed: int, arm: str, game: str) -> int:
    """Return how many runs of an arm on a task the evaluation has finished."""
    return len(list((evaluation_of(out, group, seed) / "runs" / arm / game).glob("*.json")))


def _parse(content: Any) -> Study:
    """Return the study that `content` describes. Raises ValueError if it describes none."""
    schema.check(content, {"format": int}, "study")
    if content["format"] > FORMAT:
        raise ValueError(f"format {content['format']} is newer than {FORMAT}; update leap-dist")
    schema.check(content, _SHAPE, "study")
    if content["tasks"] == "atari":
        schema.check(content["test"], _TESTS_OF_GAMES, "test")
    if content["tasks"] not in ("atari", "omniglot", "multi-cv"):
        raise ValueError(f"there are no studies of {content['tasks'][:60]!r}")
    for name in ("arms", "groups", "seeds"):
        if not 0 < len(content[name]) == len(set(content[name])):
            raise ValueError(f"{name} are missing, or one is given twice")
    for arm in (*content["arms"], *content["settings"]):
        if arm not in ARMS:
            raise ValueError(f"{arm[:60]!r} is not a meta-learner")
    for group in content["groups"]:  # groups become names of folders
        if not _is_group(group, content["tasks"]):
            raise ValueError(f"{group[:60]!r} is not a group of {content['tasks']}")
    if min(content["seeds"]) < 0 or min(content[name] for name in ("meta_updates", "batch_size", "task_steps")) < 1:
        raise ValueError("a seed or a length is out of range")
    values = {field.name: content[field.name] for field in dataclasses.fields(Study)}
    fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
    return Study(**fields)


def _is_group(name: str, tasks: str) -> bool:
    """Return whether a name is that of a group; none of them has a character that a path could not have."""
    if tasks == "omniglot":
        return bool(re.fullmatch("[1-9][0-9]?", name))
    return bool(re.fullmatch("[a-z0-9_]{1,60}", name)) if tasks == "atari" else name in DATA_SETS


# Progress ---------------------------------------------------------------------------------------------------------


def progress(out: Path) -> dict[str, Any]:
    """Return what is done and what is left, as JSON-compatible data. Raises ConfigError if `out` holds no study."""
    study = Study.read(out)
    comparisons = [_comparison(out, study, group, seed) for seed in study.seeds for group in study.groups]
    done = sum(arm["state"] == "done" for one in comparisons for arm in one["arms"].values())
    return {
        "tasks": study.tasks,
        "trained": done,
        "to_train": sum(len(one["arms"]) for one in comparisons),
        "tested": sum(one["test"]["state"] == "done" for one in comparisons),
        "to_test": len(comparisons),
        "comparisons": comparisons,
    }


def progress_text(found: dict[str, Any]) -> str:
    """Return the result of `progress` as text, with a line for each group and seed."""
    counts = f"{found['trained']} of {found['to_train']} trained, {found['tested']} of {found['to_test']} tested"
    lines = [f"{found['tasks']}: {counts}"]
    for one in found["comparisons"]:
        parts = {**one["arms"], "test": one["test"]}
        shown = ", ".join(f"{name} {_shown(part)}" for name, part in parts.items())
        lines.append(f"group {one['group']}, seed {one['seed']}: {shown}")
    return "\n".join(lines)


def _comparison(out: Path, study: Study, group: str, seed: int) -> dict[str, Any]:
    arms = {arm: progress_of(training_of(out, group, seed, arm)) for arm in study.arms if arm != "none"}
    folder = evaluation_of(out, group, seed)
    test = progress_of(folder)
    if test["state"] == "done" and not all((folder / "runs" / arm).is_dir() for arm in study.arms):
        test["state"] = "waiting"  # arms have been added since
    return {"group": group, "seed": seed, "arms": arms, "test": test}


def progress_of(folder: Path) -> dict[str, Any]:
    """Return the "state" of a training run or an evaluation, how many of its tasks are "done", and "of" how many."""
    try:
        summary = run_directory.read_summary(folder)
    except ConfigError:
        return {"state": "waiting", "done": 0, "of": 0}
    ended = summary["state"] in run_directory.ENDED or run_directory.is_alive(folder)
    state = summary["state"] if ended else "died"
    done = summary.get("tasks", 0)
    return {"state": state, "done": done if isinstance(done, int) else 0, "of": summary["tasks_wanted"]}


def _shown(part: dict[str, Any]) -> str:
    return (
        str(part["state"]) if part["state"] in ("done", "waiting") else f"{part['state']} {part['done']}/{part['of']}"
    )
