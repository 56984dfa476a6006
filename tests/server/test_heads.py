"""Heads that persist: one per game, moved by what the game's own tasks send, kept and guarded like φ."""

from __future__ import annotations

import errno
from dataclasses import replace

import numpy as np
import pytest
from protocol import HEAD, INITIAL, MODES, Clock, Worker, config, contribution, drive, fast_folder, grant, serve

from leap_dist.protocol.messages import Idle, Lease
from leap_dist.storage import checkpoint

HEADS = {"meta_learner": "finetune-multi"}
SIZE = len(INITIAL)


def joined(head, shared=0.0) -> np.ndarray:
    """A contribution's vector: the shared part, then the head's."""
    return np.concatenate([np.full(SIZE, shared), head]).astype(np.float32)


def push(server, lease, head, *, seq=1, final=True, shared=0.0):
    return server.push(contribution(lease, joined(head, shared), seq=seq, final=final))


def leases_by_game(server, count) -> dict[str, list[Lease]]:
    found: dict[str, list[Lease]] = {}
    for i in range(count):
        lease = grant(server, f"w{i}", f"w{i}")
        found.setdefault(lease.task.game, []).append(lease)
    return found


def parts(task) -> int:
    return 1 + task.index % 3


@pytest.mark.parametrize("mode", ["sync", "buffered"])
def test_a_head_moves_by_the_mean_of_its_games_contributions_and_by_no_others(tmp_path, mode):
    server = serve(tmp_path, config(**HEADS, mode=mode, meta_updates=2, meta__batch_size=4))
    leases = leases_by_game(server, 4)
    assert server.head("pong") is server.head("freeway") is None
    assert push(server, leases["pong"][0], [1, 2, 3]).durable
    assert push(server, leases["freeway"][0], [10, 0]).durable, "another game's head is another one"
    assert push(server, leases["pong"][1], [3, 2, 0]).durable
    assert server.head("pong") is None, "what waits is not in it yet"
    assert push(server, leases["freeway"][1], [0, 20]).durable
    assert server.head("pong").tolist() == [-2, -2, -1.5]
    assert server.head("freeway").tolist() == [-5, -10]
    again = leases_by_game(server, 4)
    for lease in again["pong"]:
        assert push(server, lease, [1, 1, 1]).durable
    for lease in again["freeway"]:
        assert push(server, lease, [0, 0]).durable
    assert server.head("pong").tolist() == [-3, -3, -2.5]
    assert server.head("freeway").tolist() == [-5, -10]


def test_a_game_without_a_task_in_the_meta_update_keeps_its_head(tmp_path):
    server = serve(tmp_path, config(**HEADS, mode="async", meta_updates=2))
    leases = leases_by_game(server, 4)
    push(server, leases["pong"][0], [1, 2])
    pong = server.head("pong")
    push(server, leases["freeway"][0], [5])
    assert np.array_equal(server.head("pong"), pong)
    assert server.head("freeway").tolist() == [-5]


def test_a_head_is_neither_weighed_by_staleness_nor_clipped_nor_scaled_by_the_learning_rate(tmp_path):
    weighted = {"meta__staleness": "polynomial", "meta__contribution_clip": 1}  # nothing is, unless that is asked for
    run = config(**HEADS, mode="async", meta_updates=4, meta__learning_rate=0.125, **weighted)
    server = serve(tmp_path, run)
    old = leases_by_game(server, 2)
    for _ in range(3):
        push(server, grant(server, "x", "x"), [0, 0, 0], shared=1.0)
    game, (lease,) = next(iter(old.items()))
    before, phi = server.head(game), server.snapshot()[1]
    push(server, lease, [1e6, 2, -3], shared=1e6)
    line = server.ledger(0)[0][-1]
    assert (line["staleness"], line["weight"], line["clip"]) == (3, 0.5, pytest.approx(1e-6))
    np.testing.assert_allclose(server.snapshot()[1], phi - 0.125 / 2 * 0.5, rtol=1e-5)
    assert (server.head(game) - before).tolist() == [-1e6, -2, 3]


def test_in_a_stream_a_head_moves_by_what_each_push_adds(tmp_path):
    server = serve(tmp_path, config(**HEADS, mode="stream"))
    lease = grant(server)
    push(server, lease, [1, 1], seq=1, final=False)
    assert server.head(lease.task.game).tolist() == [-1, -1]
    push(server, lease, [1, 4], seq=2, final=False)
    push(server, lease, [1, 4], seq=2, final=False)
    assert server.head(lease.task.game).tolist() == [-1, -4]
    server.release(lease.incarnation)
    assert server.head(lease.task.game).tolist() == [-1, -4], "what closes a lost lease adds nothing"


@pytest.mark.parametrize("mode", MODES)
def test_heads_are_what_the_ledger_says_whatever_the_mode(tmp_path, mode):
    """Recomputed from what was sent: in each meta-update, per game, minus the mean of what was added."""
    run = config(**{**MODES[mode], **HEADS}, meta_updates=3, meta__batch_size=4)
    server, team = serve(tmp_path, run), [Worker(run, f"w{i}", parts) for i in range(3)]
    seen: dict[str, list] = {}
    for turn in range(1000):
        if server.finished:
            break
        worker = team[turn % 3]
        if isinstance(lease := worker.step(server), Lease):
            seen.setdefault(lease.task.game, []).append(server.head(lease.task.game))
            started = worker.todo[-1].vector  # a function of the seed and of what it started from
            again = worker.train(lease, server.snapshot()[1], seen[lease.task.game][-1])
            assert np.array_equal(again[-1].vector, started)
    sent = {name: one.vector[SIZE:] for worker in team for name, one in worker.sent.items()}
    expected: dict[str, np.ndarray] = {}
    last: dict[str, np.ndarray] = {}
    lines = server.ledger(0)[0]
    for version in range(server.version):
        added: dict[str, list[np.ndarray]] = {}
        for line in lines:
            if line["version_before"] == version:
                vector = sent[line["lease"], line["seq"]]
                added.setdefault(line["game"], []).append(vector - last.get(line["lease"], 0))
                last[line["lease"]] = vector
        for game, vectors in added.items():
            expected[game] = expected.get(game, 0) - np.mean(vectors, axis=0)
    assert expected.keys() == {"pong", "freeway"}
    for game, head in expected.items():
        np.testing.assert_allclose(server.head(game), head, rtol=1e-5, atol=1e-6)
        assert any(start is not None for start in seen[game]), "a later task starts from what an earlier one added"


def test_of_an_agent_that_learns_all_games_the_newest_state_is_kept_as_it_is(tmp_path):
    run = config(meta_learner="multitask", meta_updates=2)
    server, states = serve(tmp_path, run), ([1, 2, 3], [0.1, 1e-9, -7])
    for state in states:
        lease = grant(server)
        assert (lease.task.game, lease.task.steps) == ("all_games", run.task_steps * run.meta.batch_size)
        assert isinstance(server.lease("other", "i1"), Idle), "there is one learner, and it is busy"
        assert push(server, lease, state, shared=0.25).durable
        assert np.array_equal(server.head("all_games"), np.float32(state)), "not added up"
    assert server.finished
    np.testing.assert_allclose(server.snapshot()[1], INITIAL - 0.5, rtol=1e-6)
    server.close()
    again = serve(tmp_path, run)
    assert np.array_equal(again.head("all_games"), np.float32(states[-1]))


@pytest.mark.parametrize("mode", MODES)
def test_phi_and_the_ledger_know_nothing_of_heads(mode):
    results = []
    for scale in (1, 1000):
        with fast_folder() as folder:
            run = config(**{**MODES[mode], **HEADS}, meta_updates=2)
            server = serve(folder, run)
            leases = [lease for some in leases_by_game(server, 4 if mode != "sync" else 2).values() for lease in some]
            for lease in leases:
                for seq in (1, 2):
                    vector = np.concatenate([INITIAL * seq * lease.task.index, np.full(HEAD, scale)])
                    one = contribution(lease, vector.astype(np.float32), seq=seq, final=seq == 2)
                    start = INITIAL if run.corrects_endpoint else None
                    assert server.push(replace(one, start=start)).accepted
            lines = [{k: v for k, v in line.items() if k != "lease"} for line in server.ledger(0)[0]]
            results.append((server.snapshot()[1].tolist(), lines))
    assert results[0] == results[1]
    assert results[0][1]


# --- restarts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["buffered", "async", "stream"])
def test_heads_come_back_from_the_checkpoint_bit_for_bit(tmp_path, mode):
    run = config(**{**MODES[mode], **HEADS}, meta_updates=4, meta__batch_size=2)
    server, team = serve(tmp_path, run), [Worker(run, f"w{i}", parts) for i in range(2)]
    drive(server, team, 12)
    heads, phi = {game: server.head(game) for game in run.games}, server.snapshot()[1]
    assert all(head is not None and head.any() for head in heads.values())
    server.close()
    server = serve(tmp_path, run)
    for game, head in heads.items():
        assert server.head(game).dtype == np.float32
        assert np.array_equal(server.head(game), head)
    assert np.array_equal(server.snapshot()[1], phi)


@pytest.mark.parametrize("mode", ["buffered", "async", "stream"])
def test_heads_come_back_from_the_journal_bit_for_bit(tmp_path, monkeypatch, mode):
    run = config(**{**MODES[mode], **HEADS}, meta_updates=4, meta__batch_size=2)
    undisturbed = serve(tmp_path / "undisturbed", run)
    drive(undisturbed, [Worker(run, "w", parts)])
    server, worker = serve(tmp_path / "full", run), Worker(run, "w", parts)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    while not server.finished:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.CheckpointStore, "save", full)
            heads = {game: server.head(game) for game in run.games}
            worker.step(server)  # into the journal, and no further
            assert all(server.head(game) is head for game, head in heads.items()), "an update not saved is undone whole"
        server.close()
        server = serve(tmp_path / "full", run)
    for game in run.games:
        assert np.array_equal(server.head(game), undisturbed.head(game))
    assert np.array_equal(server.snapshot()[1], undisturbed.snapshot()[1])


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("known", ["waiting", "applied", "restored", "restored from the journal"])
@pytest.mark.parametrize("length", [0, 2, 4])
def test_a_head_of_another_shape_than_the_known_one_is_refused(tmp_path, known, length, final):
    run = config(**HEADS, mode="buffered", meta_updates=3, meta__batch_size=2, games="pong")
    server = serve(tmp_path, run)
    leases = [grant(server, f"w{i}", f"w{i}") for i in range(4)]
    assert push(server, leases[0], [1, 2, 3]).durable
    if known in ("applied", "restored"):
        assert push(server, leases[1], [3, 2, 1]).durable
        assert server.head("pong").tolist() == [-2, -2, -2]
    if known.startswith("restored"):
        server.close()
        server = serve(tmp_path, run)
    head, phi, waiting = server.head("pong"), server.snapshot()[1], server.status()["contributions_waiting"]
    ack = push(server, leases[2], [5] * length, final=final)
    assert (ack.accepted, ack.reason, ack.proceed) == (False, "shape", not final)
    assert server.head("pong") is head
    assert np.array_equal(server.snapshot()[1], phi)
    assert server.status()["contributions_waiting"] == waiting
    assert server.status()["refused"] == {"shape": 1}
    assert push(server, leases[3], [5, 5, 5]).durable


@pytest.mark.parametrize("vector", [np.zeros(SIZE), np.zeros(SIZE - 1), np.zeros(0), np.zeros((SIZE, 2))])
def test_a_contribution_without_a_head_is_refused_where_heads_persist(tmp_path, vector):
    server = serve(tmp_path, config(**HEADS, server__on_lost="keep"))
    lease = grant(server)
    ack = server.push(contribution(lease, vector.astype(np.float32), final=False))
    assert (ack.accepted, ack.reason, ack.proceed) == (False, "shape", True)
    assert push(server, lease, [1]).durable, "the first may be of any size"


def test_a_head_is_refused_where_heads_do_not_persist(tmp_path):
    server = serve(tmp_path, config())
    assert push(server, grant(server), [1, 2], final=False).reason == "shape"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mode", ["buffered", "stream"])
@pytest.mark.parametrize("final", [True, False])
def test_a_head_that_is_not_finite_is_refused(tmp_path, mode, bad, final):
    server = serve(tmp_path, config(**HEADS, mode=mode))
    lease = grant(server)
    ack = push(server, lease, [1, bad, 1], final=final)
    assert (ack.accepted, ack.durable, ack.reason, ack.proceed) == (False, False, "non-finite", False)
    status = server.status()
    assert status["refused"] == {"non-finite": 1}
    assert status["partials"] == status["contributions_applied"] == status["contributions_waiting"] == 0
    assert server.head(lease.task.game) is None
    assert server.version == 0


def test_a_meta_update_that_is_not_finite_leaves_the_heads_too(tmp_path):
    run = config(
        **HEADS,
        mode="async",
        meta_updates=3,
        meta__learning_rate=100,
        games="pong",
        meta__contribution_clip=0,
        meta__refuse_norm=0,
    )
    server = serve(tmp_path, run)
    push(server, grant(server), [1, 2])
    phi, head = server.snapshot()[1], server.head("pong")
    ack = push(server, grant(server), [5, 5], shared=1e37)  # β G overflows
    assert ack.durable
    assert server.version == 2
    assert np.array_equal(server.snapshot()[1], phi)
    assert np.array_equal(server.head("pong"), head)
    assert "not finite" in server.alerts[-1]
    assert server.ledger(0)[0][-1]["update_norm"] == 0
    server.close()
    server = serve(tmp_path, run)
    assert np.array_equal(server.head("pong"), head)


def test_a_head_that_two_finite_ones_would_make_infinite_stops_the_whole_meta_update(tmp_path):
    server = serve(tmp_path, config(**HEADS, mode="buffered", games="pong", meta_updates=1, meta__batch_size=2))
    for worker in ("w0", "w1"):
        assert push(server, grant(server, worker, worker), [3e38, 1.0], shared=1.0).durable
    assert server.head("pong") is None
    assert np.array_equal(server.snapshot()[1], INITIAL)
    assert any("was not finite" in alert for alert in server.alerts)


def test_the_pushes_of_a_lease_have_one_shape_also_where_the_first_made_no_head(tmp_path):
    run = config(**HEADS, mode="stream", meta__learning_rate=100, meta__refuse_norm=0)
    server = serve(tmp_path, run)
    lease = grant(server)
    assert push(server, lease, [5, 5], shared=1e37, final=False).durable
    assert server.head(lease.task.game) is None
    assert push(server, lease, [5, 5, 5], seq=2, final=False).reason == "shape"
    assert push(server, lease, [6, 7], seq=3, shared=1e37, final=False).durable
    assert server.head(lease.task.game).tolist() == [-1, -2]


# --- what else keeps them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["buffered", "async"])
def test_the_prefix_of_a_lost_worker_moves_the_head_where_that_is_asked_for(tmp_path, mode):
    clock = Clock()
    run = config(**HEADS, mode=mode, server__on_lost="keep", meta_updates=1, meta__batch_size=1)
    server = serve(tmp_path, run, clock=clock)
    lease = grant(server)
    push(server, lease, [1, 2], final=False)
    assert server.head(lease.task.game) is None
    clock.advance(lease.seconds + 1, server)
    assert server.head(lease.task.game).tolist() == [-1, -2]
    assert server.finished
