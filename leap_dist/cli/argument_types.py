"""Types of command-line arguments: numbers, paths, URLs and initializations, checked before anything slow starts."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from leap_dist.cli import console
from leap_dist.config import loading

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def auto(text: str) -> str:
    """Return "auto", the only word that --resume takes."""
    if text != "auto":
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not auto; give auto, or nothing")
    return text


def whole_number(text: str) -> int:
    """Parse a whole number in the forms that settings accept, such as 1000 or 1e3."""
    try:
        return loading.parse_whole_number(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a whole number") from None


def location(text: str) -> str:
    """Check a path or URL, and expand `~` in a path."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; name a file or directory")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise argparse.ArgumentTypeError(
            f"{text[:80]!r} begins with the home directory of an unknown user; give the full path"
        )
    return expanded


def initialization(text: str) -> str:
    """Check [LABEL=]PATH, and expand `~` in the path. The shell expands it only at the start of a word."""
    label, equals, path = text.partition("=")
    if equals and not _URL.match(text):
        return f"{label}={location(path)}"
    return location(text)


def path(text: str) -> Path:
    """Check a path, and expand `~` in it."""
    return Path(location(text))


def directory(text: str) -> Path:
    """Check the path of an output, and complain about a URL."""
    if _URL.match(text):
        console.complain("out: must be a path on this machine, not a URL; copy the result there afterwards")
    return path(text)
