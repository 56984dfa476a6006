"""The pull-forward gradient against a naive oracle, and the laws that follow from the paper's equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pull_forward_oracle import pull_forward, smoothed
from torch import nn
from trajectories import (
    METRICS,
    Net,
    Recording,
    assert_path,
    flat,
    make_net,
    optimizers,
    seeds,
    settings_of_leap,
    train,
    watched,
)

from leap_dist.config.loading import resolve
from leap_dist.leap import meta_learners
from leap_dist.leap.pull_forward import PullForward


@given(settings_of_leap, optimizers, seeds, st.integers(1, 8), st.booleans())
def test_equals_the_oracle(settings, kind, seed, updates, with_final_loss):
    net = make_net(seed)
    pull = PullForward(net.encoder.parameters(), **settings)
    record, final_loss = train(net, pull, updates=updates, kind=kind, seed=seed)
    pull.close(final_loss if with_final_loss else None)
    assert_path(pull, record.oracle(updates + with_final_loss, **settings))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["momentum", "inside", "outside"])
def test_equals_the_oracle_in_float32_over_many_updates(metric, kind):
    net = make_net(3, torch.float32)
    pull = PullForward(net.encoder.parameters(), metric=metric)
    record, final_loss = train(net, pull, updates=200, kind=kind)
    pull.close(final_loss)
    assert_path(pull, record.oracle(201, metric=metric), tolerance=1e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("stabilize", [True, False])
def test_a_gpu_which_is_never_waited_for_gives_the_same(metric, stabilize, monkeypatch):
    """There, losses and weights stay tensors. Its twin here: nothing may ask for a tensor's value."""
    results = []
    for on_gpu in (False, True):
        net = make_net(3)
        pull = PullForward(net.encoder.parameters(), metric=metric, stabilize=stabilize, loss_smoothing=0.3)
        pull._waits = not on_gpu
        batches = torch.Generator().manual_seed(0)
        for _ in range(8):
            loss = net.loss(batches)
            net.zero_grad(set_to_none=True)
            loss.backward()
            with monkeypatch.context() as patched:
                for method in ("item", "__float__", "__bool__", "tolist", "cpu", "numpy"):
                    patched.setattr(torch.Tensor, method, never) if on_gpu else None
                pull.observe(loss)
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter -= 0.05 * parameter.grad
        results.append((pull.gradient(), pull.energy, pull.length))
    (plain, *geometry), (twin, *twin_geometry) = results
    torch.testing.assert_close(twin, plain, rtol=1e-12, atol=1e-12)
    assert twin_geometry == pytest.approx(geometry, rel=1e-12)


def never(*_: object) -> None:
    raise AssertionError("a GPU would have been waited for")


def test_the_trajectories_of_these_tests_contain_what_the_settings_distinguish():
    """Losses that rise and fall, so that `stabilize` matters; otherwise the comparisons above would prove little."""
    net = make_net(0)
    pull = PullForward(net.encoder.parameters())
    record, _ = train(net, pull, updates=8)
    changes = np.diff(record.losses)
    assert (changes > 0).any()
    assert (changes < 0).any()
    paths = [record.oracle(9, metric=m, stabilize=s).gradient for m in METRICS for s in (True, False)]
    for i in range(4):
        for j in range(i):
            assert np.linalg.norm(paths[i] - paths[j]) > 0.01 * np.linalg.norm(paths[i])


decays = st.sampled_from([0.1, 0.9]) | st.floats(0.0, 0.999)


@given(settings_of_leap, decays, optimizers, seeds, st.integers(1, 8), st.booleans())
def test_a_smoothed_loss_takes_the_place_of_the_loss(settings, decay, kind, seed, updates, with_final_loss):
    net = make_net(seed)
    pull = PullForward(net.encoder.parameters(), loss_smoothing=decay, **settings)
    record, final_loss = train(net, pull, updates=updates, kind=kind, seed=seed)
    pull.close(final_loss if with_final_loss else None)
    assert_path(pull, record.oracle(updates + with_final_loss, loss_smoothing=decay, **settings))


@given(settings_of_leap, decays, optimizers, seeds, st.integers(1, 8), st.integers(0, 10), st.booleans())
def test_during_the_warm_up_a_change_of_the_loss_does_not_count(
    settings, decay, kind, seed, updates, warmup, with_final_loss
):
    """The moving average begins at its end, too."""
    net = make_net(seed)
    pull = PullForward(net.encoder.parameters(), loss_smoothing=decay, loss_warmup=warmup, **settings)
    record, final_loss = train(net, pull, updates=updates, kind=kind, seed=seed)
    pull.close(final_loss if with_final_loss else None)
    assert_path(pull, record.oracle(updates + with_final_loss, loss_smoothing=decay, loss_warmup=warmup, **settings))


def test_the_moving_average_of_the_losses_by_hand():
    """Losses 8, 4, 0 with d = ¾: averages 8, 7, 5¼, so G is (1 + 1¾)∇f without steps; the path is as long as it was."""
    assert smoothed([8.0, 4.0, 0.0], 0.75) == [8.0, 7.0, 5.25]
    theta = nn.Parameter(torch.zeros(2))
    theta.grad = torch.tensor([1.0, -2.0])
    pull = PullForward([theta], loss_smoothing=0.75)
    for loss in (8.0, 4.0):
        pull.observe(loss)
    pull.close(0.0)
    assert pull.energy == 4.0**2 + 4.0**2
    assert pull.length == 4.0 + 4.0
    assert pull.gradient().tolist() == [2.75, -5.5]


@pytest.mark.parametrize("metric", METRICS)
def test_smoothing_by_zero_is_no_smoothing_bit_for_bit(metric):
    results = []
    for settings in ({}, {"loss_smoothing": 0.0}, {"loss_smoothing": 1e-3}):
        net = make_net(1, torch.float32)
        pull = PullForward(net.encoder.parameters(), metric=metric, **settings)
        _, final_loss = train(net, pull, updates=20)
        pull.close(final_loss)
        results.append((pull.gradient().tolist(), pull.energy, pull.length))
    assert results[0] == results[1]
    assert results[0] != results[2], "the control"


@given(settings_of_leap, optimizers, seeds, st.lists(st.booleans(), min_size=16, max_size=16))
def test_law_5_cumulative_chunks_add_up(settings, kind, seed, reads):
    """Reading changes nothing, and what is read is the path up to the last observation."""
    net, other_net = make_net(seed), make_net(seed)
    pull = PullForward(net.encoder.parameters(), **settings)
    unread = PullForward(other_net.encoder.parameters(), **settings)
    partial: list[tuple[int, np.ndarray]] = []

    def read(i: int) -> None:
        if reads[2 * i]:
            partial.append((i + 1, pull.gradient().numpy()))
            pull.gradient().fill_(np.nan)  # belongs to the reader

    def read_after_the_step(i: int) -> None:
        if reads[2 * i + 1]:
            partial.append((i + 1, pull.gradient().numpy()))
            for term in pull.terms():
                term.fill_(np.nan)

    record, final_loss = train(
        net, pull, updates=8, kind=kind, seed=seed, after_observe=read, after_step=read_after_the_step
    )
    train(other_net, unread, updates=8, kind=kind, seed=seed)
    pull.close(final_loss)
    unread.close(final_loss)

    for points, gradient in partial:
        expected = record.oracle(points, **settings)
        size = np.linalg.norm(expected.loss_term) + np.linalg.norm(expected.path_term)
        np.testing.assert_allclose(gradient, expected.gradient, rtol=0, atol=1e-6 * size)
    assert torch.equal(pull.gradient(), unread.gradient())
    assert (pull.energy, pull.length) == (unread.energy, unread.length)


def test_a_returned_vector_of_a_single_parameter_is_new():
    theta = nn.Parameter(torch.tensor([1.0, 2.0]))
    for metric in METRICS:
        pull = PullForward([theta], metric=metric)
        for loss in (3.0, 1.0):
            theta.grad = torch.ones(2)
            pull.observe(loss)
            with torch.no_grad():
                theta += 1.0
        before = pull.gradient()
        for vector in (*pull.terms(), pull.gradient()):
            vector.fill_(np.nan)
        assert torch.equal(pull.gradient(), before)


@given(optimizers, seeds, st.integers(1, 20))
def test_law_6_without_the_loss_energy_is_reptile(kind, seed, updates):
    net = make_net(seed, torch.float32)
    start = flat(net.encoder.parameters()).astype(np.float32)
    pull = PullForward(net.encoder.parameters(), metric="energy", loss_weight=0.0)
    _, final_loss = train(net, pull, updates=updates, kind=kind, seed=seed)
    pull.close(final_loss)
    end = flat(net.encoder.parameters()).astype(np.float32)
    np.testing.assert_array_equal(pull.gradient().numpy(), start - end)


@given(seeds, st.integers(1, 20), st.floats(0.01, 100), st.floats(0.01, 10))
def test_law_7_a_constant_loss_change_turns_the_loss_term_into_the_path(seed, updates, change, loss_weight):
    """Under SGD ∇f = −Δθ/α, so Σ λ|Δf|∇f = λ(c/α)(θ_0 − θ_K), whatever the sign of each Δf."""
    random = np.random.default_rng(seed)
    rate = 0.05
    theta = nn.Parameter(torch.from_numpy(random.normal(size=7)))
    optimizer = torch.optim.SGD([theta], lr=rate)
    start = theta.detach().numpy().copy()
    pull = PullForward([theta], loss_weight=loss_weight)
    loss = 0.0
    for _ in range(updates):
        theta.grad = torch.from_numpy(random.normal(size=7))
        pull.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
        loss += change * random.choice([-1, 1])
    pull.close(loss)
    expected = loss_weight * change / rate * (start - theta.detach().numpy())
    np.testing.assert_allclose(pull.terms()[0].numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


class Quadratic:
    """f(θ) = ½ θᵀAθ − bᵀθ and gradient descent on it, whose Jacobian is known: J_i = (I − αA)^i."""

    def __init__(self, seed: int, largest_curvature: float) -> None:
        random = np.random.default_rng(seed)
        basis = np.linalg.qr(random.normal(size=(5, 5)))[0]
        self.A = basis @ np.diag(np.linspace(0.2, largest_curvature, 5)) @ basis.T
        self.b = random.normal(size=5)
        self.rate = 0.3
        self.start = basis @ np.array([1.5, -2.0, 1.0, 0.8, 0.15]) + np.linalg.solve(self.A, self.b)

    def loss(self, theta: np.ndarray) -> float:
        return 0.5 * theta @ self.A @ theta - self.b @ theta

    def gradient(self, theta: np.ndarray) -> np.ndarray:
        return self.A @ theta - self.b

    def path(self, start: np.ndarray, updates: int) -> list[np.ndarray]:
        thetas = [start]
        for _ in range(updates):
            thetas.append(thetas[-1] - self.rate * self.gradient(thetas[-1]))
        return thetas


def frozen_baseline_objective(
    task: Quadratic, start: np.ndarray, baseline: list[np.ndarray], *, p: int, loss_weight: float, stabilize: bool
) -> float:
    """F(θ_0; ψ) of equation 6 for one task, for p = 1 and 2, with the regularizer μ of section 2.3.

    The paper gives μ for energy, −2Δf² where the baseline's loss rose. For length the same purpose, Δf turned into
    −|Δf| at θ = ψ, needs −Δf²/n with the baseline's own n.
    """
    total = 0.0
    updates = len(baseline) - 1
    for i, theta in enumerate(task.path(start, updates)[:updates]):
        ahead = baseline[i + 1]
        loss_change = task.loss(ahead) - task.loss(theta)
        squared = np.sum((ahead - theta) ** 2) + loss_weight * loss_change**2
        total += squared ** (p / 2)

        baseline_change = task.loss(ahead) - task.loss(baseline[i])
        if stabilize and baseline_change > 0:
            norm = np.sqrt(np.sum((ahead - baseline[i]) ** 2) + loss_weight * baseline_change**2)
            total -= loss_weight * loss_change**2 * (2.0 if p == 2 else 1.0 / norm)
    return float(total)


@pytest.mark.parametrize("loss_weight", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("stabilize", [False, True])
@pytest.mark.parametrize(("metric", "p"), [("energy", 2), ("length", 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_law_8_finite_differences_of_the_pull_forward_objective(metric, p, stabilize, loss_weight, seed):
    task = Quadratic(seed, largest_curvature=2.6 / 0.3)  # beyond 2/α: the loss falls first, then rises
    updates = 9
    baseline = task.path(task.start, updates)
    changes = np.diff([task.loss(theta) for theta in baseline])
    assert (changes > 0).any()
    assert (changes < 0).any()

    theta = nn.Parameter(torch.from_numpy(task.start.copy()))
    pull = PullForward([theta], metric=metric, loss_weight=loss_weight, stabilize=stabilize)
    optimizer = torch.optim.SGD([theta], lr=task.rate)
    cumulative = []
    for _ in range(updates):
        theta.grad = torch.from_numpy(task.gradient(theta.detach().numpy()))
        pull.observe(task.loss(theta.detach().numpy()))
        cumulative.append(pull.gradient().double().numpy())
        optimizer.step()
        optimizer.zero_grad()
    pull.close(task.loss(theta.detach().numpy()))
    cumulative.append(pull.gradient().double().numpy())

    jacobian = np.eye(5)
    meta_gradient = np.zeros(5)
    for increment in np.diff(cumulative, axis=0):
        meta_gradient += p * jacobian.T @ increment
        jacobian = (np.eye(5) - task.rate * task.A) @ jacobian

    def objective(start: np.ndarray) -> float:
        return frozen_baseline_objective(task, start, baseline, p=p, loss_weight=loss_weight, stabilize=stabilize)

    h = 1e-6
    differences = [(objective(task.start + h * e) - objective(task.start - h * e)) / (2 * h) for e in np.eye(5)]
    np.testing.assert_allclose(meta_gradient, differences, rtol=0, atol=1e-5 * np.linalg.norm(differences))


magnitudes = st.floats(-6, 6).map(lambda exponent: 10.0**exponent)


@given(seeds, magnitudes, magnitudes, magnitudes, st.booleans())
def test_law_9_a_segment_of_length_pulls_with_bounded_force(seed, step, change, slope, stabilize):
    """By Cauchy and Schwarz: ‖(|Δf|∇f − Δθ)/n‖ ≤ √(1 + ‖∇f‖²), since (|Δf|, ‖Δθ‖)/n is a unit vector."""
    random = np.random.default_rng(seed)
    gradient = slope * random.normal(size=4)
    delta = step * random.normal(size=4)
    theta = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    pull = PullForward([theta], metric="length", stabilize=stabilize)
    theta.grad = torch.from_numpy(gradient)
    pull.observe(0.0)
    with torch.no_grad():
        theta += torch.from_numpy(delta)
    pull.close(float(change * random.choice([-1, 1])))
    bound = np.sqrt(1 + gradient @ gradient)
    assert 0 < pull.gradient().double().norm().item() <= bound * (1 + 1e-6)


def test_law_9_the_bound_is_attained():
    """Where Δθ points against ∇f and |Δf| = ‖∇f‖‖Δθ‖, as in a small step of gradient descent, it is an equality."""
    gradient = np.array([3.0, 4.0])
    theta = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    pull = PullForward([theta], metric="length")
    theta.grad = torch.from_numpy(gradient)
    pull.observe(1.0)
    with torch.no_grad():
        theta -= 0.1 * torch.from_numpy(gradient)
    pull.close(1.0 - 0.1 * 25.0)
    assert pull.gradient().norm().item() == pytest.approx(np.sqrt(26.0))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("loss_weight", [0.0, 1.0])
def test_a_segment_of_length_zero_adds_nothing(metric, loss_weight):
    theta = nn.Parameter(torch.tensor([1.0, 2.0]))
    pull = PullForward([theta], metric=metric, loss_weight=loss_weight)
    for loss, step in ((3.0, 0.0), (3.0, 0.5), (2.0, 0.0), (2.0, 0.0)):
        theta.grad = torch.tensor([1.0, -1.0])
        pull.observe(loss)
        with torch.no_grad():
            theta += step
    pull.close(2.0)
    thetas = [np.array([1.0, 2.0])] * 2 + [np.array([1.5, 2.5])] * 3
    losses, gradients = [3.0, 3.0, 2.0, 2.0, 2.0], [np.array([1.0, -1.0])] * 4
    assert_path(pull, pull_forward(thetas, losses, gradients, metric=metric, loss_weight=loss_weight))
    assert torch.isfinite(pull.gradient()).all()


@pytest.mark.parametrize("metric", METRICS)
def test_parameters_of_any_layout_count_in_row_major_order(metric):
    torch.manual_seed(0)
    transposed = nn.Parameter(torch.randn(3, 4).t())
    channels_last = nn.Parameter(torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last))
    scalar = nn.Parameter(torch.randn(()))
    parameters = [transposed, channels_last, scalar]
    assert not transposed.is_contiguous()
    assert not channels_last.is_contiguous()
    pull = PullForward(parameters, metric=metric)
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    record = Recording()
    for _ in range(4):
        optimizer.zero_grad()
        loss = sum((p * torch.randn(p.shape)).square().sum() for p in parameters)
        loss.backward()
        record.thetas.append(flat(parameters))
        record.losses.append(loss.item())
        record.gradients.append(flat(p.grad for p in parameters))
        pull.observe(loss)
        optimizer.step()
    assert_path(pull, record.oracle(4, metric=metric), tolerance=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_parameters_that_are_not_given_do_not_count(metric):
    """The head moves a thousand times as far as the encoder; it must not show."""
    encoder, head = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    alone = nn.Parameter(torch.zeros(2))
    with_head, without = PullForward([encoder], metric=metric), PullForward([alone], metric=metric)
    for loss in (3.0, 1.0, 2.0):
        for parameter in (encoder, alone):
            parameter.grad = torch.tensor([1.0, 2.0])
        head.grad = torch.tensor([7.0, 7.0])
        with_head.observe(loss)
        without.observe(loss)
        with torch.no_grad():
            encoder -= 0.1
            alone -= 0.1
            head -= 100.0
    assert with_head.gradient().shape == (2,)
    assert torch.equal(with_head.gradient(), without.gradient())
    assert with_head.energy == without.energy > 0
    assert with_head.length == without.length > 0


def test_before_the_first_segment_ends_everything_is_zero():
    for metric in METRICS:
        net = make_net(0)
        pull = PullForward(net.encoder.parameters(), metric=metric)
        count = sum(p.numel() for p in net.encoder.parameters())
        assert torch.equal(pull.gradient(), torch.zeros(count))
        train(net, pull, updates=1)
        assert torch.equal(pull.gradient(), torch.zeros(count))
        assert (pull.energy, pull.length) == (0.0, 0.0)


def test_a_loss_may_be_a_number_or_a_tensor_in_the_graph():
    results = []
    for convert in (lambda loss: loss, lambda loss: loss.detach(), lambda loss: loss.item()):
        net = make_net(5)
        pull = PullForward(net.encoder.parameters(), metric="length")
        observe = pull.observe
        pull.observe = lambda loss, observe=observe, convert=convert: observe(convert(loss))
        _, final_loss = train(net, pull, updates=4)
        pull.close(convert(final_loss))
        assert not pull.gradient().requires_grad
        results.append(pull.gradient())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_closing_twice_is_closing_once_and_observing_afterwards_is_refused():
    for loss in (None, 0.5):
        net = make_net(0)
        pull = PullForward(net.encoder.parameters())
        train(net, pull, updates=3)
        pull.close(loss)
        before = pull.gradient()
        pull.close(17.0)
        pull.close()
        assert torch.equal(pull.gradient(), before)
        with pytest.raises(RuntimeError, match="close"):
            pull.observe(1.0)
        assert torch.equal(pull.gradient(), before)


def test_a_missing_gradient_is_refused_and_nothing_is_recorded():
    net = make_net(0)
    pull = PullForward(net.encoder.parameters())
    record, final_loss = train(net, pull, updates=3)
    next(iter(net.encoder.parameters())).grad = None
    before = pull.gradient()
    with pytest.raises(RuntimeError, match="no gradient"):
        pull.observe(final_loss)
    assert torch.equal(pull.gradient(), before)
    pull.close(final_loss)
    assert_path(pull, record.oracle(4))


def clipped_training(pull: PullForward, net: Net, updates: int, *, overwrite: str) -> Recording:
    """What a user's own loop does: something between two observations writes into `.grad`."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    batches = torch.Generator().manual_seed(1)
    record = Recording()
    for _ in range(updates):
        loss = net.loss(batches)
        loss.backward()
        record.thetas.append(flat(net.encoder.parameters()))
        record.losses.append(loss.item())
        record.gradients.append(flat(p.grad for p in net.encoder.parameters()))
        pull.observe(loss)
        if overwrite == "clip":
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=overwrite == "clip")
    return record


@pytest.mark.parametrize("overwrite", ["clip", "zero"])
def test_a_gradient_overwritten_in_place_is_refused_unless_copied(overwrite):
    net = make_net(0)
    pull = PullForward(net.encoder.parameters())
    with pytest.raises(RuntimeError, match="copy_gradients"):
        clipped_training(pull, net, 2, overwrite=overwrite)
    assert not pull.gradient().any(), "a refused segment must leave no trace"
    assert pull.energy == 0.0
    with pytest.raises(RuntimeError, match="copy_gradients"):
        pull.close(1.0)

    for metric in METRICS:
        net = make_net(0)
        pull = PullForward(net.encoder.parameters(), metric=metric, copy_gradients=True)
        record = clipped_training(pull, net, 6, overwrite=overwrite)
        assert_path(pull, record.oracle(6, metric=metric))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"metric": "enregy"}, "'enregy'.*'energy' or 'length'"),
        ({"loss_weight": -0.1}, "loss_weight is -0.1"),
        ({"loss_weight": float("nan")}, "loss_weight is nan"),
        ({"loss_smoothing": -0.1}, "loss_smoothing is -0.1"),
        ({"loss_smoothing": 1.0}, "loss_smoothing is 1.0.*below 1"),
        ({"loss_smoothing": 2.0}, "loss_smoothing is 2.0"),
        ({"loss_smoothing": float("nan")}, "loss_smoothing is nan"),
        ({"loss_warmup": -1}, "loss_warmup is -1; it must not be negative"),
        ({"loss_warmup": float("nan")}, "loss_warmup is nan"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        PullForward([nn.Parameter(torch.zeros(1))], **settings)


def test_no_parameters_are_refused():
    with pytest.raises(ValueError, match="at least one parameter"):
        PullForward(iter([]))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"leap.metric": "length", "leap.loss_weight": 0.25},
        {"leap.metric": "length", "leap.stabilize": False},
        {"leap.loss_smoothing": 0.9},
        {"leap.loss_warmup": 0.5},
    ],
)
def test_the_configured_meta_learner_and_its_statistics(settings):
    net = make_net(2)
    config = resolve("paper", {**settings, "task_steps": 6 * 32 * 5})
    assert config.rollouts_per_task == 6
    pull = meta_learners.make(config, watched(net))
    record, _ = train(net, pull, updates=6)
    pull.finish()
    vector, statistics = pull.report()
    of_path = {name.split(".")[1]: value for name, value in settings.items()}
    if "loss_warmup" in of_path:
        of_path["loss_warmup"] = 3
    path = record.oracle(6, **of_path)
    np.testing.assert_allclose(vector.numpy(), path.gradient, atol=1e-6 * np.linalg.norm(path.gradient))
    norms = np.linalg.norm(path.loss_term), np.linalg.norm(path.path_term)
    assert statistics.energy == pytest.approx(path.energy)
    assert statistics.length == pytest.approx(path.length)
    assert (statistics.loss_term_norm, statistics.path_term_norm) == pytest.approx(norms)
    assert statistics.cosine == pytest.approx(path.loss_term @ path.path_term / norms[0] / norms[1], abs=1e-6)
    assert abs(statistics.cosine) > 0.01


def test_the_cosine_of_a_missing_term_is_zero():
    net = make_net(2)
    pull = meta_learners.make(resolve("paper", {"leap.loss_weight": 0}), watched(net))
    train(net, pull, updates=3)
    _, statistics = pull.report()
    assert statistics.loss_term_norm == statistics.cosine == 0.0
    assert statistics.path_term_norm > 0
