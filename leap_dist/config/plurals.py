"""Numbers with the noun that they count."""

from __future__ import annotations


def counted(number: float, thing: str) -> str:
    """Return a number with the singular or plural of a regular noun: "1 worker", "0.5 GPUs", "1,200 tasks"."""
    return f"{number:,.12g} {thing}{'' if number == 1 else 's'}"
