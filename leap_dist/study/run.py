"""Performs the missing runs of a study, one after the other, each on all workers.

Several processes may work on one folder, if file locks work between their machines: a process that finds a run in use
continues with the next one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from leap_dist.config import loading as configuration
from leap_dist.config.loading import ConfigError
from leap_dist.driver import driver, reporting
from leap_dist.driver.errors import HeadLost
from leap_dist.evaluation import initializations, runs
from leap_dist.storage import run_directory
from leap_dist.storage.atomic import CorruptFile
from leap_dist.storage.locks import RunDirectoryBusy, RunLock
from leap_dist.storage.remote_run import open_run
from leap_dist.study.plan import Cell, Plan, merge, unused_sections
from leap_dist.study.spec import Study, evaluation_of, training_of

PASSES = 2
"""Number of passes: a run that another process holds in the first pass may be finished in the second."""
_CLAIMS = ".claims"

Say = Callable[[str], None]


def run(plan: Plan, out: Path, say: Say) -> str:
    """Train and test what is missing in `out`. Returns "done", "interrupted" or "failed".

    "failed" means that a run could not be finished, or that another process is still working on it; all other runs are
    performed nevertheless, unless the cluster is lost. Raises ConfigError if `out` holds something else, or if the data
    of the tasks is missing.
    """
    everything = plan.everything()
    driver.check_prerequisites(everything)
    _write_study(plan.study, out)
    cells = list(plan.cells())
    left = [(group, seed) for seed in plan.study.seeds for group in plan.study.groups]
    try:
        with driver.session(everything):
            for _ in range(PASSES):
                for group, seed in list(left):
                    compared = [cell for cell in cells if (cell.group, cell.seed) == (group, seed)]
                    outcome = _compare(compared, plan, out, say)
                    if outcome == "interrupted":
                        return outcome
                    if outcome == "done":
                        left.remove((group, seed))
    except HeadLost as error:
        say(str(error))
    return "failed" if left else "done"


def _write_study(study: Study, out: Path) -> None:
    """Write study.json, merged with the one that is there already. Raises ConfigError."""
    if run_directory.exists(out):
        raise ConfigError(f"out: {out} holds a run or an evaluation; choose another")
    content = ("study.json", _CLAIMS, "table.md", "figures", "results.csv", "results.json")
    run_directory.refuse_links(out, (*content, *study.groups))
    try:
        with _claim(out, "study"):
            (merge(Study.read(out), study) if (out / "study.json").exists() else study).write(out)
    except RunDirectoryBusy:
        raise ConfigError(f"out: other processes keep writing to {out}; try again") from None
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be written ({error.strerror}); choose another") from None


@contextlib.contextmanager
def _claim(folder: Path, name: str) -> Iterator[None]:
    """Claim a part of the study. Raises RunDirectoryBusy if another process has claimed it, and OSError."""
    place = folder / _CLAIMS / name
    place.mkdir(parents=True, exist_ok=True)
    lock = RunLock(place)
    try:
        yield
    finally:
        lock.release()


def _compare(cells: list[Cell], plan: Plan, out: Path, say: Say) -> str:
    """Train all arms of one group and seed, then evaluate them."""
    group, seed, _ = cells[0]
    whole = True
    for cell in cells:
        outcome = _train(cell, plan, out, say)
        if outcome == "interrupted":
            return outcome
        whole &= outcome == "done"
    if not whole:
        say(f"group {group}, seed {seed}: not every arm is trained yet, so none is tested")
        return "failed"
    folder = evaluation_of(out, group, seed)
    return _attempt(folder, f"test, group {group}, seed {seed}", say, lambda: _test(folder, cells, plan, out, say))


def _attempt(folder: Path, name: str, say: Say, make: Callable[[], str]) -> str:
    """Perform one run, unless another process holds it. Errors in it are printed, so that other runs can follow."""
    try:
        with _claim(folder.parent, folder.name):
            return make()
    except RunDirectoryBusy:
        say(f"{name}: another process is working on it")
    except (ConfigError, CorruptFile, OSError) as error:
        say(f"{name}: failed: {error}")
    return "failed"


def _train(cell: Cell, plan: Plan, out: Path, say: Say) -> str:
    """Start or resume a training run. Arm `none` needs no training."""
    if cell.arm == "none":
        return "done"
    folder = training_of(out, cell.group, cell.seed, cell.arm)
    return _attempt(folder, str(cell), say, lambda: _meta_train(folder, cell, plan, out, say))


def _meta_train(folder: Path, cell: Cell, plan: Plan, out: Path, say: Say) -> str:
    config, begun = plan.training(cell), run_directory.exists(folder)
    if begun:
        found = run_directory.load_config(folder, {})
        # The defaults of what the tasks do not use may have been others when the run was begun.
        config = replace(config, **{name: getattr(found, name) for name in unused_sections(config.tasks)})
        changed = configuration.incompatibilities(found, config)
        if found.meta_updates > config.meta_updates:
            changed.append(f"meta_updates: {found.meta_updates} -> {config.meta_updates}")
        if changed:
            raise ConfigError(f"{folder} was begun with other settings: {'; '.join(changed)}")
        if found.meta_updates == config.meta_updates and _is_done(folder):
            return "done"
    say(f"{cell}: {config.meta_updates} meta-updates of {config.meta.batch_size} tasks")
    with open_run(folder, resume=begun) as run:
        run_directory.prepare(folder, config, patience=run_directory.ORPHAN_SECONDS if begun else 0.0)
        return reporting.train(config, run, label=_label(folder, out))[0]


def _is_done(folder: Path) -> bool:
    try:
        return bool(run_directory.read_summary(folder)["state"] == "done")
    except ConfigError:
        return False


def _test(folder: Path, cells: list[Cell], plan: Plan, out: Path, say: Say) -> str:
    """Evaluate the initializations of all arms on the held-out tasks."""
    group, seed, _ = cells[0]
    config = plan.test(group, seed)
    labels, files = initializations.read([_spec(cell, out) for cell in cells], folder)
    rates = {cell.arm: plan.training(cell).supervised.test_learning_rate or None for cell in cells}
    chosen = [replace(arm, learning_rate=rates[arm.label]) for arm in initializations.arms(labels, files, config)]
    first = seed * plan.test_seeds  # so that no two seeds of the study have agents with the same seed
    planned = runs.plan(chosen, config, plan.test_seeds, first, plan.game_steps)
    left, warnings = runs.missing(planned, config, folder)
    for warning in warnings:
        say(warning)
    if not left:
        return "done"
    say(f"group {group}, seed {seed}: test of {', '.join(labels)} on {', '.join(config.games)}")
    run_directory.prepare(folder, config, patience=run_directory.ORPHAN_SECONDS)
    initializations.write(folder, chosen)
    return reporting.evaluate(config, planned, folder, label=_label(folder, out))


def _label(folder: Path, out: Path) -> str:
    """Return the name of a run of the study where runs of several directories are shown together."""
    return f"{out.absolute().name}/{folder.relative_to(out).as_posix()}"


def _spec(cell: Cell, out: Path) -> str:
    source = initializations.SCRATCH if cell.arm == "none" else training_of(out, cell.group, cell.seed, cell.arm)
    return f"{cell.arm}={source}"
