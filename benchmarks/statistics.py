"""Measure the CPU time of an evaluation's statistics and report.

    python -m benchmarks.statistics
    python -m benchmarks.statistics --games 24 --arms 6

The data are synthetic: by default three arms, five games and five seeds, with runs of a million agent steps and
some thousands of episodes each, and 10,000 bootstrap samples. `statistics` computes everything that a report over all
games needs from leap_dist.evaluation.statistics: aggregates of two measures, profiles at 101 thresholds, IQM curves of
100 points, and the comparison of each arm with the baseline. `report` produces the whole report, from reading the runs'
files to writing the pictures.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import Report, interleaved, parser
from leap_dist.envs.games import SETS, human_normalized, reference_scores
from leap_dist.evaluation import statistics
from leap_dist.evaluation.report.build import build
from leap_dist.evaluation.runs import RunResult, save
from leap_dist.evaluation.scoring import RETURNS

HELD_OUT = ("breakout", "pong", "qbert", "seaquest", "space_invaders")
ARMS = ("leap", "finetune", "scratch", "reptile", "fomaml", "multi")
BUDGET = 1_000_000


def made_up(arm: str, game: str, seed: int, budget: int = BUDGET, episode_steps: int = 300) -> RunResult:
    """Return a reproducible synthetic run that learns; arms learn faster the earlier they come in ARMS."""
    place = ARMS.index(arm) if arm in ARMS else len(ARMS)
    rng = np.random.default_rng([place, seed, *game.encode()])
    luck = np.random.default_rng([seed, *game.encode()]).normal(0, 0.1)  # common to all runs of a seed
    lengths = rng.integers(episode_steps // 2, 2 * episode_steps, size=budget // (episode_steps // 2))
    ended = np.cumsum(lengths)
    ended = ended[ended <= budget]
    scores = reference_scores().get(game, {"random": 0.0, "human": 100.0})
    half = budget * (0.15 + 0.12 * place)  # steps after which half of the improvement has been reached
    level = (0.7 + luck + rng.normal(0, 0.1)) * ended**2 / (half**2 + ended**2)
    spread = scores["human"] - scores["random"]
    returns = scores["random"] + spread * (level + rng.normal(0, 0.15, len(ended)))
    seconds = budget / float(rng.normal(1000, 30))
    curve = tuple({"steps": float(step), "loss": 1.0, "entropy": 1.0} for step in range(10_000, budget + 1, 10_000))
    return RunResult(arm, game, seed, budget, seconds, ended, np.round(returns, 1), curve)


def all_statistics(curves: dict[str, list[np.ndarray]], repetitions: int) -> None:
    """Compute all statistics over all games.

    Args:
        curves: Arrays of shape (runs, points) per game, by arm. The last arm is the baseline.
        repetitions: Number of bootstrap samples.
    """
    *others, baseline = curves
    measures = {
        arm: ([c[:, -1] for c in games], [np.array([statistics.area(run) for run in c]) for c in games])
        for arm, games in curves.items()
    }
    thresholds = np.linspace(0, 1, 101)
    rng = np.random.default_rng(0)
    for arm, of_arm in measures.items():
        statistics.band(statistics.iqm, curves[arm], rng, repetitions)
        for scores in of_arm:
            statistics.performance_profile(scores, thresholds, rng, repetitions)
            for aggregate in RETURNS.aggregates.values():
                statistics.interval(aggregate, scores, rng, repetitions)
    for arm in others:
        for mine, theirs in zip(measures[arm], measures[baseline], strict=True):
            statistics.probability_of_improvement(mine, theirs, rng, repetitions)
            statistics.paired_difference(statistics.iqm, mine, theirs, rng, repetitions)


def main() -> None:
    """Run the benchmark and print the report."""
    options = parser(__doc__, repeats=3)
    options.add_argument("--games", type=int, default=len(HELD_OUT), help="number of games")
    options.add_argument("--arms", type=int, default=3, help="number of arms")
    options.add_argument("--seeds", type=int, default=5, help="number of seeds")
    options.add_argument("--repetitions", type=int, default=statistics.REPETITIONS, help="number of bootstrap samples")
    arguments = options.parse_args()
    games = list(dict.fromkeys((*HELD_OUT, *SETS["seed24"])))[: arguments.games]
    arms, seeds = ARMS[: arguments.arms], range(arguments.seeds)
    runs = [made_up(arm, game, seed) for arm in arms for game in games for seed in seeds]
    grid = statistics.grid(BUDGET)
    curves: dict[str, list[np.ndarray]] = {arm: [] for arm in arms}
    for arm in arms:
        for game in games:
            if human_normalized(game, 0.0) is not None:
                found = [run for run in runs if (run.arm, run.game) == (arm, game)]
                curves[arm].append(np.stack([statistics.moving_average(r.ended, r.returns, grid) for r in found]))

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for run in runs:
            save(out, run, {})

        def processor_seconds(function: object, *given: object) -> float:
            started = time.process_time()
            function(*given)  # type: ignore[operator]
            return time.process_time() - started

        samples = interleaved(
            {
                "statistics": lambda: processor_seconds(all_statistics, curves, arguments.repetitions),
                "report": lambda: processor_seconds(build, out, RETURNS, arguments.repetitions),
            },
            arguments.repeats,
        )
    settings = {"arms": len(arms), "games": len(games), "seeds": len(seeds), "samples": arguments.repetitions}
    report = Report("Statistics and report of an evaluation", settings)
    for name, values in samples.items():
        report.add(f"{name}: processor time", "s", values)
    report.ratio("statistics, of 5 s", samples["statistics"], [5.0] * arguments.repeats, target=1.0, at_most=True)
    report.ratio("report, of 30 s", samples["report"], [30.0] * arguments.repeats, target=1.0, at_most=True)
    report.notes.append("The figures are CPU time of all threads, so other processes hardly affect them.")
    report.show(arguments.json)


if __name__ == "__main__":
    main()
