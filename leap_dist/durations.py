"""How long something takes: the newest durations, and where their middle and their tail are."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

import numpy as np

KEPT = 512
"""Of the newest durations; the 99th percentile of fewer would be their largest."""


class Durations:
    """`with durations: …` measures what is in there, whether it succeeds or raises. Not to be nested in itself."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started = 0.0
        self._newest: deque[float] = deque(maxlen=KEPT)
        self.count = 0
        """Of all durations so far."""

    def __enter__(self) -> None:
        self._started = self._clock()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._newest.append(self._clock() - self._started)
        self.count += 1

    def milliseconds(self) -> dict[str, float]:
        """Percentiles 50 and 99 of the newest as "p50" and "p99"; {} where there are none."""
        if not self._newest:
            return {}
        middle, tail = np.percentile(self._newest, (50, 99))
        return {"p50": 1e3 * float(middle), "p99": 1e3 * float(tail)}
