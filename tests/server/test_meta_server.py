"""The protocol on the plain class: what is accepted, what is refused, and the laws of the aggregation modes."""

from __future__ import annotations

import errno
import threading
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from protocol import (
    INITIAL,
    MANIFEST,
    Clock,
    config,
    contribution,
    fast_folder,
    finish,
    grant,
    ledger,
    pull,
    serve,
    work,
)

from leap_dist.config.loading import resolve
from leap_dist.nn.flat_vector import Manifest
from leap_dist.protocol.messages import Contribution, Idle
from leap_dist.protocol.task_queue import task
from leap_dist.server.meta_server import MetaServer
from leap_dist.storage.checkpoint import CheckpointStore
from leap_dist.storage.ledger import Ledger
from leap_dist.storage.locks import RunDirectoryBusy

OPTIMIZERS = [
    {"meta__optimizer": "adam", "meta__learning_rate": 0.01},
    {"meta__optimizer": "sgd", "meta__learning_rate": 0.1},
    {"meta__optimizer": "sgd", "meta__learning_rate": 0.1, "meta__momentum": 0.9},
    {"meta__optimizer": "sgd", "meta__learning_rate": 0.1, "meta__momentum": 0.9, "meta__nesterov": True},
    {"meta__optimizer": "adamw", "meta__learning_rate": 0.01, "meta__weight_decay": 0.1},
    {"meta__optimizer": "rmsprop", "meta__learning_rate": 0.01},
    {"meta__optimizer": "rmsprop", "meta__learning_rate": 0.01, "meta__momentum": 0.5, "meta__schedule": "linear"},
]


def torch_optimizer(meta, parameters) -> torch.optim.Optimizer:
    lr, momentum = meta.learning_rate, meta.momentum
    if meta.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=lr)
    if meta.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=meta.weight_decay)
    if meta.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=lr, momentum=momentum)
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, nesterov=meta.nesterov)


def algorithm_1(settings, *, clip: float = 0.0) -> np.ndarray:
    """The seed's Algorithm 1, one task after the other, with torch's optimizer: the oracle of `sync`."""
    phi = torch.nn.Parameter(torch.from_numpy(INITIAL.copy()))
    meta = settings.meta
    optimizer = torch_optimizer(meta, [phi])
    for s in range(settings.meta_updates):
        if meta.schedule == "linear":
            optimizer.param_groups[0]["lr"] = meta.learning_rate * (1 - s / settings.meta_updates)
        start = phi.detach().numpy().copy()
        total = np.zeros_like(start)
        indices = range(s * meta.batch_size, (s + 1) * meta.batch_size)
        pulls = [
            pull(task(i, settings.games, seed=settings.seed, steps=settings.task_steps).seed, start) for i in indices
        ]
        median = np.median([np.linalg.norm(g.astype(np.float64)) for g in pulls])
        for g in pulls:
            norm = np.linalg.norm(g.astype(np.float64))
            total += np.float32(min(1.0, clip * median / norm) if clip else 1.0) * g
        phi.grad = torch.from_numpy(total / np.float32(meta.batch_size))
        optimizer.step()
    return phi.detach().numpy()


@given(st.sampled_from(OPTIMIZERS), st.integers(1, 9), st.sampled_from([0.0, 1.01]), st.integers(0, 2**31 - 1))
def test_law_1_sync_is_algorithm_1_bit_for_bit_for_any_number_of_workers_in_any_order(optimizer, workers, clip, order):
    settings = config(mode="sync", meta_updates=3, meta__batch_size=5, meta__contribution_clip=clip, **optimizer)
    random = np.random.default_rng(order)
    held = {}
    with fast_folder() as folder:
        server = serve(folder, settings)
        while not server.finished:
            name = f"w{random.integers(workers)}"
            if name in held:
                lease, start = held.pop(name)
                finish(server, lease, start)
            elif not isinstance(lease := server.lease(name, "i"), Idle):
                assert lease.version == server.version
                held[name] = lease, server.snapshot()[1]
        server.close()
        assert np.array_equal(server.snapshot()[1], algorithm_1(settings, clip=clip))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("staleness", ["constant", "polynomial", "hinge", "inverse"])
def test_law_2_buffered_with_one_version_is_sync(tmp_path, optimizer, staleness):
    results = []
    for mode in ("sync", "buffered"):
        settings = config(
            mode=mode,
            meta_updates=1,
            meta__batch_size=4,
            meta__staleness=staleness,
            meta__contribution_clip=1.2,
            **optimizer,
        )
        server = serve(tmp_path / mode, settings)
        leases = [grant(server, f"w{i}") for i in range(4)]
        for lease in reversed(leases):
            finish(server, lease, INITIAL)
        assert server.version == 1
        results.append(server.snapshot()[1])
    assert np.array_equal(*results)


@pytest.mark.parametrize(
    ("other", "optimizer"),
    [
        ("async", OPTIMIZERS[1]),
        ("delayed-nesterov", OPTIMIZERS[3]),  # the same of its own rule: N pushes are one step of Nesterov's momentum
    ],
)
def test_law_3_pushes_of_one_version_are_the_step_of_sync_under_sgd(tmp_path, other, optimizer):
    results = []
    for mode in ("sync", other):
        settings = config(
            mode=mode,
            meta_updates=3,
            meta__batch_size=4,
            meta__staleness="constant",
            meta__contribution_clip=0,
            **optimizer,
        )
        server = serve(tmp_path / mode, settings)
        for _ in range(3):
            start = server.snapshot()[1]
            for lease in [grant(server, f"w{i}") for i in range(4)]:
                finish(server, lease, start)
        assert server.version == (3 if mode == "sync" else 12)
        assert server.finished
        results.append(server.snapshot()[1])
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)


@st.composite
def deliveries(draw):
    """Indices into the pushes of three leases (two partial, one final each): every final once or more, in any order."""
    extra = draw(st.lists(st.integers(0, 8), max_size=12))
    return draw(st.permutations([2, 5, 8, *extra]))


@given(order=deliveries(), mode=st.sampled_from(["sync", "buffered"]), keep=st.booleans())
def test_law_11_duplicates_and_reordering_change_nothing(order, mode, keep):
    def play(order):
        with fast_folder() as folder:
            settings = config(
                mode=mode, meta_updates=1, meta__batch_size=3, server__on_lost="keep" if keep else "retry"
            )
            server = serve(folder, settings)
            leases = [grant(server, f"w{i}") for i in range(3)]
            pushes = [
                contribution(lease, pull(lease.task.seed, INITIAL) * seq / 3, seq=seq, final=seq == 3)
                for lease in leases
                for seq in (1, 2, 3)
            ]
            for i in order:
                assert server.push(pushes[i]).accepted
            return server.snapshot()[1], ledger(folder), server.status()

    phi, lines, status = play(order)
    once_phi, once_lines, _ = play([2, 5, 8])
    assert np.array_equal(phi, once_phi)
    assert lines == once_lines
    assert status["contributions_applied"] == 3
    assert status["duplicates"] + status["partials"] + 3 == len(order)


@given(order=deliveries())
def test_law_11_async_depends_on_the_order_of_first_finals_only(order):
    def play(order):
        with fast_folder() as folder:
            server = serve(folder, config(mode="async", meta_updates=3))
            leases = [grant(server, f"w{i}") for i in range(3)]
            for i in order:
                lease, seq = leases[i // 3], i % 3 + 1
                server.push(contribution(lease, pull(lease.task.seed, INITIAL) * seq / 3, seq=seq, final=seq == 3))
            return server.snapshot()[1], ledger(folder)

    finals = list(dict.fromkeys(i for i in order if i % 3 == 2))
    (phi, lines), (once_phi, once_lines) = play(order), play(finals)
    assert np.array_equal(phi, once_phi)
    assert lines == once_lines


def test_partial_contributions_are_shown(tmp_path):
    server = serve(tmp_path, config())
    lease = grant(server)
    server.push(contribution(lease, INITIAL, seq=1, final=False))
    server.push(contribution(lease, INITIAL, seq=2, final=False))
    status = server.status()
    assert status["partials"] == 2
    assert status["agent_steps"] == 200
    (shown,) = status["leases"]
    assert (shown["game"], shown["steps"], shown["curve"][-1]["score"]) == (lease.task.game, 200, 3.0)
    assert status["contributions_applied"] == 0


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("manifest", {"manifest": "0" * 16}),
        ("shape", {"vector": np.zeros(7, np.float32)}),
        ("shape", {"vector": np.zeros((8, 1), np.float32)}),
        ("dtype", {"vector": np.zeros(8, np.float64)}),
        ("non-finite", {"vector": np.full(8, np.nan, np.float32)}),
        ("non-finite", {"vector": np.full(8, np.inf, np.float32)}),
        ("incarnation", {"incarnation": "older"}),
        ("incarnation", {"worker": "other"}),
        ("unknown-lease", {"lease": "000099-0"}),
    ],
)
@pytest.mark.parametrize("final", [True, False])
def test_a_bad_contribution_is_refused_by_name_and_counts_nowhere(tmp_path, reason, changes, final):
    server = serve(tmp_path, config())
    lease = grant(server)
    ack = server.push(replace(contribution(lease, INITIAL, final=final), **changes))
    assert (ack.accepted, ack.durable, ack.reason) == (False, False, reason)
    status = server.status()
    assert status["refused"] == {reason: 1}
    assert status["contributions_applied"] == status["contributions_waiting"] == 0
    assert server.version == 0
    assert np.array_equal(server.snapshot()[1], INITIAL)
    assert not list((tmp_path / "journal").glob("contribution-*"))


def test_a_renewal_reports_progress(tmp_path):
    clock = Clock()
    server = serve(tmp_path, config(), clock=clock)
    lease = grant(server)
    clock.now += 5
    server.renew(lease.id, "i0", 60)
    (shown,) = server.status()["leases"]
    assert (shown["steps"], shown["seconds"], server.status()["agent_steps"]) == (60, 5.0, 60)
    server.push(contribution(lease, INITIAL, seq=1, final=False))
    assert server.status()["agent_steps"] == 100, "steps are counted once"


def test_a_lease_not_renewed_expires_and_its_worker_is_fenced(tmp_path):
    clock = Clock()
    settings = config(server__lease_seconds=30)
    server = serve(tmp_path, settings, clock=clock)
    lease = grant(server, "w0")
    clock.now += 29
    assert server.renew(lease.id, "i0", 0).proceed
    clock.now += 29
    server.tick()
    assert server.push(contribution(lease, INITIAL, seq=1, final=False)).proceed
    clock.advance(31, server)
    late = server.push(contribution(lease, INITIAL, seq=2))
    assert (late.accepted, late.proceed, late.reason) == (False, False, "expired")
    assert server.renew(lease.id, "i0", 0).reason == "expired"
    again = grant(server, "w1")
    assert again.task == lease.task
    assert again.id != lease.id


def test_a_worker_that_asks_again_loses_what_it_held(tmp_path):
    server = serve(tmp_path, config())
    first = grant(server, "w0", "old")
    second = grant(server, "w0", "new")
    assert second.task == first.task
    assert server.push(contribution(first, INITIAL)).reason == "superseded"
    assert not server.renew(first.id, "old", 0).proceed
    assert not server.renew(second.id, "old", 0).proceed
    assert server.push(contribution(second, INITIAL)).durable


def test_the_prefix_of_a_lost_lease_counts_where_that_is_asked_for(tmp_path):
    server = serve(tmp_path, config(server__on_lost="keep", meta__batch_size=2))
    lost, other = grant(server, "w0", "gone"), grant(server, "w1")
    prefix = pull(1, INITIAL)
    server.push(contribution(lost, prefix, seq=3, final=False))
    server.release("gone")
    finish(server, other, INITIAL)
    first, second = ledger(tmp_path)
    assert (first["task"], first["steps"], second["task"]) == (lost.task.index, 300, other.task.index)
    assert first["norm"] == pytest.approx(np.linalg.norm(prefix))
    assert server.push(contribution(lost, prefix, seq=3, final=False)).reason == "duplicate"


@pytest.mark.parametrize("mode", ["buffered", "stream"])
@pytest.mark.parametrize("applied", [False, True])
def test_what_comes_after_the_prefix_that_counts_is_not_called_durable(tmp_path, mode, applied):
    clock = Clock()
    settings = config(mode=mode, server__on_lost="keep", meta__batch_size=1 if applied else 2)
    server = serve(tmp_path, settings, clock=clock)
    lease, vector = grant(server), pull(1, INITIAL)
    assert server.push(contribution(lease, vector, seq=1, final=False)).accepted
    clock.advance(100, server)
    for _ in range(2):
        late = server.push(contribution(lease, 2 * vector, seq=2))
        assert (late.accepted, late.durable, late.reason) == (False, False, "prefix-counts")
        again = server.push(contribution(lease, vector, seq=1, final=False))
        assert (again.durable, again.reason) == (True, "duplicate")
        server.close()
        server = serve(tmp_path, settings, clock=clock)


def test_stale_contributions_weigh_less_and_too_stale_ones_are_refused(tmp_path):
    server = serve(tmp_path, config(mode="async", meta_updates=9, meta__max_staleness=2))
    slow, slower = grant(server, "slow"), grant(server, "slower")
    for _ in range(2):
        finish(server, grant(server), server.snapshot()[1])
    finish(server, slow, INITIAL)
    line = ledger(tmp_path)[-1]
    assert (line["staleness"], line["weight"]) == (2, pytest.approx(3**-0.5))
    before = server.snapshot()[1]
    assert server.push(contribution(slower, INITIAL, seq=5)).reason == "stale"
    assert np.array_equal(server.snapshot()[1], before)
    assert server.status()["refused"] == {"stale": 1}


def test_an_exploding_contribution_is_clipped_and_the_ledger_says_so(tmp_path):
    server = serve(
        tmp_path,
        config(mode="sync", meta__batch_size=3, meta__contribution_clip=3, meta__refuse_norm=0, meta_updates=1),
    )
    leases = [grant(server, f"w{i}") for i in range(3)]
    vectors = [np.ones(8, np.float32), np.full(8, 1e12, np.float32), -np.ones(8, np.float32)]
    for lease, vector in zip(leases, vectors, strict=True):
        assert server.push(contribution(lease, vector)).durable
    lines = ledger(tmp_path)
    assert [line["clip"] for line in lines] == [1.0, pytest.approx(3e-12), 1.0]
    assert server.status()["clipped"] == 1
    assert np.isfinite(server.snapshot()[1]).all()


def test_a_game_that_keeps_failing_is_quarantined_and_the_run_goes_on(tmp_path):
    settings = config(mode="sync", meta_updates=3, meta__batch_size=2)
    server = serve(tmp_path, settings)
    seeds = set()
    while not isinstance(lease := server.lease("w0", "i0"), Idle):
        if lease.task.game == "pong":
            seeds.add(lease.task.seed)
            server.fail(lease.id, "i0", "RuntimeError: broken")
        else:
            finish(server, lease, server.snapshot()[1])
    assert len(seeds) == 3, "each attempt has a seed of its own"
    assert server.status()["quarantined"] == ["pong"]
    assert any("pong is quarantined" in alert for alert in server.alerts)
    assert server.version == 3
    assert {line["game"] for line in ledger(tmp_path)} == {"freeway"}


def test_a_run_in_which_every_game_fails_ends(tmp_path):
    server = serve(tmp_path, config())
    for _ in range(20):
        lease = server.lease("w0", "i0")
        if isinstance(lease, Idle):
            break
        server.fail(lease.id, "i0", "broken")
    assert lease == Idle(finished=True)
    assert server.version == 0


def test_no_more_tasks_are_leased_than_the_meta_updates_need(tmp_path):
    server = serve(tmp_path, config(meta_updates=1, meta__batch_size=2))
    leases = [grant(server, "w0"), grant(server, "w1")]
    assert server.lease("w2", "i") == Idle(finished=False)
    for lease in leases:
        finish(server, lease, INITIAL)
    assert server.lease("w2", "i") == Idle(finished=True)


def test_tasks_are_drawn_without_replacement_and_depend_on_the_seed():
    games = ("a", "b", "c", "d")
    tasks = [task(i, games, seed=1, steps=10) for i in range(40)]
    for first in range(0, 40, 4):
        assert {t.game for t in tasks[first : first + 4]} == set(games)
    assert len({t.seed for t in tasks}) == 40
    assert len({tuple(t.game for t in tasks[i : i + 4]) for i in range(0, 40, 4)}) > 1
    assert [t.game for t in tasks] != [task(i, games, seed=2, steps=10).game for i in range(40)]


def test_a_second_server_on_the_same_directory_is_refused(tmp_path):
    first = serve(tmp_path, config())
    with pytest.raises(RunDirectoryBusy, match=r"in use by a live server \(process"):
        serve(tmp_path, config())
    first.close()
    serve(tmp_path, config()).close()


def test_memory_does_not_keep_what_ray_lends(tmp_path):
    """Ray's arrays are read-only views that pin its object store while anything refers to them."""
    server = serve(tmp_path, config(server__on_lost="keep", meta__batch_size=2))
    lease = grant(server)
    for seq, final in ((1, False), (2, True)):
        lent = INITIAL.copy()
        lent.flags.writeable = False
        server.push(contribution(lease, lent, seq=seq, final=final))
        held = [o.newest.vector for o in server._leases.all()] + [
            a.contribution.vector for a in server._state.backlog.waiting
        ]
        assert len(held) == 1
        assert not np.shares_memory(held[0], lent)


def test_work_to_the_end_fills_the_ledger(tmp_path):
    settings = config(meta_updates=3, meta__batch_size=2)
    server = serve(tmp_path, settings)
    work(server)
    lines = ledger(tmp_path)
    assert [line["version_after"] for line in lines] == [1, 1, 2, 2, 3, 3]
    assert [line["total_steps"] for line in lines] == [400, 400, 800, 800, 1200, 1200]
    assert len(server.ledger(0)[0]) == 6
    assert server.ledger(server.ledger(0)[1]) == ([], server.ledger(0)[1])


# --- what too many, or broken, workers do --------------------------------------------------------------------------


def test_a_silent_worker_is_named_and_a_game_that_silences_three_in_a_row_is_quarantined(tmp_path):
    clock = Clock()
    server = serve(tmp_path, config(games="pong"), clock=clock)
    for number in range(3):
        lease = grant(server, f"w{number}", f"i{number}")
        clock.advance(lease.seconds + 1, server)
        assert server.status()["silent"] == [f"i{n}" for n in range(number + 1)]
        assert f"w{number} has not reported for 20 s: its task (pong) is withdrawn" in server.alerts
    assert server.status()["quarantined"] == ["pong"]
    assert server.lease("w3", "i3") == Idle(finished=True)


def test_workers_that_fall_silent_together_quarantine_nothing(tmp_path):
    clock = Clock()
    settings = config(meta_updates=8, workers=8)
    server = serve(tmp_path, settings, clock=clock)
    leases = [grant(server, f"w{n}", f"i{n}") for n in range(8)]
    clock.advance(leases[0].seconds + 1, server)
    assert len(server.status()["silent"]) == 8
    assert server.status()["quarantined"] == []
    assert sorted(grant(server, f"x{n}").task.index for n in range(8)) == sorted(lease.task.index for lease in leases)


@pytest.mark.parametrize(("crashed", "limit"), [(True, 10), (False, None)])
def test_a_game_that_kills_its_process_is_quarantined_but_not_one_whose_node_is_gone(tmp_path, crashed, limit):
    clock = Clock()
    server = serve(tmp_path, config(games="pong"), clock=clock)
    for number in range(12):
        if server.finished:
            break
        grant(server, "w0", f"i{number}")
        clock.now += 1
        server.release(f"i{number}", crashed=crashed)
    assert (server.status()["quarantined"] == ["pong"]) == crashed
    assert number == (limit if crashed else 11)


def test_a_worker_on_which_every_game_fails_gets_no_more_leases_and_the_others_go_on(tmp_path):
    clock = Clock()
    settings = config(games="pong,freeway,assault,asterix", meta_updates=4)
    server = serve(tmp_path, settings, clock=clock)
    failed = []
    while not isinstance(lease := server.lease("bad", "i"), Idle):
        failed.append(lease.task.game)
        nan = np.full(len(INITIAL), np.nan, np.float32)
        assert server.push(replace(contribution(lease, nan), worker="bad", incarnation="i")).reason == "non-finite"
        clock.now += 1
        finish(server, grant(server, "good"), server.snapshot()[1])
    assert len(set(failed)) == 3
    assert lease == Idle(finished=False, wait=5.0)
    assert server.status()["quarantined_workers"] == ["bad"]
    assert server.status()["quarantined"] == []
    assert "bad is quarantined" in "\n".join(server.alerts)
    work(server, "good")
    assert server.status()["complete"]


def test_a_worker_that_fails_at_once_whatever_it_is_given_does_not_take_the_games_with_it(tmp_path):
    """It asks again before anybody else does: what it has failed goes to others."""
    clock = Clock()
    server = serve(tmp_path, config(games="pong,freeway,assault,asterix", meta_updates=4), clock=clock)
    held = grant(server, "good")
    while not isinstance(lease := server.lease("bad", "i"), Idle):
        clock.now += 1
        server.fail(lease.id, "i", "RuntimeError: broken")
    assert server.status()["quarantined_workers"] == ["bad"]
    assert server.status()["quarantined"] == []
    finish(server, held, INITIAL)
    work(server, "good")
    assert server.status()["complete"]


def test_a_contribution_of_zeros_counts_and_is_alarmed(tmp_path):
    server = serve(tmp_path, config(meta_updates=1, meta__batch_size=2))
    finish(server, grant(server), INITIAL)
    assert server.status()["all_zero"] == 0
    assert server.push(contribution(grant(server), np.zeros(len(INITIAL), np.float32))).durable
    assert server.status()["all_zero"] == 1
    assert any("nothing but zeros for" in alert for alert in server.alerts)


def test_a_meta_learner_that_sends_nothing_alarms_nobody(tmp_path):
    server = serve(tmp_path, config(meta_learner="none"))
    assert server.push(contribution(grant(server), np.empty(0, np.float32))).durable
    assert server.status()["all_zero"] == 0
    assert not server.alerts


def test_the_largest_norm_follows_the_median_and_before_that_the_initialization(tmp_path):
    server = serve(tmp_path, config(mode="async", meta_updates=9, meta__refuse_norm=10, meta__batch_size=1))
    unit = np.eye(len(INITIAL), dtype=np.float32)[0]
    usual = np.linalg.norm(INITIAL)
    assert server.push(contribution(grant(server), unit * np.float32(10.1 * usual))).reason == "exploding"
    assert server.push(contribution(grant(server), unit * np.float32(9.9 * usual))).durable
    for _ in range(2):
        assert server.push(contribution(grant(server), unit)).durable
    assert server.push(contribution(grant(server), unit * 11)).reason == "exploding"
    assert server.push(contribution(grant(server), unit * np.float32(9.9))).durable
    assert server.status()["refused"] == {"exploding": 2}


@pytest.mark.parametrize("preset", ["paper", "paper-async", "fast"])
def test_games_whose_norms_lie_seven_orders_of_magnitude_apart_are_trained_together(tmp_path, preset):
    """Skiing's first episodes that end give a norm of 4e8 with the energy, where other games have a few hundred."""
    run = resolve(preset, {"games": "skiing,pong", "meta_updates": 4, "meta.batch_size": 2})
    server = serve(tmp_path, run)
    unit = np.eye(len(INITIAL), dtype=np.float32)[0]
    for _ in range(run.total_tasks):
        lease = grant(server)
        norm = 4e8 if lease.task.game == "skiing" else 300
        assert server.push(contribution(lease, unit * np.float32(norm))).durable
    assert not server.status()["refused"]


@pytest.mark.parametrize("on_lost", ["retry", "keep"])
def test_a_flood_of_workers_is_told_to_wait_and_the_server_stays_small(tmp_path, on_lost):
    """A hundred workers where two were asked for, each pushing a hundred vectors of 1 MB as fast as it can."""
    clock = Clock()
    manifest = Manifest(("weight",), ((2**18,),))
    settings = config(workers=2, meta_updates=100, server__on_lost=on_lost)
    server = MetaServer(settings, tmp_path, manifest=manifest, initial=np.zeros(2**18, np.float32), clock=clock)
    answers = [server.lease(f"w{n}", "i0") for n in range(100)]
    leases = [answer for answer in answers if not isinstance(answer, Idle)]
    assert len(leases) == 16
    assert {answer.wait for answer in answers if isinstance(answer, Idle)} == {5.0}
    vector = np.ones(2**18, np.float32)
    push = replace(contribution(leases[0], vector, final=False), manifest=manifest.digest)
    tracemalloc.start()
    answers = Counter()
    for seq in range(1, 101):
        for lease in leases:
            ack = server.push(replace(push, lease=lease.id, worker=lease.worker, seq=seq))
            answers[ack.reason] += 1
            assert (ack.proceed, ack.wait) == (True, 1.0 if ack.reason else 0.0)
    held, most = (figure / 2**20 for figure in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    assert answers == {"": 200, "busy": 1400}, "two seconds' worth"
    assert held < (17 if on_lost == "keep" else 1)
    assert most < 20
    assert server.status()["agent_steps"] == 16 * 100, "who is turned away is heard all the same"
    clock.now += 1
    assert server.push(replace(push, lease=leases[0].id, worker=leases[0].worker, seq=101)).accepted
    server.close()


def test_contributions_do_not_pile_up_while_no_meta_update_can_be_saved(tmp_path, monkeypatch):
    settings = config(mode="async", meta_updates=100, meta__max_staleness=1000)
    server = serve(tmp_path, settings)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "save", full)
        for _ in range(64):
            assert server.push(contribution(grant(server), INITIAL)).durable
        lease = grant(server)
        ack = server.push(contribution(lease, INITIAL))
        assert (ack.reason, ack.proceed, ack.wait) == ("busy", True, 5.0)
    server.tick()
    assert server.push(contribution(lease, INITIAL)).durable
    assert server.version == 65
    assert server.status()["contributions_waiting"] == 0


def test_a_whole_contribution_counts_as_one_that_was_pushed_in_full(tmp_path):
    """What a program with a training loop of its own sends gives the same φ."""
    settings = config(mode="sync")
    one, other = serve(tmp_path / "one", settings), serve(tmp_path / "other", settings)
    while not isinstance(lease := one.lease("w0", "i0"), Idle):
        vector = pull(lease.task.seed, one.snapshot()[1])
        ack = one.push(Contribution.whole(lease, MANIFEST.digest, vector))
        assert ack.durable
        assert not ack.proceed
    work(other)
    assert one.finished
    assert np.array_equal(one.snapshot()[1], other.snapshot()[1])
    assert one.status()["agent_steps"] == settings.total_tasks * settings.task_steps


def test_nobody_waits_for_the_verification_of_a_long_ledger(tmp_path, monkeypatch):
    """After a restart, what is pushed is durable at once; the meta-update follows when the ledger is verified."""
    settings = config(meta__batch_size=2, meta_updates=4)
    server = serve(tmp_path / "run", settings)
    for _ in range(4):
        finish(server, grant(server), server.snapshot()[1])
    assert server.status()["meta_updates"] == 2
    server.close()

    verified, verify = threading.Event(), Ledger._verify

    def slow(self, *arguments):
        verified.wait(5)
        verify(self, *arguments)

    monkeypatch.setattr(Ledger, "_verify", slow)
    monkeypatch.setattr("leap_dist.storage.ledger.VERIFIED_AT_ONCE", 0)
    server = serve(tmp_path / "run", settings)
    for _ in range(2):
        finish(server, grant(server), server.snapshot()[1])
    server.tick()
    assert not verified.is_set()
    assert server.status()["meta_updates"] == 2
    verified.set()
    server._state.ledger._verification.join(5)
    server.tick()
    assert server.status()["meta_updates"] == 3
    assert len(ledger(tmp_path / "run")) == 6
    server.close()
