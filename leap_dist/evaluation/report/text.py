"""What the report of an evaluation says, as blocks of a page."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from leap_dist.evaluation import statistics
from leap_dist.evaluation.report.document import Block, Bullets, Heading, Paragraph, Picture, Table, Verbatim
from leap_dist.evaluation.results.games import AGGREGATES, MEASURES, SEED, Cell, Results
from leap_dist.evaluation.statistics import Interval

TITLE = "Transfer to held-out games"
_NONE = "–"
_MEASURES = {"final": "final return", "auc": "area under the curve"}
_SHORT = {"final": "final", "auc": "area"}
_AGGREGATES = {"median": "median", "iqm": "IQM", "mean": "mean", "optimality_gap": "optimality gap"}
_DESCRIBED = ("source", "meta_learner", "version", "sha256")


def blocks(
    results: Results,
    described: list[dict[str, Any]],
    warnings: list[str],
    pictures: dict[str, bytes],
    attached: list[Verbatim],
    repetitions: int,
) -> list[Block]:
    """The report, in its order. `pictures` are PNGs by file name, `attached` files to show at the end."""
    wrong: list[Block] = [Heading("Warnings"), Bullets(warnings)]
    configuration: list[Block] = [Heading("Configuration"), *attached]
    return [
        Heading(TITLE, 1),
        Paragraph(_scope(results)),
        *(wrong if warnings else []),
        *initializations(described),
        *_curves(results, pictures),
        *_all_games(results, pictures),
        *_against(results, pictures),
        *_by_game(results),
        *_method(results, repetitions),
        *(configuration if attached else []),
    ]


def _scope(results: Results) -> str:
    seeds = {row.run.seed for row in results.rows}
    return (
        f"{_count(len(results.arms), 'initialization')} on {_count(len(results.cells), 'game')}, "
        f"{_count(len(seeds), 'seed')}, {_count(len(results.rows), 'run')} of {results.budget:,} agent steps each. "
        f"The baseline is {results.baseline}."
    )


def initializations(described: list[dict[str, Any]]) -> list[Block]:
    """Where the arms' initializations are from, as arms.json has it; nothing where it has nothing."""
    if not described:
        return []
    header = ["arm", *(name.replace("_", "-") for name in _DESCRIBED)]
    rows = [[arm["label"], *(_described(name, arm.get(name)) for name in _DESCRIBED)] for arm in described]
    return [Heading("Initializations"), Table(header, rows, numbers=False)]


def _described(name: str, value: Any) -> str:
    """On one line; of a checksum, as much as people compare."""
    return _NONE if value is None else str(value)[: 12 if name == "sha256" else 80]


def _curves(results: Results, pictures: dict[str, bytes]) -> list[Block]:
    caption = (
        f"Return over agent steps: mean over seeds of the last {statistics.WINDOW} episodes, with the 95 % interval of "
        "the mean."
    )
    if results.overall:
        caption += " The last panel is the interquartile mean of the human-normalized curves of all games that count."
    return [Heading("Learning curves"), _picture("curves.png", caption, pictures)]


def _all_games(results: Results, pictures: dict[str, bytes]) -> list[Block]:
    found: list[Block] = [Heading("Over all games")]
    if results.excluded:
        found += [
            Paragraph("Games that do not count here:"),
            Bullets([f"{game}: {why}" for game, why in results.excluded.items()]),
        ]
    if not results.overall:
        return [*found, Paragraph("No game counts, so nothing can be said over all games.")]
    found.append(Paragraph(f"Human-normalized, over {', '.join(results.counted)}; 95 % intervals in brackets."))
    for measure in MEASURES:
        rows = [
            [arm, *(_shown(overall.aggregates[measure][name]) for name in AGGREGATES), str(overall.runs)]
            for arm, overall in results.overall.items()
        ]
        found += [
            Heading(_MEASURES[measure].capitalize(), 3),
            Table(["arm", *(_AGGREGATES[name] for name in AGGREGATES), "runs"], rows),
        ]
    return [
        *found,
        _picture("aggregates.png", "Aggregates (diamonds) and their 95 % intervals (bars).", pictures),
        _picture(
            "profiles.png",
            "Performance profiles: the fraction of runs with a score above τ, with 95 % intervals. Higher is better; "
            "where two cross, neither arm is better throughout.",
            pictures,
        ),
    ]


def _against(results: Results, pictures: dict[str, bytes]) -> list[Block]:
    if not results.against:
        return []
    header = ["arm"]
    for measure in MEASURES:
        header += [f"P(better), {_SHORT[measure]}", f"difference, {_SHORT[measure]}"]
    rows = []
    for arm, found in results.against.items():
        row = [arm]
        for measure in MEASURES:
            difference = found.iqm_difference.get(measure)
            row += [_shown(found.improvement[measure]), _shown(difference) if difference else _NONE]
        rows.append([*row, str(found.pairs)])
    return [
        Heading(f"Against {results.baseline}"),
        Paragraph(
            f"P(better) is the probability that a run of the arm beats one of {results.baseline} on the same game. The "
            "difference is of the IQMs of human-normalized scores, over pairs of runs with the same game and seed. An "
            "interval that holds 0.5 or 0, respectively, leaves open which one is better."
        ),
        Table([*header, "pairs"], rows),
        _picture(
            "improvement.png",
            f"Probability of improvement over {results.baseline} (diamonds) and its 95 % interval (bars).",
            pictures,
        ),
    ]


def _by_game(results: Results) -> list[Block]:
    return [
        Heading("By game"),
        Paragraph("Raw returns, mean over seeds; 95 % intervals in brackets. Seeds are listed where arms differ."),
        Heading("Final return", 3),
        _game_table(results, lambda cell: _shown(cell.final, raw=True)),
        Heading("Area under the curve", 3),
        _game_table(results, lambda cell: _shown(cell.auc, raw=True)),
        Heading(f"Agent steps to the final return of {results.baseline}", 3),
        Paragraph(
            f"Median over runs, and how many of them reach the mean final return of {results.baseline} at all. Half of "
            f"the runs of {results.baseline} itself may not."
        ),
        _game_table(results, _steps),
    ]


def _game_table(results: Results, cell: Callable[[Cell], str]) -> Table:
    rows = []
    for game, cells in results.cells.items():
        seeds = [str(len(cells[arm].seeds)) if arm in cells else "0" for arm in results.arms]
        shown = [cell(cells[arm]) if arm in cells else _NONE for arm in results.arms]
        rows.append([game, *shown, seeds[0] if len(set(seeds)) == 1 else " / ".join(seeds)])
    return Table(["game", *results.arms, "seeds"], rows)


def _steps(cell: Cell) -> str:
    if cell.steps_to_baseline is None:
        return _NONE
    median, reached, runs = cell.steps_to_baseline
    return f"{f'{median:,.0f}' if math.isfinite(median) else 'never'} ({reached} of {runs})"


def _method(results: Results, repetitions: int) -> list[Block]:
    points = len(results.grid)
    return [
        Heading("Method"),
        Bullets(
            [
                f"A run's learning curve is the mean raw return of its last {statistics.WINDOW} episodes (of all where "
                f"there are fewer), at {points} points evenly spaced over {results.budget:,} agent steps. An agent "
                "step is one decision, of 4 frames.",
                "The final return is the last value of that curve; the area under it is its mean height, where what "
                "precedes the first episode's end counts as the first known value.",
                "Human-normalized is (return − random) / (human − random), with published scores of 57 games. Games "
                "without them, and games that an arm has no run of, do not count over all games.",
                "Over all games: IQM is the mean of the middle half of all runs' scores; mean and median are over the "
                "games' means; the optimality gap is the mean shortfall from 1. Games weigh the same, whatever their "
                "numbers of runs.",
                f"Intervals are 95 % percentile intervals of {repetitions:,} bootstrap samples (seed {SEED}), which "
                "draw runs with replacement within each game; for the probability of improvement independently for "
                "both arms, for paired differences seeds, so that pairs stay together. With few seeds they are rather "
                "too narrow. They say how much chance there is in the runs, not in the choice of games.",
                "After Agarwal et al. (2021), Deep Reinforcement Learning at the Edge of the Statistical Precipice.",
            ]
        ),
    ]


def _picture(name: str, caption: str, pictures: dict[str, bytes]) -> Picture:
    return Picture(f"figures/{name}", caption, pictures[name])


def _shown(interval: Interval, *, raw: bool = False) -> str:
    point, low, high = (_number(value, raw) for value in interval)
    return point if interval.low == interval.high else f"{point} [{low}, {high}]"


def _number(value: float, raw: bool) -> str:
    """Raw returns are of any size, human-normalized ones about 1."""
    return f"{value:.3f}" if not raw else f"{value:,.{0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2}f}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
