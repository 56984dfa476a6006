"""What the reports of supervised tasks say, as blocks of a page."""

from __future__ import annotations

import math
from typing import Any

from leap_dist.evaluation.report.document import Block, Bullets, Heading, Paragraph, Picture, Table
from leap_dist.evaluation.results.measures import MEASURES, SEED
from leap_dist.evaluation.statistics import Interval
from leap_dist.study import published
from leap_dist.study.results import REFERENCE, Cell, Comparison, Results

NONE = "–"
"""Where there is nothing to show."""
AREA = (
    "The area under the training-error curve is that of trapezoids between the errors of a run's batches while it "
    "learned, divided by their number, as the authors' published code has it; scaled to 0–100. It is low where a "
    "network learns fast."
)
ERRORS = (
    "Test and train error are the parts of the held-out and of the training images that the network classifies wrongly "
    "once it is trained."
)
_TITLES = {
    "omniglot": "Omniglot: transfer to held-out alphabets",
    "multi-cv": "Multi-CV: transfer to a held-out data set",
}
_CAPTIONS = {
    "figure3.png": "As the paper's figure 3. Left: training curves of leap's tasks, from the beginning of "
    "meta-training (blue) to its end (red). Right: area under the training-error curve; shaded, one standard deviation "
    "over seeds.",
    "test_error.png": "Test error; shaded, one standard deviation over seeds. Thin dashed lines: the paper's table 2.",
    "curves.png": "Training error of the batches while networks learned: mean over seeds; shaded, one standard "
    "deviation over seeds. A run that ended early keeps its last value.",
}


def blocks(results: Results, pictures: dict[str, bytes], repetitions: int) -> list[Block]:
    """The report of a study, in its order. `pictures` are PNGs by file name."""
    study = results.study
    tables = _omniglot(results) if study.tasks == "omniglot" else _multi_cv(results)
    wrong: list[Block] = [Heading("Incomplete, or worth knowing"), Bullets(results.warnings)]
    shown = [Picture(f"figures/{name}", _CAPTIONS[name], data) for name, data in pictures.items()]
    return [
        Heading(_TITLES[study.tasks], 1),
        Paragraph(
            f"{len(results.outcomes)} runs. Meta-training: {study.meta_updates:,} meta-updates of {study.batch_size} "
            f"tasks, {study.task_steps:,} examples each; seeds {', '.join(map(str, study.seeds))}."
        ),
        *(wrong if results.warnings else []),
        *tables,
        *_comparisons(results),
        Heading("Pictures"),
        *shown,
        *_method(results, repetitions),
        *_settings(results),
    ]


def _omniglot(results: Results) -> list[Block]:
    spreads = "Mean ± standard deviation over seeds, in brackets the number of runs."
    return [
        Heading("Test error (%)"),
        Paragraph(f"On held-out alphabets, by number of pretraining alphabets. {spreads}"),
        _by_group(results, "test_error"),
        Heading("Area under the training-error curve (0–100)"),
        Paragraph(f"The same of the area. {spreads}"),
        _by_group(results, "auc"),
        *_beside_table_2(results),
    ]


def _by_group(results: Results, measure: str) -> Table:
    groups = results.study.groups
    rows = [
        [arm, *(_spread(results.cells.get(group, {}).get(arm), measure, runs=True) for group in groups)]
        for arm in results.study.arms
    ]
    return Table(["arm", *groups], rows)


def _beside_table_2(results: Results) -> list[Block]:
    """Ours and the paper's, side by side."""
    groups = [group for group in results.study.groups if group in published.PRETRAINING]
    if not groups:
        return []
    rows = []
    for arm in results.study.arms:
        row = [arm]
        for group in groups:
            cell = results.cells.get(group, {}).get(arm)
            row += [_spread(cell, "test_error"), f"{published.OMNIGLOT[arm][group]:.1f}"]
        rows.append(row)
    return [
        Heading("Test error (%) beside the paper"),
        Paragraph("The paper's are those of its table 2. Its held-out alphabets are others."),
        Table(["arm", *(name for group in groups for name in (f"{group}: here", f"{group}: paper"))], rows),
    ]


def _multi_cv(results: Results) -> list[Block]:
    shown = {"test_error": "test %", "train_error": "train %", "auc": "AUC"}
    rows = []
    for group in results.study.groups:
        for arm in results.study.arms:
            cell = results.cells.get(group, {}).get(arm)
            paper = published.MULTI_CV[group].get(arm)
            row = [group, arm]
            for measure in shown:
                row += [_spread(cell, measure), NONE if paper is None else f"{getattr(paper, measure):.1f}"]
            rows.append([*row, str(cell.runs) if cell else "0"])
    header = ["held out", "arm", *(name for title in shown.values() for name in (title, "paper")), "runs"]
    return [
        Heading("Test error, train error and area under the training-error curve"),
        Paragraph("Mean ± standard deviation over seeds, beside the paper's table 3; areas are scaled to 0–100."),
        Table(header, rows),
    ]


def _comparisons(results: Results) -> list[Block]:
    if not results.comparisons:
        return []
    first = "pretraining alphabets" if results.study.tasks == "omniglot" else "held out"
    per = "of the same seed and alphabet" if results.study.tasks == "omniglot" else "of the same seed and data set"
    rows = [_comparison(found) for found in results.comparisons]
    return [
        Heading(f"{REFERENCE} less another arm"),
        Paragraph(
            f"Mean difference over pairs of runs {per}, in percentage points, with its 95 % interval. Below 0 "
            f"{REFERENCE} is better; an interval that holds 0 leaves open which one is. Seeds below 0 are those whose "
            "mean difference in test error is."
        ),
        Table([first, "other arm", "test error", "train error", "area", "seeds below 0", "pairs"], rows),
    ]


def _comparison(found: Comparison) -> list[str]:
    intervals, by_seed, pairs = found.difference
    shown = [percent(intervals[measure], signed=True) if pairs else NONE for measure in MEASURES]
    lower = f"{sum(value < 0 for value in by_seed.values())} of {len(by_seed)}" if pairs else NONE
    return ["all of them" if found.group is None else found.group, found.arm, *shown, lower, str(pairs)]


def _method(results: Results, repetitions: int) -> list[Block]:
    resampled = (
        "runs within each seed, so they say how much chance there is in the held-out alphabets and in training on "
        "them, not in meta-training; that shows in the standard deviation over seeds, and in how many seeds are below 0"
        if results.study.tasks == "omniglot"
        else "seeds within each held-out data set, so they say how much chance there is in meta-training and training, "
        "not in the choice of data sets"
    )
    return [
        Heading("Method"),
        Bullets(
            [
                "A seed's value is the mean over its held-out tasks. Means and standard deviations (with n − 1) are of "
                "the seeds' values; of one seed there is no deviation.",
                ERRORS,
                AREA,
                f"Intervals are 95 % percentile intervals of {repetitions:,} bootstrap samples (seed {SEED}), which "
                f"draw {resampled}. Pairs stay together. With few runs they are rather too narrow; of one run there is "
                "none.",
            ]
        ),
    ]


def _settings(results: Results) -> list[Block]:
    settings = results.study.settings
    if not any(settings.values()):
        return []
    arms = [arm for arm in results.study.arms if arm in settings]
    first = settings[arms[0]]
    alike = {name: first[name] for name in first if all(settings[arm].get(name) == first[name] for arm in arms)}
    rows = [[arm, _shown({n: v for n, v in settings[arm].items() if n not in alike or len(arms) == 1})] for arm in arms]
    found: list[Block] = [Heading("Settings of each arm"), Table(["arm", "settings"], rows, numbers=False)]
    return found if len(arms) == 1 or not alike else [*found, Paragraph(f"All arms: {_shown(alike)}.")]


def _shown(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in settings.items()) or NONE


def _value(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)[:80]


def _spread(cell: Cell | None, measure: str, *, runs: bool = False) -> str:
    if cell is None:
        return NONE
    mean, deviation, _ = cell.values[measure].over_seeds
    text = f"{100 * mean:.2f}" + ("" if math.isnan(deviation) else f" ± {100 * deviation:.2f}")
    return f"{text} ({cell.runs})" if runs else text


def percent(interval: Interval, *, signed: bool = False) -> str:
    """A number and its interval, where that has any width, in %."""
    # Adding 0 turns a negative zero into a positive one.
    point, low, high = (f"{round(100 * value, 2) + 0.0:{'+' if signed else ''}.2f}" for value in interval)
    return point if low == high else f"{point} [{low}, {high}]"
