"""What a study compares, and where its parts are.

OUT/study.json               what is compared
OUT/GROUP/seedN/ARM/         a training run; of arm none there is none
OUT/GROUP/seedN/test/        an evaluation, whose arms are called like the meta-learners

A group is what changes from one table's column to the next: how many alphabets were for pretraining, or which data set
was held out.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from leap_dist.config.loading import ConfigError
from leap_dist.config.registry import DATA_SETS
from leap_dist.protocol import schema
from leap_dist.storage.atomic import DECODE_ERRORS, CorruptFile, one_line, read_regular, write_atomic

FORMAT = 1
ARMS = ("leap", "reptile", "fomaml", "finetune-multi", "finetune-single", "none")
"""Meta-learners, in the order in which they are shown."""
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


@dataclasses.dataclass(frozen=True)
class Study:
    """One comparison. Every arm is trained and tested in every group with every seed."""

    tasks: str
    """What a task is: "omniglot" or "multi-cv"."""
    arms: tuple[str, ...]
    """Some of ARMS."""
    groups: tuple[str, ...]
    """Numbers of pretraining alphabets, or names of held-out data sets."""
    seeds: tuple[int, ...]
    """Of meta-training; with Omniglot they also draw which alphabets are for what."""
    settings: dict[str, dict[str, Any]]
    """What each arm was trained with, by dotted name."""
    meta_updates: int
    batch_size: int
    """Tasks per meta-update."""
    task_steps: int
    """Examples per task."""
    games: tuple[str, ...] = ()
    """Multi-CV: the data sets; each group's runs train on all but the one that is held out."""
    test: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What all arms learn with when they are tested."""

    @classmethod
    def read(cls, out: Path) -> Study:
        """Of `out`/study.json. Raises ConfigError, on one line, where there is none or it says none."""
        try:
            return _parse(json.loads(read_regular(out / "study.json")))
        except FileNotFoundError:
            raise ConfigError(f"out: {out} holds no study") from None
        except (CorruptFile, OSError, *DECODE_ERRORS) as error:
            raise ConfigError(f"out: {out}/study.json is not a study's, or damaged: {one_line(error)}") from None

    def write(self, out: Path) -> None:
        """To `out`/study.json, durably. Raises ValueError where `read` would refuse it, OSError."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        text = json.dumps(content, indent=1) + "\n"
        _parse(json.loads(text))
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "study.json", text.encode(), "study")


def training_of(out: Path, group: str, seed: int, arm: str) -> Path:
    """Where an arm's training run is."""
    return out / group / f"seed{seed}" / arm


def evaluation_of(out: Path, group: str, seed: int) -> Path:
    """Where the evaluation of all arms is."""
    return out / group / f"seed{seed}" / "test"


def _parse(content: Any) -> Study:
    """Raises ValueError where the content is not a study's."""
    schema.check(content, {"format": int}, "study")
    if content["format"] > FORMAT:
        raise ValueError(f"format {content['format']} is newer than {FORMAT}; update leap-dist")
    schema.check(content, _SHAPE, "study")
    if content["tasks"] not in ("omniglot", "multi-cv"):
        raise ValueError(f"there are no studies of {content['tasks'][:60]!r}")
    for name in ("arms", "groups", "seeds"):
        if not 0 < len(content[name]) == len(set(content[name])):
            raise ValueError(f"{name} are none, or one is given twice")
    for arm in (*content["arms"], *content["settings"]):
        if arm not in ARMS:
            raise ValueError(f"{arm[:60]!r} is no meta-learner")
    for group in content["groups"]:  # they become names of folders
        if not (re.fullmatch("[1-9][0-9]?", group) if content["tasks"] == "omniglot" else group in DATA_SETS):
            raise ValueError(f"{group[:60]!r} is no group of {content['tasks']}")
    if min(content["seeds"]) < 0 or min(content[name] for name in ("meta_updates", "batch_size", "task_steps")) < 1:
        raise ValueError("a seed or a length is out of range")
    return Study(
        tasks=content["tasks"],
        arms=tuple(content["arms"]),
        groups=tuple(content["groups"]),
        seeds=tuple(content["seeds"]),
        games=tuple(content["games"]),
        settings=content["settings"],
        test=content["test"],
        meta_updates=content["meta_updates"],
        batch_size=content["batch_size"],
        task_steps=content["task_steps"],
    )
