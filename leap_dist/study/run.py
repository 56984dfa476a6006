"""Makes the runs of a study that are missing, one after the other, each on all workers.

Several processes may work on one folder: whoever finds a run in use goes on with the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from leap_dist import arms, driver, evaluation, launching, run_directory
from leap_dist import config as configuration
from leap_dist.config import ConfigError
from leap_dist.run_lock import RunDirectoryBusy
from leap_dist.study.plan import Cell, Plan, merge
from leap_dist.study.spec import Study, evaluation_of, training_of
from leap_dist.working_copy import open_run

PASSES = 2
"""What others were at may be done the second time."""

Say = Callable[[str], None]


def run(plan: Plan, out: Path, say: Say) -> str:
    """Trains and tests what is missing in `out`. Returns "done", "interrupted" or "failed".

    "failed" where a run could not be ended, or others are still at some; the rest is made all the same. Raises
    ConfigError where something else is in `out`, or what the tasks learn from is not here.
    """
    cells = list(plan.cells())
    driver.check_prerequisites(plan.training(cells[0]))
    if (out / "study.json").exists():
        study = merge(Study.read(out), plan.study)
    elif run_directory.exists(out):
        raise ConfigError(f"out: {out} holds a run or an evaluation; choose another")
    else:
        study = plan.study
    try:
        study.write(out)
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be written ({error.strerror}); choose another") from None
    left = [(group, seed) for seed in plan.study.seeds for group in plan.study.groups]
    with driver.session(plan.training(cells[0])):
        for _ in range(PASSES):
            for group, seed in list(left):
                outcome = _compare([cell for cell in cells if (cell.group, cell.seed) == (group, seed)], plan, out, say)
                if outcome == "interrupted":
                    return outcome
                if outcome == "done":
                    left.remove((group, seed))
    return "failed" if left else "done"


def _compare(cells: list[Cell], plan: Plan, out: Path, say: Say) -> str:
    """All arms of one group and seed, and their evaluation."""
    whole = True
    for cell in cells:
        outcome = _train(cell, plan, out, say)
        if outcome == "interrupted":
            return outcome
        whole &= outcome == "done"
    if not whole:
        say(f"group {cells[0].group}, seed {cells[0].seed}: not every arm is trained, so none is tested yet")
        return "failed"
    return _test(cells, plan, out, say)


def _train(cell: Cell, plan: Plan, out: Path, say: Say) -> str:
    """One training run, begun or gone on with; of arm none there is none."""
    folder, config = training_of(out, cell.group, cell.seed, cell.arm), plan.training(cell)
    if cell.arm == "none" or _is_done(folder):
        return "done"
    say(f"{cell}: {config.meta_updates} meta-updates of {config.meta.batch_size} tasks")
    begun = run_directory.exists(folder)
    if begun and (changed := configuration.incompatibilities(run_directory.load_config(folder, {}), config)):
        raise ConfigError(f"out: {folder} was begun with other settings: {'; '.join(changed)}")
    try:
        with open_run(folder, resume=begun) as run:
            run_directory.prepare(folder, config, patience=run_directory.ORPHAN_SECONDS if begun else 0.0)
            outcome, _ = launching.meta_train(config, run)
    except RunDirectoryBusy:
        say(f"{cell}: another process is at it")
        return "failed"
    return outcome


def _is_done(folder: Path) -> bool:
    try:
        return bool(run_directory.read_summary(folder)["state"] == "done")
    except ConfigError:
        return False


def _test(cells: list[Cell], plan: Plan, out: Path, say: Say) -> str:
    """Fresh learners from every arm's initialization, on what was held out."""
    group, seed, _ = cells[0]
    folder, config = evaluation_of(out, group, seed), plan.test(group, seed)
    labels, files = arms.read([_spec(cell, out) for cell in cells])
    chosen = arms.arms(labels, files, config)
    runs = evaluation.plan(chosen, config, seeds=1)
    left, warnings = evaluation.missing(runs, config, folder)
    for warning in warnings:
        say(warning)
    if not left:
        return "done"
    say(f"group {group}, seed {seed}: test of {', '.join(labels)} on {', '.join(config.games)}")
    try:
        run_directory.prepare(folder, config, patience=run_directory.ORPHAN_SECONDS)
        arms.write(folder, chosen)
        return launching.evaluate(config, runs, folder)
    except RunDirectoryBusy:
        say(f"group {group}, seed {seed}: another process is at the test")
        return "failed"


def _spec(cell: Cell, out: Path) -> str:
    source = arms.SCRATCH if cell.arm == "none" else training_of(out, cell.group, cell.seed, cell.arm)
    return f"{cell.arm}={source}"
