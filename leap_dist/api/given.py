"""The forms in which a program may pass settings to `train` and `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leap_dist.config import loading
from leap_dist.config.settings import Config

Given = Config | str | Mapping[str, Any] | None
"""A configuration, the name of a preset, settings by dotted name or by section, or nothing."""


def settings(given: Given) -> dict[str, Any]:
    """Return settings by dotted name, `preset` among them if one was given. Nothing is checked yet.

    Raises TypeError for anything that is not a `Given`, and ConfigError for a setting that is given twice.
    """
    if given is None:
        return {}
    if isinstance(given, str):
        return {"preset": given}
    if isinstance(given, Config):
        return {name: loading.look_up(given, name) for name, _, _ in loading.fields()}
    if not isinstance(given, Mapping):
        raise TypeError(f"config: {given!r:.80} is not a Config, the name of a preset, or a mapping of settings")
    flat: dict[str, Any] = {}
    for name, value in given.items():
        for leaf, inner in value.items() if isinstance(value, Mapping) else ((None, value),):
            full = (name if leaf is None else f"{name}.{leaf}").replace("-", "_")
            if full in flat:
                raise loading.ConfigError(f"{full}: given twice")
            flat[full] = inner
    return flat
