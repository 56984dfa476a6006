"""Figures of an initialization, on networks and features made by hand, and on the first unroll of a real agent."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from a2c_learners import ALONE, playing

from leap_dist.nn import features
from leap_dist.nn.actor_critic import Encoder, initialize
from leap_dist.nn.features import dead_units, effective_rank, norm_ratio
from leap_dist.protocol.messages import AT_START


@pytest.fixture
def encoder() -> Encoder:
    made = Encoder(4)
    initialize(made, torch.Generator().manual_seed(3))
    return made


FRAMES = torch.rand(12, 4, 84, 84, generator=torch.Generator().manual_seed(5))


def test_the_norm_is_relative_to_that_of_a_fresh_encoder_whatever_its_seed(encoder):
    assert norm_ratio(encoder) == pytest.approx(1.0, rel=1e-5)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(3.0)
        assert norm_ratio(encoder) == pytest.approx(3.0, rel=1e-5)
        encoder.linear.bias.fill_(1.0)
    assert norm_ratio(encoder) == pytest.approx(math.sqrt(9 + 256 / 608), rel=1e-5), "2 · (16 + 32 + 256) = 608"


def test_a_unit_is_dead_if_no_frame_makes_it_fire(encoder):
    with torch.no_grad():
        encoder.linear.bias.fill_(1e3)
        assert dead_units(encoder(FRAMES)) == 0
        encoder.linear.bias[[7, 11, 200]] = -1e6
        assert dead_units(encoder(FRAMES)) == 3 / 256
        encoder.linear.bias[7] = -float(torch.relu(encoder.linear.weight[7]).sum())
        fires = encoder(FRAMES)
        fires[:, 11] = 0
        fires[4, 11] = 1e-3
    assert dead_units(fires[:, 11:12]) == 0, "it fires on one frame"


def test_units_that_all_look_for_the_same_have_rank_one(encoder):
    with torch.no_grad():
        encoder.linear.weight.copy_(torch.arange(1.0, 257.0).unsqueeze(1) * encoder.linear.weight[:1].abs())
    assert effective_rank(encoder(FRAMES)) == pytest.approx(1.0, abs=1e-4)


def test_the_effective_rank_counts_directions_by_their_size():
    basis = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    for sizes in ([1, 1, 1, 1], [3, 1], [5], [2, 2, 1e-9]):
        made = basis[:, : len(sizes)] * torch.tensor(sizes) @ basis[:, : len(sizes)].T
        shares = np.array(sizes) / sum(sizes)
        assert effective_rank(made) == pytest.approx(math.exp(-np.sum(shares * np.log(shares))), rel=1e-4)
    assert effective_rank(torch.zeros(3, 5)) == 0


@pytest.mark.emulator
def test_an_agent_reports_them_once_for_the_point_that_it_starts_from():
    with playing("pong", agent=ALONE) as learner:
        loss = learner.backward()
        encoded = learner._rollout.features()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in learner._model.parameters()))
        learner.step()
        learner.backward()
        means = learner.progress().means
        found = {name.removeprefix(AT_START): value for name, value in means.items() if name.startswith(AT_START)}
        assert (*found, "entropy_later") == features.STATISTICS
        assert found["norm_ratio"] == pytest.approx(1.0, rel=1e-4)
        assert found["entropy"] == pytest.approx(math.log(6), rel=1e-3), "a fresh head hardly prefers an action"
        assert found["gradient_norm"] == pytest.approx(norm, rel=1e-5)
        assert found["dead_units"] == dead_units(encoded)
        assert found["effective_rank"] == pytest.approx(effective_rank(encoded))
        assert 1 <= found["effective_rank"] <= ALONE.unroll
        assert math.isfinite(loss.item())
        learner.step()
        learner.backward()
        assert not any(name.startswith(AT_START) for name in learner.progress().means)


@pytest.mark.emulator
@pytest.mark.parametrize("interrupted_after", [None, 1, 3, 4])
def test_an_agent_reports_its_entropy_again_after_some_updates(
    monkeypatch: pytest.MonkeyPatch, interrupted_after: int | None
):
    monkeypatch.setattr("leap_dist.nn.features.LATER", 3)
    reported = []
    with playing("pong", agent=ALONE) as first, playing("pong", agent=ALONE) as second:
        learner = first
        for number in range(5):
            if number == interrupted_after:
                state = first.state()
                assert state is not None
                learner = second
                learner.load_state(state)
            learner.backward()
            means = learner.progress().means
            learner.step()
            if AT_START + "entropy_later" in means:
                assert means[AT_START + "entropy_later"] == pytest.approx(means["entropy"]), "one rollout"
                reported.append(number)
    assert reported == [3]
