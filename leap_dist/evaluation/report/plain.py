"""Results as plain data and as text for files."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Dataclasses and arrays as strict JSON, where what is unknown or infinite is null."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray | tuple | list):
        return [plain(inner) for inner in value]
    if isinstance(value, float):  # NumPy's are some
        return float(value) if math.isfinite(value) else None
    return value


def csv_text(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table for other programs. What is unknown, None or NaN, is empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow("" if value is None or value != value else value for value in row)
    return buffer.getvalue()
