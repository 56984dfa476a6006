"""Search for a meta learning rate with Optuna: trials whose paths stay long are pruned.

    python docs/examples/optuna_pruning.py --preset quick --trials 8

Needs `pip install . optuna`. Trials run one after the other, each on all workers. A pruned trial stops cleanly: what it
has accepted is saved in its run directory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import optuna

import leap_dist


class Prune(leap_dist.Callback):
    """Reports every meta-update to an Optuna trial, and ends the run if the trial is not worth going on."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_meta_update(self, run: leap_dist.LiveRun, update: leap_dist.MetaUpdate) -> None:
        """Report the mean path length. TrialPruned passes through `train`, after a clean stop."""
        if update.path_length is not None:
            self.trial.report(update.path_length, update.version)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def search(preset: str, trials: int, out: Path) -> optuna.Study:
    """Run the search on this machine, and return the study."""

    def objective(trial: optuna.Trial) -> float:
        rate = trial.suggest_float("meta.learning_rate", 1e-4, 1e-1, log=True)
        run = leap_dist.train(
            {"preset": preset, "meta.learning_rate": rate},
            run_dir=out / f"trial-{trial.number}",
            callbacks=[Prune(trial)],
            progress=False,
        )
        lengths = [update.path_length for update in run.meta_updates() if update.path_length is not None]
        return lengths[-1]

    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=2))
    study.optimize(objective, n_trials=trials)
    return study


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/optuna"))
    given = parser.parse_args()
    found = search(given.preset, given.trials, given.out)
    print(f"best: {found.best_params}, path length {found.best_value:.4g}")
