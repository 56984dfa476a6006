"""The fixed sequence of tasks of a run, and what is left of it to lease."""

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
    """The task at position `index`, a pure function of its arguments.

    Each pass over the games draws every game once, in an order of its own, so that fast games are not drawn more
    often than slow ones; with `replace`, every draw is from all games. `failures` counts how often the task has failed
    by itself; each gives it another seed.
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
    """Hands out tasks in order: those that came back first, then new ones. Games in `quarantined` are left out."""

    def __init__(
        self, games: tuple[str, ...], quarantined: set[str], *, seed: int, steps: int, replace: bool = False
    ) -> None:
        self._games = games
        self._quarantined = quarantined
        self._replace = replace
        self._seed = seed
        self._steps = steps
        self.next = 0
        """Index of the first task never drawn."""
        self._returned: list[int] = []  # heap
        self._failures: Counter[int] = Counter()  # by task, until it is done

    def draw(self, limit: int | None = None, avoid: Container[str] = ()) -> Task | None:
        """The next task with an index below `limit`; None where there is none, or every game is quarantined.

        It is of a game in `avoid` only where no other is near.
        """
        put_off: list[Task] = []
        while len(put_off) <= 2 * len(self._games) and (chosen := self._next(limit)) is not None:
            put_off.append(chosen)
            if chosen.game not in avoid:
                break
        if put_off and put_off[-1].game in avoid:
            put_off.reverse()  # in the usual order then
        drawn = put_off.pop() if put_off else None
        for other in put_off:
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
        """The task will be drawn again, with the same seed."""
        heapq.heappush(self._returned, index)

    def fail(self, failed: Task) -> None:
        """The task will be drawn again, with another seed."""
        self._failures[failed.index] += 1
        self.give_back(failed.index)

    def succeed(self, done: Task) -> None:
        """The task is done."""
        self._failures.pop(done.index, None)

    @property
    def exhausted(self) -> bool:
        """No game is left to play."""
        return self._quarantined.issuperset(self._games)

    @property
    def waiting(self) -> list[int]:
        """Tasks that came back and can be drawn again, ascending."""
        return sorted(index for index in self._returned if self._task(index).game not in self._quarantined)

    def state(self) -> dict[str, Any]:
        """Plain data for `restore`; the tasks that came back are the caller's to add."""
        return {"next": self.next, "failures": list(self._failures.items())}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` returned."""
        self.next = state["next"]
        self._failures = Counter(dict(state["failures"]))

    def reconcile(self, candidates: set[int]) -> None:
        """Makes `candidates` the tasks that came back."""
        self._returned = sorted(candidates)  # a sorted list is a heap

    def _task(self, index: int) -> Task:
        failures = self._failures[index]
        return task(index, self._games, seed=self._seed, steps=self._steps, failures=failures, replace=self._replace)
