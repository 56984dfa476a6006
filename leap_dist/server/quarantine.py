"""Who is left out because they keep failing: a game that fails on every worker, a worker on which every game fails."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

GAME_FAILURES = 3
"""Failures of a game, one after the other, that quarantine it: a task raised, fell silent, or sent what is unusable."""
GAME_DEATHS = 10
"""The same of deaths of the process that played it: more, because most have other reasons."""
WORKER_GAMES = 3
"""Different games that fail on a worker in a row and quarantine it. A run of fewer games blames the games."""


class Quarantine:
    """Counts failures in a row and says when they are enough. Any success ends the row."""

    def __init__(self) -> None:
        self.games: set[str] = set()
        self.workers: set[str] = set()
        self._failures: Counter[str] = Counter()  # by game
        self._deaths: Counter[str] = Counter()  # by game
        self._counted_at: dict[str, float] = {}  # by game, its last failure
        self._failed_on: dict[str, list[str]] = {}  # by worker, games

    def fail(self, game: str, worker: str, reason: str, *, granted: float, now: float, died: bool = False) -> str:
        """Counts a lease that ended badly. `died`: its process did, which nobody blames the worker's place for.

        Of failures at the same time, as when a switch fails, a game's first one counts: a lease that was granted
        before that is no further evidence. Returns who is quarantined for it and why, "" for nobody.
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
                self._failures -= Counter(games)  # it was not the games' fault
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
        """Games that failed on a worker since anything succeeded there: let others try them."""
        return frozenset(self._failed_on.get(worker, ()))

    def succeed(self, game: str, worker: str) -> None:
        """A task of that game came to its end on that worker."""
        self._failures.pop(game, None)
        self._deaths.pop(game, None)
        self._failed_on.pop(worker, None)

    def state(self) -> dict[str, Any]:
        """What `restore` takes, as plain data. Workers are not part of it: those of the next launch are others."""
        return {
            "quarantined": sorted(self.games),
            "in_a_row": dict(self._failures),
            "deaths_in_a_row": dict(self._deaths),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` returned."""
        self.games.update(state["quarantined"])
        self._failures = Counter(state["in_a_row"])
        self._deaths = Counter(state["deaths_in_a_row"])
