"""From parsed flags to a configuration and a place to write: what `train` and `evaluate` are asked to do."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_dist.cli import console, parser
from leap_dist.config import loading
from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config

if TYPE_CHECKING:  # slow to import
    from leap_dist.evaluation.initializations import Arm
    from leap_dist.storage.location import Run


def training(parsed: argparse.Namespace) -> tuple[Config, Run]:
    """Return the configuration and the run that `train` was asked for. Raises ConfigError."""
    if parsed.resume:
        return _resumed_training(parsed)
    preset, loaded = file_settings(parsed)
    preset = preset or "paper"
    config = loading.resolve(preset, loaded, parser.settings(parsed))
    from leap_dist.storage import location, remote_run, run_directory  # slow to import, so the settings come first

    if parsed.run_dir:
        return config, remote_run.open_run(location.location(parsed.run_dir), resume=False)
    from leap_dist.driver import driver

    driver.check_prerequisites(config)  # a start that is refused leaves no directory behind
    return config, remote_run.open_run(
        run_directory.create_unique(Path("runs") / f"{preset}-{timestamp()}"), resume=False
    )


def _resumed_training(parsed: argparse.Namespace) -> tuple[Config, Run]:
    if parsed.run_dir is None:
        raise ConfigError("resume: name the run with --run-dir")
    if parsed.preset or parsed.config:
        raise ConfigError("resume: a run keeps its preset and config; leave --preset and --config out")
    from leap_dist.storage import location, manifest, remote_run, run_directory

    run = remote_run.open_run(location.location(parsed.run_dir), resume=True)
    with run.translated_errors():
        config = run_directory.load_config(run.folder, parser.settings(parsed))
    for line in manifest.changed_packages(run.folder):
        console.notice("warning", line)
    return config, run


def evaluation(parsed: argparse.Namespace) -> tuple[Config, list[Arm], Path]:
    """Return the configuration, the arms and the output directory that `evaluate` was asked for. Raises ConfigError."""
    if not 1 <= parsed.seeds <= 1000:
        raise ConfigError(f"seeds: {parsed.seeds} is not between 1 and 1000")
    given = parser.settings(parsed)
    preset, loaded = file_settings(parsed)
    # The file may be one for training: settings without a meaning for evaluations are ignored.
    loaded = {name: value for name, value in loaded.items() if parser.is_for_evaluations(name)}
    for name, value in given.items():
        loading.parse_value(name, value)
    from leap_dist.evaluation import initializations  # after the settings were checked, because it is slow to import
    from leap_dist.storage import run_directory

    labels, files = initializations.read(parsed.init)
    base = initializations.settings(files, {**loaded, **given}, preset)
    config = initializations.resolve(given, loaded, base)
    arms = initializations.arms(labels, files, config)
    out = parsed.out or run_directory.create_unique(Path("reports") / timestamp())
    if run_directory.exists(out) and not run_directory.holds_evaluation(out):
        raise ConfigError(f"out: {out} holds a training run; choose another")
    return config, arms, out


def file_settings(parsed: argparse.Namespace) -> tuple[str | None, dict[str, Any]]:
    """Return the preset that flags or the --config file name, and the file's other settings. Raises ConfigError."""
    loaded = loading.read_yaml(parsed.config) if parsed.config else {}
    preset = loaded.pop("preset", None)
    return parsed.preset or (str(preset) if preset is not None else None), loaded


def timestamp() -> str:
    """Return the local time as part of a file name."""
    return time.strftime("%Y%m%d-%H%M%S")
