"""Early stopping of meta-training: the error on Omniglot's validation alphabets decides which φ is kept (appendix C).

RUN/validation.json            the measurements so far, with a checksum
RUN/validation/NNNNNN/         the evaluation of φ after NNNNNN meta-updates
RUN/best.safetensors           φ with the lowest error; `evaluate --init RUN` and studies use it
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from leap_dist.config.registry import expand
from leap_dist.config.settings import Config
from leap_dist.evaluation.initializations import Arm
from leap_dist.evaluation.runs import Run, load_all, plan
from leap_dist.evaluation.scoring import ERRORS
from leap_dist.protocol import schema
from leap_dist.storage.atomic import DECODE_ERRORS, CorruptFile, json_digest, one_line, read_regular, write_atomic
from leap_dist.weights.initialization import read_initialization

FORMAT = 1
BEST, HISTORY = "best.safetensors", "validation.json"
_LABEL = "phi"


class Measurement(NamedTuple):
    """The validation error of one φ."""

    meta_updates: int
    """Number of meta-updates of |B| tasks after which φ was measured."""
    error: float
    """Mean test error over the validation alphabets, a fraction of 1."""


@dataclass
class History:
    """The measurements of a run, in chronological order."""

    measurements: list[Measurement]

    @classmethod
    def read(cls, run_dir: Path) -> History:
        """Read `run_dir`/validation.json; a missing file means no measurements. Raises CorruptFile or OSError."""
        try:
            content = json.loads(read_regular(run_dir / HISTORY))
            schema.check(content, _SHAPE, "validation")
            digest = content.pop("sha256")
            if content["format"] > FORMAT or digest != json_digest(content):
                raise ValueError("its format is newer, or its checksum does not match")
        except FileNotFoundError:
            return cls([])
        except DECODE_ERRORS as error:
            raise CorruptFile(f"{HISTORY} is damaged: {one_line(error)}; remove it to measure again") from None
        return cls([Measurement(one["meta_updates"], one["error"]) for one in content["measurements"]])

    def add(self, run_dir: Path, measurement: Measurement) -> None:
        """Add a measurement of `run_dir`/init.safetensors, durably, and keep that φ if it is the best. Raises OSError.

        After a crash in between, the same measurement is added again, with the same result.
        """
        self.measurements.append(measurement)
        if self.best == measurement:
            write_atomic(run_dir / BEST, (run_dir / "init.safetensors").read_bytes(), "init")
        content = {"format": FORMAT, "measurements": [one._asdict() for one in self.measurements]}
        write_atomic(run_dir / HISTORY, json.dumps({**content, "sha256": json_digest(content)}).encode(), "validation")

    @property
    def best(self) -> Measurement | None:
        """The first measurement with the lowest error; None if there is none yet."""
        return min(self.measurements, key=lambda one: one.error, default=None)

    def is_over(self, patience: int) -> bool:
        """Return whether none of the last `patience` measurements was a new lowest error; False if `patience` is 0."""
        if self.best is None:
            return False
        return 0 < patience < len(self.measurements) - self.measurements.index(self.best)

    def describe(self, patience: int) -> dict[str, Any]:
        """Return the state as JSON-compatible data, for summary.json."""
        best = None if self.best is None else self.best._asdict()
        measured = [one._asdict() for one in self.measurements]
        return {"best": best, "stopped": self.is_over(patience), "measurements": measured}


_SHAPE = {"format": int, "sha256": str, "measurements": [{"meta_updates": int, "error": float}]}


def ends(config: Config, history: History) -> Iterator[int]:
    """Yield the numbers of meta-updates after which φ is still to be measured, ascending."""
    measured = {one.meta_updates for one in history.measurements}
    interval = config.early_stopping.interval
    for end in dict.fromkeys([*range(interval, config.meta_updates, interval), config.meta_updates]):
        if end not in measured:
            yield end


def evaluation(config: Config, run_dir: Path) -> tuple[Config, list[Run], Arm]:
    """Return the settings, runs and arm of the evaluation that measures `run_dir`/init.safetensors.

    Learners have the epochs of tests, and the learning rate `supervised.test_learning_rate`, or that of training if it
    is 0. Raises CorruptFile or OSError if that file cannot be used.
    """
    given = config.early_stopping
    games = expand("omniglot", ("validation",), seed=config.seed, pretraining=config.supervised.pretraining)
    measured = replace(
        config,
        games=games,
        meta_learner="none",
        mode="buffered",
        task_steps=given.task_steps or config.supervised.test_steps(config.task_steps),
        meta=replace(Config.meta, shared=config.meta.shared),  # others may need the mode or meta-learner of the run
        supervised=config.supervised.in_tests(),
    )
    path = (run_dir / "init.safetensors").absolute()
    content = read_initialization(path)
    rate = config.supervised.test_learning_rate or None
    arm = Arm(_LABEL, str(path), content.scope, content.sha256, content.metadata, learning_rate=rate)
    return measured, plan([arm], measured, seeds=1), arm


def folder_of(run_dir: Path, meta_updates: int) -> Path:
    """Return the folder of the evaluation after `meta_updates` meta-updates."""
    return run_dir / "validation" / f"{meta_updates:06d}"


def error_of(folder: Path) -> float:
    """Return the mean test error over the alphabets of an evaluation. Raises CorruptFile if there is none."""
    runs, warnings = load_all(folder)
    rows, more = ERRORS.score_all(runs)
    if not rows or warnings or more:
        raise CorruptFile(f"{folder}: {next(iter([*warnings, *more]), 'there is no result')}")
    return float(np.mean([row.values["test_error"] for row in rows]))
