"""Selectors for the labels of cluster nodes, such as `pool=spot` and `pool!=spot`: which nodes may get workers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_SELECTOR = re.compile(rf"((?:[A-Za-z0-9.-]{{1,253}}/)?{_NAME})(!?=)({_NAME})")


def parse(selectors: Iterable[str]) -> dict[str, str]:
    """Return label selectors in Ray's form: `pool=spot` becomes {"pool": "spot"}, `pool!=spot` {"pool": "!spot"}.

    Raises ValueError if a selector is malformed or a label is selected twice.
    """
    conditions: dict[str, str] = {}
    for selector in selectors:
        match = _SELECTOR.fullmatch(selector)
        if match is None:
            raise ValueError(f"{ascii(selector)[1:-1][:80]} is neither LABEL=VALUE nor LABEL!=VALUE")
        name, relation, value = match.groups()
        if name in conditions:
            raise ValueError(f"{name} is given twice")
        conditions[name] = f"!{value}" if relation == "!=" else value
    return conditions


def match(conditions: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Return whether a node with these labels meets all conditions. A missing label differs from every value."""
    return all(
        labels.get(name) != wanted[1:] if wanted.startswith("!") else labels.get(name) == wanted
        for name, wanted in conditions.items()
    )
