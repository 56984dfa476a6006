"""Paths of plain gradient descent, taken from the gradients alone, against the general way and the oracle."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from trajectories import METRICS, Recording, assert_path, flat, make_net, seeds, settings_of_leap

from leap_dist.leap.pull_forward import PullForward

RATE = 0.05
MOST = 19
"""Updates: gradients are added up eight at a time, so these make two sums and leave a rest."""


def descend(
    net: nn.Module,
    pulls: list[PullForward],
    *,
    updates: int,
    seed: int = 0,
    shifts: frozenset[int] = frozenset(),
    look: Callable[[], object] = lambda: None,
) -> tuple[Recording, torch.Tensor]:
    """Gradient descent under the eyes of all `pulls`, moved about in the segments `shifts`. Returns f(θ_K) as well."""
    batches, random = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    encoder, record = list(net.encoder.parameters()), Recording()
    for i in range(updates):
        net.zero_grad()
        loss = net.loss(batches)
        loss.backward()
        record.thetas.append(flat(encoder))
        record.losses.append(loss.item())
        record.gradients.append(flat(p.grad for p in encoder))
        for pull in pulls:
            pull.observe(loss)
        look()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.sub_(parameter.grad, alpha=RATE)
            if i in shifts:
                amounts = [0.1 * torch.randn(p.shape, generator=random).to(p.dtype) for p in encoder]
                for parameter, amount in zip(encoder, amounts, strict=True):
                    parameter.add_(amount)
                for pull in pulls:
                    pull.shift(amounts)
                record.shifts[i] = [flat(amounts)]
        look()
    final_loss = net.loss(batches)
    record.thetas.append(flat(encoder))
    record.losses.append(final_loss.item())
    return record, final_loss


some_segments = st.frozensets(st.integers(0, MOST - 1), max_size=4)


@given(settings_of_leap, st.sampled_from([0.0, 0.9]), seeds, st.integers(1, MOST), some_segments, st.booleans())
def test_equals_the_general_way_and_the_oracle(settings, smoothing, seed, updates, shifts, with_final_loss):
    net = make_net(seed)
    if shifts:
        smoothing = 0.0  # the oracle's average knows nothing of shifts
    settings = {**settings, "loss_smoothing": smoothing}
    general, told = (PullForward(net.encoder.parameters(), descent=rate, **settings) for rate in (None, RATE))
    record, final_loss = descend(net, [general, told], updates=updates, seed=seed, shifts=shifts)
    for pull in (general, told):
        pull.close(final_loss if with_final_loss else None)
    assert_path(told, record.oracle(updates + with_final_loss, **settings))
    for mine, other in zip(told.terms(), general.terms(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6 * max(1e-6, other.norm().item()))
    assert (told.energy, told.length) == pytest.approx((general.energy, general.length), rel=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_a_smoothed_loss_over_shifts_is_the_general_ways(metric):
    net = make_net(1)
    settings = {"metric": metric, "loss_smoothing": 0.75}
    general, told = (PullForward(net.encoder.parameters(), descent=rate, **settings) for rate in (None, RATE))
    descend(net, [general, told], updates=MOST, shifts=frozenset({3, 7}))
    torch.testing.assert_close(told.gradient(), general.gradient(), rtol=1e-6, atol=1e-7)
    assert (told.energy, told.length) == pytest.approx((general.energy, general.length), rel=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_equals_the_oracle_in_float32_over_many_updates(metric):
    net = make_net(3, torch.float32)
    pull = PullForward(net.encoder.parameters(), metric=metric, descent=RATE)
    record, final_loss = descend(net, [pull], updates=200)
    pull.close(final_loss)
    assert_path(pull, record.oracle(201, metric=metric), tolerance=1e-5)


@given(settings_of_leap, seeds, some_segments)
def test_law_5_what_is_read_is_the_path_so_far_and_reading_changes_nothing(settings, seed, shifts):
    net = make_net(seed)
    read, unread = (PullForward(net.encoder.parameters(), descent=RATE, **settings) for _ in range(2))
    seen: list[tuple[np.ndarray, float, float]] = []

    def look() -> None:
        seen.append((read.gradient().numpy(), read.energy, read.length))
        for vector in (*read.terms(), read.gradient()):
            vector.fill_(np.nan)  # they belong to the reader

    record, _ = descend(net, [read, unread], updates=MOST, seed=seed, shifts=shifts, look=look)
    assert len(seen) == 2 * MOST
    for number, (gradient, energy, length) in enumerate(seen):
        expected = record.oracle(number // 2 + 1, **settings)
        size = np.linalg.norm(expected.loss_term) + np.linalg.norm(expected.path_term)
        np.testing.assert_allclose(gradient, expected.gradient, rtol=0, atol=1e-6 * size)
        assert (energy, length) == pytest.approx((expected.energy, expected.length))
    assert torch.equal(read.gradient(), unread.gradient())


@pytest.mark.parametrize("metric", METRICS)
def test_parameters_of_any_layout_count_in_row_major_order(metric):
    torch.manual_seed(0)
    transposed = nn.Parameter(torch.randn(3, 4).t())
    channels_last = nn.Parameter(torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last))
    parameters = [transposed, channels_last, nn.Parameter(torch.randn(()))]
    general, told = (PullForward(parameters, metric=metric, descent=rate) for rate in (None, RATE))
    for _ in range(6):
        loss = sum((p * torch.randn(p.shape)).square().sum() for p in parameters)
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        general.observe(loss)
        told.observe(loss)
        with torch.no_grad():
            for parameter in parameters:
                parameter.sub_(parameter.grad, alpha=RATE)
    for mine, other in zip(told.terms(), general.terms(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_a_gradient_may_be_overwritten_after_it_was_observed():
    net = make_net(0)
    pull = PullForward(net.encoder.parameters(), descent=RATE)

    def overwrite() -> None:
        if looks.pop():
            for parameter in net.parameters():
                parameter.grad.fill_(np.nan)

    looks = [True, False] * MOST  # taken from the end: between observation and step, and after the step
    record, _ = descend(net, [pull], updates=MOST, look=overwrite)
    assert_path(pull, record.oracle(MOST))


@pytest.mark.parametrize("metric", METRICS)
def test_a_gpu_which_is_never_waited_for_gives_the_same(metric, monkeypatch):
    net = make_net(2)
    plain, twin = (PullForward(net.encoder.parameters(), metric=metric, descent=RATE) for _ in range(2))
    twin._waits, twin._sums._unchecked = False, 0
    observe = twin.observe

    def observe_without_reading(loss: torch.Tensor) -> None:
        with monkeypatch.context() as patched:
            for method in ("item", "__float__", "__bool__", "tolist", "cpu", "numpy"):
                patched.setattr(torch.Tensor, method, never)
            observe(loss)

    monkeypatch.setattr(twin, "observe", observe_without_reading)
    descend(net, [plain, twin], updates=MOST)
    torch.testing.assert_close(twin.gradient(), plain.gradient(), rtol=1e-6, atol=1e-6)
    assert (twin.energy, twin.length) == pytest.approx((plain.energy, plain.length), rel=1e-9)


def never(*_: object) -> None:
    raise AssertionError("a GPU would have been waited for")


@pytest.mark.parametrize("kind", ["another rate", "momentum", "clipped", "two steps", "no step"])
def test_what_is_not_plain_descent_is_refused(kind):
    net = make_net(0)
    encoder = list(net.encoder.parameters())
    pull = PullForward(encoder, descent=RATE)
    rate = 1.01 * RATE if kind == "another rate" else RATE
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9 if kind == "momentum" else 0.0)
    batches = torch.Generator().manual_seed(0)

    def train() -> None:
        for _ in range(3):
            net.zero_grad()
            loss = net.loss(batches)
            loss.backward()
            pull.observe(loss)
            if kind == "clipped":
                nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            for _ in range({"two steps": 2, "no step": 0}.get(kind, 1)):
                optimizer.step()

    with pytest.raises(RuntimeError, match=r"descent=0\.05"):
        train()
    count = 1 if kind == "momentum" else 0  # its first step is like any other
    assert (pull.energy > 0) == bool(count)
    assert bool(pull.gradient().any()) == bool(count)


def test_a_path_that_diverges_is_no_breach():
    """The server is told of what is not finite, and ends the task."""
    theta = nn.Parameter(torch.ones(3))
    pull = PullForward([theta], descent=RATE)
    for value in (1e38, float("inf"), float("nan")):
        theta.grad = torch.full((3,), value)
        pull.observe(1.0)
        with torch.no_grad():
            theta.sub_(theta.grad, alpha=RATE)
    pull.close(float("nan"))
    assert not pull.gradient().isfinite().any()


@pytest.mark.parametrize("rate", [0.0, -0.1, float("nan")])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match="descent is"):
        PullForward([nn.Parameter(torch.zeros(1))], descent=rate)
