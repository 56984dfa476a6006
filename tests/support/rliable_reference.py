"""Make rliable_reference.json: what rliable makes of seeded scores, which test_statistics.py compares with.

    python3 -m venv .venv-crosscheck
    .venv-crosscheck/bin/pip install -r requirements-crosscheck.txt
    .venv-crosscheck/bin/python tests/support/rliable_reference.py

Not part of the suite, because rliable wants another pandas, and with SciPy and statsmodels is the larger part of what
would have to be installed for it.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rliable import library, metrics

SEED = 2021
REPETITIONS = 20_000
SHAPES = {"leap": (5, 5), "scratch": (5, 5), "many": (10, 24), "odd": (3, 7), "other odd": (7, 7)}
"""Runs and games."""
PAIRS = (("leap", "scratch"), ("odd", "other odd"))
AGGREGATES = {
    "iqm": metrics.aggregate_iqm,
    "mean": metrics.aggregate_mean,
    "median": metrics.aggregate_median,
    "optimality_gap": metrics.aggregate_optimality_gap,
}


def main() -> None:
    """Makes the scores, and runs rliable on them."""
    rng = np.random.default_rng(SEED)
    # Skewed, as human-normalized returns are, rounded so that there are ties, and some games much easier.
    scores = {
        name: np.round(rng.gamma(0.8, rng.uniform(0.3, 1.5, shape[1]), shape) - 0.05, 1)
        for name, shape in SHAPES.items()
    }
    thresholds = np.linspace(-0.05, 2.05, 22)
    np.random.seed(SEED)  # the state that rliable draws from
    found: dict[str, Any] = {name: {"scores": array.tolist()} for name, array in scores.items()}
    for name, array in scores.items():
        found[name]["aggregates"] = {
            label: _interval({"": array}, lambda x, f=function: np.array([f(x)]))
            for label, function in AGGREGATES.items()
        }
        profile, edges = library.create_performance_profile({"": array}, thresholds, reps=REPETITIONS)
        found[name]["profile"] = [profile[""].tolist(), *edges[""].tolist()]
    improvements = [
        {"x": x, "y": y, "interval": _interval({"": [scores[x], scores[y]]}, _improvement)} for x, y in PAIRS
    ]
    result = {
        "made by": "tests/support/rliable_reference.py",
        "versions": {name: metadata.version(name) for name in ("rliable", "arch", "numpy", "scipy", "pandas")},
        "repetitions": REPETITIONS,
        "thresholds": thresholds.tolist(),
        "arms": found,
        "probability of improvement": improvements,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result) + "\n")


def _interval(scores: Any, function: Any) -> list[float]:
    """Point, low, high."""
    points, edges = library.get_interval_estimates(scores, function, reps=REPETITIONS)
    return [float(points[""][0]), *(float(edge[0]) for edge in edges[""])]


def _improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.array([metrics.probability_of_improvement(x, y)])


if __name__ == "__main__":
    main()
