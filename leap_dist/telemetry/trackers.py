"""Experiment trackers: during a run, they receive the scalars that go to TensorBoard. Off by default.

A tracker is a small adapter with three methods. Whatever it raises, training continues: there is one alert, and the
tracker receives no more values. Its package is an extra (`pip install "leap-dist[wandb]"`, `[mlflow]` or `[trackio]`),
and its account, address and offline mode are configured by its own environment variables.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from leap_dist.config.loading import ConfigError, fixed_settings
from leap_dist.config.settings import Config
from leap_dist.storage.redaction import redact
from leap_dist.telemetry.projection import SERVER, Event

AXES = {"meta": "meta_update", "meta_frames": "agent_steps", "ops": "wall_seconds", "task": "game_steps"}
"""What the steps of a group of tags count."""


class Tracker(Protocol):
    """An experiment tracker. Every method may raise anything."""

    def begin(self, project: str, name: str, identity: str, settings: dict[str, Any]) -> None:
        """Start the run called `name`, or continue the one of this `identity` from an earlier launch."""

    def log(self, values: dict[str, float], axis: str, step: int) -> None:
        """Log values by name, at a step of an axis (a value of AXES)."""

    def finish(self, failed: bool) -> None:
        """End the run."""


class WeightsAndBiases:
    """Weights & Biases; `WANDB_MODE=offline` keeps everything on this machine."""

    def begin(self, project: str, name: str, identity: str, settings: dict[str, Any]) -> None:
        """See `Tracker.begin`."""
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(project=project, name=name, id=identity, resume="allow", config=settings)
        for group, axis in AXES.items():
            self._run.define_metric(f"axis/{axis}")
            self._run.define_metric("game/*" if group == "task" else f"{group}/*", step_metric=f"axis/{axis}")

    def log(self, values: dict[str, float], axis: str, step: int) -> None:
        """See `Tracker.log`. Every group has its own axis, because W&B has only one global step."""
        self._run.log({**values, f"axis/{axis}": step})

    def finish(self, failed: bool) -> None:
        """See `Tracker.finish`."""
        self._run.finish(exit_code=int(failed))


class Trackio:
    """Trackio, which keeps its runs on this machine unless a Space is configured."""

    def begin(self, project: str, name: str, identity: str, settings: dict[str, Any]) -> None:
        """See `Tracker.begin`."""
        trackio = importlib.import_module("trackio")
        self._run = trackio.init(project=project, name=f"{name}-{identity[:6]}", resume="allow", config=settings)

    def log(self, values: dict[str, float], axis: str, step: int) -> None:
        """See `Tracker.log`."""
        self._run.log({**values, f"axis/{axis}": step})

    def finish(self, failed: bool) -> None:
        """See `Tracker.finish`."""
        self._run.finish()


class MlFlow:
    """MLflow; `MLFLOW_TRACKING_URI` names the store, by default a local one."""

    def begin(self, project: str, name: str, identity: str, settings: dict[str, Any]) -> None:
        """See `Tracker.begin`."""
        self._mlflow: Any = importlib.import_module("mlflow")
        experiment = self._mlflow.set_experiment(project).experiment_id
        found = self._mlflow.search_runs([experiment], f"tags.leap_dist = '{identity}'", output_format="list")
        if found:
            self._mlflow.start_run(run_id=found[0].info.run_id)
            return
        self._mlflow.start_run(run_name=name, tags={"leap_dist": identity})
        self._mlflow.log_params({key: str(value)[:500] for key, value in settings.items()})

    def log(self, values: dict[str, float], axis: str, step: int) -> None:
        """See `Tracker.log`. Every metric has its own steps here, so the axis needs no name."""
        self._mlflow.log_metrics(values, step=step)

    def finish(self, failed: bool) -> None:
        """See `Tracker.finish`."""
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


TRACKERS: dict[str, tuple[str, type[Tracker]]] = {
    "wandb": ("wandb", WeightsAndBiases),
    "mlflow": ("mlflow", MlFlow),
    "trackio": ("trackio", Trackio),
}
"""Package and adapter, by the value of the setting `telemetry.tracker`."""


class Tracking:
    """Passes scalars to the tracker of a run, if it has one, and survives whatever the tracker does.

    Args:
        config: the run's configuration.
        run_dir: the run's directory, whose manifest identifies the run over all its launches.
        name: name of the run in the tracker.
    """

    def __init__(self, config: Config, run_dir: Path, name: str) -> None:
        self.alerts: list[str] = []
        """Messages for the user; at most one."""
        self._kind = config.telemetry.tracker
        self._tracker: Tracker | None = None
        if self._kind == "none":
            return
        tracker = TRACKERS[self._kind][1]()
        if self._attempt(lambda: tracker.begin(config.telemetry.project, name, _identity(run_dir), _settings(config))):
            self._tracker = tracker

    def event(self, event: Event) -> None:
        """Log the scalars of an event that was written to TensorBoard, by the axis of their group."""
        tracker = self._tracker
        if tracker is None:
            return
        groups: dict[str, dict[str, float]] = {}
        for value in event.values:
            group = value.tag.partition("/")[0]
            if value.HasField("simple_value") and group in AXES and math.isfinite(value.simple_value):
                name = value.tag if event.run == SERVER else f"{event.run}/{value.tag}"
                groups.setdefault(AXES[group], {})[name] = value.simple_value
        for axis, values in groups.items():
            if not self._attempt(partial(tracker.log, values, axis, event.step)):
                return

    def finish(self, *, failed: bool) -> None:
        """End the run in the tracker."""
        if (tracker := self._tracker) is not None:
            self._attempt(lambda: tracker.finish(failed))
            self._tracker = None

    def _attempt(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:  # trackers depend on networks, and training matters more
            reason = redact(" ".join(f"{type(error).__name__}: {error}".split()))[:200]
            self.alerts.append(f"tracker {self._kind} receives no more values; training continues: {reason}")
            self._tracker = None
            return False
        return True


def check(config: Config) -> None:
    """Raise ConfigError if the package of the configured tracker is not installed."""
    kind = config.telemetry.tracker
    if kind == "none":
        return
    package, _ = TRACKERS[kind]
    try:
        importlib.import_module(package)
    except ImportError:
        raise ConfigError(
            f'telemetry.tracker: {kind} needs the package {package}; pip install "leap-dist[{kind}]"'
        ) from None


def _identity(run_dir: Path) -> str:
    """Return 16 hexadecimal digits that are the same for all launches of a run. Raises OSError or ValueError."""
    sessions = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))["sessions"]
    return hashlib.sha256(json.dumps(sessions[0], sort_keys=True).encode()).hexdigest()[:16]


def _settings(config: Config) -> dict[str, Any]:
    """Return the settings that define what is learned, by dotted name."""
    return {
        name: ", ".join(value) if isinstance(value, list) else value for name, value in fixed_settings(config).items()
    }
