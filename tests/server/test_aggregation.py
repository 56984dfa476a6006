"""Staleness weights, the norm clip, how pulls are combined, and the meta-optimizer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from leap_dist.config.settings import Config, MetaSettings
from leap_dist.server import staleness
from leap_dist.server.aggregation import Pull, batch_size, combine
from leap_dist.server.meta_optimizer import MetaOptimizer, learning_rate

MODES = get_args(get_type_hints(Config)["mode"])
KINDS = ("constant", "polynomial", "hinge", "inverse")
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


@pytest.mark.parametrize(
    ("norm", "reference", "expected"),
    [
        (12.0, [1.0, 3.0, 100.0], 0.25),
        (0.5, [1.0, 2.0, 4.0, 100.0], 6.0),  # enlarged, to (2 + 4)/2
        (0.0, [1.0], 1.0),
        (5.0, [0.0, 0.0, 1.0], 1.0),  # nothing to go by
        (5.0, [], 1.0),
    ],
)
def test_norms_are_brought_to_the_median_by_hand(norm, reference, expected):
    assert staleness.norm_factor(norm, reference) == pytest.approx(expected)


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


@st.composite
def updates(draw):
    """What `combine` may get: a mode, settings that it may have, pulls of whatever staleness, φ and earlier norms."""
    mode = draw(st.sampled_from(MODES))
    settings = MetaSettings(
        batch_size=draw(st.integers(1, 7)),
        staleness=draw(st.sampled_from(KINDS)),
        contribution_clip=draw(st.just(0.0) | st.floats(0.1, 5)),
        normalize=draw(st.booleans()),
        clip_window=draw(st.integers(1, 9)),
        # Refused in fedasync, which has a ρ of its own, and in stream.
        endpoint_correction=0.0 if mode in ("fedasync", "stream") else draw(st.just(0.0) | st.floats(0.01, 1)),
    )
    most = settings.batch_size if mode in ("sync", "buffered") else 1
    version = draw(st.integers(0, 12))
    versions = draw(st.lists(st.integers(version if mode == "sync" else 0, version), min_size=1, max_size=most))
    seed = draw(seeds)
    random = np.random.default_rng(seed)
    phi = random.normal(size=6).astype(np.float32)
    # φ has moved, by more or less, since all but the leases of this very version.
    starts = [phi - np.float32((v < version) * 10 ** random.uniform(-3, 3)) * random.normal(size=6) for v in versions]
    pulls = [replace(p, start=s.astype(np.float32)) for p, s in zip(random_pulls(seed, versions), starts, strict=True)]
    recent = (10 ** random.uniform(-3, 3, size=draw(st.integers(0, 12)))).tolist()
    return mode, settings, pulls, version, phi, recent


def by_the_table(mode, settings, pulls, version, phi, recent) -> tuple[np.ndarray, np.ndarray]:
    """The direction that notes/leap.md, section 4, states for each mode, in float64, and Σ |terms|, its own scale."""
    count, batch = len(pulls), settings.batch_size
    norms = [float(np.linalg.norm(pull.vector.astype(np.float64))) for pull in pulls]
    seen = norms if mode == "sync" else (recent + norms)[-max(settings.clip_window, count) :]
    total, scale = np.zeros(6), np.zeros(6)
    for pull, norm in zip(pulls, norms, strict=True):
        tau = version - pull.version
        s = {
            "constant": 1.0,
            "polynomial": 1 / math.sqrt(1 + tau),
            "hinge": 1.0 if tau <= 4 else 1 / (10 * (tau - 4) + 1),
            "inverse": 1 / max(1, tau),
        }[settings.staleness]
        if mode == "sync":
            s = 1.0
        if settings.normalize:
            c = np.median(seen) / norm
        else:
            c = min(1.0, settings.contribution_clip * np.median(seen) / norm) if settings.contribution_clip else 1.0
        rho = {"sync": 0.0, "stream": 0.0, "fedasync": 1.0}.get(mode, settings.endpoint_correction)
        scaled = s * c * pull.vector.astype(np.float64)
        correction = s * rho * (phi.astype(np.float64) - pull.start)
        total += scaled + correction
        scale += np.abs(scaled) + np.abs(correction)
    divisor = {
        "sync": count,
        "buffered": count,
        "async": batch,
        "fedasync": 1,
        "delayed-nesterov": 1,  # the optimizer divides by N
        "stream": batch,
    }[mode]
    return total / divisor, scale / divisor


@given(updates())
def test_every_mode_combines_as_its_rule_says(update):
    mode, settings, pulls, version, phi, recent = update
    before = [(pull.vector.copy(), pull.start.copy()) for pull in pulls], phi.copy(), list(recent)
    direction = combine(mode, settings, pulls, version=version, vector=phi, recent=recent)
    expected, scale = by_the_table(*update)
    assert direction.gradient.dtype == np.float32
    assert (np.abs(direction.gradient - expected) <= 3e-6 * scale).all()
    after = [(pull.vector, pull.start) for pull in pulls], phi, recent
    np.testing.assert_equal(after, before, "all of it is the caller's")


def test_the_endpoint_correction_is_weighed_but_not_clipped():
    settings = replace(PLAIN, contribution_clip=2.0, endpoint_correction=0.25)
    pulls = [replace(p, start=np.array([-300.0, 0.0], np.float32)) for p in pulls_of_norms(1.0, 2.0, 40.0)]
    phi = np.array([100.0, 8.0], np.float32)
    # τ = 3, so that s = ½; the clip takes 40 to 4; ρ(φ − φ_lease) is (100, 2) for each.
    found = combine("buffered", settings, pulls, version=3, vector=phi, recent=[]).gradient
    assert_direction(found, np.array([0.5 * ((1 + 2 + 4) / 3 + 100), 0.5 * 2]))
    found = combine("async", settings, pulls[2:], version=3, vector=phi, recent=[1.0, 2.0]).gradient
    assert_direction(found, np.array([0.5 * (4 + 100), 0.5 * 2]) / 4)
    plain = replace(settings, endpoint_correction=0.0)  # fedasync has ρ = 1 by itself
    found = combine("fedasync", plain, pulls[2:], version=3, vector=phi, recent=[1.0, 2.0]).gradient
    assert_direction(found, np.array([0.5 * (4 + 400), 0.5 * 8]))


def test_how_many_pulls_a_meta_update_takes():
    taken = {mode: batch_size(mode, PLAIN) for mode in MODES}
    assert taken == {"sync": 4, "buffered": 4, "async": 1, "fedasync": 1, "delayed-nesterov": 1, "stream": 1}


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


def test_the_agreement_of_pulls_whose_norm_float32_cannot_hold():
    pull = Pull(0, 4e38, np.array([2.83e38, 2.83e38], np.float32))
    assert combine("sync", PLAIN, [pull, pull], version=0, vector=PHI, recent=[]).agreement == pytest.approx(
        1, abs=1e-2
    )


# --- the meta-optimizer --------------------------------------------------------------------------------------------

ADAM = MetaSettings(optimizer="adam", learning_rate=0.01)
SGD = MetaSettings(optimizer="sgd", learning_rate=0.1)
NESTEROV = replace(SGD, momentum=0.9, nesterov=True)
TORCHS = {
    "adam": (ADAM, lambda p: torch.optim.Adam(p)),
    "adamw": (
        MetaSettings(optimizer="adamw", learning_rate=0.01, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, weight_decay=0.1),
    ),
    "sgd": (SGD, lambda p: torch.optim.SGD(p)),
    "momentum": (replace(SGD, momentum=0.9), lambda p: torch.optim.SGD(p, momentum=0.9)),
    "nesterov": (NESTEROV, lambda p: torch.optim.SGD(p, momentum=0.9, nesterov=True)),
    "rmsprop": (MetaSettings(optimizer="rmsprop", learning_rate=0.01), lambda p: torch.optim.RMSprop(p)),
    "rmsprop-momentum": (
        MetaSettings(optimizer="rmsprop", learning_rate=0.01, momentum=0.5),
        lambda p: torch.optim.RMSprop(p, momentum=0.5),
    ),
}
"""Settings, and the optimizer that they stand for, but for its learning rate."""
EVERY = {
    **{name: ("sync", settings) for name, (settings, _) in TORCHS.items()},
    "delayed-nesterov": ("delayed-nesterov", replace(NESTEROV, batch_size=3)),
}
every = pytest.mark.parametrize(("mode", "settings"), EVERY.values(), ids=EVERY.keys())
START = np.linspace(-1, 1, 5).astype(np.float32)


def gradients(seed: int, count: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.normal(size=5).astype(np.float32) for _ in range(count)]


def bits(optimizer: MetaOptimizer) -> dict[str, bytes]:
    """φ and all state; signed zeros and nan count."""
    return {name: x.tobytes() for name, x in {**optimizer.state(), "phi": optimizer.vector}.items()}


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("name", TORCHS)
def test_steps_are_torchs_own(name, schedule):
    settings, reference = replace(TORCHS[name][0], schedule=schedule), TORCHS[name][1]
    ours = MetaOptimizer("sync", settings, START)
    parameter = torch.nn.Parameter(torch.from_numpy(START.copy()))
    torchs = reference([parameter])
    for k, gradient in enumerate(gradients(0, 6)):
        assert ours.step(gradient, done=k / 6)
        parameter.grad = torch.from_numpy(gradient.copy())
        torchs.param_groups[0]["lr"] = learning_rate(settings, k / 6)
        torchs.step()
        assert np.array_equal(ours.vector, parameter.detach().numpy())
    assert not np.array_equal(ours.vector, START)


@pytest.mark.parametrize(
    ("schedule", "done", "expected"),
    [
        ("constant", 0.0, 0.5),
        ("constant", 1.0, 0.5),
        ("linear", 0.0, 0.5),
        ("linear", 0.25, 0.375),
        ("linear", 1.0, 0.0),
        ("linear", 1.5, 0.0),  # a task lost and kept may come on top
        ("cosine", 0.0, 0.5),
        ("cosine", 1 / 3, 0.375),  # ½(1 + cos π/3) = ¾
        ("cosine", 0.5, 0.25),
        ("cosine", 1.0, 0.0),
        ("cosine", 1.5, 0.0),
    ],
)
def test_schedules_by_hand(schedule, done, expected):
    settings = MetaSettings(learning_rate=0.5, schedule=schedule)
    assert learning_rate(settings, done) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sgd", [0.0, 2.01]),  # φ − 0.1 G
        ("momentum", [0.0, 2.01]),  # the first momentum is the gradient
        ("nesterov", [-0.9, 2.019]),  # φ − 0.1 (G + 0.9 G)
        ("adam", [0.99, 2.01]),  # m̂ = G, v̂ = G²: the learning rate times the sign
        ("adamw", [0.999 - 0.01, 1.998 + 0.01]),  # φ (1 − 0.01 · 0.1) first
        ("rmsprop", [0.9, 2.1]),  # v = (1 − 0.99) G²: ten times the learning rate
        ("rmsprop-momentum", [0.9, 2.1]),
    ],
)
def test_first_steps_by_hand(name, expected):
    optimizer = MetaOptimizer("sync", TORCHS[name][0], np.array([1.0, 2.0], np.float32))
    assert optimizer.step(np.array([10.0, -0.1], np.float32))
    assert optimizer.vector == pytest.approx(expected, abs=2e-6)


@every
@pytest.mark.parametrize("steps", [0, 1, 3, 5])
def test_a_restored_optimizer_continues_bit_for_bit(mode, settings, steps):
    path = gradients(1, 8)
    straight = MetaOptimizer(mode, settings, START)
    for gradient in path[:steps]:
        straight.step(gradient)
    vector, state = straight.vector, straight.state()

    fresh = MetaOptimizer(mode, settings, np.zeros(5, np.float32))
    fresh.restore(vector, state)
    strayed = MetaOptimizer(mode, settings, START)  # restoring also undoes what came before
    for gradient in gradients(2, 4):
        strayed.step(gradient, done=0.5)
    strayed.restore(vector, state)

    for gradient in path[steps:]:
        assert bits(fresh) == bits(strayed) == bits(straight)
        for optimizer in (straight, fresh, strayed):
            optimizer.step(gradient)
    assert bits(fresh) == bits(strayed) == bits(straight)


@every
def test_vector_and_state_are_copies(mode, settings):
    optimizer = MetaOptimizer(mode, settings, START)
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


def test_what_state_each_optimizer_has():
    """It is what a checkpoint holds."""
    names = {}
    for name, (mode, settings) in EVERY.items():
        optimizer = MetaOptimizer(mode, settings, START)
        assert optimizer.state() == {}
        optimizer.step(gradients(0, 1)[0])
        names[name] = " ".join(sorted(optimizer.state()))
    assert names == {
        "adam": "exp_avg exp_avg_sq step",
        "adamw": "exp_avg exp_avg_sq step",
        "sgd": "",
        "momentum": "momentum_buffer",
        "nesterov": "momentum_buffer",
        "rmsprop": "square_avg step",
        "rmsprop-momentum": "momentum_buffer square_avg step",
        "delayed-nesterov": "count mean momentum_buffer",
    }


@every
@pytest.mark.parametrize("max_norm", [0.0, 0.01])
def test_the_start_is_copied_and_a_step_does_not_write_into_the_gradient(mode, settings, max_norm):
    start, gradient = START.copy(), gradients(0, 1)[0]
    optimizer = MetaOptimizer(mode, replace(settings, max_norm=max_norm), start)
    before = gradient.copy()
    for _ in range(4):
        optimizer.step(gradient)
    assert np.array_equal(start, START)
    assert np.array_equal(gradient, before)


# --- the norm of the meta-gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_norm", "expected"), [(0.0, [3.0, 4.0]), (5.0, [3.0, 4.0]), (6.0, [3.0, 4.0]), (1.0, [0.6, 0.8])]
)
def test_the_meta_gradient_is_clipped_by_hand(max_norm, expected):
    settings = MetaSettings(optimizer="sgd", learning_rate=1.0, max_norm=max_norm)
    optimizer = MetaOptimizer("sync", settings, np.zeros(2, np.float32))
    assert optimizer.step(np.array([3.0, 4.0], np.float32))
    assert -optimizer.vector == pytest.approx(expected)


@given(seeds, st.floats(-15, 15), st.floats(-10, 10))
@example(0, 37.0, 0.0)  # the sum of squares is beyond float32
def test_a_clip_never_enlarges_and_keeps_the_direction(seed, scale, max_norm):
    gradient = (np.random.default_rng(seed).uniform(-1, 1, size=5) * 10**scale).astype(np.float32)
    settings = MetaSettings(optimizer="sgd", learning_rate=1.0, max_norm=10**max_norm)
    optimizer = MetaOptimizer("sync", settings, np.zeros(5, np.float32))
    assert optimizer.step(gradient)
    norm = np.linalg.norm(gradient.astype(np.float64))
    np.testing.assert_allclose(-optimizer.vector, gradient * min(1.0, 10**max_norm / norm), rtol=1e-6)


@every
def test_a_clipped_step_is_the_step_of_the_clipped_gradient(mode, settings):
    """The clip comes before the optimizer's own memory."""
    clipped, plain = MetaOptimizer(mode, replace(settings, max_norm=0.5), START), MetaOptimizer(mode, settings, START)
    for gradient in gradients(6, 4):
        assert clipped.step(gradient * np.float32(1e6))
        assert plain.step((0.5 * gradient / np.linalg.norm(gradient.astype(np.float64))).astype(np.float32))
    np.testing.assert_allclose(clipped.vector, plain.vector, rtol=1e-5, atol=1e-6)


# --- a step is committed or discarded whole ------------------------------------------------------------------------


@every
@given(
    seeds, st.integers(0, 4), st.sets(st.integers(0, 4), min_size=1), st.sampled_from([np.nan, np.inf, -np.inf, None])
)
def test_a_gradient_that_is_not_finite_might_never_have_been(mode, settings, seed, after, where, value):
    good = gradients(seed, 6)
    bad = good[after].copy()
    bad[list(where)] = value if value is not None else [np.nan, np.inf, -np.inf, np.inf, -np.inf][: len(where)]
    hit, spared = MetaOptimizer(mode, settings, START), MetaOptimizer(mode, settings, START)
    for k, gradient in enumerate(good):
        if k == after:
            before = bits(hit)
            assert not hit.step(bad)
            assert bits(hit) == before
        assert hit.step(gradient)
        assert spared.step(gradient)
        assert bits(hit) == bits(spared)


@every
@pytest.mark.parametrize("good", [0, 2])
def test_a_step_that_overflows_might_never_have_been(mode, settings, good):
    """Adam and RMSprop square what they get; sums overflow after a few of the largest gradients there are."""
    hit, spared = MetaOptimizer(mode, settings, START), MetaOptimizer(mode, settings, START)
    for gradient in gradients(7, good):
        assert hit.step(gradient)
        assert spared.step(gradient)
    huge = np.array([1.0, 0.0, -3e38, 3e38, 1.0], np.float32)
    for _ in range(20):
        before = bits(hit)
        if not hit.step(huge):
            break
        assert np.isfinite(hit.vector).all()
        assert spared.step(huge)
    else:
        pytest.fail("nothing overflowed")
    assert bits(hit) == before
    following = gradients(8, 1)[0]
    assert hit.step(following) == spared.step(following), "momentum alone may still be too much"
    assert bits(hit) == bits(spared)


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop"])
def test_the_very_first_step_may_overflow(name):
    """v = G², in float32; without the clip, that is."""
    optimizer = MetaOptimizer("sync", TORCHS[name][0], START)
    huge = np.full(5, 1e30, np.float32)
    assert not optimizer.step(huge)
    assert np.array_equal(optimizer.vector, START)
    assert optimizer.state() == {}
    assert MetaOptimizer("sync", replace(TORCHS[name][0], max_norm=1.0), START).step(huge)


def test_an_empty_gradient_is_no_step():
    """Meta-learner `none`; adamw would shrink φ, if it were one."""
    optimizer = MetaOptimizer("sync", TORCHS["adamw"][0], START)
    assert optimizer.step(np.empty(0, np.float32))
    assert np.array_equal(optimizer.vector, START)
    assert optimizer.state() == {}
