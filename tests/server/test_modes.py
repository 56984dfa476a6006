"""The laws of the modes that are rules of their own, on the numerics and through the server; and what is not finite."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol import INITIAL, MANIFEST, config, contribution, grant, ledger, pull, serve

from leap_dist.config.settings import Config, MetaSettings
from leap_dist.protocol.messages import Lease
from leap_dist.server.aggregation import Pull, combine
from leap_dist.server.meta_optimizer import MetaOptimizer
from leap_dist.server.meta_server import MetaServer

KINDS = ("constant", "polynomial", "hinge", "inverse")
START = np.linspace(-1, 1, 5).astype(np.float32)
seeds = st.integers(0, 2**31 - 1)
rates, betas = st.floats(0.01, 1), st.floats(0.1, 0.99)


def gradients(seed: int, count: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.normal(size=5).astype(np.float32) for _ in range(count)]


def weight(kind: str, tau: int) -> float:
    """s(τ) as notes/leap.md, section 4, has it."""
    if kind == "constant" or tau == 0:
        return 1.0
    if kind == "hinge":
        return 1.0 if tau <= 4 else 1 / (10 * (tau - 4) + 1)
    return 1 / tau if kind == "inverse" else (1 + tau) ** -0.5


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """To float32 rounding, of the largest entry: single ones may pass through zero."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * (1 + np.abs(expected).max()))


# --- law 4: delayed-nesterov ---------------------------------------------------------------------------------------


def delayed(rate: float, beta: float, delay: int) -> MetaOptimizer:
    settings = MetaSettings(optimizer="sgd", learning_rate=rate, momentum=beta, nesterov=True, batch_size=delay)
    return MetaOptimizer("delayed-nesterov", settings, START)


def published(pushes: list[np.ndarray], rate: float, beta: float, delay: int) -> Iterator[np.ndarray]:
    """φ after each push as arXiv 2401.09135 has it, in float64."""
    phi, momentum, gathered = START.astype(np.float64), np.zeros(5), []
    for g in pushes:
        phi = phi - rate * g.astype(np.float64) / delay
        gathered.append(g.astype(np.float64))
        if len(gathered) == delay:
            momentum = beta * momentum + sum(gathered) / delay
            phi = phi - rate * beta * momentum
            gathered = []
        yield phi


@given(seeds, st.integers(1, 12), rates, betas)
def test_law_4_delayed_nesterov_with_n_1_is_torchs_nesterov_sgd(seed, count, rate, beta):
    ours = delayed(rate, beta, 1)
    parameter = torch.nn.Parameter(torch.from_numpy(START.copy()))
    torchs = torch.optim.SGD([parameter], lr=rate, momentum=beta, nesterov=True)
    for gradient in gradients(seed, count):
        assert ours.step(gradient)
        parameter.grad = torch.from_numpy(gradient.copy())
        torchs.step()
        assert_close(ours.vector, parameter.detach().numpy())


@given(seeds, st.integers(1, 13), rates, betas, st.integers(1, 5), st.integers(0, 12))
def test_delayed_nesterov_is_the_published_rule(seed, count, rate, beta, delay, cut):
    path = gradients(seed, count)
    ours = resumed = delayed(rate, beta, delay)
    for k, (gradient, phi) in enumerate(zip(path, published(path, rate, beta, delay), strict=True)):
        if k == cut:  # in the middle of a cycle, most of the time
            resumed = delayed(rate, beta, delay)
            resumed.restore(ours.vector, ours.state())
        for optimizer in {ours, resumed}:
            assert optimizer.step(gradient)
        assert np.array_equal(resumed.vector, ours.vector)
        assert_close(ours.vector, phi)


# --- law 10: fedasync ----------------------------------------------------------------------------------------------


@given(seeds, st.lists(st.integers(0, 5), min_size=1, max_size=8), st.sampled_from(KINDS), rates, st.integers(1, 9))
def test_law_10_an_endpoint_correction_of_1_under_sgd_is_fedasync(seed, lags, kind, alpha, batch):
    """G = φ_lease − θ_K, whatever version the lease is of."""
    plain = MetaSettings(optimizer="sgd", learning_rate=alpha, staleness=kind, contribution_clip=0.0)
    chosen = {
        "async": replace(plain, batch_size=1, endpoint_correction=1.0),
        "fedasync": replace(plain, batch_size=batch),  # which only counts how long the run is
    }
    optimizers = {mode: MetaOptimizer(mode, chosen[mode], START) for mode in chosen}
    random, phis, mixed = np.random.default_rng(seed), [START], START.astype(np.float64)
    for version, lag in enumerate(lags):
        lease = max(0, version - lag)
        end = random.normal(size=5).astype(np.float32)
        arrived = Pull(lease, 1.0, phis[lease] - end, phis[lease])
        for mode, optimizer in optimizers.items():
            direction = combine(mode, chosen[mode], [arrived], version=version, vector=optimizer.vector, recent=[])
            assert optimizer.step(direction.gradient)
        share = alpha * weight(kind, version - lease)
        mixed = (1 - share) * mixed + share * end
        assert_close(optimizers["async"].vector, optimizers["fedasync"].vector)
        assert_close(optimizers["fedasync"].vector, mixed)
        phis.append(optimizers["fedasync"].vector)


# --- through the server --------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk():
    """The laws are about numbers; a real flush takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


class Arrival(NamedTuple):
    """A contribution as it was applied."""

    tau: int
    start: np.ndarray
    vector: np.ndarray
    phi: np.ndarray
    """After it."""


def push(server: MetaServer, chosen: Config, lease: Lease, vector: np.ndarray, start: np.ndarray, **changes: Any):
    """Pushes what a worker would, φ_lease included where the server needs it."""
    whole = replace(contribution(lease, vector), start=start if chosen.corrects_endpoint else None)
    return server.push(replace(whole, **changes))


def play(server: MetaServer, chosen: Config, order: list[int]) -> list[Arrival]:
    """Three workers hold a lease each, arrive in the order given, and take the next task at once."""
    held = {worker: (grant(server, f"w{worker}"), INITIAL) for worker in range(3)}
    arrivals = []
    for worker in order:
        lease, start = held.pop(worker)
        tau = server.version - lease.version
        vector = pull(lease.task.seed, np.tanh(start))  # wherever φ is, the path stays short
        assert push(server, chosen, lease, vector, start).durable
        phi = server.snapshot()[1]
        arrivals.append(Arrival(tau, start, vector, phi))
        if isinstance(following := server.lease(f"w{worker}", "i0"), Lease):
            held[worker] = following, phi
    assert server.finished
    return arrivals


orders = st.tuples(st.lists(st.integers(0, 2), max_size=4), st.permutations(range(3))).map(lambda two: two[0] + two[1])


def play_anew(order: list[int], **chosen: Any) -> list[Arrival]:
    """As many tasks as arrivals: the last three are of leases that overlap."""
    with tempfile.TemporaryDirectory() as folder:
        whole = config(meta_updates=len(order), meta__batch_size=1, meta__contribution_clip=0, **chosen)
        return play(serve(Path(folder), whole), whole, order)


@settings(max_examples=20)
@given(orders, st.sampled_from(KINDS), rates, st.sampled_from(["reptile", "leap"]))
def test_law_10_holds_through_the_server_for_leases_that_overlap(order, kind, alpha, learner):
    chosen = {"meta__staleness": kind, "meta__learning_rate": alpha, "meta_learner": learner, "leap__loss_weight": 0}
    corrected = play_anew(order, mode="async", meta__optimizer="sgd", meta__endpoint_correction=1, **chosen)
    fedasync = play_anew(order, mode="fedasync", **chosen)
    assert max(arrival.tau for arrival in fedasync) > 0
    phi = INITIAL.astype(np.float64)
    for ours, theirs in zip(corrected, fedasync, strict=True):
        assert ours.tau == theirs.tau
        assert_close(ours.phi, theirs.phi)
        share = alpha * weight(kind, theirs.tau)
        end = theirs.start.astype(np.float64) - theirs.vector
        phi = (1 - share) * phi + share * end
        assert_close(theirs.phi, phi)


@settings(max_examples=12)
@given(orders, st.sampled_from(KINDS), rates, betas)
def test_law_4_holds_through_the_server(order, kind, rate, beta):
    chosen = {"meta__staleness": kind, "meta__learning_rate": rate, "meta__momentum": beta, "meta__nesterov": True}
    ours = play_anew(order, mode="delayed-nesterov", **chosen)
    torchs = play_anew(order, mode="async", meta__optimizer="sgd", **chosen)
    for one, other in zip(ours, torchs, strict=True):
        assert_close(one.phi, other.phi)


@pytest.mark.parametrize("mode", ["async", "fedasync", "stream"])
def test_staleness_counts_from_the_version_that_a_worker_last_heard_of(tmp_path, mode):
    """A shifted worker's path goes on from a later φ than its lease's."""
    chosen = config(mode=mode, meta_learner="reptile", meta_updates=3, meta__batch_size=1, meta__contribution_clip=0)
    moved = []
    for base_version in (0, 1, 2):
        server = serve(tmp_path / str(base_version), chosen)
        slow = grant(server, "slow")
        for _ in range(2):
            push(server, chosen, grant(server), INITIAL, INITIAL)
        before = server.snapshot()[1]
        push(server, chosen, slow, INITIAL, INITIAL, base_version=base_version)
        moved.append(before - server.snapshot()[1])
    for tau in (1, 2):  # the weight is all that differs
        assert_close(moved[2 - tau], moved[2] * weight("polynomial", tau))


@pytest.mark.parametrize("mode", ["buffered", "async", "fedasync", "delayed-nesterov", "stream"])
def test_the_clip_looks_back_over_meta_updates(tmp_path, mode):
    chosen = config(
        mode=mode,
        meta_learner="reptile",
        meta_updates=4,
        meta__batch_size=1,
        meta__contribution_clip=2,
        meta__clip_window=3,
    )
    server = serve(tmp_path, chosen)
    unit = np.eye(MANIFEST.size, dtype=np.float32)[0]
    for norm in (500, 3, 4, 100):  # limits 2 · 500, 2 · 251.5, 2 · 4, 2 · 4: the first is out of the window by then
        push(server, chosen, grant(server), norm * unit, server.snapshot()[1])
    assert [line["clip"] for line in ledger(tmp_path)] == [1.0, 1.0, 1.0, pytest.approx(0.08)]


# --- what is not finite --------------------------------------------------------------------------------------------

STATEFUL = {
    "sync": {"meta__optimizer": "adam"},
    "buffered": {"meta__optimizer": "rmsprop", "meta__momentum": 0.5, "meta__endpoint_correction": 0.5},
    "async": {"meta__momentum": 0.9, "meta__endpoint_correction": 0.5},
    "fedasync": {},
    "delayed-nesterov": {"meta__endpoint_correction": 0.5},
    "stream": {"meta__momentum": 0.9, "meta__nesterov": True},
}
"""Each mode with as much to spoil as it can have."""


def bits(server: MetaServer) -> dict[str, bytes]:
    """φ, the optimizer's state and the heads."""
    state = server._state
    arrays = {**state._optimizer.state(), **{f"head of {game}": x for game, x in state.heads.items()}}
    return {name: x.tobytes() for name, x in {**arrays, "phi": state.vector}.items()}


@pytest.mark.parametrize("mode", STATEFUL)
@settings(max_examples=12)
@given(
    part=st.sampled_from(["vector", "head", "start"]),
    position=st.integers(0, MANIFEST.size - 1),
    value=st.sampled_from([np.nan, np.inf, -np.inf]),
    final=st.booleans(),
)
def test_a_contribution_that_is_not_finite_might_never_have_been(mode, part, position, value, final):
    chosen = config(mode=mode, meta_learner="finetune-multi", meta_updates=3, meta__batch_size=1, **STATEFUL[mode])
    head = 3
    vectors = [pull(k, np.linspace(-1, 1, MANIFEST.size + head).astype(np.float32)) for k in range(3)]

    def run(bad: bool) -> list[dict[str, bytes]]:
        with tempfile.TemporaryDirectory() as folder:
            server = serve(Path(folder), chosen)
            push(server, chosen, grant(server), vectors[0], INITIAL)
            states = [bits(server)]
            lease, start = grant(server, "bad" if bad else "good"), server.snapshot()[1]
            if bad:
                vector, spoilt = vectors[1].copy(), start.copy()
                if part == "start" and chosen.corrects_endpoint:
                    spoilt[position] = value
                else:
                    vector[MANIFEST.size + position % head if part == "head" else position] = value
                ack = push(server, chosen, lease, vector, spoilt, final=final)
                assert (ack.accepted, ack.reason, ack.proceed) == (False, "non-finite", False)
                assert bits(server) == states[-1]
                assert server.version == 1
                lease = grant(server, "good")  # the task goes to others first
            for seq, vector in ((2, vectors[1]), (2, vectors[2])):
                assert push(server, chosen, lease, vector, start, seq=seq).durable
                states.append(bits(server))
                lease, start = server.lease("good", "i0"), server.snapshot()[1]
            assert server.finished
            return states

    assert run(bad=True) == run(bad=False)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize(
    ("mode", "chosen", "huge"),
    [
        ("sync", {}, 1e30),  # Adam squares it
        ("buffered", {"meta__optimizer": "rmsprop"}, 1e30),
        ("buffered", {"meta__optimizer": "adamw", "meta__endpoint_correction": 1}, 1e30),
        ("async", {"meta__learning_rate": 2, "meta__momentum": 0.9}, 3e38),
        ("stream", {"meta__learning_rate": 2}, 3e38),
        ("delayed-nesterov", {}, 3e38),  # ε G + ε β G
        ("fedasync", {"meta__learning_rate": 1, "leap__loss_weight": 0}, 3e38),
    ],
)
def test_an_update_that_overflows_is_made_and_changes_nothing(tmp_path, mode, chosen, huge):
    """A contribution that is finite counts as one: its task is not run again."""
    whole = config(
        mode=mode, meta_updates=3, meta__batch_size=1, meta__contribution_clip=0, meta__refuse_norm=0, **chosen
    )
    server = serve(tmp_path, whole)
    push(server, whole, grant(server), pull(1, INITIAL), INITIAL)
    before, start = bits(server), server.snapshot()[1]
    # In fedasync only the correction makes it too much: φ − θ_K where the two are far apart.
    spoilt = np.full_like(start, -huge) if mode == "fedasync" else start
    assert push(server, whole, grant(server), np.full_like(INITIAL, huge), spoilt).durable
    assert bits(server) == before
    assert server.version == 2
    assert any("meta-update 2 was not finite" in alert for alert in server.alerts)
    assert push(server, whole, grant(server), pull(2, start), start).durable
    assert bits(server) != before
    assert server.finished
