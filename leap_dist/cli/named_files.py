"""Files that the command line names, checked before anything slow is imported."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from leap_dist.config import pretrained
from leap_dist.config.loading import ConfigError
from leap_dist.config.validation import did_you_mean


def require_all(specs: Sequence[str]) -> None:
    """Raise ConfigError if a file that --init names is missing, before anything slow is imported."""
    for spec in specs:
        label, equals, path = spec.partition("=")
        named = path if equals and "://" not in label else spec
        if named != "scratch" and not re.match("[A-Za-z0-9+.-]+://", named):
            require(Path(named), scratch=True)


def require(path: Path, *, scratch: bool = False) -> Path:
    """Return the path of the file that a run directory, `pretrained:NAME` or a file itself stands for.

    Raises ConfigError if there is no such file. It names the nearest run that has one, or what may be given; with
    `scratch`, that includes a random initialization.
    """
    file = pretrained.path_of(str(path))
    try:
        file.stat()
    except OSError as error:
        others = [found.parent for found in Path().glob("*/*/init.safetensors")]
        if path.suffix == ".safetensors":
            others = list(path.parent.glob("*.safetensors"))
        near = did_you_mean(str(path), map(str, others)) or f"; {pretrained.choices(scratch=scratch)}"
        what = (
            f"{path} holds no init.safetensors" if os.path.isdir(path) else f"{path} cannot be read ({error.strerror})"
        )
        if os.path.exists(path / "config.yaml") and not os.path.exists(path / "arms.json"):  # no evaluation
            near = " yet: the run has only begun; wait for its first meta-update"
        raise ConfigError(f"init: {what}{near}") from None
    return file
