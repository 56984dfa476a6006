"""Compare short meta-trainings that differ in one choice, and choose one of them by the rule of docs/results-atari.md.

    python -m benchmarks.candidates runs/candidate1 runs/candidate2 --scratch reference/atari/scratch
    python launch.py evaluate --preset fast --init runs/candidate1 --init runs/candidate2 --games moving4 --seeds 1 \
        --task-steps 500000 --worker.precision float32 --out reports/candidates
    python -m benchmarks.candidates runs/candidate1 runs/candidate2 --scratch reference/atari/scratch \
        --agents reports/candidates

For each run, a table has a row for each meta-update: what φ computes at the start of its tasks (the share of units that
are zero on their first 80 frames, and the effective rank), the mean length of their paths, and the mean return of each
game over its task. The last table has what decides. Dead units and effective rank are means over frames of random play
in the training games, for φ and for φ_0. A run is dropped if more than half of the units are dead, or if the rank is
less than half of that of φ_0. Of the others, that one is chosen whose agents have the largest mean area under the curve
of returns, where each game's area is divided by the mean area of agents from random encoders.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from benchmarks.controls import start_vector
from benchmarks.encoder_features import features_of, frames
from leap_dist.config.loading import ConfigError
from leap_dist.evaluation import scoring
from leap_dist.evaluation.runs import RunResult, load_all
from leap_dist.nn.flat_vector import flatten
from leap_dist.storage.atomic import CorruptFile
from leap_dist.storage.ledger import Ledger
from leap_dist.weights.initialization import Initialization, read_initialization

MOST_DEAD, LEAST_RANK = 0.5, 0.5
"""Largest share of dead units, and smallest effective rank as a part of φ_0's, with which a run is kept."""
LINEAR_SEEDS = range(4)
"""Seeds of the linear layers with which convolutions are measured that were meta-learned alone."""


class Health(NamedTuple):
    """What an encoder computes, as means over games."""

    dead: float
    """Share of units that are zero on all frames of a game."""
    rank: float
    """Effective rank of the features."""

    def is_kept(self, start: Health) -> bool:
        """Return whether the rule keeps an encoder that began as `start`."""
        return self.dead <= MOST_DEAD and self.rank >= LEAST_RANK * start.rank


def health(found: Initialization, seen: Mapping[str, Tensor]) -> Health:
    """Return means over the frames `seen` of each game, (n, 4, 84, 84), and over linear layers if φ has none."""
    # Only convolutions need linear layers; a whole encoder has its own.
    seeds = LINEAR_SEEDS if found.scope == "convolutions" else LINEAR_SEEDS[:1]
    encoders = [found.encoder(linear_seed=seed) for seed in seeds]
    vectors = [flatten(encoder.parameters()).numpy() for encoder in encoders]
    measured = [features_of(vector, images) for vector in vectors for images in seen.values()]
    return Health(float(np.mean([one.dead for one in measured])), float(np.mean([one.rank for one in measured])))


def start_of(run_dir: Path, learned: Initialization) -> Initialization:
    """Return φ_0 of a run. Raises ConfigError if its settings cannot be read."""
    return dataclasses.replace(learned, tensors=learned.manifest.split(start_vector(run_dir)))


def history(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the meta-updates in the lines of a ledger, in Markdown."""
    games = sorted({line["game"] for line in lines})
    heads = ["meta-update", f"dead units: {', '.join(games)}", "effective rank", "path length", *games]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for version in sorted({line["version_after"] for line in lines}):
        of_update = [line for line in lines if line["version_after"] == version and line["curve"]]
        by_game = [[line for line in of_update if line["game"] == game] for game in games]
        dead = [_mean(line["curve"][0]["means"]["start/dead_units"] for line in of_game) for of_game in by_game]
        rank = _mean(line["curve"][0]["means"]["start/effective_rank"] for line in of_update)
        length = _mean(line["path"]["length"] for line in of_update)
        returns = [_mean(p["score"] for line in of_game for p in line["curve"] if p["episodes"]) for of_game in by_game]
        cells = [str(version), ", ".join(map(_number, dead)), f"{rank:.1f}", f"{length:,.0f}"]
        rows.append(f"| {' | '.join([*cells, *(_number(value, 0) for value in returns)])} |")
    return "\n".join(rows)


def relative_areas(agents: Sequence[RunResult], scratch: Sequence[RunResult]) -> dict[str, dict[str, float]]:
    """Return by arm and game the mean area under the curve of returns, divided by that of agents of the arm scratch."""
    runs = [run for run in agents if run.arm != "scratch"]
    games = sorted({run.game for run in runs})
    baseline = [run for run in scratch if run.arm == "scratch" and run.game in games]
    rows, _ = scoring.of_tasks("atari").score_all([*runs, *baseline])

    def area(arm: str, game: str) -> float:
        return _mean(row.values["auc"] for row in rows if (row.run.arm, row.run.game) == (arm, game))

    arms = dict.fromkeys(run.arm for run in runs)
    return {arm: {game: area(arm, game) / area("scratch", game) for game in games} for arm in arms}


def choose(kept: Mapping[str, bool], areas: Mapping[str, Mapping[str, float]]) -> str | None:
    """Return the run that the rule chooses; None if none was kept, or if agents of a kept one are missing."""
    means = {name: _mean(areas.get(name, {}).values()) for name, is_kept in kept.items() if is_kept}
    if not means or any(math.isnan(value) for value in means.values()):
        return None
    return max(means, key=lambda name: means[name])


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return float(np.mean(found)) if found else math.nan


def _number(value: float, digits: int = 2) -> str:
    return "–" if math.isnan(value) else f"{value:,.{digits}f}"


def verdict(
    health_of: Mapping[str, tuple[Health, Health]], areas: Mapping[str, Mapping[str, float]], games: Sequence[str]
) -> str:
    """Return the table that decides, in Markdown: `health_of` has φ_0's and φ's health for each run."""
    rows = [
        f"| run | dead units of φ_0, φ | effective rank of φ_0, φ | kept | {' | '.join(games)} | mean area |",
        "|---" * (5 + len(games)) + "|",
    ]
    for name, (start, end) in health_of.items():
        of_run = [areas.get(name, {}).get(game, math.nan) for game in games]
        cells = [name, f"{start.dead:.2f}, {end.dead:.2f}", f"{start.rank:.1f}, {end.rank:.1f}"]
        cells += ["yes" if end.is_kept(start) else "no", *map(_number, of_run), _number(float(np.mean(of_run)))]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Print the tables, and the choice if there are agents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run directories")
    parser.add_argument("--scratch", type=Path, required=True, help="evaluation with agents from random encoders")
    parser.add_argument("--agents", type=Path, help="evaluation of the runs; arms are called like the directories")
    given = parser.parse_args()
    found: list[RunResult] = []
    try:
        learned = {run_dir.name: read_initialization(run_dir / "init.safetensors") for run_dir in given.runs}
        starts = {run_dir.name: start_of(run_dir, learned[run_dir.name]) for run_dir in given.runs}
        for run_dir in given.runs:
            print(f"{run_dir.name}\n\n{history(list(Ledger(run_dir / 'ledger.jsonl').lines()))}\n")
        scratch, warnings = load_all(given.scratch)
        if given.agents:
            found, more = load_all(given.agents)
            warnings += more
    except (ConfigError, CorruptFile, OSError, ValueError) as error:
        parser.error(str(error))
    for warning in warnings:
        print(warning, file=sys.stderr)
    games = sorted({game for one in learned.values() for game in one.metadata["games"]})
    seen = {game: frames([game], 64) for game in games}
    health_of = {name: (health(starts[name], seen), health(one, seen)) for name, one in learned.items()}
    areas = relative_areas(found, scratch)
    print(verdict(health_of, areas, games))
    if found:
        chosen = choose({name: end.is_kept(start) for name, (start, end) in health_of.items()}, areas)
        print(f"\nchosen: {chosen or 'none yet; agents of a run that was kept are missing, or none was kept'}")


if __name__ == "__main__":
    main()
