"""The book of leases: what it finds by its indexes is what a look at every lease would find."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from protocol import INITIAL, Clock, config, contribution, grant, serve

from leap_dist.protocol.messages import CurvePoint, Lease, Task
from leap_dist.server.leases import LeaseBook, OpenLease, describe
from leap_dist.storage import journal, run_directory


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


@pytest.mark.parametrize("seconds", [45.0, 10_000.0])
def test_leases_do_not_expire_while_the_server_itself_stands_still(tmp_path: Path, seconds: float) -> None:
    """Stopped, swapped out, or waiting for a disk: what its workers reported meanwhile has not been heard yet."""
    clock = Clock()
    server = serve(tmp_path, config(server__lease_seconds=20), clock=clock)
    lease = grant(server)
    clock.advance(10, server)
    clock.now += seconds
    server.tick()  # what the driver wanted comes first
    assert server.renew(lease.id, "i0", 10).proceed
    assert server.status()["silent"] == []


def test_a_silent_worker_is_found_after_the_server_stood_still(tmp_path: Path) -> None:
    clock = Clock()
    server = serve(tmp_path, config(server__lease_seconds=20), clock=clock)
    grant(server)
    clock.now += 45
    clock.advance(21, server)
    assert server.status()["silent"] == ["i0"]


def test_a_call_that_takes_long_costs_nobody_a_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it lasts, nobody else is heard: a disk that takes a minute to write."""
    clock = Clock()
    server = serve(tmp_path, config(server__lease_seconds=20), clock=clock)
    waiting, pushing = grant(server, "w0"), grant(server, "w1", "i1")
    write = journal.write_atomic

    def slow(*arguments: Any, **more: Any) -> None:
        clock.now += 60
        write(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(journal, "write_atomic", slow)
        assert server.push(contribution(pushing, INITIAL)).durable
    server.tick()
    assert server.renew(waiting.id, "i0", 10).proceed


@pytest.mark.parametrize(
    ("scores", "shown"),
    [
        ([], []),
        ([None], [0]),
        ([3.0], [0]),
        ([1.0, 2.0, None, None], [1, 3]),
        ([1.0, None, 2.0], [2]),
        ([None] * 3, [2]),
    ],
)
def test_a_status_shows_the_end_of_a_curve(tmp_path, scores, shown):
    """The newest score and the newest point are all that a table of workers needs."""
    server = serve(tmp_path, config())
    points = tuple(CurvePoint(100 * (n + 1), 1, score, {"loss": 0.5}) for n, score in enumerate(scores))
    pushed = replace(contribution(grant(server), INITIAL, final=False), curve=points)
    assert server.push(pushed).accepted
    assert server.status()["leases"][0]["curve"] == [points[n].plain() for n in shown]


def test_the_summary_of_many_workers_with_long_curves_can_be_read(tmp_path):
    """700 workers, whose tasks have reported 100 times."""
    names = ("loss", "policy_loss", "value_loss", "entropy")
    points = tuple(CurvePoint(50_000 * n, 9, n / 7, dict.fromkeys(names, n / 3)) for n in range(1, 101))
    leases = []
    for number in range(700):
        task = Task(number, "space_invaders", 3, 1, 5_000_000)
        lease = Lease(f"{number:06d}-0123abcd", task, f"w{number}", "0" * 32, 100, 60.0)
        newest = replace(contribution(lease, INITIAL, final=False), curve=points)
        leases.append(describe(OpenLease(lease, 1.0, 2.0, 5_000_000, 1, newest), 3.0))
    summary = {"state": "running", "tasks_wanted": 1000, "leases": leases}
    run_directory.write_summary(tmp_path, summary)
    assert run_directory.read_summary(tmp_path) == summary
    assert (tmp_path / "summary.json").stat().st_size < 700 * 1000
