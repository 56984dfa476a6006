"""Search for a meta learning rate with Ray Tune: ASHA stops the trials whose paths stay long.

    python docs/examples/tune_asha.py --preset quick --trials 8

Needs `pip install . "ray[tune]"`. Every trial is a training run of its own, in runs/tune/TRIAL.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler

import leap_dist


class Report(leap_dist.Callback):
    """Reports every meta-update to Tune."""

    def on_meta_update(self, run: leap_dist.LiveRun, update: leap_dist.MetaUpdate) -> None:
        """Report the mean path length, which meta-learning reduces."""
        tune.report({"path_length": update.path_length, "meta_update": update.version})


def trial(config: dict[str, Any]) -> None:
    """Train with one meta learning rate, on one worker. Tune's Ray is used, because the trial runs in it."""
    leap_dist.train(
        {"preset": config["preset"], "workers": 1, "meta.learning_rate": config["learning_rate"]},
        run_dir=Path(config["out"]) / tune.get_context().get_trial_id(),
        callbacks=[Report()],
        progress=False,
    )


def search(preset: str, trials: int, out: Path, updates: int) -> tune.ResultGrid:
    """Run the search on this machine, and return what Tune knows of its trials."""
    # The first bundle is the trial itself, which mostly waits; the second one is for its worker.
    resources = tune.PlacementGroupFactory([{"CPU": 0.0}, {"CPU": 1.0}])
    tuner = tune.Tuner(
        tune.with_resources(trial, resources),
        param_space={
            "learning_rate": tune.loguniform(1e-4, 1e-1),
            "preset": preset,
            "out": str(out.absolute()),  # trials start in another directory
        },
        tune_config=tune.TuneConfig(
            metric="path_length",
            mode="min",
            num_samples=trials,
            scheduler=ASHAScheduler(time_attr="meta_update", grace_period=1, max_t=updates, reduction_factor=2),
        ),
    )
    return tuner.fit()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--updates", type=int, default=10, help="meta-updates after which a trial is complete")
    parser.add_argument("--out", type=Path, default=Path("runs/tune"))
    given = parser.parse_args()
    found = search(given.preset, given.trials, given.out, given.updates)
    best = found.get_best_result()
    assert best.config is not None
    print(f"best meta.learning_rate: {best.config['learning_rate']:.2g}, path length {best.metrics['path_length']:.4g}")
