"""The report of a study, made from its evaluations and Leap's ledgers alone.

table.md      for people        results.csv     one row per run
figures/*.png its pictures      results.json    every number with its interval
"""

from __future__ import annotations

from pathlib import Path

from leap_dist.config.loading import ConfigError
from leap_dist.evaluation import statistics
from leap_dist.evaluation.report import output
from leap_dist.study import figures, meta_training
from leap_dist.study.results import REFERENCE, Results, compute, load
from leap_dist.study.spec import Study
from leap_dist.study.text import blocks

COLUMNS = ("group", "seed", "arm", "game", "test_error", "train_error", "auc", "test_loss", "seconds")
"""Of results.csv. What is unknown is empty."""
_FIGURES = ("figure3.png", "test_error.png", "curves.png")


def build(out: Path, repetitions: int = statistics.REPETITIONS) -> list[str]:
    """Writes the report of what there is of the study in `out`, and returns what is missing or wrong, a line each.

    Runs may be missing, damaged, or go on while this reads them. Raises ConfigError where `out` holds no study, or
    nothing of it yet, and OSError where the report cannot be written.
    """
    study = Study.read(out)
    outcomes, warnings = load(out, study)
    evolution = None
    if study.tasks == "omniglot":
        evolution, more = meta_training.read(out, study)
        warnings += more
    if not outcomes and evolution is None:
        damaged = f"; {warnings[0]}" if warnings else ""
        raise ConfigError(f"out: there is nothing of the study in {out} yet{damaged}")
    results = compute(study, outcomes, evolution, tuple(warnings), repetitions)
    pictures = figures.pictures(results)
    output.write_pictures(out, pictures, _FIGURES)
    output.write_text(out, "table.md", blocks(results, pictures, repetitions))
    output.write_table(out, COLUMNS, results.outcomes)
    output.write_numbers(out, _numbers(results), repetitions)
    return list(results.warnings)


def _numbers(results: Results) -> dict[str, object]:
    """Runs are in results.csv."""
    return {
        "study": results.study,
        "reference": REFERENCE,
        "cells": results.cells,
        "points": results.points,
        "comparisons": results.comparisons,
        "evolution": results.evolution,
        "warnings": results.warnings,
    }
