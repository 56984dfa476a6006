"""`leap_dist.evaluate`, the Python counterpart of the command `leap-dist evaluate`."""

from __future__ import annotations

import base64
import json
import operator
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from leap_dist.api import errors
from leap_dist.api.callbacks import Callback, Dispatcher, LiveRun
from leap_dist.api.given import Given, settings
from leap_dist.config import loading
from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.driver import driver, reporting
from leap_dist.driver.signals import stop_signal
from leap_dist.evaluation import initializations, runs, scoring
from leap_dist.evaluation.report.build import build
from leap_dist.evaluation.runs import RunResult
from leap_dist.storage import new_directory, run_directory
from leap_dist.storage.objects import is_url


@dataclass(frozen=True)
class Report:
    """The report of an evaluation."""

    path: Path
    """The output directory."""
    config: Config
    outcome: str
    """"done", or "stopped" if a callback asked for it; the same call continues with the missing runs."""
    numbers: dict[str, Any]
    """The content of results.json: every number of the report with its interval; see docs/evaluation.md."""
    warnings: tuple[str, ...]
    """Warnings, each of one line, about what the report leaves out."""

    def __repr__(self) -> str:
        """Return the report in one line; `numbers` and `markdown` have the rest."""
        arms = self.numbers.get("arms", [])
        return f"Report(path={str(self.path)!r}, outcome={self.outcome!r}, arms={arms!r})"

    @property
    def markdown(self) -> str:
        """The report as Markdown. Raises OSError."""
        return (self.path / "report.md").read_text(encoding="utf-8")

    @property
    def html(self) -> Path:
        """Path of the report as a self-contained HTML page; only evaluations of games have one."""
        return self.path / "report.html"

    def runs(self) -> list[RunResult]:
        """Return the results of all finished runs, with every episode. Damaged ones are left out."""
        return runs.load_all(self.path)[0]

    def _repr_markdown_(self) -> str:
        """Show the report in a notebook, with its pictures inside, or in one line that there is none yet."""

        def embedded(link: re.Match[str]) -> str:
            data = base64.b64encode((self.path / link[1]).read_bytes()).decode()
            return f"](data:image/png;base64,{data})"

        if not (self.path / "report.md").exists():
            return f"There is no finished run in {self.path} yet."
        return re.sub(r"\]\((figures/[^)]*\.png)\)", embedded, self.markdown)


def evaluate(
    inits: Mapping[str, str | Path] | Sequence[str | Path],
    config: Given = None,
    *,
    seeds: int = 5,
    game_steps: Mapping[str, int] = MappingProxyType({}),
    out: str | Path | None = None,
    callbacks: Iterable[Callback] = (),
    progress: bool = True,
) -> Report:
    """Train fresh agents from each initialization on held-out tasks, and return the report.

    Args:
        inits: the initializations by label, or only their sources: a file, a run directory, a URL, `pretrained:NAME`,
            or "scratch".
        config: settings of the agents: the name of a preset, or settings by dotted name such as `games` and
            `task_steps`. All others are those of the run that made the first initialization.
        seeds: number of runs for each initialization and task.
        game_steps: agent steps for individual games, where they differ from the setting `task_steps`.
        out: output directory; by default a new one below reports/. If it holds runs of the same evaluation, only
            the missing ones are performed.
        callbacks: called during the evaluation: `on_start`, `on_report`, `on_alert` and `on_end`.
        progress: show a live table on a terminal, and plain lines elsewhere.

    Raises:
        ConfigError: bad input in one line; nothing was started.
        RunDirectoryBusy: another launch is working in `out`.
        RunFailed: an agent could not be trained. Finished runs are kept.
        Interrupted: a signal stopped it. Finished runs are kept.
        Exception: the exception that a callback raised, after a clean stop.
    """
    with errors.naming_arguments(), stop_signal() as stop:
        given = _checked(config)
        resolved, arms = _arms(inits, given, None if out is None else Path(out))
        seeds = _whole("seeds", seeds)
        if not 1 <= seeds <= 1000:
            raise ConfigError(f"seeds: {seeds:,} is not between 1 and 1,000")
        game_steps = {game: _whole(f"game_steps: {game[:40]}", steps) for game, steps in game_steps.items()}
        if out is not None and is_url(str(out)):
            raise ConfigError("out: must be a path on this machine, not a URL; copy the result there afterwards")
        folder = (Path(out) if out is not None else new_directory.create_unique(_default_folder(), "out")).absolute()
        run_directory.require_place_of_evaluation(folder)
        planned = runs.plan(arms, resolved, seeds, initializations.first_seed(given, resolved), game_steps)
        runs.missing(planned, resolved, folder)  # raises errors before anything is written
        driver.check_prerequisites(resolved)
        stop.check()
        seen = LiveRun(str(folder), folder, resolved, stop)
        dispatcher = Dispatcher(callbacks, seen)
        dispatcher.start()
        outcome = "failed"
        try:
            with run_directory.claimed(folder, field="out"):
                run_directory.prepare(folder, resolved, patience=run_directory.ORPHAN_SECONDS, field="out")
                initializations.write(folder, arms)
                left, _ = runs.missing(planned, resolved, folder)
                outcome = "done"
                if left:
                    outcome = reporting.evaluate(
                        resolved, planned, folder, progress=progress, observers=(dispatcher.record,)
                    )
        except KeyboardInterrupt:
            outcome = "interrupted"
            raise
        finally:
            outcome = dispatcher.end(outcome)
        report = _report(folder, resolved, outcome)
        errors.raise_for(outcome, report, seen.summary, dispatcher.error)
        return report


def _whole(name: str, value: Any) -> int:
    """Return a whole number of any type as an int. Raises ConfigError for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{name}: {value!r:.40} is not a whole number") from None


def _checked(config: Given) -> dict[str, Any]:
    """Return the settings by dotted name. Raises ConfigError for one that does not apply to evaluations."""
    if isinstance(config, Config):
        raise ConfigError("config: give only the settings that differ from those of the first initialization's run")
    given = settings(config)
    for name in given:
        if name != "preset" and not loading.is_for_evaluations(name):
            raise ConfigError(f"{name}: does not apply to evaluations; leave it out")
    return given


def _arms(
    inits: Mapping[str, str | Path] | Sequence[str | Path], given: dict[str, Any], out: Path | None
) -> tuple[Config, list[initializations.Arm]]:
    """Return the agents' configuration and the initializations. Raises ConfigError."""
    if isinstance(inits, str | Path):
        inits = [inits]
    if isinstance(inits, Mapping):
        inits = [f"{label}={source}" for label, source in inits.items()]
    specs = [str(source) for source in inits]
    if not specs:
        raise ConfigError("inits: name at least one initialization, or scratch")
    preset = given.pop("preset", None)
    labels, files = initializations.read(specs, out)
    base = initializations.settings(files, given, preset)
    resolved = initializations.resolve(given, {}, base)
    return resolved, initializations.arms(labels, files, resolved)


def _default_folder() -> Path:
    return Path("reports") / time.strftime("%Y%m%d-%H%M%S")


def _report(folder: Path, config: Config, outcome: str) -> Report:
    """Build the report of the finished runs; it is empty if there are none. Raises ConfigError."""
    numbers: dict[str, Any] = {}
    warnings: list[str] = []
    if any(folder.glob("runs/*/*/*.json")):
        try:
            warnings = build(folder, scoring.of_tasks(config.tasks))
            numbers = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"out: the report in {folder} cannot be written: {error}") from None
    return Report(folder, config, outcome, numbers, tuple(warnings))
