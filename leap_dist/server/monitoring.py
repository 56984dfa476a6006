"""Monitoring of the server: alerts, counters, latencies, and the agreement between games."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from leap_dist.protocol.messages import AT_START, Contribution

log = logging.getLogger(__name__)

MAX_ALERTS = 100
"""Number of alerts that are kept."""
WINDOW_SIZE = 512
"""Number of durations behind the percentiles; the 99th percentile of fewer would be their maximum."""
DIMENSIONS = 4093
"""Length of the projections. It is prime, so that the rows of a layer do not always fall on the same places."""
MOST_DEAD = 0.6
"""Share of dead units above which there is an alert. A fresh encoder has 0.04 to 0.37, depending on the game."""
TASKS_OF_DEAD = 8
"""Number of newest tasks over which that share is averaged; there is no alert before half as many."""
RECENT = 20
"""Number of newest alerts among which there are no two alike: several files may fail in turn."""
INTERVAL = 60.0
"""Seconds between two alerts of one kind, however many workers and files they name."""
KEPT = 0.8
"""Share of a game's mean that is kept at each new pull: the last five pulls make up two thirds of the mean."""

_MIN_NORM = 1e-30


class Alert(Protocol):
    """A function that takes a message meant for the user."""

    def __call__(self, text: str, *, kind: str = "") -> None:
        """Take a message; `kind` names a condition of which there may be many messages, and one is enough."""


class Alerts:
    """Messages meant for the user, oldest first. Implements `Alert`.

    A message is not recorded again while it is among the newest RECENT, nor one of a kind of which there was a message
    less than INTERVAL ago: while the disk is full, each worker reports it once a second.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._recorded: dict[str, float] = {}  # time of the newest message, by kind
        self.messages: deque[str] = deque(maxlen=MAX_ALERTS)

    def __call__(self, text: str, *, kind: str = "") -> None:
        """Record and log a message, unless it would only repeat what was said."""
        now = self._clock()
        if text in list(self.messages)[-RECENT:] or now - self._recorded.get(kind, -math.inf) < INTERVAL:
            return
        log.warning(text)
        self.messages.append(text)
        if kind:
            self._recorded[kind] = now


class DeadUnits:
    """Raises an alert when most units of φ are zero on all frames at the start of tasks, as after a collapse.

    Such a φ makes paths short because agents hardly learn, which no other figure of the server shows.
    """

    def __init__(self, alert: Callable[[str], None]) -> None:
        self._alert = alert
        self._shares: deque[float] = deque(maxlen=TASKS_OF_DEAD)
        self._is_reported = False

    def observe(self, contributions: Iterable[Contribution]) -> None:
        """Take the shares that tasks have measured before their first step, if they have."""
        name = f"{AT_START}dead_units"
        firsts = [contribution.curve[0].means for contribution in contributions if contribution.curve]
        self._shares += [means[name] for means in firsts if name in means]
        if 2 * len(self._shares) < TASKS_OF_DEAD:
            return
        mean = sum(self._shares) / len(self._shares)
        if mean > MOST_DEAD and not self._is_reported:
            self._alert(
                f"{mean:.0%} of the units of φ are dead at the start of a task, so agents may learn less; try "
                "--meta.shared convolutions or a lower --meta.learning-rate, and watch meta/features in TensorBoard"
            )
        self._is_reported = mean > MOST_DEAD


class Counters:
    """Totals over the whole run, which checkpoints contain."""

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        """Totals of partials, duplicates, leases_lost, all_zero, and steps, which includes steps of lost work."""
        self.refused: Counter[str] = Counter()
        """Number of refused contributions by reason."""


class LatencyWindow:
    """Measures durations: `with window: ...` records one, whether the block succeeds or raises. Cannot be nested."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started = 0.0
        self._newest: deque[float] = deque(maxlen=WINDOW_SIZE)
        self.count = 0
        """Number of durations recorded so far."""

    def __enter__(self) -> None:
        self._started = self._clock()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._newest.append(self._clock() - self._started)
        self.count += 1

    def milliseconds(self) -> dict[str, float]:
        """Return the percentiles 50 and 99 of the newest durations as "p50" and "p99", or {} if there are none."""
        if not self._newest:
            return {}
        middle, tail = np.percentile(self._newest, (50, 99))
        return {"p50": 1e3 * float(middle), "p99": 1e3 * float(tail)}


class Agreement:
    """Cosines between the mean directions of the games' newest pulls: which games pull φ the same way.

    A pull is as long as φ, so only a projection of each game's mean is kept: every element gets a random sign, and
    elements whose indices are equal modulo DIMENSIONS are added up. The scalar product of two projections is that of
    the vectors, up to about 1/√DIMENSIONS of the product of their norms, so a cosine is typically off by 0.016.
    (Charikar, Chen and Farach-Colton 2002, "Finding frequent items in data streams"; indices are taken in turn instead
    of hashed, because neighbors within a layer are of similar size.)

    Nothing is kept across a restart: a game is left out until there is a new pull of it.

    Args:
        size: length of the pulls.
    """

    def __init__(self, size: int) -> None:
        signs = np.random.default_rng(0).integers(0, 2, size, dtype=np.int8)
        self._signs = 2 * signs.astype(np.float32) - 1
        self._signed = np.zeros(-(-size // DIMENSIONS) * DIMENSIONS, np.float32)
        self._means: dict[str, np.ndarray] = {}

    def add(self, game: str, pull: np.ndarray, norm: float) -> None:
        """Add a pull, float32 (size,), with its norm. A pull without a direction is ignored."""
        if pull.size != self._signs.size or not _MIN_NORM < norm < np.inf:
            return
        np.multiply(pull, self._signs, out=self._signed[: pull.size])
        direction = self._signed.reshape(-1, DIMENSIONS).sum(axis=0) / np.float32(norm)
        if np.isfinite(direction).all():
            mean = self._means.get(game)
            self._means[game] = direction if mean is None else KEPT * mean + (1 - KEPT) * direction

    def cosines(self) -> dict[str, Any]:
        """Return the "games" with pulls, in alphabetical order, and the matrix of "cosines" between them."""
        norms = {game: float(np.linalg.norm(mean)) for game, mean in self._means.items()}
        games = sorted(game for game, norm in norms.items() if norm > 0)
        unit = np.array([self._means[game] / norms[game] for game in games]).reshape(len(games), DIMENSIONS)
        return {"games": games, "cosines": np.clip(unit @ unit.T, -1, 1).astype(float).round(4).tolist()}
