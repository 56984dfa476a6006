"""Writes the report of a study, from its evaluations and the ledgers of Leap alone.

table.md      report for people     results.csv     one row per run
figures/*.png its pictures          results.json    every number, with its interval
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from leap_dist.config.loading import ConfigError
from leap_dist.evaluation import statistics
from leap_dist.evaluation.report.build import ERROR_COLUMNS, UNIT, ReportFolder
from leap_dist.evaluation.report.document import Block, Bullets, Heading, Paragraph, Picture, Table, markdown
from leap_dist.evaluation.report.text import AREA_TEXT, ERRORS_TEXT, NONE, intervals_note, percent
from leap_dist.evaluation.scoring import ERRORS, Row
from leap_dist.study import figures, games_report, published
from leap_dist.study.results import REFERENCE, Cell, Comparison, Results, compute, load, load_evolution, load_validation
from leap_dist.study.settings_of_arms import settings_of_arms
from leap_dist.study.spec import Study

COLUMNS: dict[str, Callable[[Row], Any]] = {
    "group": lambda row: row.group,
    "seed": lambda row: row.seed,
    **ERROR_COLUMNS,
}
"""Columns of results.csv."""
_TITLES = {
    "omniglot": "Omniglot: transfer to held-out alphabets",
    "multi-cv": "Multi-CV: transfer to a held-out data set",
}
_CAPTIONS = {
    "figure3.png": "Counterpart of the paper's figure 3. Left: training curves of leap's tasks, from the beginning of "
    "meta-training (blue) to its end (red). Right: area under the training-error curve; shaded, one standard deviation "
    "over seeds.",
    "test_error.png": "Test error; shaded, one standard deviation over seeds. Thin dashed lines: the paper's table 2.",
    "validation.png": "Error on the validation alphabets during meta-training: mean over seeds; shaded, one standard "
    "deviation over seeds. A run that was stopped early keeps its last value.",
    "curves.png": "Training error of the batches during training: mean over seeds; shaded, one standard "
    "deviation over seeds. A run that ended early keeps its last value.",
}


def build(out: Path, repetitions: int = statistics.REPETITIONS) -> list[str]:
    """Write the report of the study in `out`, as far as it has results, and return warnings of one line each.

    Runs may be missing or damaged, and more may be written at the same time. Raises ConfigError if `out` holds no study
    or nothing of it yet, and OSError if the report cannot be written.
    """
    study = Study.read(out)
    if study.tasks == "atari":
        return games_report.build(out, study, repetitions)
    rows, warnings = load(out, study)
    evolution, validation = None, None
    if study.tasks == "omniglot":
        evolution, more = load_evolution(out, study)
        validation, wrong = load_validation(out, study)
        warnings += more + wrong
    if not rows and evolution is None:
        damaged = f"; {warnings[0]}" if warnings else ""
        raise ConfigError(f"out: {out} holds no results of the study yet{damaged}")
    results = compute(study, rows, evolution, tuple(warnings), repetitions, validation)
    pictures = figures.pictures(results)
    folder = ReportFolder(out, "study-report")
    folder.write_pictures(pictures, figures.NAMES)
    folder.write("table.md", markdown(blocks(results, pictures, repetitions)))
    folder.write_table(COLUMNS, results.rows)
    # The runs are in results.csv.
    names = ("study", "cells", "points", "comparisons", "evolution", "validation", "warnings")
    numbers = {name: getattr(results, name) for name in names}
    folder.write_numbers({"unit": UNIT, "reference": REFERENCE, **numbers}, repetitions)
    return list(results.warnings)


def blocks(results: Results, pictures: dict[str, bytes], repetitions: int) -> list[Block]:
    """Return the report. `pictures` are PNG files by name."""
    study = results.study
    tables = _omniglot(results) if study.tasks == "omniglot" else _multi_cv(results)
    wrong: list[Block] = [Heading("Warnings"), Bullets(results.warnings)]
    shown = [Picture(f"figures/{name}", _CAPTIONS[name], data) for name, data in pictures.items()]
    return [
        Heading(_TITLES[study.tasks], 1),
        Paragraph(
            f"{len(results.rows)} runs. Meta-training: {study.meta_updates:,} meta-updates of {study.batch_size} "
            f"tasks, {study.task_steps:,} examples each; seeds {', '.join(map(str, study.seeds))}."
        ),
        *(wrong if results.warnings else []),
        *tables,
        *_comparisons(results),
        Heading("Pictures"),
        *shown,
        *_method(results, repetitions),
        *settings_of_arms(study),
    ]


def _omniglot(results: Results) -> list[Block]:
    spreads = "Mean ± standard deviation over seeds, in brackets the number of runs."
    return [
        Heading("Test error (%)"),
        Paragraph(f"On held-out alphabets, by number of pretraining alphabets. {spreads}"),
        _by_group(results, "test_error"),
        Heading("Area under the training-error curve (0–100)"),
        Paragraph(f"By number of pretraining alphabets. {spreads}"),
        _by_group(results, "auc"),
        *_beside_table_2(results),
        *_in_between(results),
        *_validation(results),
    ]


def _in_between(results: Results) -> list[Block]:
    """Return a table of the test errors at the lengths at which every run was tested, if any run was in between."""
    errors: defaultdict[tuple[str, str], list[dict[float, float]]] = defaultdict(list)
    for row in results.rows:
        errors[row.group, row.run.arm].append(_tested(row))
    runs = [run for of_arm in errors.values() for run in of_arm]
    steps = sorted(set(runs[0]).intersection(*runs)) if runs else []
    if len(steps) < 2:
        return []
    rows = [
        [group, arm, *(f"{100 * np.mean([run[step] for run in of_arm]):.1f}" for step in steps)]
        for (group, arm), of_arm in errors.items()
    ]
    return [
        Heading("Test error (%) by length of the test"),
        Paragraph(
            "Mean over runs, by number of examples (`supervised.test_interval`), at lengths that all runs reach."
        ),
        Table(["pretraining alphabets", "arm", *(f"{step:,.0f}" for step in steps)], rows),
    ]


def _tested(row: Row) -> dict[float, float]:
    """Return the test errors of a run by number of examples."""
    return {point["steps"]: point["test_error"] for point in row.run.curve if "test_error" in point}


def _validation(results: Results) -> list[Block]:
    """Return a table of the validation errors of all arms that measured at the same meta-updates, by group."""
    tables: list[Block] = []
    for group, arms in results.validation.items():
        measured = sorted(set[int]().union(*arms.values()))
        rows = [
            [
                arm,
                *(f"{100 * np.mean(errors[at]):.1f} ({len(errors[at])})" if at in errors else NONE for at in measured),
            ]
            for arm, errors in arms.items()
        ]
        tables += [
            Paragraph(f"With {group} pretraining alphabets, by number of meta-updates:"),
            Table(["arm", *(f"{at:,}" for at in measured)], rows),
        ]
    if not tables:
        return []
    intro = (
        "Mean test error over the validation alphabets and seeds, in brackets the number of seeds. A run that was "
        "stopped early keeps its last value; a run in progress does not count beside one that has ended. Early "
        "stopping keeps the φ of each run with the lowest error."
    )
    return [Heading("Error on the validation alphabets during meta-training (%)"), Paragraph(intro), *tables]


def _by_group(results: Results, name: str) -> Table:
    groups = results.study.groups
    rows = [
        [arm, *(_spread(results.cells.get(group, {}).get(arm), name, runs=True) for group in groups)]
        for arm in results.study.arms
    ]
    return Table(["arm", *groups], rows)


def _beside_table_2(results: Results) -> list[Block]:
    """Return tables of our errors on held-out and on training images beside the paper's."""
    groups = [group for group in results.study.groups if group in published.PRETRAINING]
    if not groups:
        return []

    def beside(name: str) -> Table:
        rows = []
        for arm in results.study.arms:
            row = [arm]
            for group in groups:
                cell = results.cells.get(group, {}).get(arm)
                row += [_spread(cell, name), f"{published.OMNIGLOT[arm][group]:.1f}"]
            rows.append(row)
        return Table(["arm", *(name for group in groups for name in (f"{group}: here", f"{group}: paper"))], rows)

    return [
        Heading("Test error (%) beside the paper"),
        Paragraph("The paper's errors are from its table 2, which has different held-out alphabets."),
        beside("test_error"),
        Heading("Error on the training images (%) beside the paper"),
        Paragraph(
            "This is our error on the training images of the held-out alphabets after the last step. The authors' code "
            "tested on those images until December 2019, so table 2 may show this error; docs/results-omniglot.md has "
            "the evidence."
        ),
        beside("train_error"),
    ]


def _multi_cv(results: Results) -> list[Block]:
    shown = {"test_error": "test %", "train_error": "train %", "auc": "AUC"}
    rows = []
    for group in results.study.groups:
        for arm in results.study.arms:
            cell = results.cells.get(group, {}).get(arm)
            paper = published.MULTI_CV[group].get(arm)
            row = [group, arm]
            for name in shown:
                row += [_spread(cell, name), NONE if paper is None else f"{getattr(paper, name):.1f}"]
            rows.append([*row, str(cell.runs) if cell else "0"])
    header = ["held out", "arm", *(column for title in shown.values() for column in (title, "paper")), "runs"]
    return [
        Heading("Test error, train error and area under the training-error curve"),
        Paragraph("Mean ± standard deviation over seeds, beside the paper's table 3; areas are scaled to 0–100."),
        Table(header, rows),
        *_at_equal_lengths(results),
    ]


def _at_equal_lengths(results: Results) -> list[Block]:
    """Return a table of test errors and areas at the length of the shortest run of each group, if lengths differ.

    A run whose validation error stops improving early has a larger area than it would have after more training.
    """
    of_groups: defaultdict[str, list[Row]] = defaultdict(list)
    for row in results.rows:
        of_groups[row.group].append(row)
    rows: list[list[str]] = []
    for group, runs in of_groups.items():
        lengths = {row.run.ended[-1] for row in runs}
        if len(lengths) < 2:
            continue
        shortest = min(lengths)
        tested = [_tested(row) for row in runs]
        common = [step for step in set(tested[0]).intersection(*tested) if step <= shortest]
        errors = [found.get(max(common, default=math.nan), math.nan) for found in tested]
        areas = [statistics.trapezoids(row.run.returns[row.run.ended <= shortest]) for row in runs]
        for arm in dict.fromkeys(row.run.arm for row in runs):
            of_arm = [row.run.arm == arm for row in runs]
            error, area = (_over_seeds([row.seed for row in runs], values, of_arm) for values in (errors, areas))
            shown = [error, f"{max(common):,.0f}"] if common else [NONE, NONE]
            rows.append([group, arm, *shown, area, f"{shortest:,.0f}"])
    if not rows:
        return []
    return [
        Heading("At equal numbers of examples"),
        Paragraph(
            "Tests end when the validation error stops improving, so runs differ in length, and so do the areas above. "
            "Here, all runs with the same held-out data set are compared after as many examples as "
            "the shortest of them has seen, or, for the test error, at the last test before that. Mean ± standard "
            "deviation over seeds."
        ),
        Table(["held out", "arm", "test %", "after examples", "AUC", "over examples"], rows),
    ]


def _comparisons(results: Results) -> list[Block]:
    if not results.comparisons:
        return []
    first = "pretraining alphabets" if results.study.tasks == "omniglot" else "held out"
    per = "of the same seed and alphabet" if results.study.tasks == "omniglot" else "of the same seed and data set"
    rows = [_comparison(found) for found in results.comparisons]
    return [
        Heading(f"{REFERENCE} minus another arm"),
        Paragraph(
            f"Mean difference over pairs of runs {per}, in percentage points, with its 95 % interval. Below 0 "
            f"{REFERENCE} is better; if an interval contains 0, it is undecided which is better. The last column but "
            "one counts the seeds whose mean difference in test error is below 0."
        ),
        Table([first, "other arm", "test error", "train error", "area", "seeds below 0", "pairs"], rows),
    ]


def _comparison(found: Comparison) -> list[str]:
    intervals, by_seed, pairs = found.difference.intervals, found.difference.by_seed, found.difference.pairs
    shown = [percent(intervals[name], signed=True) if pairs else NONE for name in ERRORS.values]
    lower = f"{sum(value < 0 for value in by_seed.values())} of {len(by_seed)}" if pairs else NONE
    return ["all of them" if found.group is None else found.group, found.arm, *shown, lower, str(pairs)]


def _method(results: Results, repetitions: int) -> list[Block]:
    resampled = (
        "held-out alphabets, each with its runs of all seeds that hold it out, so they show the randomness of alphabets"
        " and of training on them, but not that of meta-training, which shows in the standard deviation over seeds, and"
        " in how many seeds are below 0"
        if results.study.tasks == "omniglot"
        else "seeds within each held-out data set, so they show the randomness of meta-training and training, but not "
        "that of the choice of data sets"
    )
    return [
        Heading("Method"),
        Bullets(
            [
                "A seed's value is the mean over its held-out tasks. Means and standard deviations (with n − 1) are "
                "taken over the seeds' values; a single seed has no deviation.",
                ERRORS_TEXT,
                AREA_TEXT,
                intervals_note(
                    repetitions,
                    f"{resampled}. Pairs stay together. With few runs the intervals are often too narrow; one run has "
                    "none.",
                ),
            ]
        ),
    ]


def _over_seeds(seeds: Sequence[int], values: Sequence[float], counts: Sequence[bool]) -> str:
    """Return mean and standard deviation over seeds of the values that count; each seed has one of them."""
    found = {seed: value for seed, value, of_arm in zip(seeds, values, counts, strict=True) if of_arm}
    return _percent(statistics.spread(found))


def _percent(spread: statistics.Spread) -> str:
    return f"{100 * spread.mean:.2f}" + ("" if math.isnan(spread.deviation) else f" ± {100 * spread.deviation:.2f}")


def _spread(cell: Cell | None, name: str, *, runs: bool = False) -> str:
    if cell is None:
        return NONE
    text = _percent(cell.values[name].over_seeds)
    return f"{text} ({cell.runs})" if runs else text
