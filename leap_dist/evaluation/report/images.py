"""The report of an evaluation whose tasks are supervised: which initialization leads to lower errors, and faster.

report.md     for people        results.csv     one row per run
figures/curves.png              results.json    every number with its interval
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

from leap_dist.config.loading import ConfigError
from leap_dist.evaluation import statistics
from leap_dist.evaluation.report import output
from leap_dist.evaluation.report.canvas import DASHES, png
from leap_dist.evaluation.report.document import Block, Bullets, Heading, Paragraph, Picture, Table
from leap_dist.evaluation.report.text import initializations
from leap_dist.evaluation.results import measures
from leap_dist.evaluation.results.measures import MEASURES, SEED, Difference, Outcome
from leap_dist.evaluation.results.runs import describe_arms, load_all
from leap_dist.evaluation.statistics import Interval
from leap_dist.study.figures import Panel, curves
from leap_dist.study.text import AREA, ERRORS, NONE, percent
from leap_dist.telemetry.pictures import COLOURS

COLUMNS = ("arm", "game", "seed", "test_error", "train_error", "auc", "test_loss", "seconds")
"""Of results.csv. What is unknown is empty."""
_BASELINE = "scratch"
_TITLES = {"test_error": "test error (%)", "train_error": "train error (%)", "auc": "area (0–100)"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One arm, on one task or on all that count."""

    runs: int
    intervals: dict[str, Interval]
    """By measure: mean over tasks of the mean over runs."""


@dataclasses.dataclass(frozen=True)
class Results:
    """All of it, in the order in which it is shown."""

    arms: tuple[str, ...]
    baseline: str
    outcomes: tuple[Outcome, ...]
    games: dict[str, dict[str, Cell]]
    """By task and arm, where there are runs."""
    counted: tuple[str, ...]
    """Tasks that every arm has runs of: over these arms are compared."""
    overall: dict[str, Cell]
    against: dict[str, Difference]
    """By arm, less the baseline, over all pairs of runs of the same task and seed."""
    warnings: tuple[str, ...]


def build(out: Path, repetitions: int = statistics.REPETITIONS) -> list[str]:
    """Writes the report of all runs in `out`, in place of an older one, and returns what is wrong, on one line each.

    Runs may be missing, damaged, or go on while this reads them. Raises ConfigError where there is no run of a
    supervised task at all, and OSError where the report cannot be written.
    """
    runs, warnings = load_all(out)
    outcomes, more = measures.measure_all(runs)
    warnings += more
    if not outcomes:
        damaged = f"; {warnings[0]}" if warnings else ""
        raise ConfigError(f"out: {out} holds no run of a supervised task{damaged}")
    described, _ = describe_arms(out)
    if without := [arm["label"] for arm in described if arm["label"] not in {outcome.arm for outcome in outcomes}]:
        warnings.append(f"no run yet of {', '.join(without)}")
    results = compute(outcomes, tuple(warnings), repetitions)
    picture = png(curves(_panels(results, repetitions), _looks(results)))
    output.write_pictures(out, {"curves.png": picture}, ("curves.png",))
    output.write_text(out, "report.md", _blocks(results, described, picture, repetitions))
    output.write_table(out, COLUMNS, results.outcomes)
    numbers = {field.name: getattr(results, field.name) for field in dataclasses.fields(results)}
    del numbers["outcomes"]  # they are in results.csv
    output.write_numbers(out, {"described": described, **numbers}, repetitions)
    return list(results.warnings)


def compute(
    outcomes: list[Outcome], warnings: tuple[str, ...] = (), repetitions: int = statistics.REPETITIONS
) -> Results:
    """Compares runs, at least one, in the order of their arms."""
    arms = tuple(dict.fromkeys(outcome.arm for outcome in outcomes))
    baseline = _BASELINE if _BASELINE in arms else arms[-1]
    found: dict[str, dict[str, list[Outcome]]] = {game: {} for game in sorted({o.game for o in outcomes})}
    for outcome in outcomes:
        found[outcome.game].setdefault(outcome.arm, []).append(outcome)
    counted = tuple(game for game, of_arms in found.items() if len(of_arms) == len(arms))
    everything = {arm: [o for game in counted for o in found[game][arm]] for arm in arms}
    return Results(
        arms=arms,
        baseline=baseline,
        outcomes=tuple(outcomes),
        games={
            game: {arm: _cell(of_arms[arm], repetitions) for arm in arms if arm in of_arms}
            for game, of_arms in found.items()
        },
        counted=counted,
        overall={arm: _cell(everything[arm], repetitions) for arm in arms} if counted else {},
        against={
            arm: measures.difference(everything[arm], everything[baseline], _game, repetitions)
            for arm in arms
            if arm != baseline
        },
        warnings=(*warnings, *_warnings(outcomes, arms, counted)),
    )


def _cell(outcomes: list[Outcome], repetitions: int) -> Cell:
    return Cell(len(outcomes), {name: measures.interval(outcomes, name, _game, repetitions) for name in MEASURES})


def _game(outcome: Outcome) -> str:
    """The stratum: runs are resampled within each task, and tasks weigh the same."""
    return outcome.game


def _warnings(outcomes: list[Outcome], arms: tuple[str, ...], counted: tuple[str, ...]) -> list[str]:
    games, seeds = (sorted({getattr(o, name) for o in outcomes}) for name in ("game", "seed"))
    present = {(o.arm, o.game, o.seed) for o in outcomes}
    missing: defaultdict[str, list[str]] = defaultdict(list)
    for arm in arms:
        for game in games:
            for seed in seeds:
                if (arm, game, seed) not in present:
                    missing[f"{arm}/{game}"].append(str(seed))
    found = []
    if missing:
        places = "; ".join(f"{place} seed {', '.join(lacking)}" for place, lacking in missing.items())
        found.append(f"incomplete: missing runs, {sum(map(len, missing.values()))}: {places}")
    if others := [game for game in games if game not in counted]:
        found.append(f"not counted over all tasks, because an arm has no run of them: {', '.join(others)}")
    if len(seeds) == 1:
        found.append("there is one seed only: intervals have no width, and say nothing about chance")
    return found


def _panels(results: Results, repetitions: int) -> list[Panel]:
    """One for all tasks that count, where there are several, and one for each."""
    found = [("mean of all tasks", results.counted)] if len(results.counted) > 1 else []
    found += [(game, (game,)) for game in results.games]
    panels = []
    for title, games in found:
        shown = [outcome for outcome in results.outcomes if outcome.game in games]
        points = measures.points_of(shown)
        of_arms = {arm: [outcome for outcome in shown if outcome.arm == arm] for arm in results.arms}
        bands = {
            arm: measures.curve_with_interval(of_arm, points, _game, repetitions)
            for arm, of_arm in of_arms.items()
            if of_arm
        }
        panels.append(Panel(title, points, bands))
    return panels


def _looks(results: Results) -> dict[str, dict[str, Any]]:
    return {
        arm: {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}
        for index, arm in enumerate(results.arms)
    }


def _blocks(results: Results, described: list[dict[str, Any]], picture: bytes, repetitions: int) -> list[Block]:
    wrong: list[Block] = [Heading("Warnings"), Bullets(results.warnings)]
    seeds = {outcome.seed for outcome in results.outcomes}
    return [
        Heading("Transfer to held-out tasks", 1),
        Paragraph(
            f"Initializations: {len(results.arms)}. Tasks: {len(results.games)}. Seeds: {len(seeds)}. Runs: "
            f"{len(results.outcomes)}. The baseline is {results.baseline}."
        ),
        *(wrong if results.warnings else []),
        *initializations(described),
        *_overall(results),
        *_by_game(results),
        Heading("Training-error curves"),
        Picture(
            "figures/curves.png",
            "Training error of the batches while networks learned: mean over runs, with its 95 % interval. A run that "
            "ended early keeps its last value.",
            picture,
        ),
        Heading("Method"),
        Bullets(
            [
                ERRORS,
                AREA,
                f"Intervals are 95 % percentile intervals of {repetitions:,} bootstrap samples (seed {SEED}), which "
                "draw runs with replacement within each task, pairs as pairs; tasks weigh the same. With few seeds "
                "they are rather too narrow. They are of the chance that is in the runs, not in the choice of tasks.",
            ]
        ),
    ]


def _overall(results: Results) -> list[Block]:
    if not results.overall:
        return [Heading("Over all tasks"), Paragraph("No task has runs of every arm, so nothing can be compared.")]
    rows = [
        [arm, *(percent(cell.intervals[name]) for name in MEASURES), str(cell.runs)]
        for arm, cell in results.overall.items()
    ]
    found: list[Block] = [
        Heading("Over all tasks"),
        Paragraph(f"Means over {', '.join(results.counted)}; 95 % intervals in brackets."),
        Table(["arm", *(_TITLES[name] for name in MEASURES), "runs"], rows),
    ]
    if not results.against:
        return found
    rows = [
        [arm, *(percent(intervals[name], signed=True) if pairs else NONE for name in MEASURES), str(pairs)]
        for arm, (intervals, _, pairs) in results.against.items()
    ]
    return [
        *found,
        Heading(f"Less {results.baseline}"),
        Paragraph(
            f"Mean difference over pairs of runs of the same task and seed, in percentage points. Below 0 the arm is "
            f"better than {results.baseline}; an interval that holds 0 leaves open which one is."
        ),
        Table(["arm", *(_TITLES[name].split(" (")[0] for name in MEASURES), "pairs"], rows),
    ]


def _by_game(results: Results) -> list[Block]:
    found: list[Block] = [Heading("By task")]
    for name in MEASURES:
        rows = []
        for game, cells in results.games.items():
            runs = [str(cells[arm].runs) if arm in cells else "0" for arm in results.arms]
            shown = [percent(cells[arm].intervals[name]) if arm in cells else NONE for arm in results.arms]
            rows.append([game, *shown, runs[0] if len(set(runs)) == 1 else " / ".join(runs)])
        title = _TITLES[name][0].upper() + _TITLES[name][1:]
        found += [Heading(title, 3), Table(["task", *results.arms, "runs"], rows)]
    return found
