"""Mode stream on the plain class: every push counts as it comes, and a task counts once whatever becomes of it."""

from __future__ import annotations

import errno
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol import INITIAL, MODES, Clock, Worker, config, contribution, drive, fast_folder, grant, serve

from leap_dist.protocol.messages import Ack
from leap_dist.storage import checkpoint, journal

PLAIN = {
    **MODES["stream"],
    "meta__learning_rate": 0.3,
    "meta__staleness": "constant",
    "meta__contribution_clip": 0,
    "meta__max_staleness": 1000,
}
"""The sum of what was pushed is all that there is to φ."""


def descended(run, vectors) -> np.ndarray:
    """φ₀ − β/|B| Σ G."""
    total = np.sum([vector.astype(np.float64) for vector in vectors], axis=0)
    return INITIAL - run.meta.learning_rate / run.meta.batch_size * total


def close_to(found, expected) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def push(server, lease, seq, *, scale=1.0, final=False, **changes):
    """The lease's cumulative contribution number `seq`, `scale` × `seq` × ones."""
    vector = np.full(len(INITIAL), scale * seq, np.float32)
    return server.push(replace(contribution(lease, vector, seq=seq, final=final), **changes))


def by_lease(server) -> dict[str, list[dict]]:
    lines: dict[str, list[dict]] = {}
    for line in server.ledger(0)[0]:
        lines.setdefault(line["lease"], []).append(line)
    return lines


# --- what a stream adds up to --------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    pushes=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    workers=st.integers(1, 4),
    turns=st.lists(st.integers(0, 3), max_size=40),
)
def test_phi_is_the_sum_of_the_tasks_wherever_pushes_fall_and_however_workers_interleave(pushes, workers, turns):
    with fast_folder() as folder:
        run = config(**PLAIN, meta_updates=2, meta__batch_size=2)
        server = serve(folder, run)
        team = [Worker(run, f"w{i}", lambda task: pushes[task.index]) for i in range(workers)]
        for turn in turns:
            team[turn % workers].step(server)
        drive(server, team)
        sent = {name: one for worker in team for name, one in worker.sent.items()}
        phi, lines = server.snapshot()[1], server.ledger(0)[0]
    finals = [one for one in sent.values() if one.final]
    assert len(finals) == run.total_tasks
    close_to(phi, descended(run, [one.vector for one in finals]))

    assert [(line["version_before"], line["version_after"]) for line in lines] == [
        (n, n + 1) for n in range(len(lines))
    ]
    assert np.cumsum([line["new_steps"] for line in lines]).tolist() == [line["total_steps"] for line in lines]
    assert lines[-1]["total_steps"] == run.total_tasks * run.task_steps, "as in a run that is no stream"
    assert all(line["staleness"] == line["version_before"] - line["base_version"] for line in lines)
    assert all(bool(line["curve"]) == line["final"] for line in lines)
    assert sorted(line["task"] for line in lines if line["final"]) == [0, 1, 2, 3]
    for index, count in enumerate(pushes):
        mine = [line for line in lines if line["task"] == index]
        assert [line["seq"] for line in mine] == list(range(1, count + 1))
        assert [line["final"] for line in mine] == [False] * (count - 1) + [True]
        assert np.cumsum([line["new_steps"] for line in mine]).tolist() == [line["steps"] for line in mine]
        assert mine[-1]["steps"] == run.task_steps


@pytest.mark.parametrize("other", ["sync", "buffered", "async", "delayed-nesterov"])
def test_a_stream_trains_the_same_tasks_for_as_many_agent_steps_as_any_other_mode(tmp_path, other):
    totals = []
    for mode in ("stream", other):
        run = config(mode=mode, meta_updates=2, meta__batch_size=3)
        server = serve(tmp_path / mode, run)
        drive(server, [Worker(run, f"w{i}", lambda task: 1 + task.index % 3) for i in range(2)])
        lines = server.ledger(0)[0]
        tasks = sorted((line["task"], line["game"], line["visit"]) for line in lines if line["final"])
        totals.append((tasks, lines[-1]["total_steps"], server.status()["agent_steps"]))
    assert totals[0] == totals[1]
    assert totals[0][1:] == (6 * 400, 6 * 400)


def test_an_increment_is_weighed_by_its_own_staleness_and_clipped_by_its_own_norm(tmp_path):
    run = config(**{**PLAIN, "meta__staleness": "inverse", "meta__contribution_clip": 2}, meta_updates=9)
    server = serve(tmp_path, run)
    lease, other = grant(server, "w0"), grant(server, "w1")
    push(server, lease, 1)
    push(server, other, 1)
    push(server, other, 2)
    push(server, lease, 5)  # adds four times as much as the others
    line = server.ledger(0)[0][-1]
    assert (line["staleness"], line["weight"], line["clip"]) == (3, pytest.approx(1 / 3), pytest.approx(0.5))
    assert line["norm"] == pytest.approx(4 * len(INITIAL) ** 0.5)
    # s(0) = s(1) = 1, s(2) = 1/2: the third is of τ = 2.
    close_to(server.snapshot()[1], INITIAL - 0.3 / 2 * (1 + 1 + 1 / 2 + 4 / 3 / 2))


def test_a_push_is_as_stale_as_the_snapshot_that_its_worker_has_moved_to(tmp_path):
    choices = {**PLAIN, "meta__staleness": "inverse", "meta__max_staleness": 2}
    server = serve(tmp_path, config(**choices, meta__shift=True))
    lease, other = grant(server, "w0"), grant(server, "w1")
    push(server, other, 1)
    push(server, other, 2)
    push(server, lease, 1)
    assert push(server, lease, 2, base_version=3).accepted, "its lease is of a version that is too old by now"
    old, new = by_lease(server)[lease.id]
    assert (old["lease_version"], old["base_version"], old["staleness"], old["weight"]) == (0, 0, 2, 0.5)
    assert (new["lease_version"], new["base_version"], new["staleness"], new["weight"]) == (0, 3, 0, 1)


def test_every_push_is_durable_when_it_is_acknowledged(tmp_path):
    server = serve(tmp_path, config(**PLAIN))
    lease = grant(server)
    for seq in (1, 2):
        ack = push(server, lease, seq)
        assert (ack.accepted, ack.durable, ack.proceed, ack.version) == (True, True, True, seq)
    ack = push(server, lease, 3, final=True)
    assert (ack.durable, ack.proceed) == (True, False)
    assert server.status()["partials"] == 2


# --- the journal ---------------------------------------------------------------------------------------------------


def orders(run_dir) -> set[int]:
    return {int(path.stem.split("-")[1]) for path in (run_dir / "journal").glob("contribution-*")}


def must_be_kept(lines, leases, kept) -> set[int]:
    """The journal's entries that somebody may need, of a stream where entry n is what made version n + 1.

    Those that the oldest of the `kept` checkpoints lacks; of each lease the one that such an entry is measured from;
    and of each open lease the newest, which its next push is measured from.
    """
    lacking = set(range(max(0, len(lines) - kept + 1), len(lines)))
    needed = set(lacking)
    for order, line in enumerate(lines):
        later = [n for n, other in enumerate(lines) if n > order and other["lease"] == line["lease"]]
        if later[0] in lacking if later else line["lease"] in leases:
            needed.add(order)
    return needed


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_the_journal_holds_what_somebody_may_need_and_nothing_else(kept, restarts):
    with fast_folder() as folder:
        run = config(**PLAIN, meta_updates=6, meta__batch_size=2, server__keep_checkpoints=kept)
        server = serve(folder, run)
        slow, fast = Worker(run, "slow", lambda task: 6), Worker(run, "fast", lambda task: 1 + task.index % 3)
        turn, failed = 0, False
        while not server.finished:
            turn += 1
            if restarts and turn % 5 == 0:
                server.close()
                server = serve(folder, run)
            updated = isinstance((slow if turn % 7 == 0 else fast).step(server), Ack)
            if turn > 15 and not failed and fast.todo and fast.todo[0].seq > 1:
                server.fail(fast.lease.id, fast.name, "broken")
                fast.todo, updated, failed = [], False, True  # what this leaves behind goes with the next meta-update
            leases = {held["lease"] for held in server.status()["leases"]}
            lines = server.ledger(0)[0]
            if updated:
                assert orders(folder) == must_be_kept(lines, leases, kept)
                assert len(orders(folder)) <= 2 * kept + 2, "however long the run"
                assert set(server._state.backlog._entries) == {lines[order]["lease"] for order in orders(folder)}
            assert set(server._state.backlog.unfinished) == {line["lease"] for line in lines} & leases
            assert {path.stem[6:] for path in (folder / "journal").glob("lease-*")} == leases
        assert failed
        assert not server._state.backlog.unfinished
        assert len(server._state.backlog._entries) <= kept


@pytest.mark.parametrize("damaged", [0, 1])
def test_after_a_restart_the_next_push_is_measured_from_the_last_one_and_a_repeated_one_adds_nothing(tmp_path, damaged):
    run = config(**PLAIN, meta_updates=2, meta__batch_size=2, server__keep_checkpoints=2)
    server = serve(tmp_path, run)
    slow, other = grant(server, "slow"), Worker(run, "other", lambda task: 3)
    push(server, slow, 1)
    push(server, slow, 2)
    drive(server, [other], 7)  # so that only the open lease keeps its last entry in the journal
    version, phi = server.version, server.snapshot()[1]
    assert version == 7
    server.close()
    if damaged:
        (tmp_path / "checkpoints" / f"{version:06d}" / "state.json").write_text("{}")

    server = serve(tmp_path, run)
    assert np.array_equal(server.snapshot()[1], phi)
    for seq in (2, 1, 2):
        ack = push(server, slow, seq)
        assert (ack.accepted, ack.durable, ack.reason, ack.proceed) == (True, True, "duplicate", True)
    assert np.array_equal(server.snapshot()[1], phi)
    assert server.status()["duplicates"] == 3
    push(server, slow, 5)
    close_to(server.snapshot()[1], phi - 0.3 / 2 * 3)
    line = server.ledger(0)[0][-1]
    assert (line["seq"], line["new_steps"], line["steps"]) == (5, 300, 500)
    push(server, slow, 6, final=True)
    drive(server, [other])
    assert [line["seq"] for line in by_lease(server)[slow.id]] == [1, 2, 5, 6]
    assert server.status()["agent_steps"] == server.ledger(0)[0][-1]["total_steps"] == 600 + 3 * 400


@pytest.mark.parametrize(("damaged", "needed"), [(3, True), (4, False), (5, False)])
def test_a_damaged_entry_ends_a_lease_only_where_the_next_push_is_measured_from_it(tmp_path, damaged, needed):
    run = config(**PLAIN, meta_updates=4, server__keep_checkpoints=3)
    server = serve(tmp_path, run)
    lease, worker = grant(server, "open"), Worker(run, "other", lambda task: 2)
    push(server, lease, 1)
    drive(server, [worker], 3)
    push(server, lease, 2)
    drive(server, [worker], 3)
    assert orders(tmp_path) == {3, 4, 5}, "the open lease's, and what the oldest checkpoint lacks"
    server.close()
    file = tmp_path / "journal" / f"contribution-{damaged:08d}.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    server = serve(tmp_path, run)
    assert f"contribution-{damaged:08d}" in server.alerts[0]
    assert not file.exists()
    assert file.with_name(f"{file.name}.damaged").exists()
    phi = server.snapshot()[1]
    if needed:
        ack = push(server, lease, 4, final=True)
        assert (ack.durable, ack.reason, ack.proceed) == (False, "journal-damaged", False)
        close_to(server.snapshot()[1], phi)
        assert grant(server, "open").task == lease.task
    else:
        push(server, lease, 4, final=True)
        close_to(server.snapshot()[1], phi - 0.3 / 2 * 2)


# --- lost workers, lost drivers, failed tasks ----------------------------------------------------------------------


def lose_by_release(server, clock, lease, run, run_dir):
    server.release(lease.incarnation)
    return server


def lose_by_expiry(server, clock, lease, run, run_dir):
    clock.advance(lease.seconds + 1, server)
    return server


def lose_by_asking_again(server, clock, lease, run, run_dir):
    asked = server.lease(lease.worker, "next")
    assert asked.task.index != lease.task.index
    server.release("next")
    return server


def lose_by_a_new_session(server, clock, lease, run, run_dir):
    server.close()
    return serve(run_dir, run, clock=clock, session="next")


def lose_by_a_new_session_after_a_crash(server, clock, lease, run, run_dir):
    server.close()
    for version in server.version, server.version - 1:
        (run_dir / "checkpoints" / f"{version:06d}" / "state.json").unlink()
    return serve(run_dir, run, clock=clock, session="next")


LOSSES = [
    lose_by_release,
    lose_by_expiry,
    lose_by_asking_again,
    lose_by_a_new_session,
    lose_by_a_new_session_after_a_crash,
]


@pytest.mark.parametrize("lose", LOSSES)
def test_the_prefix_of_a_lost_worker_is_its_tasks_contribution(tmp_path, lose):
    run, clock = config(**PLAIN, meta_updates=2, meta__batch_size=2), Clock()
    server = serve(tmp_path, run, clock=clock)
    lost = grant(server, "lost")
    push(server, lost, 1)
    push(server, lost, 3)
    phi = server.snapshot()[1]
    server = lose(server, clock, lost, run, tmp_path)
    assert np.array_equal(server.snapshot()[1], phi), "what closes the lease adds nothing"
    assert (
        by_lease(server)[lost.id][-1] | {"final": True, "seq": 3, "new_steps": 0, "norm": 0.0, "steps": 300}
        == (by_lease(server)[lost.id][-1])
    )
    assert by_lease(server)[lost.id][-1]["curve"], "it is the lease's last line"
    assert (server.status()["tasks"], server.status()["leases_lost"] > 0) == (1, True)
    ack = push(server, lost, 4, final=True)
    assert (ack.accepted, ack.durable, ack.reason, ack.proceed) == (False, False, "prefix-counts", False)
    other = Worker(run, "other", lambda task: 2)
    drive(server, [other])
    vectors = [one.vector for one in other.sent.values() if one.final]
    close_to(server.snapshot()[1], descended(run, [*vectors, np.full(len(INITIAL), 3.0)]))
    lines = server.ledger(0)[0]
    assert sorted(line["task"] for line in lines if line["final"]) == [0, 1, 2, 3]
    assert lines[-1]["total_steps"] == 300 + 3 * 400


@pytest.mark.parametrize("lose", LOSSES)
def test_the_task_of_a_lost_worker_that_had_pushed_nothing_is_trained_by_another(tmp_path, lose):
    run, clock = config(**PLAIN), Clock()
    server = serve(tmp_path, run, clock=clock)
    done, lost = grant(server, "done"), grant(server, "lost")
    push(server, done, 1)
    push(server, done, 2, final=True)
    if lose is lose_by_asking_again:
        assert server.lease("lost", "next").task == lost.task
        server.release("next")
    else:
        server = lose(server, clock, lost, run, tmp_path)
    assert server.status()["tasks"] == 1
    again = grant(server, "other")
    assert again.task == lost.task
    assert not push(server, lost, 1).accepted


def test_a_lost_lease_is_closed_however_stale_it_is(tmp_path):
    run = config(**{**PLAIN, "meta__max_staleness": 2}, meta_updates=2)
    server = serve(tmp_path, run)
    lost = grant(server, "lost")
    push(server, lost, 1)
    drive(server, [Worker(run, "other")], 6)
    assert server.version == 4
    server.release("lost")
    server.release(lost.incarnation)
    last = by_lease(server)[lost.id][-1]
    assert (last["final"], last["new_steps"], last["staleness"]) == (True, 0, 4)
    assert server.status()["tasks"] == 4
    assert server.finished
    assert server.status()["refused"] == {}


def test_a_lost_lease_that_the_disk_has_no_room_to_close_is_closed_later(tmp_path, monkeypatch):
    run, clock = config(**PLAIN, meta_updates=1), Clock()
    server = serve(tmp_path, run, clock=clock)
    lost = grant(server, "lost")
    push(server, lost, 1)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "write_atomic", full)
        server.release(lost.incarnation)
        assert server.status()["tasks"] == 0
    other = grant(server, "other")
    assert other.task != lost.task, "it is not trained again: its prefix is in φ"
    push(server, other, 1, final=True)
    assert not server.finished
    clock.advance(lost.seconds + 1, server)
    assert server.finished
    assert [(line["seq"], line["final"]) for line in by_lease(server)[lost.id]] == [(1, False), (1, True)]


@pytest.mark.parametrize("how", ["fail", "non-finite"])
def test_what_a_failed_task_has_pushed_stays_and_it_is_trained_again_with_another_seed(tmp_path, how):
    run = config(**PLAIN, meta_updates=1)
    server = serve(tmp_path, run)
    failed = grant(server, "failed")
    push(server, failed, 1)
    phi = server.snapshot()[1]
    if how == "fail":
        assert not server.fail(failed.id, failed.incarnation, "broken").proceed
    else:
        ack = push(server, failed, 2, scale=np.nan, final=True)
        assert (ack.accepted, ack.proceed, ack.reason) == (False, False, "non-finite")
    assert np.array_equal(server.snapshot()[1], phi)
    assert push(server, failed, 3).reason == "failed"
    assert grant(server, "failed").task.index == 1, "others try it first"
    again = grant(server, "other")
    assert (again.task.index, again.task.game, again.version) == (0, failed.task.game, 1)
    assert again.task.seed != failed.task.seed
    push(server, again, 2, final=True)
    drive(server, [Worker(run, "failed")])
    assert server.status()["tasks"] == run.total_tasks == 2
    lines = by_lease(server)
    assert [(line["seq"], line["final"], line["new_steps"]) for line in lines[failed.id]] == [(1, False, 100)]
    assert [(line["seq"], line["final"], line["new_steps"]) for line in lines[again.id]] == [(2, True, 200)]
    assert sum(line["new_steps"] for lease in lines.values() for line in lease) == 100 + 200 + 400


def test_a_failed_lease_is_forgotten_over_a_restart_too(tmp_path):
    run = config(**PLAIN)
    server = serve(tmp_path, run)
    failed = grant(server)
    push(server, failed, 1)
    server.fail(failed.id, failed.incarnation, "broken")
    server.close()
    server = serve(tmp_path, run)
    assert not server._state.backlog.unfinished
    assert push(server, failed, 2).reason == "unknown-lease"
    again = grant(server)
    assert again.task.index == failed.task.index
    phi = server.snapshot()[1]
    push(server, again, 2, final=True)
    close_to(server.snapshot()[1], phi - 0.3 / 2 * 2)  # all of it: nothing of the failed lease is subtracted


# --- staleness -----------------------------------------------------------------------------------------------------


def test_the_limit_of_staleness_grows_with_the_pushes_of_a_task():
    assert config(mode="async").max_staleness(3) == 4 * 3
    assert config(mode="stream", task_steps=400, worker__push_interval=100).max_staleness(3) == 4 * 3 * 5
    assert config(mode="stream", task_steps=399, worker__push_interval=100).max_staleness(3) == 4 * 3 * 4
    assert config(mode="stream", meta__max_staleness=7).max_staleness(3) == 7


@pytest.mark.parametrize("final", [False, True])
def test_a_push_that_is_too_stale_ends_its_task_with_what_was_pushed_before(tmp_path, final):
    run = config(**{**PLAIN, "meta__max_staleness": 3}, meta_updates=2)
    server = serve(tmp_path, run)
    slow, other = grant(server, "slow"), grant(server, "other")
    push(server, slow, 1)
    push(server, other, 1)
    push(server, other, 2)
    assert push(server, slow, 2).durable, "at the limit"
    phi, lines = server.snapshot()[1], server.ledger(0)[0]
    ack = push(server, slow, 3, final=final)
    assert (ack.accepted, ack.durable, ack.proceed, ack.reason) == (False, False, False, "stale")
    assert np.array_equal(server.snapshot()[1], phi)
    (*before, end), _ = server.ledger(0)
    assert (before, end["lease"], end["final"], end["steps"]) == (lines, slow.id, True, lines[-1]["steps"])
    assert slow.id not in server._state.backlog.unfinished
    again = push(server, slow, 4)
    assert (again.accepted, again.reason) == (False, "prefix-counts")
    assert server.status()["refused"] == {"stale": 1, "prefix-counts": 1}
    assert [held["lease"] for held in server.status()["leases"]] == [other.id]
    again = grant(server, "slow")
    assert again.task.index != slow.task.index, "or its pushes would be in φ twice"
    push(server, again, 1, final=True)
    server.release(other.incarnation)
    drive(server, [Worker(run, "slow")])
    lines = server.ledger(0)[0]
    assert sorted(line["task"] for line in lines if line["final"]) == list(range(run.total_tasks))
    assert [(line["seq"], line["final"]) for line in by_lease(server)[slow.id]][:2] == [(1, False), (2, False)]


def test_a_first_push_that_is_too_stale_gives_its_task_back(tmp_path):
    run = config(**{**PLAIN, "meta__max_staleness": 1}, meta_updates=2)
    server = serve(tmp_path, run)
    slow, other = grant(server, "slow"), grant(server, "other")
    push(server, other, 1)
    push(server, other, 2)
    assert push(server, slow, 1).reason == "stale"
    assert grant(server, "slow").task == slow.task


# --- a full disk ---------------------------------------------------------------------------------------------------


def test_a_push_that_cannot_be_journaled_is_refused_and_counts_once_when_it_is_sent_again(tmp_path, monkeypatch):
    run, clock = config(**PLAIN, meta_updates=1, meta__batch_size=2), Clock()
    undisturbed = serve(tmp_path / "undisturbed", run)
    drive(undisturbed, [Worker(run, "w", lambda task: 3)])
    server, worker = serve(tmp_path / "full", run, clock=clock), Worker(run, "w", lambda task: 3)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    while not server.finished:
        if worker.todo:
            phi, lines = server.snapshot()[1], server.ledger(0)[0]
            with monkeypatch.context() as patch:
                patch.setattr(journal, "write_atomic", full)
                for _ in range(2):
                    clock.now += 0.9 * worker.lease.seconds
                    ack = worker.step(server)
                    assert (ack.accepted, ack.durable, ack.proceed, ack.reason) == (False, False, True, "storage")
                    server.tick()  # its lease is not lost meanwhile
            assert np.array_equal(server.snapshot()[1], phi)
            assert server.ledger(0)[0] == lines
        worker.step(server)
    assert np.array_equal(server.snapshot()[1], undisturbed.snapshot()[1])
    assert [(line["task"], line["seq"]) for line in server.ledger(0)[0]] == [(t, s) for t in (0, 1) for s in (1, 2, 3)]
    assert server.status()["refused"] == {"storage": 12}


def test_pushes_that_are_journaled_wait_for_room_for_the_checkpoints_and_are_then_applied_one_by_one(
    tmp_path, monkeypatch
):
    run = config(**PLAIN, meta_updates=1, meta__batch_size=2)
    server = serve(tmp_path, run)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    lease = grant(server)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.CheckpointStore, "save", full)
        for seq in (1, 2, 3):
            assert push(server, lease, seq, final=seq == 3).durable
        assert server.version == 0
        assert np.array_equal(server.snapshot()[1], INITIAL)
        status = server.status()
        assert (status["contributions_waiting"], status["tasks_waiting"], status["tasks"]) == (3, 1, 0)
        server.close()
        server = serve(tmp_path, run)  # the journal has them
        assert server.version == 0
    server.tick()
    assert server.version == 3
    close_to(server.snapshot()[1], INITIAL - 0.3 / 2 * 3)
    assert [line["norm"] for line in server.ledger(0)[0]] == [pytest.approx(len(INITIAL) ** 0.5)] * 3
    assert push(server, lease, 3, final=True).reason == "duplicate"
