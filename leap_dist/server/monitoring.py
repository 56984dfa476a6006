"""Which games pull the initialization the same way: the cosine between their pulls.

A pull has as many numbers as the initialization, so what is kept of each game is a projection of it to a few thousand:
every number gets a random sign, and those whose places are equal modulo DIMENSIONS are added up. The scalar product
of two projections is that of the vectors, give or take about 1/√DIMENSIONS of the product of their norms (Charikar,
Chen and Farach-Colton 2002, "Finding frequent items in data streams", with places taken in turn instead of by a hash,
since neighbours in a layer are of similar size). So a cosine is off by 0.016, typically.

How long something takes: the newest durations, and where their middle and their tail are.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np

DIMENSIONS = 4093
"""A prime: no layer's rows come to lie on the same places again."""
KEPT = 0.8
"""Of a game's mean with each new pull: the last five make two thirds of it."""

_SMALLEST_NORM = 1e-30


class Agreement:
    """The mean direction of every game's newest pulls, and the angles between them.

    Nothing of it is kept over a restart: games are left out then until they have been heard of again.

    Args:
        size: length of the pulls.
    """

    def __init__(self, size: int) -> None:
        signs = np.random.default_rng(0).integers(0, 2, size, dtype=np.int8)
        self._signs = 2 * signs.astype(np.float32) - 1
        self._signed = np.zeros(-(-size // DIMENSIONS) * DIMENSIONS, np.float32)
        self._means: dict[str, np.ndarray] = {}

    def add(self, game: str, pull: np.ndarray, norm: float) -> None:
        """Takes note of a pull, float32 (size,), and its norm. Whatever has no direction is left out."""
        if pull.size != self._signs.size or not _SMALLEST_NORM < norm < np.inf:
            return
        np.multiply(pull, self._signs, out=self._signed[: pull.size])
        direction = self._signed.reshape(-1, DIMENSIONS).sum(axis=0) / np.float32(norm)
        if np.isfinite(direction).all():
            mean = self._means.get(game)
            self._means[game] = direction if mean is None else KEPT * mean + (1 - KEPT) * direction

    def cosines(self) -> dict[str, Any]:
        """As plain data: the "games" heard of, in alphabetical order, and a matrix of the "cosines" between them."""
        norms = {game: float(np.linalg.norm(mean)) for game, mean in self._means.items()}
        games = sorted(game for game, norm in norms.items() if norm > 0)
        unit = np.array([self._means[game] / norms[game] for game in games]).reshape(len(games), DIMENSIONS)
        return {"games": games, "cosines": np.clip(unit @ unit.T, -1, 1).astype(float).round(4).tolist()}


WINDOW_SIZE = 512
"""Of the newest durations; the 99th percentile of fewer would be their largest."""


class LatencyWindow:
    """`with durations: …` measures what is in there, whether it succeeds or raises. Not to be nested in itself."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started = 0.0
        self._newest: deque[float] = deque(maxlen=WINDOW_SIZE)
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
