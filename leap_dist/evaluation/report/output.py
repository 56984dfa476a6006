"""How reports of supervised tasks are put into a folder, in place of older ones."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from leap_dist.evaluation import statistics
from leap_dist.evaluation.report.document import Block, markdown
from leap_dist.evaluation.report.plain import csv_text, plain
from leap_dist.evaluation.results.measures import SEED, Outcome
from leap_dist.storage.atomic import remove, write_atomic

FORMAT = 1


def write_text(out: Path, name: str, blocks: Sequence[Block]) -> None:
    """The report for people. Raises OSError, as all here."""
    write(out / name, markdown(blocks).encode())


def write_table(out: Path, columns: Sequence[str], outcomes: Sequence[Outcome]) -> None:
    """results.csv, a row per run."""
    rows = ([getattr(outcome, name) for name in columns] for outcome in outcomes)
    write(out / "results.csv", csv_text(columns, rows).encode())


def write_numbers(out: Path, content: dict[str, Any], repetitions: int) -> None:
    """results.json: strict JSON, with what is unknown as null."""
    everything = {
        "format": FORMAT,
        "unit": "errors and areas are parts of 1",
        "bootstrap": {"repetitions": repetitions, "level": statistics.LEVEL, "seed": SEED},
        **plain(content),
    }
    write(out / "results.json", (json.dumps(everything, indent=1, allow_nan=False) + "\n").encode())


def write_pictures(out: Path, pictures: dict[str, bytes], names: Collection[str]) -> None:
    """figures/; what else of `names` is there from earlier goes."""
    (out / "figures").mkdir(exist_ok=True)
    for name in names:
        if name in pictures:
            write(out / "figures" / name, pictures[name])
        else:
            remove(out / "figures" / name)


def write(path: Path, data: bytes) -> None:
    """A file that can be made again."""
    write_atomic(path, data, "study-report", durable=False)
