"""The text of an evaluation's report, as blocks of a document."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from leap_dist.config.plurals import counted
from leap_dist.evaluation import statistics
from leap_dist.evaluation.report.conclusion import conclusion
from leap_dist.evaluation.report.document import Block, Bullets, Heading, Paragraph, Picture, Table, Verbatim
from leap_dist.evaluation.results import Cell, Results
from leap_dist.evaluation.statistics import Interval

NONE = "–"
"""Shown where there is no value."""
AREA_TEXT = (
    "The area under the training-error curve is the sum of the trapezoids between the errors of a run's batches, "
    "divided by the number of batches, as in the code that the authors published; scaled to 0–100. It is low if a "
    "network learns fast."
)
ERRORS_TEXT = (
    "Test and train error are the fractions of held-out and of training images that the network classifies wrongly "
    "after training."
)
_AGGREGATES = {"median": "median", "iqm": "IQM", "mean": "mean", "optimality_gap": "optimality gap"}
_SHORT = {"final": "final", "auc": "area"}
_P_BETTER = "P(better) is the probability that a run of the arm beats one of {} on the same game."
_DESCRIBED = ("source", "meta_learner", "version", "sha256")


def blocks(
    results: Results,
    described: list[dict[str, Any]],
    warnings: Sequence[str],
    pictures: dict[str, bytes],
    attached: Sequence[Verbatim],
    repetitions: int,
) -> list[Block]:
    """Return the report: `described` are the entries of arms.json, `pictures` PNG files, `attached` files to append."""
    games = results.scoring.human_normalized
    wrong: list[Block] = [Heading("Warnings"), Bullets(warnings)]
    configuration: list[Block] = [Heading("Configuration"), *attached]
    return [
        Heading(title(results), 1),
        Paragraph(conclusion(results)),
        Paragraph(_scope(results)),
        *(wrong if warnings else []),
        *_initializations(described),
        Heading("Learning curves" if games else "Training-error curves"),
        _picture("curves.png", _curves_caption(results), pictures),
        *(_all_games(results, pictures) if games else _all_tasks(results)),
        *(_improvement(results, pictures) if games else _differences(results)),
        *_by_game(results),
        *_method(results, repetitions),
        *(configuration if attached else []),
    ]


def title(results: Results) -> str:
    """Return the title of the report."""
    return f"Transfer to {'games' if results.scoring.human_normalized else 'tasks'}"


def percent(interval: Interval, *, signed: bool = False) -> str:
    """Return a fraction in percent, and its interval if that has any visible width."""
    # Adding 0 turns a negative zero into a positive one.
    return _with_interval(interval, lambda x: f"{round(100 * x, 2) + 0.0:{'+' if signed else ''}.2f}")


def intervals_note(repetitions: int, drawn: str) -> str:
    """Return the description of the intervals for the section on the method. `drawn` says what is resampled."""
    return (
        f"Intervals are 95 % percentile intervals of {repetitions:,} bootstrap samples (seed {statistics.SEED}), which "
        f"draw {drawn}"
    )


def lengths(results: Results) -> str:
    """Return the number of steps over which runs are compared, or the smallest and the largest number."""
    shortest, longest = min(results.budgets.values()), max(results.budgets.values())
    return f"{shortest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"


def _scope(results: Results) -> str:
    seeds = {row.seed for row in results.rows}
    counts = [(results.arms, "initialization"), (results.cells, "game" if results.scoring.human_normalized else "task")]
    shown = [counted(len(things), name) for things, name in [*counts, (seeds, "seed"), (results.rows, "run")]]
    return (
        f"{shown[0]} on {', '.join(shown[1:])} of {lengths(results)} {results.scoring.metric.step_unit} each. "
        f"The baseline is {results.baseline}."
    )


def _initializations(described: list[dict[str, Any]]) -> list[Block]:
    if not described:
        return []
    header = ["arm", *(name.replace("_", "-") for name in _DESCRIBED)]
    rows = [[arm["label"], *(_described(name, arm.get(name)) for name in _DESCRIBED)] for arm in described]
    return [Heading("Initializations"), Table(header, rows, numbers=False)]


def _described(name: str, value: Any) -> str:
    """Return a property of an initialization; a checksum is abbreviated to its beginning."""
    return NONE if value is None else str(value)[: 12 if name == "sha256" else 80]


def _curves_caption(results: Results) -> str:
    if not results.scoring.human_normalized:
        return (
            "Training error of the batches during training: mean over runs, with its 95 % interval. A run that ended "
            "early keeps its last value."
        )
    caption = (
        f"Return over agent steps: mean over runs of the last {statistics.WINDOW} episodes, with the 95 % interval of "
        "the mean."
    )
    if results.overall:
        caption += " The last panel is the interquartile mean of the human-normalized curves of all games that count."
    return caption


def _by_game(results: Results) -> list[Block]:
    """Return a table for each value, with a row for each game and a column for each arm."""
    if not results.scoring.human_normalized:
        found: list[Block] = [Heading("By task")]
        return found + _tables_by_game(results, ("task", "runs"), percent)
    return [
        Heading("By game"),
        Paragraph(
            "Raw returns, mean over runs; 95 % intervals in brackets. Where arms differ in their numbers of runs, the "
            "last column has the number of each."
        ),
        *_tables_by_game(results, ("game", "runs"), _raw),
        Heading(f"Agent steps to the final return of {results.baseline}", 3),
        Paragraph(
            f"Median over runs, and the number of runs that ever reach the mean final return of {results.baseline}. "
            f"Because that is a mean, about half of {results.baseline}'s own runs may never reach it."
        ),
        _table_by_game(results, ("game", "runs"), _steps),
    ]


def _tables_by_game(results: Results, ends: tuple[str, str], shown: Callable[[Interval], str]) -> list[Block]:
    found: list[Block] = []
    for name, heading in results.scoring.values.items():
        table = _table_by_game(results, ends, lambda cell, name=name: shown(cell.intervals[name]))  # type: ignore[misc]
        found += [Heading(heading[0].upper() + heading[1:], 3), table]
    return found


def _table_by_game(results: Results, ends: tuple[str, str], shown: Callable[[Cell], str]) -> Table:
    """Return a table whose last column has the numbers of runs. `ends` are the titles of the outer columns."""
    rows = []
    for game, cells in results.cells.items():
        runs = [str(len(cells[arm].seeds)) if arm in cells else "0" for arm in results.arms]
        of_arms = [shown(cells[arm]) if arm in cells else NONE for arm in results.arms]
        rows.append([game, *of_arms, runs[0] if len(set(runs)) == 1 else " / ".join(runs)])
    return Table([ends[0], *results.arms, ends[1]], rows)


# Returns of games -------------------------------------------------------------------------------------------------


def _all_games(results: Results, pictures: dict[str, bytes]) -> list[Block]:
    found: list[Block] = [Heading("Over all games")]
    if results.excluded:
        found += [
            Paragraph("Games left out of the scores over all games:"),
            Bullets([f"{game}: {why}" for game, why in results.excluded.items()]),
        ]
    if not results.overall:
        return [*found, Paragraph("Every game is left out, so there are no scores over all games.")]
    found.append(Paragraph(f"Human-normalized, over {', '.join(results.counted)}; 95 % intervals in brackets."))
    for value, heading in results.scoring.values.items():
        rows = [
            [arm, *(_normalized(overall.aggregates[value][name]) for name in _AGGREGATES), str(overall.runs)]
            for arm, overall in results.overall.items()
        ]
        found += [Heading(heading.capitalize(), 3), Table(["arm", *_AGGREGATES.values(), "runs"], rows)]
    profiles = (
        "Performance profiles: the fraction of runs with a score above τ, with 95 % intervals. Higher is better; where "
        "two profiles cross, neither arm is better throughout."
    )
    return [
        *found,
        _picture("aggregates.png", "Aggregates (diamonds) and their 95 % intervals (bars).", pictures),
        _picture("profiles.png", profiles, pictures),
    ]


def _improvement(results: Results, pictures: dict[str, bytes]) -> list[Block]:
    if not results.against:
        return []
    return [
        Heading(f"Against {results.baseline}"),
        *(_with_scores(results) if results.overall else _by_rank(results)),
        *_every_pair(results),
        _picture(
            "improvement.png",
            f"Probability of improvement over {results.baseline} (diamonds) and its 95 % interval (bars).",
            pictures,
        ),
    ]


def _with_scores(results: Results) -> list[Block]:
    header = ["arm"]
    for value in results.scoring.values:
        header += [f"{what}, {_SHORT[value]}" for what in ("P(better)", "difference", "ratio")]
    rows = []
    for arm, found in results.against.items():
        row = [arm]
        for value in results.scoring.values:
            parts = found.improvement[value], found.intervals.get(value), found.ratios[value]
            row += [_normalized(part) if part else NONE for part in parts]
        rows.append([*row, str(found.pairs)])
    return [
        Paragraph(
            f"{_P_BETTER.format(results.baseline)} The "
            "difference and the ratio compare the IQMs of human-normalized scores, over pairs of runs with the same "
            "game and seed. If an interval contains 0.5 (probability), 0 (difference) or 1 (ratio), it is undecided "
            f"which arm is better. There is no ratio where the IQM of {results.baseline} may be 0 or below."
        ),
        Table([*header, "pairs"], rows),
    ]


def _by_rank(results: Results) -> list[Block]:
    rows = [
        [arm, *(_normalized(found.improvement[value]) for value in results.scoring.values)]
        for arm, found in results.against.items()
    ]
    return [
        Paragraph(
            f"{_P_BETTER.format(results.baseline)} It needs no human scores; here, it is the mean over "
            f"{', '.join(results.ranked)}. If an interval contains 0.5, it is undecided which is better."
        ),
        Table(["arm", *(f"P(better), {_SHORT[value]}" for value in results.scoring.values)], rows),
    ]


def _every_pair(results: Results) -> list[Block]:
    """Return tables of every arm against every other, if there are others besides the baseline."""
    if len(results.arms) < 3:
        return []
    found: list[Block] = [
        Heading("Every arm against every other", 3),
        Paragraph("The probability that a run of the row's arm beats one of the column's on the same game:"),
    ]
    for value, heading in results.scoring.values.items():
        of_pairs = results.improvements[value]
        rows = [
            [first, *(NONE if first == second else _normalized(of_pairs[first, second]) for second in results.arms)]
            for first in results.arms
        ]
        found.append(Table([heading, *results.arms], rows))
    return found


def _steps(cell: Cell) -> str:
    if cell.steps_to_baseline is None:
        return NONE
    median, reached, runs = cell.steps_to_baseline
    return f"{f'{median:,.0f}' if math.isfinite(median) else 'never'} ({reached} of {runs})"


# Errors of classifiers --------------------------------------------------------------------------------------------


def _all_tasks(results: Results) -> list[Block]:
    found: list[Block] = [Heading("Over all tasks")]
    if not results.overall:
        return [*found, Paragraph("No task has runs of every arm, so nothing can be compared.")]
    values = results.scoring.values
    rows = [
        [arm, *(percent(overall.aggregates[name]["mean"]) for name in values), str(overall.runs)]
        for arm, overall in results.overall.items()
    ]
    return [
        *found,
        Paragraph(f"Means over {', '.join(results.counted)}; 95 % intervals in brackets."),
        Table(["arm", *values.values(), "runs"], rows),
    ]


def _differences(results: Results) -> list[Block]:
    if not (results.overall and results.against):
        return []
    values = results.scoring.values
    rows = [
        [
            arm,
            *(percent(found.intervals[name], signed=True) if found.pairs else NONE for name in values),
            str(found.pairs),
        ]
        for arm, found in results.against.items()
    ]
    return [
        Heading(f"Difference from {results.baseline}"),
        Paragraph(
            "Mean difference over pairs of runs of the same task and seed, in percentage points. Below 0 the arm is "
            f"better than {results.baseline}; if an interval contains 0, it is undecided which of the two is better."
        ),
        Table(["arm", *(heading.split(" (")[0] for heading in values.values()), "pairs"], rows),
    ]


# Method and formats -----------------------------------------------------------------------------------------------


def _method(results: Results, repetitions: int) -> list[Block]:
    if not results.scoring.human_normalized:
        drawn = (
            "runs with replacement within each task; pairs stay together, and tasks have equal weights. With few seeds "
            "they tend to be too narrow. They show the randomness of the runs, not of the choice of tasks."
        )
        return [Heading("Method"), Bullets([ERRORS_TEXT, AREA_TEXT, intervals_note(repetitions, drawn)])]
    return [
        Heading("Method"),
        Bullets(
            [
                f"A run's learning curve is the mean raw return of its last {statistics.WINDOW} episodes (of all while "
                f"there are fewer), at 100 points evenly spaced over {lengths(results)} agent steps. An agent step is "
                "one decision of the agent.",
                "The final return is the last value of that curve. The area under it is its mean height, where the "
                "values before the end of the first episode are taken to be equal to the first known one.",
                "Human-normalized is (return − random) / (human − random), with published scores of 57 games. Games "
                "without them, and games for which an arm has no run, are left out of the scores over all games. If no "
                "game is left, the probability of improvement is over all games with runs of every arm.",
                "Over all games, IQM is the mean of the middle half of all runs' scores; mean and median are taken "
                "over the games' means; the optimality gap is the mean shortfall from 1. Games have equal weights, "
                "whatever their numbers of runs.",
                intervals_note(repetitions, _drawn(results)),
                "After Agarwal et al. (2021), Deep Reinforcement Learning at the Edge of the Statistical Precipice.",
            ]
        ),
    ]


def _drawn(results: Results) -> str:
    """Return what the intervals of returns resample."""
    few = "With few seeds the intervals tend to be too narrow. They show the randomness of"
    if len({row.seed for row in results.rows if row.group}) > 1:
        return (
            "seeds of the meta-training with replacement, each with all of its runs on all games, because these start "
            "from the same initialization. For the probability of improvement, the seeds of each arm are drawn "
            f"independently; for differences, pairs stay together. {few} meta-training and of the runs, but not that "
            "of the choice of games."
        )
    return (
        "runs with replacement within each game. For the probability of improvement, the runs of each arm are drawn "
        f"independently; for paired differences, seeds are drawn, so that pairs stay together. {few} the runs, but "
        "not that of meta-training, which all runs with one initialization share, nor that of the choice of games."
    )


def _picture(name: str, caption: str, pictures: dict[str, bytes]) -> Picture:
    return Picture(f"figures/{name}", caption, pictures[name])


def _normalized(interval: Interval) -> str:
    """Return a human-normalized score, which is about 1."""
    return _with_interval(interval, lambda x: f"{x:.3f}")


def _raw(interval: Interval) -> str:
    """Return a raw return, which may have any magnitude."""
    return _with_interval(interval, lambda x: f"{x:,.{0 if abs(x) >= 1000 else 1 if abs(x) >= 10 else 2}f}")


def _with_interval(interval: Interval, shown: Callable[[float], str]) -> str:
    point, low, high = map(shown, interval)
    return point if low == high else f"{point} [{low}, {high}]"
