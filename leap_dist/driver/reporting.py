"""Training and evaluation with reports: summary.json, TensorBoard and the live table in the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from leap_dist.config import loading as configuration
from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.driver import driver
from leap_dist.evaluation.runs import Run
from leap_dist.storage import run_directory
from leap_dist.storage.location import Run as TrainingRun
from leap_dist.storage.redaction import redact
from leap_dist.telemetry import tensorboard, terminal

Observer = Callable[[list[dict[str, Any]], dict[str, Any]], None]
"""Called about twice a second with the ledger's new lines, in whole meta-updates, and the summary."""


def train(
    config: Config,
    run: TrainingRun,
    *,
    profile: bool = False,
    progress: bool = True,
    observers: Sequence[Observer] = (),
) -> tuple[str, dict[str, Any]]:
    """Meta-train in a prepared directory with TensorBoard and, with `progress`, a table on standard output.

    Returns "done", "interrupted" or "failed", and the last summary. Raises what `driver.train` raises.
    """
    run_dir = run.folder
    before = run_directory.wall_seconds(run_dir)
    board = tensorboard.TensorBoard(run_dir, agreement_interval=config.telemetry.agreement_interval)
    board.begin(config)
    board.text("config", redact(f"```yaml\n{configuration.to_yaml(config)}```"))
    board.text("manifest", redact(f"```json\n{(run_dir / 'manifest.json').read_text()}\n```"))
    latest: dict[str, Any] = {}
    with _table(progress) as table:

        def record(lines: list[dict[str, Any]], summary: dict[str, Any], clips: list[Any], offset: int) -> None:
            summary = run.report(summary)
            summary["alerts"] = [*summary["alerts"], *board.alerts]
            latest.update(summary)
            board.record(lines, summary, clips, offset)
            with contextlib.suppress(OSError):  # a full disk does not stop training
                run_directory.write_summary(run_dir, summary)
            table.show(summary)
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
        except KeyboardInterrupt:  # before the first report, or by a second signal: nobody else says how the run ended
            with contextlib.suppress(OSError, ConfigError):
                last = latest or run_directory.read_summary(run_dir)
                run_directory.write_summary(run_dir, {**last, "state": "interrupted"})
            raise
        finally:
            board.close()
    return outcome, latest


def evaluate(
    config: Config, runs: Sequence[Run], out: Path, *, progress: bool = True, observers: Sequence[Observer] = ()
) -> str:
    """Perform the missing runs of an evaluation in a prepared folder. With `progress`, print a table meanwhile.

    Returns "done", "interrupted" or "failed". Raises what `driver.evaluate` raises.
    """
    with _table(progress) as table:

        def record(lines: list[dict[str, Any]], summary: dict[str, Any], clips: list[Any], offset: int) -> None:
            with contextlib.suppress(OSError):  # a full disk does not stop the evaluation
                run_directory.write_summary(out, summary)
            table.show(summary)
            for observe in observers:
                observe(lines, summary)

        before = run_directory.wall_seconds(out)
        return driver.evaluate(config, runs, out, record, wall_seconds_before=before, announce=table.begin)


def _table(progress: bool) -> contextlib.AbstractContextManager[terminal.LiveTable | terminal.NoTable]:
    return terminal.LiveTable() if progress else contextlib.nullcontext(terminal.NoTable())
