"""Quarantine: exclude a game that fails on every worker, or a worker on which every game fails."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

GAME_FAILURES = 3
"""Consecutive failures (an exception, silence, or an unusable contribution) that quarantine a game."""
GAME_DEATHS = 10
"""Consecutive deaths of the worker's process that quarantine a game: more, because most have other causes."""
WORKER_GAMES = 3
"""Different games failing consecutively on one worker that quarantine the worker instead of the games."""


class Quarantine:
    """Counts consecutive failures and decides when they are enough. Any success resets the count."""

    def __init__(self) -> None:
        self.games: set[str] = set()
        """Games that get no more leases."""
        self.workers: set[str] = set()
        """Workers that get no more leases."""
        self._failures: Counter[str] = Counter()  # by game
        self._deaths: Counter[str] = Counter()  # by game
        self._counted_at: dict[str, float] = {}  # by game, time of its last failure
        self._failed_on: dict[str, list[str]] = {}  # by worker, games

    def fail(self, game: str, worker: str, reason: str, *, granted: float, now: float, died: bool = False) -> str:
        """Count a lease that ended badly. Return who is quarantined for it and why, or "" if nobody is.

        When several tasks of a game fail at the same time, as when a network switch fails, only the first counts: a
        lease granted before that failure is no further evidence.

        Args:
            game: game of the lease's task.
            worker: worker that held the lease.
            reason: what went wrong, for the message.
            granted: when the lease was granted, in monotonic seconds.
            now: current time, in monotonic seconds.
            died: whether the worker's process died. The worker is not blamed for that.
        """
        counts = granted >= self._counted_at.get(game, -math.inf)
        if counts:
            self._counted_at[game] = now
            (self._deaths if died else self._failures)[game] += 1
        if not died:
            games = self._failed_on.setdefault(worker, [])
            if counts:
                games.append(game)
            if worker not in self.workers and len(set(games)) >= WORKER_GAMES:
                self.workers.add(worker)
                self._failures -= Counter(games)  # the worker was to blame, not the games
                return (
                    f"{worker} is quarantined: {', '.join(dict.fromkeys(games))} failed on it; the last one: {reason}"
                )
        enough = self._failures[game] >= GAME_FAILURES or self._deaths[game] >= GAME_DEATHS
        if not enough or game in self.games:
            return ""
        self.games.add(game)
        count = self._failures[game] + self._deaths[game]
        return f"{game} is quarantined after {count} failures in a row; the last one: {reason}"

    def failed_on(self, worker: str) -> frozenset[str]:
        """Return the games that failed on a worker since its last success, so that other workers try them."""
        return frozenset(self._failed_on.get(worker, ()))

    def succeed(self, game: str, worker: str) -> None:
        """Reset the counts of a game and a worker after a task was completed."""
        self._failures.pop(game, None)
        self._deaths.pop(game, None)
        self._failed_on.pop(worker, None)

    def state(self) -> dict[str, Any]:
        """Return plain data for `restore`, without workers: those of the next launch are new."""
        return {
            "quarantined": sorted(self.games),
            "in_a_row": dict(self._failures),
            "deaths_in_a_row": dict(self._deaths),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a state that `state` has returned."""
        self.games.update(state["quarantined"])
        self._failures = Counter(state["in_a_row"])
        self._deaths = Counter(state["deaths_in_a_row"])
