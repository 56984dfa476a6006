"""Writes the report of an evaluation, using only its runs.

report.md               report for people              results.csv       one row per run
figures/*.png           its pictures                   results.json      every number, with its interval

Evaluations of games also have report.html, a page that needs no other file, and tensorboard/eval.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from leap_dist.config.loading import ConfigError
from leap_dist.evaluation import statistics
from leap_dist.evaluation.initializations import describe_arms, not_held_out
from leap_dist.evaluation.report import figures, tensorboard, text
from leap_dist.evaluation.report.conclusion import conclusion
from leap_dist.evaluation.report.document import Verbatim, markdown, page
from leap_dist.evaluation.results import Cell, Results, compute
from leap_dist.evaluation.runs import load_all
from leap_dist.evaluation.scoring import Row, Scoring
from leap_dist.storage.atomic import CorruptFile, one_line, read_regular, remove, write_atomic

FORMAT = 1
UNIT = "errors and areas are fractions of 1"
RETURN_COLUMNS: dict[str, Callable[[Row], Any]] = {
    "arm": lambda row: row.run.arm,
    "game": lambda row: row.run.game,
    "seed": lambda row: row.seed,
    "budget": lambda row: row.run.budget,
    "episodes": lambda row: len(row.run.ended),
    "auc": lambda row: row.values["auc"],
    "final_return": lambda row: row.values["final"],
    "human_normalized_auc": lambda row: row.scores["auc"],
    "human_normalized_final": lambda row: row.scores["final"],
    "steps_to_baseline_final": lambda row: row.steps_to_baseline,
    "seconds": lambda row: row.run.seconds,
    "steps_per_second": lambda row: row.run.budget / row.run.seconds if row.run.seconds else None,
}
"""Columns of results.csv for games. If the final return of the baseline is not reached, the steps to it are inf."""
ERROR_COLUMNS: dict[str, Callable[[Row], Any]] = {
    "arm": lambda row: row.run.arm,
    "game": lambda row: row.run.game,
    "seed": lambda row: row.seed,
    "test_error": lambda row: row.values["test_error"],
    "train_error": lambda row: row.values["train_error"],
    "auc": lambda row: row.values["auc"],
    "test_loss": lambda row: row.test_loss,
    "seconds": lambda row: row.run.seconds,
}
"""Columns of results.csv for classifiers."""
_ATTACHED = ("config.yaml", "manifest.json")
_T = TypeVar("_T")


def build(out: Path, scoring: Scoring, repetitions: int = statistics.REPETITIONS) -> list[str]:
    """Write the report of all runs in `out`, replacing an older one, and return warnings of one line each.

    Runs may be missing or damaged, and more may be written at the same time. Raises ConfigError if there is no run of
    this kind at all, and OSError if the report cannot be written.
    """
    runs, warnings = load_all(out)
    rows, more = scoring.score_all(runs)
    warnings += more
    if not rows:
        kind = "an evaluation" if scoring.human_normalized else "a supervised task"
        raise ConfigError(f"out: {out} holds no run of {kind}{f'; {warnings[0]}' if warnings else ''}")
    described, _ = describe_arms(out)
    if without := [arm["label"] for arm in described if arm["label"] not in {row.run.arm for row in rows}]:
        warnings.append(f"no run yet of {', '.join(without)}")
    for arm in described:
        warnings += not_held_out([arm], sorted({row.run.game for row in rows if row.run.arm == arm["label"]}))
    attached, more = _attached(out) if scoring.human_normalized else ([], [])
    results = compute(rows, scoring, [*warnings, *more], repetitions)
    pictures = figures.pictures(results)
    blocks = text.blocks(results, described, results.warnings, pictures, attached, repetitions)

    folder = ReportFolder(out, "transfer-report")
    folder.write_pictures(pictures, figures.NAMES)
    folder.write("report.md", markdown(blocks))
    if scoring.human_normalized:
        folder.write("report.html", page(text.title(results), blocks))
        folder.write_table(RETURN_COLUMNS, results.rows)
        folder.write_numbers({"described": described, **returns_numbers(results)}, repetitions)
        tensorboard.write(results, out / "tensorboard" / "eval")
    else:
        folder.write_table(ERROR_COLUMNS, results.rows)
        folder.write_numbers({"described": described, **_errors_numbers(results)}, repetitions)
    return list(results.warnings)


class ReportFolder:
    """A folder that a report is written to, replacing an older one. All methods raise OSError.

    Args:
        out: the folder.
        failpoint: prefix of the failpoints of all writes.
    """

    def __init__(self, out: Path, failpoint: str) -> None:
        self._out = out
        self._failpoint = failpoint

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file. It need not be durable, because it can be made again."""
        data = content.encode() if isinstance(content, str) else content
        write_atomic(self._out / name, data, self._failpoint, durable=False)

    def write_pictures(self, pictures: dict[str, bytes], names: Collection[str]) -> None:
        """Write the pictures to figures/, and remove those of `names` that are not among them."""
        (self._out / "figures").mkdir(exist_ok=True)
        for name in names:
            if name in pictures:
                self.write(f"figures/{name}", pictures[name])
            else:
                remove(self._out / "figures" / name)

    def write_table(self, columns: Mapping[str, Callable[[Row], Any]], rows: Iterable[Row]) -> None:
        """Write results.csv, with a line for each run. Unknown values (None or NaN) become empty fields."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            values = (value_of(row) for value_of in columns.values())
            writer.writerow("" if value is None or value != value else value for value in values)
        self.write("results.csv", buffer.getvalue())

    def write_numbers(self, content: dict[str, Any], repetitions: int) -> None:
        """Write results.json: strict JSON, in which unknown or infinite numbers are null."""
        bootstrap = {"repetitions": repetitions, "level": statistics.LEVEL, "seed": statistics.SEED}
        everything = {"format": FORMAT, "bootstrap": bootstrap, **plain(content)}
        self.write("results.json", json.dumps(everything, indent=1, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """Return dataclasses, tuples and arrays as JSON-compatible data, with null for unknown or infinite numbers."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray | tuple | list):
        return [plain(inner) for inner in value]
    if isinstance(value, float):  # this includes NumPy's
        return float(value) if math.isfinite(value) else None
    return value


def returns_numbers(results: Results) -> dict[str, Any]:
    """Return results.json of an evaluation of games; its rows are in results.csv."""
    names = ("arms", "baseline", "budgets", "targets", "counted", "ranked", "excluded", "thresholds", "overall")
    return {
        "conclusion": conclusion(results),
        **{name: getattr(results, name) for name in (*names, "warnings")},
        "window": statistics.WINDOW,
        "budget": results.budget,
        "grid": {game: statistics.grid(budget) for game, budget in results.budgets.items()}
        if results.by_share
        else statistics.grid(results.budget),
        "cells": _each(results.cells, lambda cells: _each(cells, _returns_cell)),
        "against": _each(
            results.against,
            lambda found: {
                "improvement": found.improvement,
                "pairs": found.pairs,
                "iqm_difference": found.intervals,
                "iqm_ratio": found.ratios,
            },
        ),
        "improvements": {
            value: [{"arm": first, "other": second, **found._asdict()} for (first, second), found in of_pairs.items()]
            for value, of_pairs in results.improvements.items()
        },
    }


def _returns_cell(cell: Cell) -> dict[str, Any]:
    return {"seeds": cell.seeds, **cell.intervals, "curve": cell.curve, "steps_to_baseline": cell.steps_to_baseline}


def _errors_numbers(results: Results) -> dict[str, Any]:
    """Return results.json of an evaluation of classifiers; its rows are in results.csv."""
    return {
        "conclusion": conclusion(results),
        **{name: getattr(results, name) for name in ("arms", "baseline", "budgets", "counted", "warnings")},
        "unit": UNIT,
        "games": _each(
            results.cells,
            lambda cells: _each(cells, lambda cell: {"runs": len(cell.seeds), "intervals": cell.intervals}),
        ),
        "overall": _each(
            results.overall,
            lambda overall: {
                "runs": overall.runs,
                "intervals": {name: found["mean"] for name, found in overall.aggregates.items()},
            },
        ),
        "against": _each(
            results.against,
            lambda found: {"intervals": found.intervals, "by_seed": found.by_seed, "pairs": found.pairs},
        ),
    }


def _each(found: Mapping[str, _T], numbers: Callable[[_T], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: numbers(value) for name, value in found.items()}


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
