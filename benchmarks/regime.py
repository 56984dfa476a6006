"""Show how agents learn each game from scratch, and choose games and task length for meta-training by a fixed rule.

    python launch.py evaluate --preset fast --init scratch --games seed24,breakout,qbert,space_invaders \
        --seeds 2 --task-steps 500000 --out reports/scratch
    python -m benchmarks.regime reports/scratch --out docs/scratch.png

The rule was written down before any of the curves was seen (docs/learning.md, "The rule").
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from leap_dist.envs.games import HELD_OUT, SETS, reference_scores
from leap_dist.evaluation.runs import RunResult, load_all
from leap_dist.evaluation.statistics import grid, moving_average

LENGTHS = (100_000, 200_000, 300_000, 500_000)
"""Task lengths to choose from, in agent steps."""
START = 50_000
"""Agent steps at the start of training whose episodes count as the first."""
END = 0.75
"""Fraction of the task after which episodes count as the last."""
EPISODES = 10
"""Minimum number of first episodes, and of last ones, for an effect to be computed."""
EFFECT = 0.8
"""Smallest effect size at which a game moves: what Cohen (1988) calls a large effect."""
GAMES = 8
"""Number of training games."""
HELD_OUT_PLACES = (2, 5)
"""Places in the ranking of moving training games with reference scores, from 0, whose games are held out instead."""
SEED_HELD_OUT = HELD_OUT["seed24"]
"""The games that the paper's first version holds out."""
TRAINING = SETS["seed24"]
"""The training games of that version."""
SEEDS = 2
"""Number of runs in each of which a game must move."""
MOVING, HELD_OUT_MOVING = GAMES + len(HELD_OUT_PLACES), 2
"""Numbers of training games and of held-out games that must move within a task."""


@dataclass(frozen=True)
class Choice:
    """A regime for meta-training."""

    task_steps: int
    training: tuple[str, ...]
    held_out: tuple[str, ...]
    """The held-out games of the paper's first version, and two that were taken out of the training games."""


def effect(run: RunResult, task_steps: int) -> float:
    """Return by how many standard deviations the returns of the last episodes exceed those of the first.

    The difference of the means is divided by the root of the mean of both variances (Cohen's d). NaN if there are
    fewer than EPISODES first or last ones; infinite if the means differ and neither part varies.
    """
    within = run.ended <= task_steps
    first = run.returns[run.ended <= START]
    last = run.returns[within & (run.ended > END * task_steps)]
    if min(len(first), len(last)) < EPISODES:
        return math.nan
    gain, deviation = last.mean() - first.mean(), math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / 2)
    if not deviation:
        return math.copysign(math.inf, gain) if gain else 0.0
    return float(gain / deviation)


def effects(runs: Sequence[RunResult], task_steps: int) -> dict[str, float]:
    """Return the smallest effect over the runs of each game; NaN where one is unknown."""
    found: dict[str, list[float]] = {}
    for run in runs:
        found.setdefault(run.game, []).append(effect(run, task_steps))
    return {game: float(np.min(values)) for game, values in sorted(found.items())}


def usable(runs: Sequence[RunResult]) -> list[RunResult]:
    """Return the runs to which the rule applies: whole ones from a random initialization, on the paper's games."""
    games = {*TRAINING, *SEED_HELD_OUT}
    return [run for run in runs if run.arm == "scratch" and run.game in games and run.budget >= LENGTHS[-1]]


def undecided(runs: Sequence[RunResult]) -> list[str]:
    """Return the games for which a further run may change the choice.

    A game that does not move with one seed does not move with two, so it needs no further run.
    """
    by_length = [effects(runs, length) for length in LENGTHS]
    lacking = [game for game in (*TRAINING, *SEED_HELD_OUT) if sum(run.game == game for run in runs) < SEEDS]
    return [game for game in lacking if any(found.get(game, math.inf) >= EFFECT for found in by_length)]


def choose(runs: Sequence[RunResult]) -> Choice:
    """Apply the rule: the shortest task within which enough games move, and the games that move most.

    The task is the shortest of LENGTHS within which MOVING training games and HELD_OUT_MOVING of the paper's held-out
    games move, or else the longest. The training games that move are ranked by their effect. The third and the sixth of
    those with reference scores are held out, and the first GAMES of the others are the training games. Where fewer than
    three or six games with reference scores move, fewer are held out.
    """
    for task_steps in LENGTHS:
        found = effects(runs, task_steps)
        moving = {game for game, value in found.items() if value >= EFFECT}
        ranked = sorted((game for game in TRAINING if game in moving), key=lambda game: -found[game])
        if len(ranked) >= MOVING and len(moving.intersection(SEED_HELD_OUT)) >= HELD_OUT_MOVING:
            break
    scored = [game for game in ranked if game in reference_scores()]
    ours = tuple(scored[place] for place in HELD_OUT_PLACES if place < len(scored))
    training = tuple(game for game in ranked if game not in ours)[:GAMES]
    return Choice(task_steps, training, (*SEED_HELD_OUT, *ours))


def table(runs: Sequence[RunResult]) -> str:
    """Return the table of the page in Markdown: for each game its returns, reference scores and effects."""
    by_length = {length: effects(runs, length) for length in LENGTHS}
    marks = [f"{length // 1000}k" for length in LENGTHS]
    lines = [
        f"| game | random | human | first | {' | '.join(marks)} | effect at {' | '.join(marks)} |",
        "|---" * (4 + 2 * len(LENGTHS)) + "|",
    ]
    for game in sorted({run.game for run in runs}):
        of_game = [run for run in runs if run.game == game]
        first = float(np.mean([_mean(run, 0, START) for run in of_game]))
        last = [float(np.mean([_mean(run, END * length, length) for run in of_game])) for length in LENGTHS]
        scores = reference_scores().get(game, {})
        cells = [_number(value) for value in (scores.get("random"), scores.get("human"), first, *last)]
        found = [by_length[length][game] for length in LENGTHS]
        shown = ["–" if math.isnan(value) else f"{value:.2f}" for value in found]  # EFFECT is hidden by one decimal
        lines.append(f"| {game} | {' | '.join(cells + shown)} |")
    return "\n".join(lines)


def draw(runs: Sequence[RunResult], path: Path) -> None:
    """Draw the learning curve of each run, a panel for each game, with the marks of random play and of a person."""
    games, columns = sorted({run.game for run in runs}), 5
    rows = math.ceil(len(games) / columns)
    figure = Figure(figsize=(3.0 * columns, 2.1 * rows), dpi=100, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(games) :]:
        axes.axis("off")
    for axes, game in zip(panels, games, strict=False):
        top = -math.inf
        for run in (run for run in runs if run.game == game):
            at = grid(run.budget)
            curve = moving_average(run.ended, run.returns, at)
            axes.plot(at / 1000, curve, linewidth=1.2)
            top = max(top, np.nanmax(curve, initial=-math.inf))
        scores = reference_scores().get(game, {})
        for name, style in (("random", ":"), ("human", "--")):
            if name in scores and (name == "random" or scores[name] < 2 * abs(top)):
                axes.axhline(scores[name], color="0.4", linestyle=style, linewidth=0.9)
        axes.set_title(game, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
    figure.supxlabel("agent steps (thousands)", fontsize=9)
    figure.supylabel("mean return of the last 100 episodes", fontsize=9)
    figure.savefig(path)


def _mean(run: RunResult, after: float, until: float) -> float:
    """Return the mean return of the episodes that ended in the given part of training; NaN if none did."""
    found = run.returns[(run.ended > after) & (run.ended <= until)]
    return float(found.mean()) if len(found) else math.nan


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


def main() -> None:
    """Print the table and the choice, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path, help="output directory of the evaluation")
    parser.add_argument("--out", type=Path, help="picture to draw")
    arguments = parser.parse_args()
    runs, warnings = load_all(arguments.evaluation)
    for warning in warnings:
        print(warning, file=sys.stderr)
    runs = usable(runs)
    if not runs:
        parser.error(
            f"there are no runs from a random initialization of {LENGTHS[-1]:,} steps in {arguments.evaluation}"
        )
    print(table(runs))
    if arguments.out:
        try:
            draw(runs, arguments.out)
        except OSError as error:
            parser.error(f"--out: {arguments.out} cannot be written: {error.strerror}")
    if games := undecided(runs):
        parser.error(f"the rule cannot be applied yet: {SEEDS} runs are needed of {', '.join(games)}")
    choice = choose(runs)
    print(f"\ntask length: {choice.task_steps:,} agent steps")
    print(f"training games: {', '.join(choice.training)}")
    print(f"held-out games: {', '.join(choice.held_out)}")


if __name__ == "__main__":
    main()
