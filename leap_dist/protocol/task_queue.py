"""The fixed sequence of a run's tasks, and the queue of those still to be leased."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Container
from typing import Any

import numpy as np

from leap_dist.protocol.messages import Task


def task(
    index: int, games: tuple[str, ...], *, seed: int, steps: int, failures: int = 0, replace: bool = False
) -> Task:
    """Return the task at position `index`, a pure function of the arguments.

    Each pass over the games draws every game once, in a new order, so that fast games are not drawn more often.

    Args:
        index: position in the sequence.
        games: games to draw from.
        seed: seed of the run.
        steps: length of a task in agent steps.
        failures: number of times the task itself has failed; each failure gives it another seed.
        replace: draw every time from all games, with replacement.
    """
    if replace:
        draws = np.random.default_rng(seed).integers(len(games), size=index + 1)
        chosen, visit = int(draws[index]), int((draws[:index] == draws[index]).sum())
    else:
        visit, position = divmod(index, len(games))
        chosen = int(np.random.default_rng((seed, visit)).permutation(len(games))[position])
    own_seed = int(np.random.SeedSequence((seed, index, failures)).generate_state(1)[0])
    return Task(index, games[chosen], visit, own_seed, steps)


class TaskQueue:
    """Hands out tasks in order: those that were given back first, then new ones.

    Args:
        games: games to draw from.
        quarantined: games whose tasks are left out. The set is read at every draw, so its owner may change it.
        seed: seed of the run.
        steps: length of a task in agent steps.
        replace: draw games with replacement.
    """

    def __init__(
        self, games: tuple[str, ...], quarantined: set[str], *, seed: int, steps: int, replace: bool = False
    ) -> None:
        self._games = games
        self._quarantined = quarantined
        self._replace = replace
        self._seed = seed
        self._steps = steps
        self.next = 0
        """Index of the first task that has never been drawn."""
        self._returned: list[int] = []  # heap
        self._failures: Counter[int] = Counter()  # by task, until it is done

    def draw(self, limit: int | None = None, avoid: Container[str] = ()) -> Task | None:
        """Return the next task with an index below `limit`, or None if there is none.

        A task of a game in `avoid` is drawn only if no task of another game follows soon.
        """
        skipped: list[Task] = []
        while len(skipped) <= 2 * len(self._games) and (chosen := self._next(limit)) is not None:
            skipped.append(chosen)
            if chosen.game not in avoid:
                break
        if skipped and skipped[-1].game in avoid:
            skipped.reverse()  # then take the first one
        drawn = skipped.pop() if skipped else None
        for other in skipped:
            self.give_back(other.index)
        return drawn

    def _next(self, limit: int | None) -> Task | None:
        while self._returned:
            chosen = self._task(heapq.heappop(self._returned))
            if chosen.game not in self._quarantined:
                return chosen
        while not self.exhausted and (limit is None or self.next < limit):
            chosen = self._task(self.next)
            self.next += 1
            if chosen.game not in self._quarantined:
                return chosen
        return None

    def give_back(self, index: int) -> None:
        """Queue a task again, with the same seed."""
        heapq.heappush(self._returned, index)

    def fail(self, failed: Task) -> None:
        """Queue a task again, with another seed."""
        self._failures[failed.index] += 1
        self.give_back(failed.index)

    def succeed(self, done: Task) -> None:
        """Forget the failures of a task that is done."""
        self._failures.pop(done.index, None)

    @property
    def exhausted(self) -> bool:
        """Whether every game is in quarantine."""
        return self._quarantined.issuperset(self._games)

    @property
    def waiting(self) -> list[int]:
        """Indices of the tasks that were given back and can be drawn again, ascending."""
        return sorted(index for index in self._returned if self._task(index).game not in self._quarantined)

    def state(self) -> dict[str, Any]:
        """Return plain data for `restore`, without the tasks that were given back."""
        return {"next": self.next, "failures": list(self._failures.items())}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a state that `state` has returned."""
        self.next = state["next"]
        self._failures = Counter(dict(state["failures"]))

    def reconcile(self, candidates: set[int]) -> None:
        """Replace the set of tasks that were given back by `candidates`."""
        self._returned = sorted(candidates)  # a sorted list is a heap

    def _task(self, index: int) -> Task:
        failures = self._failures[index]
        return task(index, self._games, seed=self._seed, steps=self._steps, failures=failures, replace=self._replace)
