"""The book of leases: what it finds by its indexes is what a look at every lease would find."""

from __future__ import annotations

import random
from typing import Any

import pytest

from leap_dist.protocol.messages import Task
from leap_dist.server.leases import LeaseBook


class Unrecorded:
    """A lease store that keeps nothing."""

    def open_lease(self, lease_id: str, header: dict[str, Any]) -> None:
        pass

    def close_lease(self, lease_id: str) -> None:
        pass

    def leases(self) -> tuple[list[dict[str, Any]], list[str]]:
        return [], []


@pytest.mark.parametrize("seed", range(20))
def test_expired_leases_and_those_of_a_worker_are_what_a_look_at_all_of_them_finds(seed: int) -> None:
    chance, now = random.Random(seed), 0.0
    book = LeaseBook(Unrecorded(), "", lambda: now)
    seen_expired = 0
    for number in range(400):
        now += chance.random()
        action = chance.choice(("grant", "grant", "extend", "end", "look"))
        held = book.all()
        if action == "grant":
            task = Task(number, "pong", 0, 0, 1000)
            book.grant(task, f"w{chance.randrange(5)}", "i", 0, seconds=chance.choice((3.0, 10.0)))
        elif action == "extend" and held:
            book.extend(chance.choice(held))
        elif action == "end" and held:
            book.end(chance.choice(held), "failed")
        expected = [one for one in book.all() if one.deadline < now]
        if action == "look":
            assert book.expired() == expected
            seen_expired += len(expected)
        for worker in range(5):
            assert book.of(f"w{worker}") == [one for one in book.all() if one.lease.worker == f"w{worker}"]
    assert seen_expired
