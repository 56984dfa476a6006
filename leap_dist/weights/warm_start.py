"""Starting a run from an existing initialization instead of a random one (setting `init`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from leap_dist.config import pretrained
from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import ENVIRONMENTS, Config
from leap_dist.storage import reader
from leap_dist.storage.atomic import CorruptFile
from leap_dist.storage.location import Url
from leap_dist.storage.objects import is_url
from leap_dist.tasks.task import family_of
from leap_dist.weights.initialization import read_initialization


def absolute_source(source: str) -> str:
    """Return the setting `init` in a form that is valid for a process in another directory."""
    is_path = source and not is_url(source) and not pretrained.is_name(source)
    return str(Path(source).absolute()) if is_path else source


def initial_vector(config: Config, source: str | None = None) -> np.ndarray | None:
    """Return φ₀ of a new run, flat float32, if `config.init` names one; None for a random one.

    `source` is used instead of `config.init` by a process in another directory. Raises ConfigError if the file cannot
    be read, or its parameters are not those of the run's network.
    """
    source = source if source is not None else config.init
    if not source:
        return None
    if source == "scratch":
        raise ConfigError("init: a run starts from scratch by default; leave --init out")
    path = locate(source)
    try:
        found = read_initialization(path)
    except OSError as error:
        raise ConfigError(
            f"init: {source} cannot be read ({error.strerror}); {pretrained.choices(scratch=False)}"
        ) from None
    except CorruptFile as error:
        shown = str(error).replace(str(path), source) if is_url(source) else error
        raise ConfigError(f"init: {shown}") from None
    if (found.tasks in ENVIRONMENTS) != (config.tasks in ENVIRONMENTS):
        raise ConfigError(
            f"init: {source} was meta-learned on {found.tasks}, and its network is not for {config.tasks}; "
            f"give --tasks {found.tasks}, or another initialization"
        )
    if other := found.other_setting(config, ("network",)):
        raise ConfigError(
            f"{other.name}: {other.wanted} is not what {source} was trained with; use "
            f"--{other.name.replace('_', '-')} {other.found}, or another initialization"
        )
    manifest, _ = family_of(config).initialization(config, config.seed, config.scope)
    try:
        return found.vector(manifest)
    except ValueError as error:
        raise ConfigError(f"init: {source} does not fit this run's network: {error}") from None


def locate(source: str) -> Path:
    """Return the path of the file that a source means. Raises ConfigError for an unknown name or URL."""
    if is_url(source):
        return reader.cached_initialization(Url(source))
    return pretrained.path_of(source)
