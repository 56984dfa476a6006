"""`leap_dist.train`, the Python counterpart of the command `leap-dist train`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from leap_dist.api import errors
from leap_dist.api.callbacks import Callback, Dispatcher, LiveRun, MetaUpdate
from leap_dist.api.given import Given, settings
from leap_dist.config import loading, pretrained
from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.driver import driver, reporting
from leap_dist.driver.signals import stop_signal
from leap_dist.storage import location, new_directory, reader, remote_run, run_directory
from leap_dist.storage.ledger import Ledger
from leap_dist.weights.initialization import Initialization, InitializedEncoder, read_initialization
from leap_dist.weights.warm_start import initial_vector


@dataclass(frozen=True)
class Run:
    """A training run that has ended or was stopped."""

    path: str
    """The run directory, or the URL of the run."""
    config: Config
    outcome: str
    """"done", or "stopped" if a callback asked for it."""
    summary: dict[str, Any]
    """The last summary: totals, rates and alerts, with the same content as summary.json."""

    def __repr__(self) -> str:
        """Return the run in one line; `config` and `summary` have the rest."""
        updates = self.summary.get("meta_updates", 0)
        preset = self.config.preset
        return f"Run(path={self.path!r}, outcome={self.outcome!r}, preset={preset!r}, meta_updates={updates})"

    @property
    def initialization(self) -> Initialization:
        """The meta-learned parameters with their metadata: the best ones if early stopping has chosen them.

        Raises OSError or ConfigError if they cannot be read.
        """
        return read_initialization(self._init_file())

    def load_encoder(self, *, linear_seed: int | None = None) -> InitializedEncoder:
        """Return the meta-learned encoder; see `leap_dist.load_encoder`."""
        return self.initialization.encoder(linear_seed=linear_seed)

    def meta_updates(self) -> list[MetaUpdate]:
        """Return all meta-updates of the run, those of earlier launches included.

        Raises OSError or ConfigError if the ledger cannot be read.
        """
        with reader.local_copy(location.location(self.path), "ledger.jsonl") as folder:
            by_version: dict[int, list[dict[str, Any]]] = {}
            for line in Ledger(folder / "ledger.jsonl").lines():
                by_version.setdefault(line["version_after"], []).append(line)
            return [MetaUpdate.of_lines(group) for group in by_version.values()]

    def _init_file(self) -> Path:
        where = location.location(self.path)
        if isinstance(where, location.Url):
            return reader.cached_initialization(where)
        return pretrained.path_of(str(where))


def train(
    config: Given = None,
    *,
    run_dir: str | Path | None = None,
    resume: bool | Literal["auto"] = False,
    callbacks: Iterable[Callback] = (),
    progress: bool = True,
    profile: bool = False,
) -> Run:
    """Meta-train an initialization, and return the finished run.

    Args:
        config: a `Config`, the name of a preset, or settings by dotted name, which may include `preset`. The default
            is the preset `quick`. To resume, pass nothing, or only the settings that change.
        run_dir: output directory or URL; by default a new directory below runs/.
        resume: continue the run in `run_dir` with its own settings; "auto" starts a new run there if it holds none.
        callbacks: called during the run; see `Callback`.
        progress: show a live table on a terminal, and plain lines elsewhere.
        profile: write a trace and a time breakdown of each worker to the run directory.

    Returns:
        The run, with outcome "done", or "stopped" if a callback has called `stop`.

    Raises:
        ConfigError: bad input in one line; nothing was started.
        RunDirectoryBusy: another launch is working on the run.
        CorruptFile: the run to resume is damaged beyond repair.
        RunFailed: training could not continue.
        Interrupted: a signal stopped the run, with everything accepted saved.
        Exception: the exception that a callback raised, after a clean stop.
    """
    with errors.naming_arguments(), stop_signal() as stop:
        resolved, run = _open(config, run_dir, resume)
        seen = LiveRun(run.shown, run.folder, resolved, stop)
        dispatcher = Dispatcher(callbacks, seen)
        driver.check_prerequisites(resolved)
        stop.check()  # before anything is written
        dispatcher.start()
        outcome, summary = "failed", dict[str, Any]()
        try:
            with run, run.translated_errors():
                dispatcher.version = _meta_updates_so_far(run.folder)
                if (finished := reporting.finished(resolved, run.folder)) is not None:
                    outcome, summary = "done", finished
                else:
                    patience = run_directory.ORPHAN_SECONDS if resume else 0.0
                    run_directory.prepare(run.folder, resolved, patience=patience)
                    run.publish()
                    outcome, summary = reporting.train(
                        resolved, run, profile=profile, progress=progress, observers=(dispatcher.record,)
                    )
        except KeyboardInterrupt:
            outcome = "interrupted"
            raise
        finally:
            outcome = dispatcher.end(outcome)
        shown = location.location(run.shown)
        path = str(shown.absolute()) if isinstance(shown, Path) else run.shown  # it stays valid in another directory
        result = Run(path, resolved, outcome, summary)
        errors.raise_for(outcome, result, summary, dispatcher.error)
        return result


def _open(given: Given, run_dir: str | Path | None, resume: bool | Literal["auto"]) -> tuple[Config, location.Run]:
    """Return the configuration and the run, whose context is not entered yet. Raises ConfigError."""
    where = None if run_dir is None else location.location(str(run_dir))
    if resume and where is None:
        raise ConfigError("resume: name the run with run_dir")
    if resume is True and where is not None:
        changed = settings(given) if isinstance(given, Mapping) else {}
        if given is not None and (not isinstance(given, Mapping) or "preset" in changed):
            raise ConfigError("resume: a resumed run keeps its preset and config; give only the settings that change")
        run = remote_run.open_run(where, resume=True)
        with run.translated_errors():
            return run_directory.load_config(run.folder, changed), run
    values = settings(given)
    named = "preset" in values
    preset = str(values.pop("preset", "quick"))
    config = loading.resolve(preset, values)
    if is_unnamed := where is None:
        driver.check_prerequisites(config)  # a start that is refused leaves no directory behind
        initial_vector(config)
        where = new_directory.create_unique(Path("runs") / f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}")
    run = remote_run.open_run(where, resume=resume)
    if run.continues:
        with run.translated_errors():
            config = run_directory.load_config(run.folder, values, preset=preset if named else None)
    elif not is_unnamed:
        initial_vector(config)  # raises errors before anything is written; a run that has begun needs it no more
    return config, run


def _meta_updates_so_far(folder: Path) -> int:
    try:
        return int(run_directory.read_summary(folder).get("meta_updates", 0))
    except ConfigError:
        return 0
