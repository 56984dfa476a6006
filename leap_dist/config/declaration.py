"""Declaration of a setting."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


def setting(
    default: Any, help: str, *, low: float = -math.inf, high: float = math.inf, above: float = -math.inf
) -> Any:
    """Declare a setting: a dataclass field with a help text and a range (low ≤ value ≤ high, value > above)."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "above": above})
