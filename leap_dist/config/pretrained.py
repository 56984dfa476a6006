"""The initializations that come with the package. Wherever one is expected, `pretrained:NAME` names it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from leap_dist.config.loading import ConfigError
from leap_dist.config.validation import did_you_mean

PREFIX = "pretrained:"
ROOT = Path(__file__).parents[1] / "pretrained"
"""Directory with one folder for each initialization; see its README.md."""


OF_RUNS = ("best.safetensors", "init.safetensors")
"""Initializations in a run directory: the one that early stopping has chosen, if any, and the newest."""


@dataclass(frozen=True)
class Pretrained:
    """An initialization that comes with the package."""

    name: str
    folder: Path
    summary: str
    """What it was meta-learned on, in one line."""
    license: str
    """SPDX identifier of the license of the weights."""
    sha256: str
    """SHA-256 of the weights, hexadecimal."""
    test_steps: int | None = None
    """Agent steps or examples of the runs by which it was tested; None if unknown."""

    @property
    def path(self) -> Path:
        """Path of the weights."""
        return self.folder / "init.safetensors"


def available(root: Path | None = None) -> Iterator[Pretrained]:
    """Yield the initializations in order of their names. Raises ConfigError for a damaged installation."""
    for folder in sorted(path.parent for path in (root or ROOT).glob("*/manifest.json")):
        try:
            about = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            texts = {name: str(about[name]) for name in ("summary", "license", "sha256")}
            steps = int(about["test_steps"]) if "test_steps" in about else None
            yield Pretrained(folder.name, folder, **texts, test_steps=steps)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"pretrained: {folder / 'manifest.json'} is damaged ({error}); install again") from None


def choices(*, scratch: bool) -> str:
    """Return the advice for a missing initialization: what may be given, with `scratch` also a random one."""
    others = ("a URL", f"{PREFIX}NAME", *(("scratch",) if scratch else ()))
    return f"give a run directory, an init.safetensors, {', '.join(others[:-1])} or {others[-1]}"


def is_name(source: str) -> bool:
    """Return whether a source is the name of such an initialization rather than a path or URL."""
    return source.startswith(PREFIX)


def path_of(source: str) -> Path:
    """Return the path of the weights that a source means.

    `pretrained:NAME` means weights of the package; a run directory, its best initialization if early stopping has
    chosen one, and else its newest; any other path, that file. Raises ConfigError if there is no initialization of that
    name, with the nearest one, or if its weights were changed.
    """
    if not is_name(source):
        path = Path(source)
        if not os.path.isdir(path):  # which is also the answer if there cannot be such a path
            return path
        return next((file for name in OF_RUNS if (file := path / name).exists()), path / OF_RUNS[-1])
    name, known = source.removeprefix(PREFIX), {one.name: one for one in available()}
    if name not in known:
        there = f"; there are {', '.join(known)}" if known else "; no initialization comes with this version"
        raise ConfigError(f"init: no pretrained {name[:80]!r}{did_you_mean(name, known) or there}")
    found = known[name]
    try:
        digest = hashlib.sha256(found.path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"init: {source} cannot be read ({error.strerror}); install the package again") from None
    if digest != found.sha256:
        raise ConfigError(f"init: the weights of {source} are not those of the release; install the package again")
    return found.path
