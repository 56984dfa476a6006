"""What the runs of an evaluation say: every arm on every game, over all games, and against the baseline.

Two measures of a run, both of its learning curve: the *final* return, its last value, and *auc*, its mean height.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from leap_dist.envs.games import human_normalized
from leap_dist.evaluation import statistics
from leap_dist.evaluation.results.runs import TransferRun
from leap_dist.evaluation.statistics import Band, Interval

MEASURES = ("final", "auc")
AGGREGATES = {
    "median": statistics.median,
    "iqm": statistics.iqm,
    "mean": statistics.mean,
    "optimality_gap": statistics.optimality_gap,
}
SEED = 0
"""Of the bootstrap. Every interval starts from it anew, so none depends on what else is in a report."""
_BASELINE = "scratch"


@dataclasses.dataclass(frozen=True)
class Row:
    """One run, measured. NaN where no episode ended, None where there is nothing to measure with."""

    run: TransferRun
    curve: np.ndarray
    """(points,), return."""
    final: float
    auc: float
    normalized_curve: np.ndarray | None
    normalized_final: float | None
    normalized_auc: float | None
    steps_to_baseline: float | None
    """Agent steps until the curve reaches the baseline's final return; infinite where it does not."""


class Reached(NamedTuple):
    """How an arm's runs got to the baseline's mean final return."""

    median_steps: float
    reached: int
    runs: int


@dataclasses.dataclass(frozen=True)
class Cell:
    """One arm on one game: means over its runs, in raw return."""

    seeds: tuple[int, ...]
    final: Interval
    auc: Interval
    curve: Band
    steps_to_baseline: Reached | None


@dataclasses.dataclass(frozen=True)
class Overall:
    """One arm over all games that count, human-normalized."""

    runs: int
    aggregates: dict[str, dict[str, Interval]]
    """By measure and aggregate."""
    profiles: dict[str, Band]
    """By measure, at `Results.thresholds`."""
    curve: Band
    """Interquartile mean at each point."""


@dataclasses.dataclass(frozen=True)
class Against:
    """One arm against the baseline, on the games that count, by measure."""

    improvement: dict[str, Interval]
    """Probability that a run of the arm beats one of the baseline."""
    pairs: int
    """Seeds of a game that both have."""
    iqm_difference: dict[str, Interval]
    """Human-normalized, over those pairs; empty where there are none."""


@dataclasses.dataclass(frozen=True)
class Results:
    """All of it. Arms and games are in the order in which they are shown."""

    arms: tuple[str, ...]
    baseline: str
    budget: int
    grid: np.ndarray
    """(points,), agent steps."""
    rows: tuple[Row, ...]
    targets: dict[str, float]
    """By game, the baseline's mean final return."""
    cells: dict[str, dict[str, Cell]]
    """By game and arm, where it has runs."""
    counted: tuple[str, ...]
    """Games that count in what is over all games."""
    excluded: dict[str, str]
    """The others, and why."""
    thresholds: dict[str, np.ndarray]
    """By measure."""
    overall: dict[str, Overall]
    against: dict[str, Against]
    warnings: tuple[str, ...]


def compute(runs: list[TransferRun], repetitions: int = statistics.REPETITIONS) -> Results:
    """Measures and compares runs, at least one, in the order of their arms."""
    arms = tuple(dict.fromkeys(run.arm for run in runs))
    baseline = _BASELINE if _BASELINE in arms else arms[-1]
    budget = min(run.budget for run in runs)
    grid = statistics.grid(budget)
    measured = [_measure(run, grid) for run in runs]
    targets = _targets(measured, baseline)
    rows = [_with_target(row, grid, targets) for row in measured]
    by_game: dict[str, dict[str, list[Row]]] = {game: {} for game in sorted({run.game for run in runs})}
    for row in rows:
        if not math.isnan(row.final):
            by_game[row.run.game].setdefault(row.run.arm, []).append(row)
    cells = {
        game: {arm: _cell(of_arms[arm], repetitions) for arm in arms if arm in of_arms}
        for game, of_arms in by_game.items()
    }
    excluded = {game: why for game, of_arms in by_game.items() if (why := _why_excluded(game, of_arms, arms))}
    counted = {game: of_arms for game, of_arms in by_game.items() if game not in excluded}
    thresholds = {measure: _thresholds(counted, measure) for measure in MEASURES} if counted else {}
    return Results(
        arms=arms,
        baseline=baseline,
        budget=budget,
        grid=grid,
        rows=tuple(rows),
        targets=targets,
        cells=cells,
        counted=tuple(counted),
        excluded=excluded,
        thresholds=thresholds,
        overall={arm: _overall(counted, arm, thresholds, repetitions) for arm in arms} if counted else {},
        against={arm: _against(counted, arm, baseline, repetitions) for arm in arms if arm != baseline}
        if counted
        else {},
        warnings=tuple(_warnings(rows, budget, bool(counted))),
    )


def _measure(run: TransferRun, grid: np.ndarray) -> Row:
    curve = statistics.moving_average(run.ended, run.returns, grid)
    final, auc = float(curve[-1]), statistics.area(curve)
    return Row(
        run=run,
        curve=curve,
        final=final,
        auc=auc,
        normalized_curve=_normalized(run.game, curve),
        normalized_final=human_normalized(run.game, final),
        normalized_auc=human_normalized(run.game, auc),
        steps_to_baseline=None,
    )


def _normalized(game: str, curve: np.ndarray) -> np.ndarray | None:
    values = [human_normalized(game, float(value)) for value in curve]
    return None if None in values else np.array(values, float)


def _targets(rows: list[Row], baseline: str) -> dict[str, float]:
    finals: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.run.arm == baseline and not math.isnan(row.final):
            finals[row.run.game].append(row.final)
    return {game: float(np.mean(finals[game])) for game in sorted(finals)}


def _with_target(row: Row, grid: np.ndarray, targets: dict[str, float]) -> Row:
    target = targets.get(row.run.game)
    steps = None if target is None else statistics.steps_to(row.curve, grid, target)
    return dataclasses.replace(row, steps_to_baseline=steps)


def _cell(rows: list[Row], repetitions: int) -> Cell:
    steps = [row.steps_to_baseline for row in rows if row.steps_to_baseline is not None]
    return Cell(
        seeds=tuple(row.run.seed for row in rows),
        final=statistics.interval(statistics.mean, [np.array([row.final for row in rows])], _rng(), repetitions),
        auc=statistics.interval(statistics.mean, [np.array([row.auc for row in rows])], _rng(), repetitions),
        curve=statistics.band(statistics.mean, [np.stack([row.curve for row in rows])], _rng(), repetitions),
        steps_to_baseline=Reached(float(np.median(steps)), sum(map(math.isfinite, steps)), len(steps))
        if steps
        else None,
    )


def _why_excluded(game: str, of_arms: dict[str, list[Row]], arms: tuple[str, ...]) -> str:
    """Why a game cannot count, "" where it can. All arms are compared on the same games."""
    if human_normalized(game, 0.0) is None:
        return "no published human score"
    lacking = [arm for arm in arms if arm not in of_arms]
    return f"no run of {', '.join(lacking)} in which an episode ended" if lacking else ""


_Counted = dict[str, dict[str, list[Row]]]


def _scores(counted: _Counted, arm: str, measure: str) -> list[np.ndarray]:
    """Human-normalized, one array (runs,) or, of `curve`, (runs, points) per game."""
    return [
        np.array([getattr(row, f"normalized_{measure}") for row in of_arms[arm]], float) for of_arms in counted.values()
    ]


def _thresholds(counted: _Counted, measure: str) -> np.ndarray:
    """(101,), from the lowest score, or 0, to the highest: where profiles fall from 1 to 0."""
    arms = next(iter(counted.values()))
    everything = np.concatenate([score for arm in arms for score in _scores(counted, arm, measure)])
    return np.linspace(min(0.0, everything.min()), max(0.01, everything.max()), 101)


def _overall(counted: _Counted, arm: str, thresholds: dict[str, np.ndarray], repetitions: int) -> Overall:
    scores = {measure: _scores(counted, arm, measure) for measure in MEASURES}
    return Overall(
        runs=sum(len(of_arms[arm]) for of_arms in counted.values()),
        aggregates={
            measure: {
                name: statistics.interval(aggregate, scores[measure], _rng(), repetitions)
                for name, aggregate in AGGREGATES.items()
            }
            for measure in MEASURES
        },
        profiles={
            measure: statistics.performance_profile(scores[measure], thresholds[measure], _rng(), repetitions)
            for measure in MEASURES
        },
        curve=statistics.band(statistics.iqm, _scores(counted, arm, "curve"), _rng(), repetitions),
    )


def _against(counted: _Counted, arm: str, baseline: str, repetitions: int) -> Against:
    pairs: _Counted = {}
    for game, of_arms in counted.items():
        by_seed = [{row.run.seed: row for row in of_arms[side]} for side in (arm, baseline)]
        if shared := sorted(by_seed[0].keys() & by_seed[1].keys()):
            pairs[game] = {
                side: [rows[seed] for seed in shared] for side, rows in zip((arm, baseline), by_seed, strict=True)
            }
    return Against(
        improvement={
            measure: statistics.probability_of_improvement(
                _scores(counted, arm, measure), _scores(counted, baseline, measure), _rng(), repetitions
            )
            for measure in MEASURES
        },
        pairs=sum(len(of_arms[arm]) for of_arms in pairs.values()),
        iqm_difference={
            measure: statistics.paired_difference(
                statistics.iqm, _scores(pairs, arm, measure), _scores(pairs, baseline, measure), _rng(), repetitions
            )
            for measure in MEASURES
        }
        if pairs
        else {},
    )


def _rng() -> np.random.Generator:
    return np.random.default_rng(SEED)


def _warnings(rows: list[Row], budget: int, anything_counts: bool) -> list[str]:
    runs = [row.run for row in rows]
    found = []
    if others := sorted({run.budget for run in runs} - {budget}):
        more = ", ".join(f"{other:,}" for other in others)
        found.append(
            f"budgets differ: all runs are compared over the first {budget:,} agent steps, also those of {more}"
        )
    if silent := [f"{row.run.arm}/{row.run.game}/{row.run.seed}" for row in rows if math.isnan(row.final)]:
        found.append(f"left out, because no episode ended in them: {', '.join(silent)}")
    seeds = sorted({run.seed for run in runs})
    present = {(run.arm, run.game, run.seed) for run in runs}
    missing: defaultdict[str, list[int]] = defaultdict(list)
    for arm in dict.fromkeys(run.arm for run in runs):
        for game in sorted({run.game for run in runs}):
            for seed in seeds:
                if (arm, game, seed) not in present:
                    missing[f"{arm}/{game}"].append(seed)
    if missing:
        places = "; ".join(f"{place} seed {', '.join(map(str, lacking))}" for place, lacking in missing.items())
        found.append(f"incomplete: missing runs, {sum(map(len, missing.values()))}: {places}")
    if len(seeds) == 1:
        found.append("there is one seed only: intervals have no width, and say nothing about chance")
    if not anything_counts:
        found.append("no game has a published human score and runs of every arm: nothing is said over all games")
    return found
