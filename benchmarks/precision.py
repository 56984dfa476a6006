"""Compare learning in bfloat16 and float32: plain A2C with the same seeds and settings.

    python -m benchmarks.precision --game breakout --steps 300000 --seeds 2 --out docs/precision.png

Each agent is a process with one thread, and one agent runs per core at a time. The table lists each agent's mean return
over the last 100 episodes and its agent steps/s while others ran beside it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.harness import Report, parser, progress
from leap_dist.config.loading import resolve
from leap_dist.envs import atari_vector
from leap_dist.nn.actor_critic import initialization
from leap_dist.nn.device import prepare
from leap_dist.tasks.atari.a2c import A2C

PRECISIONS = ("bfloat16", "float32")
EPISODES = 100
Curve = list[tuple[int, float]]


def main() -> None:
    """Train all agents, print the report and draw the picture."""
    command = parser(__doc__, repeats=1)
    command.add_argument("--game", default="breakout")
    command.add_argument("--steps", type=int, default=300_000, help="agent steps per agent")
    command.add_argument("--seeds", type=int, default=2)
    command.add_argument("--out", type=Path, help="path of the picture to draw")
    given = command.parse_args()
    arms = [(precision, given.game, seed, given.steps) for seed in range(given.seeds) for precision in PRECISIONS]
    with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0)), maxtasksperchild=1) as pool:
        found = dict(zip(arms, pool.starmap(train, arms, chunksize=1), strict=True))
    report = Report(
        "Plain A2C in both precisions, one thread each",
        {"preset": "fast", "game": given.game, "agent steps": given.steps, "seeds": given.seeds},
    )
    for precision in PRECISIONS:
        curves = [found[arm] for arm in arms if arm[0] == precision]
        report.add(f"{precision}: return, last {EPISODES} episodes", "raw", [curve[-1][1] for curve, _ in curves])
        report.add(f"{precision}: speed", "agent steps/s", [given.steps / seconds for _, seconds in curves])
    report.show(given.json)
    if given.out:
        draw({arm: curve for arm, (curve, _) in found.items()}, given.out, given.game)


def train(precision: str, game: str, seed: int, steps: int) -> tuple[Curve, float]:
    """Train one agent. Return its learning curve and the seconds it took.

    The curve has pairs of agent steps and mean return over the last 100 episodes.
    """
    prepare("cpu", 1, 0)
    config = resolve("fast", {"worker.precision": precision, "worker.device": "cpu"})
    vector = initialization(atari_vector.channels(config.atari.frames), seed)[1]
    learner = A2C(game, vector, seed=seed, agent=config.agent, settings=config.atari, worker=config.worker)
    curve: Curve = []
    scores: list[float] = []
    started = time.perf_counter()
    every = max(1, steps // learner.steps_per_update // 60)
    for update in range(1, steps // learner.steps_per_update + 1):
        learner.backward()
        learner.step()
        if update % every == 0:
            scores += learner.progress().scores
            if scores:
                curve.append((update * learner.steps_per_update, float(np.mean(scores[-EPISODES:]))))
    learner.close()
    progress(f"{precision}, seed {seed}: {curve[-1][1]:.1f}")
    return curve, time.perf_counter() - started


def draw(curves: dict[tuple[str, str, int, int], Curve], path: Path, game: str) -> None:
    """Draw the return over agent steps, one line for each agent."""
    figure = Figure(figsize=(6.5, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for (precision, _, seed, _), curve in curves.items():
        colour, style = ("#0072B2", "-") if precision == "bfloat16" else ("#D55E00", "--")
        axes.plot(*zip(*curve, strict=True), color=colour, linestyle=style, label=None if seed else precision)
    axes.set_xlabel("agent steps")
    axes.set_ylabel(f"return, last {EPISODES} episodes")
    axes.set_title(f"{game}: plain A2C in both precisions, one line per seed")
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
