"""Suggestions for names that do not exist: the nearest valid one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

GOOD = 0.6
"""Similarity from which a single suggestion is worth making."""


def nearest(word: str, choices: Iterable[str], *, count: int = 1, cutoff: float = GOOD) -> list[str]:
    """Return up to `count` choices that resemble `word`, most similar first; similarities are between 0 and 1."""
    ranked = sorted(((similarity(word, choice), choice) for choice in choices), key=lambda pair: -pair[0])
    return [choice for score, choice in ranked[:count] if score >= cutoff]


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return "; did you mean CHOICE?" for the nearest choice, or "" if none is near."""
    found = nearest(word[:200], choices)
    return f"; did you mean {found[0]}?" if found else ""


def similarity(word: str, choice: str) -> float:
    """Return how well `word` may stand for `choice`, between 0 and 1.

    Case, dashes and underscores do not matter. A dotted choice is also compared by its last part alone, where an
    abbreviation counts, so that `agent.lr` resembles `agent.learning_rate`.
    """
    word, choice = _plain(word), _plain(choice)
    section, _, leaf = word.rpartition(".")
    of_section, _, of_leaf = choice.rpartition(".")
    ratio = difflib.SequenceMatcher(None, leaf, of_leaf).ratio()
    if _abbreviates(leaf, of_leaf) or set(of_leaf.split("_")) < set(leaf.split("_")):
        ratio = max(ratio, 0.9)
    if section == of_section:
        return ratio
    # A name in the section that was typed comes before the same name in another one.
    return 0.95 * ratio if not section else max(0.85 * ratio, difflib.SequenceMatcher(None, word, choice).ratio())


def _plain(name: str) -> str:
    return name.lower().lstrip("-").replace("-", "_").replace(" ", "_")


def _abbreviates(short: str, name: str) -> bool:
    """Return whether `short` is the start of a name, or made of the starts of all its words (as their initials are)."""
    if len(short) < 2:
        return False
    words = [re.escape(word) for word in name.split("_") if word]
    starts = "_?".join("(?:" + "|".join(word[:end] for end in range(len(word), 0, -1)) + ")" for word in words)
    return name.startswith(short) or re.fullmatch(starts, short) is not None
