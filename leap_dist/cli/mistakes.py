"""Mistakes in a command line that argparse would report badly, and words that stand for flags."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from leap_dist.cli import console
from leap_dist.config.validation import did_you_mean

FLAGS_ALONE = ("-h", "--help", "--version")
"""The flags that need no command."""


def without_words_for_flags(given: list[str]) -> list[str]:
    """Return the arguments with --help for the word `help`, alone or before a command, and --version for `version`."""
    if given[:1] == ["help"]:
        return [*given[1:2], "--help"]
    return ["--version"] if given[:1] == ["version"] else given


def refuse_unknown_flags(given: Sequence[str], known: Sequence[str]) -> None:
    """Complain about the first unknown flag, before argparse reports that the flag that was meant is missing."""
    for word in itertools.takewhile(lambda word: word != "--", given[1:]):
        if word.startswith("--") and " " not in word and word.partition("=")[0] not in known:
            console.complain(no_such_flag(word, known))


def no_such_flag(word: str, known: Sequence[str]) -> str:
    """Return the line about an unknown flag, which may have a value: `--flag=value`."""
    flag = word.partition("=")[0]
    return f"{flag[:80]}: no such flag{did_you_mean(flag, known)}"


def require_initializations(given: Sequence[str], unknown: Sequence[str]) -> None:
    """Complain if an evaluation has no initialization, or one without --init."""
    bare = list(itertools.takewhile(lambda word: not word.startswith("-"), unknown))
    if bare or not given:
        example = " ".join(f"--init {word[:80]}" for word in bare) or "--init runs/mine --init scratch"
        problem = f"{bare[0][:80]}: unexpected argument" if bare else "init: name what to compare"
        console.complain(f"{problem}; for example, evaluate {example}")
