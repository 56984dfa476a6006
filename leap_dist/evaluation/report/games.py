"""The report of an evaluation, made from its runs alone.

report.md, report.html   for people; the page needs no other file        figures/*.png   its pictures
results.csv              one row per run                                 results.json    every number with its interval
tensorboard/eval         curves with margins
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from leap_dist.config.loading import ConfigError
from leap_dist.evaluation import statistics
from leap_dist.evaluation.report import figures, tensorboard
from leap_dist.evaluation.report.document import Verbatim, markdown, page
from leap_dist.evaluation.report.plain import csv_text, plain
from leap_dist.evaluation.report.text import TITLE, blocks
from leap_dist.evaluation.results.games import SEED, Results, Row, compute
from leap_dist.evaluation.results.runs import describe_arms, load_all
from leap_dist.storage.atomic import CorruptFile, one_line, read_regular, remove, write_atomic

FORMAT = 1
COLUMNS = (
    "arm",
    "game",
    "seed",
    "budget",
    "episodes",
    "auc",
    "final_return",
    "human_normalized_auc",
    "human_normalized_final",
    "steps_to_baseline_final",
    "seconds",
    "steps_per_second",
)
"""Of results.csv. What is unknown is empty; where the baseline's final return is not reached, steps are inf."""
_FIGURES = ("curves.png", "profiles.png", "aggregates.png", "improvement.png")
_ATTACHED = ("config.yaml", "manifest.json")


def build(out: Path, repetitions: int = statistics.REPETITIONS) -> list[str]:
    """Writes the report of all runs in `out`, in place of an older one, and returns what is wrong, on one line each.

    Runs may be missing, damaged, or go on while this reads them. Raises ConfigError where there is no run at all, and
    OSError where the report cannot be written.
    """
    runs, warnings = load_all(out)
    if not runs:
        damaged = f"; {warnings[0]}" if warnings else ""
        raise ConfigError(f"out: {out} holds no run of an evaluation{damaged}")
    described, _ = describe_arms(out)
    without = [arm["label"] for arm in described if arm["label"] not in {run.arm for run in runs}]
    if without:
        warnings.append(f"no run yet of {', '.join(without)}")
    attached, more = _attached(out)
    results = compute(runs, repetitions)
    warnings = [*warnings, *more, *results.warnings]
    pictures = figures.pictures(results)

    (out / "figures").mkdir(exist_ok=True)
    for name in _FIGURES:
        if name in pictures:
            _write(out / "figures" / name, pictures[name])
        else:
            remove(out / "figures" / name)
    found = blocks(results, described, warnings, pictures, attached, repetitions)
    _write(out / "report.md", markdown(found).encode())
    _write(out / "report.html", page(TITLE, found).encode())
    _write(out / "results.csv", _table(results.rows).encode())
    _write(out / "results.json", _json(results, described, warnings, repetitions).encode())
    tensorboard.write(results, out / "tensorboard" / "eval")
    return warnings


def _write(path: Path, data: bytes) -> None:
    write_atomic(path, data, "transfer-report", durable=False)  # it can be made again


def _attached(out: Path) -> tuple[list[Verbatim], list[str]]:
    found, warnings = [], []
    for name in _ATTACHED:
        try:
            found.append(Verbatim(name, read_regular(out / name).decode(errors="replace")))
        except FileNotFoundError:
            continue
        except (CorruptFile, OSError) as error:
            warnings.append(f"{name} is left out: {one_line(error)}")
    return found, warnings


def _table(rows: tuple[Row, ...]) -> str:
    found = []
    for row in rows:
        run = row.run
        speed = run.budget / run.seconds if run.seconds else None
        measured = (row.auc, row.final, row.normalized_auc, row.normalized_final, row.steps_to_baseline)
        found.append((run.arm, run.game, run.seed, run.budget, len(run.ended), *measured, run.seconds, speed))
    return csv_text(COLUMNS, found)


def _json(results: Results, described: list[dict[str, Any]], warnings: list[str], repetitions: int) -> str:
    numbers = plain(dataclasses.replace(results, rows=()))
    del numbers["rows"]  # they are in results.csv
    content = {
        "format": FORMAT,
        "described": described,
        "bootstrap": {"repetitions": repetitions, "level": statistics.LEVEL, "seed": SEED},
        "window": statistics.WINDOW,
        **numbers,
        "warnings": warnings,
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"
