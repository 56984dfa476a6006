"""Training and evaluation with reports: summary.json, TensorBoard and the live table in the terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from leap_dist.config import loading as configuration
from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.driver import driver, plan
from leap_dist.driver.errors import HeadLost
from leap_dist.driver.metrics import Exporter
from leap_dist.evaluation import early_stopping, initializations
from leap_dist.evaluation.early_stopping import History, Measurement
from leap_dist.evaluation.runs import Run, missing
from leap_dist.storage import manifest, run_directory
from leap_dist.storage.location import Run as TrainingRun
from leap_dist.storage.redaction import redact
from leap_dist.telemetry import tensorboard, terminal, trackers
from leap_dist.telemetry.overview import about

Observer = Callable[[list[dict[str, Any]], dict[str, Any]], None]
"""Called about twice a second with the ledger's new lines, in whole meta-updates, and the summary."""


def finished(config: Config, run_dir: Path) -> dict[str, Any] | None:
    """Return the last summary of a run that has made all meta-updates of `config`, or more; None for any other."""
    try:
        summary = run_directory.read_summary(run_dir)
    except ConfigError:
        return None
    made = summary.get("meta_updates")
    is_over = summary["state"] == "done" or (summary["state"] == "interrupted" and not config.early_stopping.interval)
    is_written = (run_dir / "init.safetensors").exists() and summary.get("files_written", True)
    return summary if isinstance(made, int) and made >= config.meta_updates and is_over and is_written else None


def train(
    config: Config,
    run: TrainingRun,
    *,
    profile: bool = False,
    progress: bool = True,
    observers: Sequence[Observer] = (),
    label: str = "",
    rate: float | None = None,
) -> tuple[str, dict[str, Any]]:
    """Meta-train in a prepared directory with TensorBoard and, with `progress`, a table on standard output.

    With early stopping, training pauses for each measurement. In Prometheus and in trackers, the run has the name
    `label`, by default that of its directory. `rate` is the number of steps per second that the plan states, if it was
    measured. Returns "done", "interrupted" or "failed", and the last summary. Raises what `driver.train` raises.
    """
    label = label or Path(run.shown).name
    if not config.early_stopping.interval:
        return _train(config, run, config, label, profile, progress, observers, rate)
    if run.remote is not None:
        raise ConfigError(
            f"early_stopping.interval: {config.early_stopping.interval} needs a run directory on disk, because "
            "validation results are not kept at a URL; use 0"
        )

    def train_until(end: int) -> tuple[str, dict[str, Any]]:
        return _train(replace(config, meta_updates=end), run, config, label, profile, progress, observers, rate)

    def measure(end: int, history: History) -> str:
        return _measure(config, run.folder, end, history, label, progress)

    try:
        with _session(config):
            return _train_with_validation(config, run.folder, train_until, measure)
    except HeadLost as error:
        return error.outcome, run_directory.read_summary(run.folder)


def _train_with_validation(
    config: Config,
    run_dir: Path,
    train_until: Callable[[int], tuple[str, dict[str, Any]]],
    measure: Callable[[int, History], str],
    clock: Callable[[], float] = time.monotonic,
) -> tuple[str, dict[str, Any]]:
    """Train from measurement to measurement, until the run is complete or the validation error stops improving."""
    history, patience = History.read(run_dir), config.early_stopping.patience
    summary: dict[str, Any] = {}
    for end in early_stopping.ends(config, history):
        if history.is_over(patience):
            break
        outcome, summary = train_until(end)
        if outcome == "done":
            began = clock()
            outcome = measure(end, history)
            summary = {**summary, "wall_seconds": summary["wall_seconds"] + clock() - began}
            with contextlib.suppress(OSError):  # a full disk does not stop training
                run_directory.write_summary(run_dir, summary)
        if outcome != "done":
            run_directory.write_summary(run_dir, summary := {**summary, "state": outcome})
            return outcome, summary
    if not summary:  # an earlier launch did everything, but may not have reported it
        outcome, summary = train_until(max(one.meta_updates for one in history.measurements))
        if outcome != "done":
            return outcome, summary
    summary |= {"state": "done", "early_stopping": history.describe(patience)}
    run_directory.write_summary(run_dir, summary)
    return "done", summary


def _measure(config: Config, run_dir: Path, meta_updates: int, history: History, label: str, progress: bool) -> str:
    """Measure the newest φ on the validation alphabets. Returns "done", "interrupted" or "failed"."""
    settings, runs, arm = early_stopping.evaluation(config, run_dir)
    folder = early_stopping.folder_of(run_dir, meta_updates)
    run_directory.prepare(folder, settings, patience=run_directory.ORPHAN_SECONDS)
    initializations.write(folder, [arm])
    if missing(runs, settings, folder)[0]:
        outcome = evaluate(settings, runs, folder, progress=progress, label=f"{label}/{folder.name}")
        if outcome != "done":
            return outcome
    history.add(run_dir, Measurement(meta_updates, early_stopping.error_of(folder)))
    if progress and history.best is not None:
        print(
            f"validation after {meta_updates} meta-updates: error {100 * history.measurements[-1].error:.1f} %, "
            f"lowest {100 * history.best.error:.1f} % after {history.best.meta_updates}",
            flush=True,
        )
    return "done"


def _train(
    config: Config,
    run: TrainingRun,
    whole: Config,
    label: str,
    profile: bool,
    progress: bool,
    observers: Sequence[Observer],
    rate: float | None,
) -> tuple[str, dict[str, Any]]:
    """Train until the meta-updates of `config` are made, which may be a part of those of the `whole` run."""
    run_dir = run.folder
    before = run_directory.wall_seconds(run_dir)
    tracking = trackers.Tracking(config, run_dir, label)
    exporter = Exporter(label)
    interval = config.telemetry.agreement_interval
    board = tensorboard.TensorBoard(run_dir, agreement_interval=interval, listener=tracking.event)
    board.begin(config)
    board.about(redact(about(config, manifest.describe_command())))
    board.text("config", redact(f"```yaml\n{configuration.to_yaml(config)}```"))
    board.text("manifest", redact(f"```json\n{(run_dir / 'manifest.json').read_text()}\n```"))
    latest: dict[str, Any] = {}
    is_saved = False
    with _table(progress) as table:

        def record(lines: list[dict[str, Any]], summary: dict[str, Any], clips: list[Any], offset: int) -> None:
            nonlocal is_saved
            summary = run.report(summary)
            with contextlib.suppress(OSError):  # a full disk does not stop training
                if not is_saved:  # a launch that never works changes nothing
                    run_directory.write_config(run_dir, whole)
                    is_saved = True
            if whole.early_stopping.interval:
                summary = _of_whole(summary, whole.total_tasks)
            summary["plan"] = plan.with_speed(summary, config, rate)
            summary["alerts"] = [*summary["alerts"], *board.alerts, *tracking.alerts, *exporter.alerts]
            latest.update(summary)
            board.record(lines, summary, clips, offset)
            with contextlib.suppress(OSError):  # a full disk does not stop training
                run_directory.write_summary(run_dir, summary)
            table.show(summary)
            exporter.record(lines, summary)
            for observe in observers:
                observe(lines, summary)

        try:
            outcome = driver.train(
                config,
                run_dir,
                record,
                wall_seconds_before=before,
                profile=profile,
                remote=run.remote,
                ledger_offset=board.offset,
                announce=table.begin,
            )
        except KeyboardInterrupt:  # before the first report, or by a second signal: nothing else records it
            with contextlib.suppress(OSError, ConfigError):
                last = latest or run_directory.read_summary(run_dir)
                run_directory.write_summary(run_dir, {**last, "state": "interrupted"})
            raise
        finally:
            board.close()
            tracking.finish(failed=latest.get("state") == "failed")
    return outcome, latest


def _of_whole(summary: dict[str, Any], total_tasks: int) -> dict[str, Any]:
    """Convert the summary of a part of a run, which ends with a measurement, to a summary of the whole run."""
    done, eta = summary["tasks"], summary["eta_seconds"]
    total, left = max(total_tasks, done), summary["tasks_wanted"] - done
    return {
        **summary,
        "state": "running" if summary["state"] == "done" else summary["state"],
        "tasks_wanted": total,
        "eta_seconds": eta * (total - done) / left if eta is not None and left > 0 else eta,
    }


def evaluate(
    config: Config,
    runs: Sequence[Run],
    out: Path,
    *,
    progress: bool = True,
    observers: Sequence[Observer] = (),
    label: str = "",
    rate: float | None = None,
) -> str:
    """Perform the missing runs of an evaluation in a prepared folder. With `progress`, print a table meanwhile.

    In Prometheus, the evaluation has the name `label`, by default that of its folder. `rate` is as in `train`. Returns
    "done", "interrupted" or "failed". Raises what `driver.evaluate` raises.
    """
    exporter = Exporter(label or out.name)
    mean = replace(config, task_steps=sum(run.steps for run in runs) // len(runs))  # games may differ in length
    with _table(progress) as table:

        def record(lines: list[dict[str, Any]], summary: dict[str, Any], clips: list[Any], offset: int) -> None:
            summary["plan"] = plan.with_speed(summary, mean, rate)
            summary["alerts"] = [*summary["alerts"], *exporter.alerts]
            with contextlib.suppress(OSError):  # a full disk does not stop the evaluation
                run_directory.write_summary(out, summary)
            table.show(summary)
            exporter.record(lines, summary)
            for observe in observers:
                observe(lines, summary)

        before = run_directory.wall_seconds(out)
        return driver.evaluate(config, runs, out, record, wall_seconds_before=before, announce=table.begin)


def _session(config: Config) -> contextlib.AbstractContextManager[None]:
    """Return a context with a connection to Ray. Inside another such context, it does nothing."""
    return contextlib.nullcontext() if ray.is_initialized() else driver.session(config)


def _table(progress: bool) -> contextlib.AbstractContextManager[terminal.LiveTable | terminal.NoTable]:
    return terminal.LiveTable() if progress else contextlib.nullcontext(terminal.NoTable())
