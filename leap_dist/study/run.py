"""Makes the runs of a study that are missing, one after the other, each on all workers.

Several processes may work on one folder, where locks of files work between their machines: whoever finds a run in use
goes on with the next one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from leap_dist.config import loading as configuration
from leap_dist.config.loading import ConfigError
from leap_dist.driver import driver, reporting
from leap_dist.driver.cluster import HeadLost
from leap_dist.evaluation import initializations, server
from leap_dist.storage import run_directory
from leap_dist.storage.atomic import CorruptFile
from leap_dist.storage.remote_run import open_run
from leap_dist.storage.run_lock import RunDirectoryBusy, RunLock
from leap_dist.study.plan import Cell, Plan, groups_of, merge
from leap_dist.study.spec import Study, evaluation_of, training_of

PASSES = 2
"""What others were at may be done the second time."""
_CLAIMS = ".claims"

Say = Callable[[str], None]


def run(plan: Plan, out: Path, say: Say) -> str:
    """Trains and tests what is missing in `out`. Returns "done", "interrupted" or "failed".

    "failed" where a run could not be ended, or others are still at some; the rest is made all the same, but where the
    cluster is lost. Raises ConfigError where something else is in `out`, or what the tasks learn from is not here.
    """
    everything = plan.everything()
    driver.check_prerequisites(everything)
    _note(plan.study, out)
    cells, left = list(plan.cells()), groups_of(plan.study)
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


def _note(study: Study, out: Path) -> None:
    """Says in `out` what is compared, with what others have said there. Raises ConfigError."""
    if run_directory.exists(out):
        raise ConfigError(f"out: {out} holds a run or an evaluation; choose another")
    try:
        with _claim(out, "study"):
            (merge(Study.read(out), study) if (out / "study.json").exists() else study).write(out)
    except RunDirectoryBusy:
        raise ConfigError(f"out: others are writing to {out} all the time; try again") from None
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be written ({error.strerror}); choose another") from None


@contextlib.contextmanager
def _claim(folder: Path, name: str) -> Iterator[None]:
    """Keeps other studies' processes away from a part of it. Raises RunDirectoryBusy where one is at it, OSError."""
    place = folder / _CLAIMS / name
    place.mkdir(parents=True, exist_ok=True)
    lock = RunLock(place)
    try:
        yield
    finally:
        lock.release()


def _compare(cells: list[Cell], plan: Plan, out: Path, say: Say) -> str:
    """All arms of one group and seed, and their evaluation."""
    group, seed, _ = cells[0]
    whole = True
    for cell in cells:
        outcome = _train(cell, plan, out, say)
        if outcome == "interrupted":
            return outcome
        whole &= outcome == "done"
    if not whole:
        say(f"group {group}, seed {seed}: not every arm is trained, so none is tested yet")
        return "failed"
    folder = evaluation_of(out, group, seed)
    return _attempt(folder, f"test, group {group}, seed {seed}", say, lambda: _test(folder, cells, plan, out, say))


def _attempt(folder: Path, name: str, say: Say, make: Callable[[], str]) -> str:
    """Makes one run, unless others are at it. What is wrong with it does not keep the others from being made."""
    try:
        with _claim(folder.parent, folder.name):
            return make()
    except RunDirectoryBusy:
        say(f"{name}: another process is at it")
    except (ConfigError, CorruptFile, OSError) as error:
        say(f"{name}: cannot be made: {error}")
    return "failed"


def _train(cell: Cell, plan: Plan, out: Path, say: Say) -> str:
    """One training run, begun or gone on with; of arm none there is none."""
    if cell.arm == "none":
        return "done"
    folder = training_of(out, cell.group, cell.seed, cell.arm)
    return _attempt(folder, str(cell), say, lambda: _go_on(folder, cell, plan, say))


def _go_on(folder: Path, cell: Cell, plan: Plan, say: Say) -> str:
    config, begun = plan.training(cell), run_directory.exists(folder)
    if begun and (changed := configuration.incompatibilities(run_directory.load_config(folder, {}), config)):
        raise ConfigError(f"{folder} was begun with other settings: {'; '.join(changed)}")
    if _is_done(folder):
        return "done"
    say(f"{cell}: {config.meta_updates} meta-updates of {config.meta.batch_size} tasks")
    with open_run(folder, resume=begun) as run:
        run_directory.prepare(folder, config, patience=run_directory.ORPHAN_SECONDS if begun else 0.0)
        return reporting.train(config, run)[0]


def _is_done(folder: Path) -> bool:
    try:
        return bool(run_directory.read_summary(folder)["state"] == "done")
    except ConfigError:
        return False


def _test(folder: Path, cells: list[Cell], plan: Plan, out: Path, say: Say) -> str:
    """Fresh learners from every arm's initialization, on what was held out."""
    group, seed, _ = cells[0]
    config = plan.test(group, seed)
    labels, files = initializations.read([_spec(cell, out) for cell in cells])
    chosen = initializations.arms(labels, files, config)
    runs = server.plan(chosen, config, seeds=1)
    left, warnings = server.missing(runs, config, folder)
    for warning in warnings:
        say(warning)
    if not left:
        return "done"
    say(f"group {group}, seed {seed}: test of {', '.join(labels)} on {', '.join(config.games)}")
    run_directory.prepare(folder, config, patience=run_directory.ORPHAN_SECONDS)
    initializations.write(folder, chosen)
    return reporting.evaluate(config, runs, folder)


def _spec(cell: Cell, out: Path) -> str:
    source = initializations.SCRATCH if cell.arm == "none" else training_of(out, cell.group, cell.seed, cell.arm)
    return f"{cell.arm}={source}"
