"""Declaration of a setting."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


def setting(
    default: Any,
    help: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    switch: tuple[str, str] | None = None,
) -> Any:
    """Declare a setting: a dataclass field with a help text and a range (low ≤ value ≤ high, value > above).

    `switch` holds the choices that stand for no and yes in the files of old runs, if the setting was once a boolean.
    """
    limits = {"low": low, "high": high, "above": above}
    return dataclasses.field(default=default, metadata={"help": help, **limits, "switch": switch})
