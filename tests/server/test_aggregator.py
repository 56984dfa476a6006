"""Aggregators between workers and the real server: the same result, fewer calls, nothing lost with one that dies."""

from __future__ import annotations

import errno
import itertools
import math
import os
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
from crashes import Killed
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol import INITIAL, MODES, Clock, Worker, config, contribution, fast_folder, grant, ledger, serve

from leap_dist.config.loading import ConfigError
from leap_dist.protocol.messages import Ack, Contribution, Lease, Renewal, Task
from leap_dist.server import aggregator
from leap_dist.server.aggregator import REMEMBERED_SECONDS, SOON_SECONDS, Aggregator
from leap_dist.storage import atomic, journal

GATHER = 5.0
PLAIN = {
    "mode": "stream",
    "meta__optimizer": "sgd",
    "meta__learning_rate": 0.1,
    "meta__staleness": "constant",
    "meta__contribution_clip": 0,
    "meta__max_staleness": 1000,
}
"""φ is the sum of what was pushed."""


class Crowd:
    """Workers in step: in a round whoever has no task leases one, then all push one contribution, in turn."""

    def __init__(self, run, count: int, pushes: int = 1) -> None:
        self.workers = [Worker(run, f"w{n}", lambda task: 1 + (pushes + task.index) % pushes) for n in range(count)]
        self.acknowledged: set[tuple[str, int]] = set()

    def play(self, server, deliver, rounds: int = 1000) -> None:
        """`deliver` takes the round's contributions and returns their answers, None for those that got none."""
        for _ in range(rounds):
            for worker in self.workers:
                if not worker.todo and not server.finished:
                    worker.step(server)
            busy = [worker for worker in self.workers if worker.todo]
            if not busy:
                return
            for worker, ack in zip(busy, deliver([worker.todo[0] for worker in busy]), strict=True):
                self.settle(worker, ack)
        assert rounds < 1000, "the run does not end"

    def settle(self, worker: Worker, ack: Ack | None) -> None:
        if ack is None or ack.reason == "storage":
            return  # and pushes the same again
        sent = worker.todo.pop(0)
        if ack.durable:
            self.acknowledged.add((sent.lease, sent.seq))
        if not ack.proceed:
            worker.todo = []


def straight(server):
    """Every worker talks to the server itself."""
    return lambda sent: [server.push(one) for one in sent]


def through(nodes: Sequence[Aggregator], clock: Clock):
    """Workers of one round on these nodes in turn, so that the server hears of them in the same order."""

    def deliver(sent: list[Contribution]) -> list[Ack | None]:
        answers: list[Future[Ack]] = []
        share = math.ceil(len(sent) / len(nodes))
        for n, node in enumerate(nodes):
            answers += [node.push_soon(one) for one in sent[n * share : (n + 1) * share]]
            clock.now += GATHER
            node.tick()
        return [answer.result(0) for answer in answers]

    return deliver


def end_of(folder, run, crowd: Crowd, make=straight):
    server = serve(folder, run)
    crowd.play(server, make(server))
    assert server.finished
    server.close()
    return server


# --- the same result -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", ["float32", "int8"])
@pytest.mark.parametrize("mode", ["sync", "buffered", "async", "delayed-nesterov"])
@pytest.mark.parametrize(("workers", "nodes"), [(1, 1), (5, 1), (6, 2), (7, 3)])
def test_initialization_and_ledger_are_bit_for_bit_the_same_for_the_same_order(tmp_path, mode, workers, nodes, wire):
    run = config(**MODES[mode], worker__wire=wire, workers=8, meta_updates=5, meta__batch_size=3)
    alone = end_of(tmp_path / "alone", run, Crowd(run, workers, 2))
    clock = Clock()
    together = end_of(
        tmp_path / "together",
        run,
        Crowd(run, workers, 2),
        lambda server: through([Aggregator(server, GATHER, clock) for _ in range(nodes)], clock),
    )
    assert np.array_equal(alone.snapshot()[1], together.snapshot()[1])
    assert ledger(tmp_path / "alone") == ledger(tmp_path / "together")
    assert alone.status()["agent_steps"] == together.status()["agent_steps"]


@settings(max_examples=30)
@given(
    order=st.lists(st.integers(0, 35), max_size=60),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    heads=st.sampled_from([{}, {"meta_learner": "finetune-multi"}]),
    wire=st.sampled_from(["float32", "int16"]),
)
def test_a_stream_ends_in_the_same_sum_with_fewer_meta_updates(order, sizes, heads, wire):
    """Twelve tasks of three pushes, in any order, lost and repeated, in deliveries of any size; then the finals."""
    run = config(**PLAIN, **heads, worker__wire=wire, workers=20, meta_updates=4, meta__batch_size=3)
    ends = []
    for together in (False, True):
        with fast_folder() as folder:
            server, clock, sent = serve(folder, run), Clock(), []
            node = Aggregator(server, GATHER, clock)
            for n in range(12):
                sent += Worker(run, f"w{n}", lambda task: 3).train(grant(server, f"w{n}", f"w{n}"), INITIAL, None)
            queue = [sent[index] for index in [*order, *range(2, 36, 3)]]
            for number in range(len(queue)):
                size = sizes[number % len(sizes)] if together else 1
                batch, queue = queue[:size], queue[size:]
                if together:
                    assert all(ack.accepted for ack in through([node], clock)(batch))
                else:
                    assert all(server.push(one).accepted for one in batch)
            assert server.finished
            assert server.status()["contributions_waiting"] == 0
            ends.append((server.snapshot()[1], {game: server.head(game) for game in run.games}, server.version))
            server.close()
    (phi, kept, versions), (phi_together, kept_together, versions_together) = ends
    np.testing.assert_allclose(phi_together, phi, rtol=1e-5, atol=1e-5)
    for game, head in kept.items():
        if head is not None:
            np.testing.assert_allclose(kept_together[game], head, rtol=1e-5, atol=1e-4)
    assert versions_together <= versions


def test_in_a_stream_each_contribution_keeps_its_own_clip_and_weight(tmp_path):
    choices = {**PLAIN, "meta__staleness": "inverse", "meta__contribution_clip": 2.0, "meta__batch_size": 1}
    server = serve(tmp_path, config(**choices, workers=20, meta_updates=10))
    old = grant(server, "old", "old")
    for seq in (1, 2):
        server.push(contribution(grant(server), np.ones(8, np.float32), seq=seq))
    new, huge = grant(server, "new", "new"), grant(server, "huge", "huge")
    ones = np.ones(8, np.float32)
    together = [contribution(lease, factor * ones) for lease, factor in ((old, 1), (new, 1), (huge, 100))]
    before = server.snapshot()[1]
    assert [ack.durable for ack in server.push_together(together)] == [True] * 3
    lines = [line for line in server.ledger(0)[0] if line["version_before"] == 2]
    assert [(line["weight"], line["clip"]) for line in lines] == [(0.5, 1), (1, 1), (1, pytest.approx(0.02))]
    np.testing.assert_allclose(before - server.snapshot()[1], 0.1 * (0.5 + 1 + 2) * ones, rtol=1e-5)


@st.composite
def deliveries(draw):
    """Contributions of three leases in any order, some of them wrong, cut into deliveries."""
    kinds = st.sampled_from(["", "", "", "", "manifest", "incarnation", "nan", "shape", "lease", "base"])
    pushes = draw(st.lists(st.tuples(st.integers(0, 8), kinds), min_size=1, max_size=16))
    cuts = draw(st.sets(st.integers(1, 16)))
    return pushes, sorted({0, len(pushes), *(cut for cut in cuts if cut < len(pushes))})


SPOIL = {
    "manifest": {"manifest": "0" * 16},
    "incarnation": {"incarnation": "older"},
    "nan": {"vector": np.full(8, np.nan, np.float32)},
    "shape": {"vector": np.zeros(7, np.float32)},
    "lease": {"lease": "000099-0"},
    "base": {"base_version": 99},
}


@settings(max_examples=60)
@given(given_=deliveries(), mode=st.sampled_from(["sync", "buffered", "async", "fedasync"]), keep=st.booleans())
def test_what_comes_together_is_answered_as_if_it_came_one_by_one(given_, mode, keep):
    """Answers, refusals, counters, ledger, φ."""
    pushes, cuts = given_
    ends = []
    for together in (False, True):
        with fast_folder() as folder:
            choices = {"meta__max_staleness": 50, "server__on_lost": "keep" if keep else "retry"}
            run = config(**MODES[mode], **choices, meta_updates=2, meta__batch_size=3)
            server = serve(folder, run)
            parts = []
            for name in ("w0", "w1", "w2"):
                lease = grant(server, name, name)
                parts += Worker(run, name, lambda task: 3).train(lease, server.snapshot()[1], None)
            sent = [replace(parts[index], **SPOIL.get(kind, {})) for index, kind in pushes]
            acks: list[Ack] = []
            for first, last in itertools.pairwise(cuts):
                batch = sent[first:last]
                acks += server.push_together(batch) if together else [server.push(one) for one in batch]
            status = server.status()
            hidden = ("alerts", "pushes", "push_ms", "update_ms", "checkpoint_age", "leases")
            server.close()
            ends.append(
                (
                    acks,
                    {k: v for k, v in status.items() if k not in hidden},
                    [{**lease, "lease": ""} for lease in status["leases"]],
                    ledger(folder) if (folder / "ledger.jsonl").exists() else [],
                    server.snapshot()[1].tolist(),
                )
            )
    assert ends[0] == ends[1]


# --- what it costs the server --------------------------------------------------------------------------------------


def count_flushes(monkeypatch) -> list[str]:
    seen: list[str] = []
    for module in (atomic, journal):
        flush = module.sync_directory
        monkeypatch.setattr(module, "sync_directory", lambda path, flush=flush: (seen.append(path.name), flush(path)))
    return seen


@pytest.mark.parametrize("mode", ["sync", "buffered", "stream"])
def test_the_journals_directory_is_flushed_once_for_all_and_before_a_meta_update(tmp_path, monkeypatch, mode):
    run = config(**MODES[mode], workers=20, meta_updates=2, meta__batch_size=6)
    server = serve(tmp_path, run)
    count = 6 if mode == "sync" else 10  # a batch, or more
    leases = [grant(server, f"w{n}", f"w{n}") for n in range(count)]
    sent = [Worker(run, lease.worker).train(lease, INITIAL, None)[0] for lease in leases]
    seen = count_flushes(monkeypatch)
    assert all(ack.durable for ack in server.push_together(sent))
    journals = [n for n, name in enumerate(seen) if name == "journal"]
    # buffered makes a meta-update of the first six, and four entries follow.
    assert len(journals) == (2 if mode == "buffered" else 1)
    assert server.version == 1
    assert journals[0] < min(n for n, name in enumerate(seen) if name != "journal")
    assert len(server._state.backlog.journal.orders()) == count


@pytest.mark.parametrize("mode", ["sync", "buffered", "stream"])
def test_what_could_not_be_flushed_is_not_called_durable_and_counts_once_when_it_is_sent_again(
    tmp_path, monkeypatch, mode
):
    run = config(**MODES[mode], workers=20, meta_updates=2, meta__batch_size=3)
    server = serve(tmp_path, run)
    sent = [Worker(run, f"w{n}").train(grant(server, f"w{n}", f"w{n}"), INITIAL, None)[0] for n in range(2)]

    def full(path):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "sync_directory", full)
        acks = server.push_together(sent)
        assert {(ack.accepted, ack.durable, ack.reason, ack.proceed) for ack in acks} == {
            (False, False, "storage", True)
        }
        assert server.push(sent[0]).reason == "storage", "nor is what was received before"
        server.tick()
        assert server.version == 0
    acks = [*server.push_together(sent), server.push(sent[0])]
    assert [(ack.durable, ack.reason) for ack in acks] == [(True, "duplicate")] * 3
    server.tick()
    assert server.status()["tasks"] + server.status()["tasks_waiting"] == 2


def test_there_is_one_call_in_an_interval_however_many_workers_report(tmp_path):
    clock = Clock()
    server = serve(tmp_path, config(workers=64, meta_updates=100), clock=clock)
    node = Aggregator(server, GATHER, clock)
    leases = [grant(server, f"w{n}", "i0") for n in range(64)]
    for step in range(1000):  # a hundred seconds, in which each reports every two
        clock.now += 0.1
        for n, lease in enumerate(leases):
            if (step + n) % 20 == 0:
                node.renew_soon(lease.id, "i0", 10 * step)
        node.tick()
    first = math.ceil(2 / 0.1)  # every worker's first report is waited for; those of a tenth of a second share a call
    assert node.deliveries <= 100 / GATHER + first
    assert server.status()["leases"][0]["steps"] >= 9000
    before = node.deliveries
    for step in range(500):
        clock.now += 0.1
        node.renew_soon(leases[step % 64].id, "i0", 10_000)
        node.tick()
    assert node.deliveries - before <= 50 / GATHER + 1
    assert len(server.status()["leases"]) == 64


# --- what it promises ----------------------------------------------------------------------------------------------


class Recorder:
    """Answers everything, and keeps what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[Contribution], list[Renewal]]] = []
        self.changes: dict = {}
        self.error: Exception | None = None

    def push_together(self, contributions, renewals):
        self.calls.append((list(contributions), list(renewals)))
        if self.error:
            raise self.error
        answers = [Ack(True, one.final, "", not one.final, len(self.calls)) for one in contributions]
        answers += [Ack(True, False, "", True, len(self.calls)) for _ in renewals]
        return [replace(ack, **self.changes) for ack in answers]

    def snapshot(self):
        return 7, INITIAL


def recorded():
    clock, server = Clock(), Recorder()
    return Aggregator(server, GATHER, clock), server, clock


def lease_of(number: int = 0) -> Lease:
    return Lease(f"00000{number}-00000000", Task(number, "pong", 0, 1, 100), f"w{number}", f"i{number}", 0, 60.0)


def partial(number: int = 0, seq: int = 1, **changes) -> Contribution:
    return contribution(lease_of(number), INITIAL, seq=seq, final=False, **changes)


def first_report(node: Aggregator, clock: Clock, number: int = 0, seq: int = 1) -> None:
    waiting = node.push_soon(partial(number, seq))
    clock.now += SOON_SECONDS
    node.tick()
    assert waiting.done()


def test_the_first_report_of_a_lease_waits_for_the_server_and_later_ones_do_not():
    node, server, clock = recorded()
    waiting = node.renew_soon("l", "i", 5)
    assert not waiting.done()
    assert node.tick() == pytest.approx(SOON_SECONDS), "others may join in"
    assert not server.calls
    clock.now += SOON_SECONDS
    assert node.tick() == math.inf
    assert waiting.result(0).version == 1
    assert node.renew_soon("l", "i", 6).result(0).version == 1
    assert node.tick() == pytest.approx(GATHER)
    assert len(server.calls) == 1
    assert not node.renew_soon("l", "other", 6).done(), "another incarnation is another question"
    assert node.snapshot()[0] == 7


def test_only_the_newest_contribution_of_a_lease_is_delivered_and_a_renewal_only_where_it_came_later():
    node, server, clock = recorded()
    first_report(node, clock)
    for seq in (2, 4, 3):
        assert node.push_soon(partial(0, seq)).result(0).accepted
    node.renew_soon(lease_of(1).id, "i1", 5)
    node.push_soon(partial(1, 1))
    node.push_soon(partial(2, 1))
    node.renew_soon(lease_of(2).id, "i2", 500)
    clock.now += SOON_SECONDS
    node.tick()
    pushed, renewed = server.calls[-1]
    assert [(one.lease, one.seq) for one in pushed] == [(lease_of(n).id, seq) for n, seq in ((0, 4), (1, 1), (2, 1))]
    assert renewed == [Renewal(lease_of(2).id, "i2", 500)]
    clock.now += 100
    node.tick()
    assert len(server.calls) == 2, "with nothing to say nothing is said"


def test_nothing_is_called_durable_that_only_the_aggregator_has():
    node, server, clock = recorded()
    server.changes = {"durable": True}
    waiting = node.push_soon(partial(0, 1))
    clock.now += SOON_SECONDS
    node.tick()
    assert waiting.result(0).durable
    assert not node.push_soon(partial(0, 2)).result(0).durable
    assert not node.push_soon(contribution(lease_of(0), INITIAL, seq=3)).done(), "a final one is answered by the server"


def test_final_contributions_share_a_delivery_and_keep_their_order():
    node, server, clock = recorded()
    for n in (0, 1, 2):
        first_report(node, clock, n)
    node.push_soon(partial(2, 2))
    waiting = [node.push_soon(contribution(lease_of(n), INITIAL, seq=3)) for n in (1, 2, 0)]
    again = node.push_soon(contribution(lease_of(1), INITIAL, seq=3))
    clock.now += SOON_SECONDS
    node.tick()
    assert [one.result(0).durable for one in (*waiting, again)] == [True] * 4
    assert [(one.lease, one.final) for one in server.calls[-1][0]] == [(lease_of(n).id, True) for n in (1, 2, 0)]


@pytest.mark.parametrize("how", ["fenced", "stopped"])
def test_whoever_is_not_to_go_on_is_told_at_the_next_call(how):
    node, server, clock = recorded()
    first_report(node, clock)
    server.changes = {"proceed": False, "accepted": how == "stopped", "reason": "" if how == "stopped" else "expired"}
    assert node.push_soon(partial(0, 2)).result(0).proceed, "the server has not been asked yet"
    clock.now += GATHER
    node.tick()
    for answer in (node.push_soon(partial(0, 3)), node.renew_soon(lease_of().id, "i0", 9)):
        assert not answer.result(0).proceed
        assert answer.result(0).reason == server.changes["reason"]


def test_a_fenced_worker_hears_of_it_from_the_real_server(tmp_path):
    clock = Clock()
    server = serve(tmp_path, config(), clock=clock)
    node = Aggregator(server, GATHER, clock)
    lease = grant(server)
    node.renew_soon(lease.id, "i0", 1)
    clock.now += 1
    node.tick()
    server.release("i0")
    node.renew_soon(lease.id, "i0", 2)
    clock.now += GATHER
    node.tick()
    ack = node.renew_soon(lease.id, "i0", 3).result(0)
    assert (ack.accepted, ack.proceed, ack.reason) == (False, False, "worker-lost")


def test_an_aggregator_keeps_no_lease_alive_whose_worker_is_silent(tmp_path):
    clock = Clock()
    server = serve(tmp_path, config(workers=4, meta_updates=10, server__lease_seconds=30.0), clock=clock)
    node = Aggregator(server, GATHER, clock)
    silent, lively = grant(server, "silent", "i0"), grant(server, "lively", "i1")
    node.renew_soon(silent.id, "i0", 1)
    heard = clock.now
    while clock.now < heard + 30 + GATHER + 1:
        node.renew_soon(lively.id, "i1", 1)
        clock.now += 1.0
        node.tick()
        server.tick()
    assert [held["lease"] for held in server.status()["leases"]] == [lively.id]
    assert server.renew(silent.id, "i0", 2).reason == "expired"


def test_what_the_server_raises_goes_to_those_who_wait_and_the_next_report_asks_again():
    node, server, clock = recorded()
    first_report(node, clock, 0)
    server.error = RuntimeError("the server is gone")
    node.push_soon(partial(0, 2))
    waiting = node.push_soon(partial(1))
    given_up = node.push_soon(partial(2))
    given_up.cancel()
    clock.now += SOON_SECONDS
    node.tick()
    with pytest.raises(RuntimeError, match="is gone"):
        waiting.result(0)
    server.error = None
    later = node.push_soon(partial(0, 3))
    assert not later.done(), "nobody knows whether its lease is still open"
    clock.now += SOON_SECONDS
    node.tick()
    assert later.result(0).accepted


def test_a_lease_that_nobody_speaks_of_is_forgotten():
    node, _, clock = recorded()
    first_report(node, clock, 0)
    clock.now += REMEMBERED_SECONDS + 1
    first_report(node, clock, 1)
    assert len(node._known) == 1
    assert not node.push_soon(partial(0, 2)).done()


def test_packed_contributions_stay_packed():
    node, server, clock = recorded()
    sent = contribution(lease_of(), INITIAL).quantized(8)
    node.push_soon(sent)
    clock.now += SOON_SECONDS
    node.tick()
    assert server.calls[0][0][0].packed is sent.packed


def test_more_than_a_quarter_of_a_lease_is_refused():
    with pytest.raises(ConfigError, match=r"server\.gather_seconds: 20 is more than a quarter.*use at most 5"):
        config(server__gather_seconds=20)


# --- one that dies -------------------------------------------------------------------------------------------------


class Gone(RuntimeError):
    """The aggregator's process, and what it had gathered."""


@pytest.mark.parametrize("answered", [True, False], ids=["before the answer", "before the delivery"])
@pytest.mark.parametrize("mode", ["sync", "stream"])
def test_an_aggregator_that_dies_loses_nothing_and_nothing_counts_twice(tmp_path, mode, answered):
    """At each of its deliveries: its workers push the same again, at first to the server itself, then to a new one."""
    choices = {**PLAIN, "mode": mode} if mode == "stream" else {"mode": mode}
    run = config(**choices, workers=8, meta_updates=3, meta__batch_size=3)
    alone = end_of(tmp_path / "alone", run, Crowd(run, 4, 2))
    at = 0
    while True:
        clock, crowd, count = Clock(), Crowd(run, 4, 2), [0]
        server = serve(tmp_path / str(at), run)

        class Dying:
            def push_together(self, contributions, renewals, server=server, count=count, at=at):
                count[0] += 1
                if count[0] - 1 != at:
                    return server.push_together(contributions, renewals)
                if answered:
                    server.push_together(contributions, renewals)
                raise Gone

        nodes, died = [Aggregator(Dying(), GATHER, clock)], [False]

        def deliver(sent, nodes=nodes, clock=clock, server=server, died=died):
            try:
                return through(nodes, clock)(sent)
            except Gone:
                died[0] = True
                nodes[0] = Aggregator(server, GATHER, clock)
                return [server.push(one) if n % 2 else None for n, one in enumerate(sent)]

        crowd.play(server, deliver)
        assert server.finished
        applied = [(line["lease"], line["seq"]) for line in server.ledger(0)[0]]
        assert len(applied) == len(set(applied))
        assert crowd.acknowledged <= set(applied)
        if mode == "sync":
            assert np.array_equal(server.snapshot()[1], alone.snapshot()[1])
        else:
            finals = sum(line["final"] for line in server.ledger(0)[0])
            assert finals == run.total_tasks
        server.close()
        shutil.rmtree(tmp_path / str(at))
        if not died[0]:
            break
        at += 1
    assert at >= 3


def deadly(call, count: list[int], at: int):
    """`call`, whose call number `at` is the end of the process."""

    def wrapped(*arguments):
        count[0] += 1
        if count[0] - 1 == at:
            raise Killed
        return call(*arguments)

    return wrapped


@pytest.mark.parametrize("mode", ["sync", "buffered", "stream"])
def test_a_server_killed_at_any_write_of_a_delivery_has_what_it_acknowledged_once(monkeypatch, mode):
    """Killed before each fsync, rename, removal; then the workers push again, one by one."""
    run = config(**MODES[mode], workers=8, meta_updates=2, meta__batch_size=2, server__keep_checkpoints=2)
    at = 0
    with fast_folder() as folder:
        alone = end_of(folder / "alone", run, Crowd(run, 4))
        while True:
            here, crowd, killed, count = folder / str(at), Crowd(run, 4), [], [0]
            held = [serve(here, run)]

            class Server:
                """Whichever lives."""

                def __getattr__(self, name, held=held):
                    return getattr(held[0], name)

            def deliver(sent, killed=killed, held=held, here=here, count=count, at=at):
                if killed:
                    return [held[0].push(one) for one in sent]
                with monkeypatch.context() as patch:
                    for owner, name in ((os, "fsync"), (os, "replace")):
                        patch.setattr(owner, name, deadly(getattr(owner, name), count, at))
                    try:
                        return held[0].push_together(sent)
                    except Killed:
                        killed.append(True)
                held[0].close()
                held[0] = serve(here, run)
                return [None] * len(sent)

            crowd.play(Server(), deliver)
            server = held[0]
            assert server.finished
            applied = [(line["lease"], line["seq"]) for line in server.ledger(0)[0]]
            assert len(applied) == len(set(applied))
            assert crowd.acknowledged <= set(applied)
            if mode == "sync":
                assert np.array_equal(server.snapshot()[1], alone.snapshot()[1]), at
                assert ledger(here) == ledger(folder / "alone")
            else:
                assert sum(line["final"] for line in server.ledger(0)[0]) == run.total_tasks
            server.close()
            shutil.rmtree(here)
            if not killed:
                break
            at += 1
    assert at > 20


# --- threads -------------------------------------------------------------------------------------------------------


def test_workers_in_threads_end_where_workers_alone_do(tmp_path):
    """Eight threads on two nodes, and a thread that delivers on each: `sync`, to the bit."""
    run = config(mode="sync", workers=8, meta_updates=3, meta__batch_size=8)
    alone = end_of(tmp_path / "alone", run, Crowd(run, 3, 3))
    server, lock = serve(tmp_path / "together", run), threading.Lock()

    class Locked:
        """The server does one thing at a time."""

        def __getattr__(self, name):
            def call(*arguments):
                with lock:
                    return getattr(server, name)(*arguments)

            return call

    nodes = [Aggregator(Locked(), 0.02) for _ in range(2)]
    runners = [threading.Thread(target=node.run) for node in nodes]
    errors: list[BaseException] = []

    class Client(Locked):
        def __init__(self, node):
            self.push = node.push

    def work(n: int) -> None:
        worker, client = Crowd(run, n + 1, 3).workers[n], Client(nodes[n % 2])
        pause = threading.Event()
        try:
            while not server.finished:
                if worker.todo:
                    assert nodes[n % 2].renew(worker.lease.id, worker.name, 0).proceed
                worker.step(client)
                pause.wait(0 if worker.todo else 0.002)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in [*runners, *threads]:
        thread.start()
    for thread in threads:
        thread.join(60)
    for node in nodes:
        node.close()
    for thread in runners:
        thread.join(60)
    assert not errors
    assert not any(thread.is_alive() for thread in [*runners, *threads])
    assert np.array_equal(alone.snapshot()[1], server.snapshot()[1])
    server.close()


def test_closing_delivers_what_is_left_and_ends_the_thread():
    server = Recorder()
    node = Aggregator(server, 1000.0)
    thread = threading.Thread(target=node.run)
    thread.start()
    assert node.push(contribution(lease_of(0), INITIAL)).durable, "long before the interval is over"
    node.renew_soon(lease_of(0).id, "i0", 3)
    node.close()
    thread.join(20)
    assert not thread.is_alive()
    assert len(server.calls) == 2
    assert aggregator.SOON_SECONDS < 1
