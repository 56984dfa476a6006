"""The runs of an evaluation that wait for a worker, and those that are given up after repeated failures."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Sequence

from leap_dist.evaluation.runs import Run
from leap_dist.server.leases import OpenLease
from leap_dist.server.quarantine import Quarantine

ATTEMPTS = 3
"""Number of failures after which a run is given up."""
DEATHS = 10
"""Number of deaths of worker processes without progress after which a run is given up: more than ATTEMPTS, because most
have other causes."""


class RunQueue:
    """The runs that no worker is working on, by index.

    Args:
        runs: all runs of the evaluation.
        waiting: indices of those without a result.
    """

    def __init__(self, runs: Sequence[Run], waiting: Iterable[int]) -> None:
        self.waiting = sorted(waiting)
        """Indices of the runs to be performed, ascending."""
        self.given_up: set[int] = set()
        """Indices of the runs that have failed too often, or whose game has."""
        self._runs = runs
        self._failures: Counter[int] = Counter()
        self._deaths: Counter[int] = Counter()  # since the last progress
        self._farthest: dict[int, int] = {}  # largest number of steps at a death, by index
        self._quarantine = Quarantine()

    @property
    def quarantined_games(self) -> list[str]:
        """Games that keep failing, sorted."""
        return sorted(self._quarantine.games)

    @property
    def quarantined_workers(self) -> list[str]:
        """Workers on which everything fails, sorted."""
        return sorted(self._quarantine.workers)

    def take(self, worker: str) -> int | None:
        """Remove and return the next run for a worker; None if no run is waiting.

        Games that have failed on the worker come last: a broken worker must not use up all attempts of a run.
        """
        if not self.waiting:
            return None
        avoid = self._quarantine.failed_on(worker)
        index = next((i for i in self.waiting if self._runs[i].game not in avoid), self.waiting[0])
        self.waiting.remove(index)
        return index

    def take_run(self, index: int) -> bool:
        """Remove a run that a worker is already performing. Returns False if it is not waiting."""
        if index not in self.waiting:
            return False
        self.waiting.remove(index)
        return True

    def give_back(self, index: int) -> None:
        """Queue a run again that ended without a result."""
        bisect.insort(self.waiting, index)

    def succeed(self, index: int, worker: str) -> None:
        """Record that a worker has completed a run."""
        self._quarantine.succeed(self._runs[index].game, worker)

    def fail(self, held: OpenLease, reason: str, now: float, *, died: bool = False) -> list[str]:
        """Count the failure of a run that was given back, or with `died` the death of the process that performed it.

        A run that fails repeatedly is given up, and so is a game. A worker on which everything fails gets no more
        runs. Returns an alert for each such decision. `now` is a reading of the clock that the leases use.

        A death resets the counts instead, as a success does, if the run had come farther than at any death before:
        it continues from its last state, and does not end processes each time.
        """
        index, run = held.lease.task.index, self._runs[held.lease.task.index]
        if died and held.steps > self._farthest.get(index, 0):
            self._farthest[index] = held.steps
            self._deaths.pop(index, None)
            self._quarantine.succeed(run.game, held.lease.worker)
            return []
        news = self._quarantine.fail(run.game, held.lease.worker, reason, granted=held.granted, now=now, died=died)
        alerts = [news] if news else []
        (self._deaths if died else self._failures)[index] += 1
        hopeless = {i for i in self.waiting if self._runs[i].game in self._quarantine.games}
        if self._failures[index] >= ATTEMPTS or self._deaths[index] >= DEATHS:
            alerts.append(f"{run.name} is given up: {reason}")
            hopeless.add(index)
        self.given_up |= hopeless
        self.waiting = [i for i in self.waiting if i not in hopeless]
        return alerts
