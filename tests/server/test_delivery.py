"""What holds in every mode: pushes may be repeated, late and refused; the length of a run is its tasks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol import INITIAL, MODES, Worker, config, contribution, drive, fast_folder, grant, serve

from leap_dist.protocol.messages import Idle

LEARNERS = {**MODES, **{f"{mode}-heads": {"mode": mode, "meta_learner": "finetune-multi"} for mode in MODES}}
LEARNERS |= {f"{mode}-none": {"mode": mode, "meta_learner": "none"} for mode in MODES if mode != "fedasync"}

SIZE = len(INITIAL)
VECTOR, START = np.ones(SIZE, np.float32), INITIAL


# --- law 11 --------------------------------------------------------------------------------------------------------


def deliver(order, choices, bare=()):
    """Three leases with three pushes each, the last one final, delivered in that order (index = 3 · lease + seq − 1).

    Those in `bare` that are not final go without their vectors. Returns what may depend on it, and the counters.
    """
    with fast_folder() as folder:
        run = config(**choices, meta_updates=1, meta__batch_size=3)
        server = serve(folder, run)
        pushes = []
        for name in ("w0", "w1", "w2"):
            lease = grant(server, name, name)
            start, head = server.snapshot()[1], server.head(lease.task.game)
            pushes += Worker(run, name, lambda task: 3).train(lease, start, head)
        for index in bare:
            if not pushes[index].final:
                pushes[index] = replace(pushes[index], vector=pushes[index].vector[:0], start=None)
        for index in order:
            assert server.push(pushes[index]).accepted
        heads = {game: server.head(game) for game in run.games}
        lines = [{k: v for k, v in line.items() if k != "lease"} for line in server.ledger(0)[0]]
        return server.snapshot()[1], heads, lines, server.status(), pushes


def assert_same(found, once, order):
    assert np.array_equal(found[0], once[0])
    assert found[1].keys() == once[1].keys()
    assert all(np.array_equal(found[1][game], once[1][game]) for game in once[1])
    assert found[2] == once[2]
    status = found[3]
    finals = len({index for index in order if index % 3 == 2})
    assert status["tasks"] == finals == 3
    assert status["finished"]
    assert status["duplicates"] + status["partials"] + finals == len(order)
    assert status["refused"] == {}


@st.composite
def deliveries(draw):
    """Every final once or more, partials or not, in any order."""
    return draw(st.permutations([2, 5, 8, *draw(st.lists(st.integers(0, 8), max_size=12))]))


@settings(max_examples=60)
@given(order=deliveries(), mode=st.sampled_from([mode for mode in LEARNERS if not mode.startswith("stream")]))
def test_law_11_what_is_repeated_late_or_partial_changes_nothing(order, mode):
    finals = list(dict.fromkeys(index for index in order if index % 3 == 2))
    if mode.startswith(("sync", "buffered")):
        finals.sort()  # nor does the order of arrival
    assert_same(deliver(order, LEARNERS[mode]), deliver(finals, LEARNERS[mode]), order)


@st.composite
def streams(draw):
    """First copies in the order of their seq, as workers with one push under way send them; others wherever they may.

    Every first copy once, then copies of what was delivered before, anywhere.
    """
    order, sent = [], [0, 0, 0]
    for lease in draw(st.permutations([0, 1, 2] * 3)):
        order.append(3 * lease + sent[lease])
        sent[lease] += 1
    for position in draw(st.lists(st.integers(1, 8), max_size=10)):
        order.insert(position, order[draw(st.integers(0, position - 1))])
    return order


@settings(max_examples=60)
@given(order=streams(), learner=st.sampled_from([mode for mode in LEARNERS if mode.startswith("stream")]))
def test_law_11_a_stream_depends_on_the_order_of_first_copies_only(order, learner):
    choices = {**LEARNERS[learner], "meta__contribution_clip": 1.1}
    assert_same(deliver(order, choices), deliver(list(dict.fromkeys(order)), choices), order)


@given(order=deliveries(), heads=st.booleans())
def test_law_11_a_stream_whose_pushes_overtake_each_other_ends_in_the_same_sum(order, heads):
    choices = {
        **LEARNERS["stream-heads" if heads else "stream"],
        "meta__staleness": "constant",
        "meta__contribution_clip": 0,
        "meta__learning_rate": 0.3,
    }
    phi, found, lines, status, pushes = deliver(order, choices)
    finals = [pushes[index].vector for index in (2, 5, 8)]
    total = np.sum(finals, axis=0, dtype=np.float64)
    np.testing.assert_allclose(phi, INITIAL - 0.3 / 3 * total[: len(INITIAL)], rtol=1e-5, atol=1e-6)
    assert lines[-1]["total_steps"] == 3 * 400
    assert status["tasks"] == 3
    if heads:
        changes = sum(-head.astype(np.float64) for head in found.values())
        np.testing.assert_allclose(changes, total[len(INITIAL) :], rtol=1e-5, atol=1e-6)


# --- the length of a run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", LEARNERS)
def test_a_run_leases_and_applies_as_many_tasks_as_were_asked_for(tmp_path, mode):
    run = config(**LEARNERS[mode], meta_updates=3, meta__batch_size=2, workers=5)
    server = serve(tmp_path, run)
    team = [Worker(run, f"w{i}", lambda task: 1 + task.index % 3) for i in range(5)]
    leased, turn = set(), 0
    while not server.finished:
        worker = team[(turn := turn + 1) % 5]
        answer = worker.step(server)
        assert answer != Idle(finished=True)
        if worker.lease:
            leased.add(worker.lease.task.index)
        status = server.status()
        lines = server.ledger(0)[0]
        done = sum(line["final"] for line in lines)
        assert (status["tasks"], status["tasks_wanted"], status["contributions_applied"]) == (done, 6, len(lines))
        assert status["complete"] == status["finished"] == (done == 6)
        assert status["tasks"] + status["tasks_waiting"] + len(status["leases"]) <= 6
        assert turn < 200
    assert leased == set(range(6)), "no task more than needed"
    assert [worker.step(server) for worker in team] == [Idle(finished=True)] * 5
    lines = server.ledger(0)[0]
    pushes = 6 if run.mode != "stream" else sum(1 + index % 3 for index in range(6))
    assert len(lines) == pushes
    assert server.version == (3 if run.mode in ("sync", "buffered") else pushes)
    assert lines[-1]["total_steps"] == 6 * run.task_steps
    if run.meta_learner == "none":
        assert np.array_equal(server.snapshot()[1], INITIAL)
        assert {line["update_norm"] for line in lines} == {line["norm"] for line in lines} == {0.0}


@pytest.mark.parametrize("mode", MODES)
def test_a_quarantined_game_does_not_hang_a_run(tmp_path, mode):
    run = config(**MODES[mode], meta_updates=3, meta__batch_size=2, games="pong,freeway,assault")
    server = serve(tmp_path, run)
    team = [Worker(run, f"w{i}", lambda task: 2) for i in range(3)]
    for turn in range(200):
        if server.finished:
            break
        worker = team[turn % 3]
        worker.step(server)
        if worker.todo and worker.lease.task.game == "pong" and worker.todo[0].final:  # it has pushed once
            server.fail(worker.lease.id, worker.name, "broken")
            worker.todo = []
    status = server.status()
    assert status["quarantined"] == ["pong"]
    assert status["complete"]
    assert not status["leases"]
    finals = [line for line in server.ledger(0)[0] if line["final"]]
    assert {line["game"] for line in finals} == {"freeway", "assault"}
    if mode == "sync":  # a batch goes on without the tasks of that game
        assert server.version == 3
        assert len(finals) == status["tasks"] < 6
    else:
        assert len(finals) == status["tasks"] == 6


@pytest.mark.parametrize("mode", ["buffered", "async"])
def test_a_lost_prefix_that_is_too_stale_counts_nowhere_and_its_task_comes_back_once(tmp_path, mode):
    run = config(mode=mode, meta_updates=8, meta__batch_size=1, meta__max_staleness=1, server__on_lost="keep")
    server = serve(tmp_path, run)
    lost = grant(server, "lost", "lost")
    server.push(contribution(lost, VECTOR, final=False))
    drive(server, [Worker(run, "other")], 4)
    assert server.version == 2
    server.release("lost")
    assert server.status()["refused"] == {"stale": 1}
    assert {line["task"] for line in server.ledger(0)[0]} == {1, 2}
    assert [grant(server, f"w{i}").task.index for i in range(3)] == [0, 3, 4]


@pytest.mark.parametrize("mode", MODES)
def test_a_run_whose_games_are_all_quarantined_ends_incomplete(tmp_path, mode):
    server = serve(tmp_path, config(**MODES[mode]))
    for _ in range(20):
        lease = server.lease("w", "i")
        if isinstance(lease, Idle):
            break
        server.fail(lease.id, "i", "broken")
    assert lease == Idle(finished=True)
    status = server.status()
    assert (status["finished"], status["complete"], status["tasks"]) == (True, False, 0)


# --- what nobody reads is not sent ---------------------------------------------------------------------------------

BARE = [mode for mode in MODES if mode != "stream"]


@settings(max_examples=60)
@given(order=deliveries(), mode=st.sampled_from(BARE), bare=st.sets(st.integers(0, 8)))
def test_partials_without_vectors_leave_the_same_initialization_ledger_and_counts(order, mode, bare):
    """Any of the pushes that are not final, sent without what the server would drop."""
    found = deliver(order, MODES[mode], bare)
    once = deliver(order, MODES[mode])
    assert_same(found, once, order)
    assert {k: v for k, v in found[3].items() if k not in CHANGING} == {
        k: v for k, v in once[3].items() if k not in CHANGING
    }


@pytest.mark.parametrize("mode", BARE)
def test_a_final_contribution_without_its_vector_is_refused(tmp_path, mode):
    server = serve(tmp_path, config(**MODES[mode]))
    lease = grant(server)
    (last,) = Worker(server._config).train(lease, server.snapshot()[1], None)
    assert server.push(replace(last, vector=last.vector[:0], start=None)).reason == "shape"


# --- refusals ------------------------------------------------------------------------------------------------------

LARGE = np.array([3e38, *[0] * (SIZE - 1)], np.float32)
FEDASYNC, STREAM, NONE = MODES["fedasync"], MODES["stream"], {"meta_learner": "none"}
CORRECTED = {"mode": "async", "meta__endpoint_correction": 0.5, "meta_learner": "reptile"}
REFUSALS = {
    "older than the lease": ({}, "base-version", {"base_version": 0}),
    "newer than the server": ({}, "base-version", {"base_version": 3}),
    "older than the lease, streamed": (STREAM, "base-version", {"base_version": 0}),
    "newer than the server, streamed": (STREAM, "base-version", {"base_version": 3}),
    "start missing": (FEDASYNC, "shape", {"start": None}),
    "start missing, corrected": (CORRECTED, "shape", {"start": None}),
    "start not wanted": ({}, "shape", {"start": START}),
    "start not wanted, streamed": (STREAM, "shape", {"start": START}),
    "start too short": (FEDASYNC, "shape", {"start": START[:-1]}),
    "start with two axes": (FEDASYNC, "shape", {"start": START[None]}),
    "start of another type": (FEDASYNC, "dtype", {"start": START.astype(np.float64)}),
    "start nan": (FEDASYNC, "non-finite", {"start": np.full(SIZE, np.nan, np.float32)}),
    "start inf": (CORRECTED, "non-finite", {"start": np.full(SIZE, np.inf, np.float32)}),
    "vector where there is none": (NONE, "shape", {"vector": VECTOR}),
    "vector with two axes where there is none": (NONE, "shape", {"vector": np.empty((0, 1), np.float32)}),
    "vector with no axis": ({}, "shape", {"vector": np.array(1.0, np.float32)}),
    "vector with no axis where there is none": (NONE, "shape", {"vector": np.array(1.0, np.float32)}),
    "vector of another type where there is none": (NONE, "dtype", {"vector": np.empty(0)}),
    "empty vector": ({"server__on_lost": "keep"}, "shape", {"vector": VECTOR[:0]}),
    "empty vector, streamed": (STREAM, "shape", {"vector": VECTOR[:0]}),
    "empty vector with a start": (FEDASYNC, "shape", {"vector": VECTOR[:0], "start": START}),
    "empty vector with two axes": ({}, "shape", {"vector": np.empty((0, 1), np.float32)}),
    "empty vector of another type": ({}, "dtype", {"vector": np.empty(0)}),
    "empty vector of another encoder": ({}, "manifest", {"vector": VECTOR[:0], "manifest": "0" * 16}),
    "exploding": ({}, "exploding", {"vector": VECTOR * np.float32(1e12), "final": True}),
    "exploding, streamed": (STREAM, "exploding", {"vector": VECTOR * np.float32(1e12)}),
    "increment nan": (STREAM, "non-finite", {"vector": np.full(SIZE, np.nan, np.float32)}),
    "increment too large": (STREAM, "non-finite", {"vector": -LARGE}),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in subtract")
@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("case", REFUSALS)
def test_a_contribution_that_does_not_fit_is_refused_by_name_and_counts_nowhere(tmp_path, case, final):
    choices, reason, changes = REFUSALS[case]
    huge = 0 if "large" in case else 1e6
    run = config(**choices, meta_updates=4, meta__batch_size=1, meta__refuse_norm=huge)
    server = serve(tmp_path, run)
    team = [Worker(run, "before", lambda task: 1)]
    drive(server, team, 2)  # so that the lease is not of the first version
    lease = grant(server, "w0", "w0")
    good = Worker(run, "w0", lambda task: 3).train(lease, server.snapshot()[1], server.head(lease.task.game))
    if run.mode == "stream":  # and this is an increment
        good[0] = replace(good[0], vector=LARGE if "large" in case else good[0].vector)
        server.push(good[0])
    before = observed(server)
    hopeless = final or reason in ("non-finite", "exploding")  # what is cumulative stays that
    ack = server.push(replace(good[2], **{"final": final, **changes}))
    assert (ack.accepted, ack.durable, ack.reason, ack.proceed) == (False, False, reason, not hopeless)
    after = observed(server)
    assert after.pop("refused") == {**before.pop("refused"), reason: 1}
    if hopeless:  # the task failed, and will be trained again
        assert [held["lease"] for held in before.pop("leases")] == [lease.id]
        assert after.pop("leases") == []
    assert after == before
    if not hopeless:
        assert server.push(good[2]).durable


CHANGING = ("checkpoint_age", "alerts", "pushes", "push_ms", "update_ms")
"""Of the status: what a refusal may change."""


def observed(server):
    """All of a server that a refusal must leave alone, and what it may change."""
    games = server._config.games
    status = {k: v for k, v in server.status().items() if k not in CHANGING}
    return {
        **status,
        "phi": server.snapshot()[1].tolist(),
        "heads": [None if server.head(game) is None else server.head(game).tolist() for game in games],
        "ledger": server.ledger(0),
        "journal": server._state.backlog.journal.orders(),
    }
