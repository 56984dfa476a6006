"""Escaping of text from files and other programs, so that printing it cannot control the terminal."""

from __future__ import annotations

from typing import Any


def printable(text: str) -> str:
    r"""Return `text` with control characters, bidirectional overrides and lone surrogates escaped, as in `\x1b`.

    White space of any kind becomes a plain space.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else " " if char.isspace() else char.encode("unicode_escape").decode()
        for char in text
    )


def printable_tree(value: Any) -> Any:
    """Return JSON-like data with `printable` applied to every string in it, keys included."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [printable_tree(item) for item in value]
    if isinstance(value, dict):
        return {printable_tree(key): printable_tree(item) for key, item in value.items()}
    return value
