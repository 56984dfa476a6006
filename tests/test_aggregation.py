"""Staleness weights, the norm clip, how pulls are combined, and the meta-optimizer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leap_dist import staleness
from leap_dist.aggregation import MetaOptimizer, Pull, batch_size, combine
from leap_dist.settings import MetaSettings

KINDS = ("constant", "polynomial", "hinge", "inverse")
OPTIMIZERS = [
    MetaSettings(optimizer="adam", learning_rate=0.01),
    MetaSettings(optimizer="sgd", learning_rate=0.1),
    MetaSettings(optimizer="sgd", learning_rate=0.1, momentum=0.9),
]
PHI = np.zeros(0, np.float32)  # only the endpoint correction asks where φ is
PLAIN = MetaSettings(batch_size=4, staleness="polynomial", contribution_clip=0.0)
seeds = st.integers(0, 2**31 - 1)


def random_pulls(seed: int, versions: list[int], size: int = 6) -> list[Pull]:
    """Of very different lengths, as Atari games are."""
    random = np.random.default_rng(seed)
    vectors = [(random.normal(size=size) * 10 ** random.uniform(-3, 3)).astype(np.float32) for _ in versions]
    return [Pull(v, float(np.linalg.norm(x.astype(np.float64))), x) for v, x in zip(versions, vectors, strict=True)]


# --- staleness weights ---------------------------------------------------------------------------------------------


@given(st.sampled_from(KINDS), st.integers(0, 10**9))
def test_a_weight_starts_at_one_never_rises_and_stays_positive(kind, tau):
    assert staleness.weight(kind, 0) == 1.0
    assert 0 < staleness.weight(kind, tau + 1) <= staleness.weight(kind, tau) <= 1


@pytest.mark.parametrize(
    ("kind", "tau", "expected"),
    [
        ("constant", 1000, 1.0),
        ("polynomial", 3, 0.5),  # (1+3)^−½
        ("polynomial", 99, 0.1),
        ("hinge", 4, 1.0),  # b = 4 is still fresh
        ("hinge", 5, 1 / 11),  # 1/(10·(5−4)+1)
        ("hinge", 14, 1 / 101),
        ("inverse", 1, 1.0),  # 1/max(1, 1)
        ("inverse", 2, 0.5),
        ("inverse", 50, 0.02),
    ],
)
def test_weights_by_hand(kind, tau, expected):
    assert staleness.weight(kind, tau) == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_negative_staleness_is_refused(kind):
    with pytest.raises(ValueError, match="-1"):
        staleness.weight(kind, -1)


def test_an_unknown_weight_is_refused():
    with pytest.raises(ValueError, match=r"'hnge'.*hinge"):
        staleness.weight("hnge", 0)


# --- the norm clip -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "reference", "multiple", "expected"),
    [
        (12.0, [1.0, 2.0, 100.0], 3.0, 0.5),  # limit 3 · 2
        (12.0, [1.0, 2.0, 4.0, 100.0], 3.0, 0.75),  # limit 3 · (2 + 4)/2
        (6.0, [1.0, 2.0, 100.0], 3.0, 1.0),  # at the limit
        (5.0, [1.0, 2.0, 100.0], 3.0, 1.0),  # never enlarged
        (1e6, [1.0], 0.0, 1.0),  # off
        (1e6, [], 3.0, 1.0),  # nothing to compare with
        (0.0, [1.0], 3.0, 1.0),
        (0.0, [0.0], 3.0, 1.0),
    ],
)
def test_clip_factors_by_hand(norm, reference, multiple, expected):
    assert staleness.clip_factor(norm, reference, multiple) == pytest.approx(expected)


norms = st.just(0.0) | st.floats(1e-12, 1e12)


@given(norms, st.lists(norms, max_size=9), st.just(0.0) | st.floats(0.01, 100))
def test_a_clip_factor_never_enlarges_and_keeps_the_limit(norm, reference, multiple):
    factor = staleness.clip_factor(norm, reference, multiple)
    assert 0 <= factor <= 1
    if multiple > 0 and reference and np.median(reference) > 0:
        assert factor * norm <= multiple * np.median(reference) * (1 + 1e-9)


# --- the weighted mean ---------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 9), st.integers(1, 20))
def test_the_weighted_mean_is_the_naive_one(seed, vectors, count):
    random = np.random.default_rng(seed)
    xs = [random.normal(size=5).astype(np.float32) for _ in range(vectors)]
    weights = random.uniform(size=vectors).tolist()
    before = [x.copy() for x in xs]
    mean = staleness.weighted_mean(xs, weights, count)
    for k in range(5):
        expected = sum(w * float(x[k]) for w, x in zip(weights, xs, strict=True)) / count
        assert mean[k] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert mean.dtype == np.float32
    assert all(np.array_equal(x, old) for x, old in zip(xs, before, strict=True)), "the vectors are the caller's"
    assert np.array_equal(mean, staleness.weighted_mean(xs, weights, count)), "bit for bit"


def test_unequal_contributors_are_averaged_exactly():
    xs = [np.array([1.0, 8.0], np.float32), np.array([3.0, 0.0], np.float32), np.array([-4.0, 2.0], np.float32)]
    assert staleness.weighted_mean(xs, [1.0, 0.5, 0.25], 4).tolist() == [(1 + 1.5 - 1) / 4, (8 + 0.5) / 4]


def test_vectors_and_weights_must_be_as_many():
    with pytest.raises(ValueError):
        staleness.weighted_mean([np.zeros(2, np.float32)], [1.0, 1.0], 2)


# --- combining pulls -----------------------------------------------------------------------------------------------


def naive(pulls: list[Pull], factors: list[float], divisor: int) -> np.ndarray:
    total = np.zeros(len(pulls[0].vector))
    for pull, factor in zip(pulls, factors, strict=True):
        total += factor * pull.vector.astype(np.float64)
    return total / divisor


def assert_direction(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_sync_is_the_plain_mean():
    pulls = random_pulls(0, [7, 7, 7])
    direction = combine("sync", PLAIN, pulls, version=7, vector=PHI, recent=[])
    assert_direction(direction.gradient, naive(pulls, [1, 1, 1], 3))
    assert direction.weights == (1.0, 1.0, 1.0)
    assert direction.clips == (1.0, 1.0, 1.0)


@given(seeds, st.lists(st.integers(0, 9), min_size=1, max_size=6), st.sampled_from(KINDS))
def test_buffered_weighs_each_pull_by_its_staleness(seed, versions, kind):
    pulls = random_pulls(seed, versions)
    direction = combine("buffered", replace(PLAIN, staleness=kind), pulls, version=9, vector=PHI, recent=[])
    weights = [staleness.weight(kind, 9 - v) for v in versions]
    assert direction.weights == tuple(weights)
    assert_direction(direction.gradient, naive(pulls, weights, len(pulls)))


@given(seeds, st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(1, 9))
def test_async_divides_by_the_batch_size(seed, versions, batch):
    """So that |B| arrivals of one version move as far as one batch of them."""
    pulls = random_pulls(seed, versions)
    direction = combine("async", replace(PLAIN, batch_size=batch), pulls, version=9, vector=PHI, recent=[])
    assert_direction(direction.gradient, naive(pulls, [(1 + 9 - v) ** -0.5 for v in versions], batch))


def test_how_many_pulls_a_meta_update_takes():
    assert [batch_size(mode, PLAIN) for mode in ("sync", "buffered", "async")] == [4, 4, 1]


def pulls_of_norms(*norms: float) -> list[Pull]:
    return [Pull(0, norm, np.array([norm, 0.0], np.float32)) for norm in norms]


def test_sync_clips_against_its_own_batch_only():
    settings = replace(PLAIN, contribution_clip=2.0)
    pulls = pulls_of_norms(1.0, 2.0, 40.0)
    direction = combine("sync", settings, pulls, version=0, vector=PHI, recent=[1e9] * 64)
    assert direction.clips == pytest.approx((1.0, 1.0, 0.1))  # limit 2 · median(1, 2, 40) = 4
    assert_direction(direction.gradient, np.array([(1 + 2 + 4) / 3, 0.0]))


@pytest.mark.parametrize("mode", ["buffered", "async"])
def test_the_others_clip_against_the_running_median(mode):
    settings = replace(PLAIN, contribution_clip=2.0, clip_window=5)
    pulls = pulls_of_norms(40.0)
    direction = combine(mode, settings, pulls, version=0, vector=PHI, recent=[1e9, 1e9, 1e9, 3.0, 4.0, 5.0, 6.0])
    # the window holds 3, 4, 5, 6 and 40 itself: limit 2 · 5
    assert direction.clips == pytest.approx((0.25,))
    assert_direction(direction.gradient, np.array([10.0 / (1 if mode == "buffered" else 4), 0.0]))


def test_a_window_smaller_than_the_batch_still_holds_the_batch():
    settings = replace(PLAIN, contribution_clip=2.0, clip_window=1)
    direction = combine("buffered", settings, pulls_of_norms(1.0, 2.0, 40.0), version=0, vector=PHI, recent=[1e9])
    assert direction.clips == pytest.approx((1.0, 1.0, 0.1))


def test_clip_and_staleness_multiply():
    settings = replace(PLAIN, contribution_clip=2.0)
    stale = replace(pulls_of_norms(40.0)[0], version=0)
    pulls = [replace(pull, version=3) for pull in pulls_of_norms(1.0, 2.0)] + [stale]
    direction = combine("buffered", settings, pulls, version=3, vector=PHI, recent=[])
    assert direction.weights == (1.0, 1.0, 0.5)
    assert_direction(direction.gradient, np.array([(1 + 2 + 0.5 * 4) / 3, 0.0]))


# --- agreement -----------------------------------------------------------------------------------------------------


@given(seeds, st.integers(2, 8))
def test_agreement_is_the_mean_cosine_over_all_pairs(seed, count):
    pulls = random_pulls(seed, [0] * count)
    cosines = []
    for i in range(count):
        for j in range(i):
            a, b = pulls[i].vector.astype(np.float64), pulls[j].vector.astype(np.float64)
            cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    direction = combine("sync", PLAIN, pulls, version=0, vector=PHI, recent=[])
    assert direction.agreement == pytest.approx(np.mean(cosines), abs=1e-5)


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        ([[1, 0]], 0.0),
        ([[1, 0], [5, 0]], 1.0),
        ([[1, 0], [-5, 0]], -1.0),
        ([[1, 0], [0, 2], [3, 0]], 1 / 3),  # cosines 0, 1, 0
        ([[1, 0], [0, 0], [3, 0]], 1.0),  # a pull of zero has no direction
        ([[0, 0], [0, 0]], 0.0),
    ],
)
def test_agreement_by_hand(vectors, expected):
    pulls = [Pull(0, float(np.linalg.norm(v)), np.array(v, np.float32)) for v in vectors]
    assert combine("sync", PLAIN, pulls, version=0, vector=PHI, recent=[]).agreement == pytest.approx(
        expected, abs=1e-6
    )


# --- the meta-optimizer --------------------------------------------------------------------------------------------


def torch_optimizer(settings: MetaSettings, parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
    if settings.optimizer == "adam":
        return torch.optim.Adam([parameter], lr=settings.learning_rate)
    return torch.optim.SGD([parameter], lr=settings.learning_rate, momentum=settings.momentum)


def gradients(seed: int, count: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.normal(size=5).astype(np.float32) for _ in range(count)]


START = np.linspace(-1, 1, 5).astype(np.float32)


@pytest.mark.parametrize("settings", OPTIMIZERS)
def test_steps_are_torchs_own(settings):
    ours = MetaOptimizer("sync", settings, START)
    parameter = torch.nn.Parameter(torch.from_numpy(START.copy()))
    reference = torch_optimizer(settings, parameter)
    for gradient in gradients(0, 5):
        ours.step(gradient)
        parameter.grad = torch.from_numpy(gradient.copy())
        reference.step()
        assert np.array_equal(ours.vector, parameter.detach().numpy())
    assert not np.array_equal(ours.vector, START)


def test_an_sgd_step_by_hand():
    optimizer = MetaOptimizer("sync", OPTIMIZERS[1], np.array([1.0, 2.0], np.float32))
    optimizer.step(np.array([5.0, -10.0], np.float32))
    assert optimizer.vector == pytest.approx([0.5, 3.0])  # φ − 0.1 G


def test_the_first_adam_step_by_hand():
    """m̂ = g, v̂ = g²: the step is the learning rate times the sign."""
    optimizer = MetaOptimizer("sync", OPTIMIZERS[0], np.array([1.0, 2.0], np.float32))
    optimizer.step(np.array([10.0, -0.1], np.float32))
    assert optimizer.vector == pytest.approx([1.0 - 0.01, 2.0 + 0.01], abs=1e-6)


@pytest.mark.parametrize("settings", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_restored_optimizer_continues_bit_for_bit(settings, steps):
    path = gradients(1, 6)
    straight = MetaOptimizer("sync", settings, START)
    for gradient in path[:steps]:
        straight.step(gradient)
    vector, state = straight.vector, straight.state()

    fresh = MetaOptimizer("sync", settings, np.zeros(5, np.float32))
    fresh.restore(vector, state)
    strayed = MetaOptimizer("sync", settings, START)  # restoring also undoes what came before
    for gradient in gradients(2, 4):
        strayed.step(gradient)
    strayed.restore(vector, state)

    assert np.array_equal(fresh.vector, vector)
    for gradient in path[steps:]:
        for optimizer in (straight, fresh, strayed):
            optimizer.step(gradient)
    assert np.array_equal(fresh.vector, straight.vector)
    assert np.array_equal(strayed.vector, straight.vector)
    assert set(fresh.state()) == set(straight.state())
    assert all(np.array_equal(fresh.state()[name], value) for name, value in straight.state().items())


@pytest.mark.parametrize("settings", OPTIMIZERS)
def test_vector_and_state_are_copies(settings):
    optimizer = MetaOptimizer("sync", settings, START)
    for gradient in gradients(3, 2):
        optimizer.step(gradient)
    vector, state = optimizer.vector, optimizer.state()
    kept = {name: value.copy() for name, value in state.items()}
    optimizer.step(gradients(4, 1)[0])
    assert not np.array_equal(optimizer.vector, vector)
    assert all(np.array_equal(state[name], value) for name, value in kept.items()), "a snapshot does not move on"

    optimizer.restore(vector, state)
    snapshot = optimizer.vector
    vector[:] = np.nan
    for value in state.values():
        value.fill(np.nan)
    assert np.array_equal(optimizer.vector, snapshot)
    optimizer.step(gradients(5, 1)[0])
    assert np.isfinite(optimizer.vector).all(), "what was restored from belongs to the caller"


def test_adam_has_state_and_plain_sgd_has_none():
    states = []
    for settings in OPTIMIZERS:
        optimizer = MetaOptimizer("sync", settings, START)
        optimizer.step(gradients(0, 1)[0])
        states.append(set(optimizer.state()))
    assert states == [{"step", "exp_avg", "exp_avg_sq"}, set(), {"momentum_buffer"}]


def test_the_start_is_copied_and_a_step_does_not_write_into_the_gradient():
    start, gradient = START.copy(), gradients(0, 1)[0]
    optimizer = MetaOptimizer("sync", OPTIMIZERS[2], start)
    before = gradient.copy()
    optimizer.step(gradient)
    optimizer.step(gradient)
    assert np.array_equal(start, START)
    assert np.array_equal(gradient, before)
