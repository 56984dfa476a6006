"""Moves that are not training, on the way: what they leave out of the path, and what they must not touch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from trajectories import METRICS, Recording, assert_path, flat, make_net, optimizers, seeds, settings_of_leap, train

from leap_dist.leap.pull_forward import PullForward


class Shift(NamedTuple):
    """One move within segment i, between observations i and i+1."""

    segment: int
    after_the_step: bool
    size: float


def train_with_shifts(
    net: nn.Module,
    pull: PullForward,
    shifts: list[Shift],
    *,
    seed: int = 0,
    read: Callable[[int], None] = lambda i: None,
    **training: object,
) -> tuple[Recording, torch.Tensor]:
    """`train`, where the encoder is also moved about; `read` is called after each event of segment i."""
    encoder = list(net.encoder.parameters())
    random = torch.Generator().manual_seed(seed)
    moved: dict[int, list[np.ndarray]] = {}

    def events(after_the_step: bool) -> Callable[[int], None]:
        def happen(i: int) -> None:
            for shift in shifts:
                if (shift.segment, shift.after_the_step) != (i, after_the_step):
                    continue
                amounts = [shift.size * torch.randn(p.shape, generator=random).to(p.dtype) for p in encoder]
                with torch.no_grad():
                    for parameter, amount in zip(encoder, amounts, strict=True):
                        parameter += amount
                pull.shift(amounts)
                moved.setdefault(i, []).append(flat(amounts))
                read(i)
                for amount in amounts:  # they stay the caller's
                    amount.fill_(np.nan)
            read(i)

        return happen

    record, final_loss = train(net, pull, seed=seed, after_observe=events(False), after_step=events(True), **training)
    record.shifts = moved
    return record, final_loss


UPDATES = 6
segments = st.integers(0, UPDATES - 1)
shifts = st.lists(st.builds(Shift, segments, st.booleans(), st.sampled_from([0.0, 0.01, 0.3])), max_size=5)


@given(settings_of_leap, shifts, optimizers, seeds, st.booleans())
def test_equals_the_oracle(settings, shifts, kind, seed, with_final_loss):
    net = make_net(seed)
    pull = PullForward(net.encoder.parameters(), **settings)
    record, final_loss = train_with_shifts(net, pull, shifts, updates=UPDATES, kind=kind, seed=seed)
    pull.close(final_loss if with_final_loss else None)
    assert_path(pull, record.oracle(UPDATES + with_final_loss, **settings))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "shifts",
    [
        pytest.param([Shift(2, True, 0.1), Shift(2, True, 0.2)], id="two within one segment"),
        pytest.param([Shift(2, False, 0.1), Shift(2, True, 0.2)], id="on both sides of a step"),
        pytest.param([Shift(UPDATES - 1, True, 0.1)], id="right before the close"),
        pytest.param([Shift(i, True, 0.01) for i in range(UPDATES)], id="in every segment"),
    ],
)
def test_equals_the_oracle_in_float32(metric, shifts):
    net = make_net(3, torch.float32)
    pull = PullForward(net.encoder.parameters(), metric=metric)
    record, final_loss = train_with_shifts(net, pull, shifts, updates=UPDATES)
    pull.close(final_loss)
    assert sum(map(len, record.shifts.values())) == len(shifts)
    assert_path(pull, record.oracle(UPDATES + 1, metric=metric), tolerance=1e-5)


def test_a_shift_by_hand():
    """From 0 by −1 to −1, moved by 10 to 9, by −2 to 7: what counts is −1 without its loss, and −2 with a fall by 1."""
    theta = nn.Parameter(torch.tensor([0.0]))
    theta.grad = torch.tensor([1.0])
    pull = PullForward([theta])
    with torch.no_grad():
        pull.observe(5.0)
        theta -= 1
        theta += 10
        pull.shift([torch.tensor([10.0])])
        pull.observe(100.0)
        theta -= 2
        pull.close(99.0)
    assert [term.item() for term in pull.terms()] == [1.0, 3.0]
    assert pull.energy == 1.0 + (4.0 + 1.0)
    assert pull.length == pytest.approx(1.0 + 5.0**0.5)


def test_a_shift_starts_the_average_of_a_smoothed_loss_anew():
    """Or the jump from 8 to 100, which is left out of its own segment, would come in with the next: 31 → 47¼."""
    theta = nn.Parameter(torch.zeros(1))
    theta.grad = torch.ones(1)
    pull = PullForward([theta], loss_smoothing=0.75)
    pull.observe(8.0)
    pull.shift([torch.zeros(1)])
    pull.observe(100.0)
    pull.close(96.0)
    assert pull.gradient().tolist() == [1.0]
    assert pull.energy == 4.0**2


@pytest.mark.parametrize("metric", METRICS)
def test_after_a_shift_before_the_first_observation_the_path_is_one_that_started_there(metric):
    """Its first segment keeps its loss part: nothing straddles the shift."""
    results = []
    for told in (True, False):
        net = make_net(4, torch.float32)
        amounts = [torch.full_like(p, 0.1) for p in net.encoder.parameters()]
        pull = PullForward(net.encoder.parameters(), metric=metric)
        with torch.no_grad():
            for parameter, amount in zip(net.encoder.parameters(), amounts, strict=True):
                parameter += amount
        if told:
            pull.shift(amounts)
        else:
            pull = PullForward(net.encoder.parameters(), metric=metric)
        _, final_loss = train(net, pull, updates=3)
        pull.close(final_loss)
        results.append(([term.tolist() for term in pull.terms()], pull.energy, pull.length))
    assert results[0] == results[1]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("loss_weight", [0.0, 2.0])
def test_a_shift_of_zero_costs_the_loss_part_of_its_segment_and_nothing_else(metric, loss_weight):
    def play(shifts: list[Shift]) -> tuple[PullForward, Recording]:
        net = make_net(5)
        pull = PullForward(net.encoder.parameters(), metric=metric, loss_weight=loss_weight)
        record, final_loss = train_with_shifts(net, pull, shifts, updates=UPDATES)
        pull.close(final_loss)
        return pull, record

    shifted, record = play([Shift(2, True, 0.0)])
    plain, plain_record = play([])
    assert record.losses == plain_record.losses
    change = record.losses[3] - record.losses[2]
    assert shifted.energy == pytest.approx(plain.energy - loss_weight * change**2, rel=1e-12)
    if loss_weight == 0:
        assert torch.equal(shifted.gradient(), plain.gradient())
        assert shifted.length == plain.length
    elif metric == "energy":
        lost = plain.terms()[0] - shifted.terms()[0]
        np.testing.assert_allclose(lost, loss_weight * abs(change) * record.gradients[2], rtol=1e-4, atol=1e-5)
        assert torch.equal(shifted.terms()[1], plain.terms()[1])
    else:  # n_i = ‖Δθ_i‖ also makes the segment weigh more
        assert shifted.length < plain.length
        assert not torch.equal(shifted.terms()[1], plain.terms()[1])


@given(shifts, optimizers, seeds)
def test_the_path_term_of_energy_telescopes_over_the_steps_alone(shifts, kind, seed):
    net = make_net(seed)
    pull = PullForward(net.encoder.parameters(), metric="energy")
    record, final_loss = train_with_shifts(net, pull, shifts, updates=UPDATES, kind=kind, seed=seed)
    pull.close(final_loss)
    moved = sum((sum(amounts) for amounts in record.shifts.values()), np.zeros(len(record.thetas[0])))
    steps = record.thetas[-1] - record.thetas[0] - moved
    np.testing.assert_allclose(pull.terms()[1], -steps, rtol=0, atol=1e-6 * np.linalg.norm(steps))


@given(settings_of_leap, shifts, seeds)
def test_law_5_cumulative_chunks_add_up_over_shifts(settings, shifts, seed):
    """What is read, also between a shift and the next observation, is the path up to the last observation."""
    net, other_net = make_net(seed), make_net(seed)
    pull = PullForward(net.encoder.parameters(), **settings)
    unread = PullForward(other_net.encoder.parameters(), **settings)
    partial: list[tuple[int, np.ndarray, float, float]] = []

    def read(i: int) -> None:
        partial.append((i + 1, pull.gradient().numpy(), pull.energy, pull.length))

    record, final_loss = train_with_shifts(net, pull, shifts, updates=UPDATES, seed=seed, read=read)
    train_with_shifts(other_net, unread, shifts, updates=UPDATES, seed=seed)
    pull.close(final_loss)
    unread.close(final_loss)

    assert len(partial) >= 2 * UPDATES
    for points, gradient, energy, length in partial:
        expected = record.oracle(points, **settings)
        # A shift rounds the points that it moves, however short the path between them is.
        size = np.linalg.norm(expected.loss_term) + np.linalg.norm(expected.path_term) + 1e-6
        np.testing.assert_allclose(gradient, expected.gradient, rtol=0, atol=1e-6 * size)
        assert (energy, length) == pytest.approx((expected.energy, expected.length))
    assert torch.equal(pull.gradient(), unread.gradient())
    assert (pull.energy, pull.length) == (unread.energy, unread.length)


@pytest.mark.parametrize("metric", METRICS)
def test_a_shift_after_the_close_changes_nothing(metric):
    net = make_net(6)
    pull = PullForward(net.encoder.parameters(), metric=metric)
    _, final_loss = train(net, pull, updates=3)
    pull.close(final_loss)
    before = pull.gradient(), pull.energy, pull.length
    pull.shift([torch.ones_like(p) for p in net.encoder.parameters()])
    torch.testing.assert_close(pull.gradient(), before[0])
    assert (pull.energy, pull.length) == before[1:]
