"""Draw the learning curves of a run's tasks: mean return over agent steps, one line per task.

    python launch.py train --preset fast --games breakout --meta-updates 1 --meta.batch-size 2 \
        --task-steps 600000 --worker.push-interval 20000 --run-dir runs/learning
    python -m benchmarks.learning_curve --run-dir runs/learning --out docs/learning.png

Tasks of the first meta-update start from random initializations, so their curves show plain A2C.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from leap_dist.envs.games import reference_scores
from leap_dist.storage.ledger import Ledger


def main() -> None:
    """Draw the picture, and print the last returns of each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    lines = list(Ledger(arguments.run_dir / "ledger.jsonl").lines())
    games = sorted({line["game"] for line in lines})
    figure = Figure(figsize=(6.0 * max(1, len(games)), 3.6), dpi=120, layout="constrained")
    for axes, game in zip(figure.subplots(1, max(1, len(games)), squeeze=False)[0], games, strict=True):
        random_play = reference_scores().get(game, {}).get("random")
        for line in (line for line in lines if line["game"] == game):
            points = [(p["steps"], p["score"]) for p in line["curve"] if p["score"] is not None]
            axes.plot(*zip(*points, strict=True), linewidth=1.4, label=f"task {line['task']}")
            shown = "unknown" if random_play is None else f"{random_play:g}"
            print(f"{game} task {line['task']}: {points[-1][1]:.1f} at {points[-1][0]:,} steps; random play {shown}")
        if random_play is not None:
            axes.axhline(random_play, color="0.5", linestyle="--", linewidth=1, label="random play")
        axes.set_title(game)
        axes.set_xlabel("agent steps in the task")
        axes.set_ylabel("mean return")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.25)
    figure.savefig(arguments.out)


if __name__ == "__main__":
    main()
