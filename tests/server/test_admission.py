"""How often workers report: laws of a server in simulated time, with as many as ten thousand of them."""

from __future__ import annotations

import heapq
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from protocol import INITIAL, Clock, config, contribution, grant, serve

from leap_dist.server.admission import WINDOW_SECONDS, BackPressure

LEASE = 60.0
HEARTBEAT = 2.0
SHARE = 0.5


class Seen(NamedTuple):
    """Of a stretch of simulated time."""

    reports: float
    """Share of the server's time that reports took."""
    intervals: list[float]
    """Between two reports of one worker, as the server saw them."""
    wait: float
    """What workers were told last."""


class Simulation:
    """A server that serves one call after the other, and workers that report every `interval` seconds or when told.

    `cost` seconds of a report, half of them before the call is there, as Ray's share is. `updates` a second take `busy`
    seconds each.
    """

    def __init__(self, *, cost: float, interval: float = HEARTBEAT, updates: float = 0.0, busy: float = 0.0) -> None:
        self.now = self.worked = 0.0
        self.cost, self.interval, self.busy = cost, interval, busy
        self.pace = BackPressure(SHARE, LEASE / 4, lambda: self.now, lambda: self.worked)
        self.random = np.random.default_rng(0)
        self.heard: dict[int, float] = {}
        self.calls: list[tuple[float, int]] = []  # when, and who; −1 is whoever makes meta-updates
        self.gap = 1 / updates if updates else 0.0
        if updates:
            self.calls.append((self.gap, -1))

    def join(self, count: int) -> None:
        """More workers, within one interval."""
        first = max(self.heard, default=-1) + 1
        for worker in range(first, first + count):
            self.heard[worker] = self.now
            heapq.heappush(self.calls, (self.now + self.random.uniform(0, self.interval), worker))

    def leave(self, count: int) -> None:
        """As many are gone."""
        for worker in list(self.heard)[:count]:
            del self.heard[worker]

    def run(self, seconds: float) -> Seen:
        end, on_reports, intervals, wait = self.now + seconds, 0.0, [], 0.0
        started = self.now
        while self.calls and self.calls[0][0] < end:
            due, worker = heapq.heappop(self.calls)
            if worker >= 0 and worker not in self.heard:
                continue
            self.now = max(self.now, due)
            if worker < 0:
                with self.pace.call():
                    self._work(self.busy)
                heapq.heappush(self.calls, (due + self.gap, worker))
                continue
            self._work(self.cost / 2)
            with self.pace.call(reports=1):
                self._work(self.cost / 2)
                wait = self.pace.wait(len(self.heard))
            on_reports += self.cost
            intervals.append(self.now - self.heard[worker])
            self.heard[worker] = self.now
            # Training goes on in updates of about 0.1 s, and a report is sent after one.
            heapq.heappush(self.calls, (self.now + max(self.interval, wait) + self.random.uniform(0, 0.1), worker))
        self.now = max(self.now, end)
        return Seen(on_reports / (self.now - started), intervals, wait)

    def _work(self, seconds: float) -> None:
        self.now += seconds
        self.worked += seconds


@pytest.mark.parametrize("workers", [10, 100, 1000, 10_000])
@pytest.mark.parametrize("cost", [0.0002, 0.0007])
def test_reports_take_what_is_left_of_the_servers_time_and_no_lease_expires(workers, cost):
    """To 5 % of the target; at low load every interval is the configured one."""
    world = Simulation(cost=cost)
    world.join(workers)
    before = world.run(30)
    seen = world.run(40)
    alone = workers * cost / HEARTBEAT
    assert seen.reports <= 1.05 * SHARE
    assert max([*before.intervals, *seen.intervals]) < LEASE / 2
    if alone < 0.9 * SHARE:
        assert seen.wait == before.wait == 0
        assert max(seen.intervals) < HEARTBEAT + 0.1 + 0.05 * HEARTBEAT
    elif alone > 1.1 * SHARE:
        assert seen.reports > 0.9 * SHARE, "and not less than it may be"
        assert seen.wait == pytest.approx(workers * cost / SHARE, rel=0.02)


def test_meta_updates_come_first_and_reports_keep_a_tenth():
    world = Simulation(cost=0.0005, updates=1, busy=0.3)
    world.join(2000)
    world.run(60)
    assert world.run(60).reports == pytest.approx(SHARE - 0.3, rel=0.1)
    assert world.pace.busy_share == pytest.approx(SHARE, rel=0.15)
    world.busy = 0.8
    world.run(120)
    seen = world.run(60)
    assert seen.reports == pytest.approx(0.5 * 0.1 * 1.33, rel=0.15), "20 s apart they would take 0.05, but 15 is most"
    assert seen.wait == LEASE / 4
    assert max(seen.intervals) < LEASE / 2


def test_what_cannot_be_had_within_a_lease_is_not_asked_for():
    world = Simulation(cost=0.002)
    world.join(5000)
    world.run(60)
    seen = world.run(60)
    assert seen.wait == LEASE / 4
    assert max(seen.intervals) < LEASE / 2
    assert seen.reports == pytest.approx(5000 * 0.002 / 15, rel=0.05)


def test_workers_that_come_are_paced_at_once_and_when_they_leave_the_rest_reports_as_before():
    world = Simulation(cost=0.0005)
    world.join(100)
    assert world.run(20).wait == 0
    world.join(6000)
    world.run(2 * WINDOW_SECONDS)
    crowd = world.run(30)
    assert crowd.wait == pytest.approx(6100 * 0.0005 / SHARE, rel=0.05)
    world.leave(6000)
    world.run(60)
    calm = world.run(20)
    assert calm.wait == 0
    assert max(calm.intervals) < HEARTBEAT + 0.2


def test_many_who_start_at_the_same_moment_do_not_swing():
    """Their reports come in waves: the server must not be taken for idle in between."""
    world = Simulation(cost=0.0007)
    world.join(8000)
    world.calls = [(0.0, worker) for _, worker in world.calls]
    world.run(30)
    shares = [world.run(2 * 0.0007 * 8000 / SHARE).reports for _ in range(4)]
    assert max(shares) <= 1.05 * SHARE
    assert min(shares) >= 0.85 * SHARE


def test_a_call_within_a_call_counts_once_and_one_that_raises_counts_too():
    now = [0.0]
    pace = BackPressure(1.0, 15.0, lambda: now[0], lambda: 0.0)

    def broken():
        with pace.call():
            now[0] += 2.0
            with pace.call(reports=1):
                now[0] += 1.0
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        broken()
    now[0] += 3.0
    with pace.call():
        pass
    assert pace.busy_share == 0.5


def paced(tmp_path, cost=0.05, **settings):
    """A server that 40 workers report to every 0.1 s, each time at that cost, until it tells them to wait."""
    clock, worked = Clock(), [0.0]
    server = serve(tmp_path, config(workers=40, meta_updates=100, **settings), clock=clock, work=lambda: worked[0])
    leases = [grant(server, f"w{n}", "i0") for n in range(40)]
    for _ in range(60):
        for lease in leases:
            worked[0] += cost
            ack = server.renew(lease.id, "i0", 0)
        clock.now += 2.0
    return server, leases, ack, clock


def test_the_server_says_so_in_every_answer_to_a_report_but_never_to_a_final_contribution(tmp_path):
    server, leases, ack, clock = paced(tmp_path)
    assert ack.wait == pytest.approx(40 * 0.05 / 0.5)
    partial = contribution(leases[0], INITIAL, seq=1, final=False)
    assert server.push(partial).wait == pytest.approx(4.0, rel=0.1)
    assert server.push(partial).wait == pytest.approx(4.0, rel=0.1), "a duplicate"
    assert server.push(contribution(leases[0], INITIAL, seq=2)).wait == 0
    status = server.status()
    assert status["pace_seconds"] == pytest.approx(39 * 0.05 / 0.5, rel=0.1)
    assert status["busy_share"] == pytest.approx(1.0, rel=0.05)
    assert server.renew("000000-unknown", "i0", 0).wait == 0
    clock.now += 61
    assert server.push(replace(partial, seq=3)).wait == 0, "it has no lease any more"


@pytest.mark.parametrize(("share", "lease", "wait"), [(1.0, 60.0, 0.0), (0.1, 60.0, 15.0), (0.1, 20.0, 5.0)])
def test_the_share_is_a_setting_and_a_lease_the_limit(tmp_path, share, lease, wait):
    settings = {"server__busy_share": share, "server__lease_seconds": lease, "worker__heartbeat_seconds": 1.0}
    _, _, ack, _ = paced(tmp_path, cost=0.04, **settings)
    assert ack.wait == wait
