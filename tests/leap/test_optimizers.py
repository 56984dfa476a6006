"""RMSProp in its two forms: computed by hand, against torch's own, and without touching what others hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from leap_dist.leap.optimizers import RMSProp

SHAPES = ((3, 2), (4,), ())


def random_parameters(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def random_gradients(generator: torch.Generator, scale: float = 1.0) -> list[torch.Tensor]:
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


def assert_parameters_equal(found: list[nn.Parameter], expected: list[nn.Parameter]) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=1e-5, atol=1e-6)


def two_steps(*, epsilon_inside: bool) -> list[float]:
    """θ after each of two steps with g = 2, then −1; θ_0 = 1, α = 0.1, ρ = 0.75, ε = 0.5."""
    theta = nn.Parameter(torch.tensor([1.0]))
    optimizer = RMSProp([theta], learning_rate=0.1, decay=0.75, epsilon=0.5, epsilon_inside=epsilon_inside)
    visited = []
    for gradient in (2.0, -1.0):
        theta.grad = torch.tensor([gradient])
        optimizer.step()
        visited.append(theta.item())
    return visited


def test_two_steps_by_hand_with_epsilon_inside_the_root():
    # v_0 = 1.  v_1 = 0.75·1 + 0.25·4 = 1.75,     √(v_1 + 0.5) = √2.25 = 1.5
    #           v_2 = 0.75·1.75 + 0.25·1 = 1.5625, √(v_2 + 0.5) = √2.0625
    first = 1 - 0.1 * 2 / 1.5
    second = first + 0.1 * 1 / math.sqrt(2.0625)
    assert two_steps(epsilon_inside=True) == pytest.approx([first, second], rel=1e-6)


def test_two_steps_by_hand_with_epsilon_outside_the_root():
    # v_0 = 0.  v_1 = 0.25·4 = 1,                 √v_1 + 0.5 = 1.5
    #           v_2 = 0.75·1 + 0.25·1 = 1,        √v_2 + 0.5 = 1.5
    first = 1 - 0.1 * 2 / 1.5
    second = first + 0.1 * 1 / 1.5
    assert two_steps(epsilon_inside=False) == pytest.approx([first, second], rel=1e-6)


@given(
    st.integers(0, 2**31 - 1),
    st.floats(1e-5, 1e-1),
    st.floats(0.5, 0.999),
    st.sampled_from([1e-8, 1e-5, 1e-2]),
    st.sampled_from([1e-4, 1.0, 1e3]),
)
def test_the_outside_form_is_torchs_rmsprop(seed, learning_rate, decay, epsilon, scale):
    ours, theirs = random_parameters(seed), random_parameters(seed)
    optimizer = RMSProp(ours, learning_rate=learning_rate, decay=decay, epsilon=epsilon, epsilon_inside=False)
    reference = torch.optim.RMSprop(theirs, lr=learning_rate, alpha=decay, eps=epsilon)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(6):
        for a, b, gradient in zip(ours, theirs, random_gradients(generator, scale), strict=True):
            a.grad, b.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    assert_parameters_equal(ours, theirs)


@pytest.mark.parametrize("epsilon_inside", [True, False])
@pytest.mark.parametrize("limit", [0.3, 3.0, 1e6])
@given(st.integers(0, 2**31 - 1))
def test_clipping_is_clip_grad_norm_followed_by_the_step(epsilon_inside, limit, seed):
    """`limit` clips always, sometimes, never: the gradients' norms are about 0.3, 3 and 30."""
    settings = {"learning_rate": 0.01, "epsilon": 1e-3, "epsilon_inside": epsilon_inside}
    ours, theirs = random_parameters(seed), random_parameters(seed)
    clipping = RMSProp(ours, max_grad_norm=limit, **settings)
    plain = RMSProp(theirs, **settings)
    generator = torch.Generator().manual_seed(seed)
    for scale in (1.0, 0.1, 10.0):
        for a, b, gradient in zip(ours, theirs, random_gradients(generator, scale), strict=True):
            a.grad, b.grad = gradient.clone(), gradient.clone()
        raw_norm = clipping.step()
        expected = nn.utils.clip_grad_norm_(theirs, limit)
        assert plain.step().item() == pytest.approx(min(expected.item(), limit), rel=1e-4)
        assert raw_norm.shape == ()
        assert raw_norm.item() == pytest.approx(expected.item(), rel=1e-5), "the norm before clipping"
    assert_parameters_equal(ours, theirs)


@pytest.mark.parametrize("epsilon_inside", [True, False])
def test_gradients_that_somebody_holds_are_dropped_and_not_overwritten(epsilon_inside):
    parameters = random_parameters(0)
    optimizer = RMSProp(parameters, learning_rate=0.1, epsilon_inside=epsilon_inside, max_grad_norm=0.01)
    held = random_gradients(torch.Generator().manual_seed(1))
    before = [gradient.clone() for gradient in held]
    versions = [gradient._version for gradient in held]
    for parameter, gradient in zip(parameters, held, strict=True):
        parameter.grad = gradient
    optimizer.step()
    assert all(torch.equal(gradient, old) for gradient, old in zip(held, before, strict=True))
    assert [gradient._version for gradient in held] == versions
    assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize("epsilon_inside", [True, False])
def test_a_gradient_of_zero_moves_nothing(epsilon_inside):
    parameters = random_parameters(0)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = RMSProp(parameters, learning_rate=0.1, epsilon_inside=epsilon_inside, max_grad_norm=0.5)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    assert optimizer.step().item() == 0.0
    assert all(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))


def test_a_missing_gradient_is_refused_and_nothing_moves():
    parameters = random_parameters(0)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = RMSProp(parameters, learning_rate=0.1)
    parameters[0].grad = torch.ones_like(parameters[0])
    with pytest.raises(RuntimeError, match="no gradient"):
        optimizer.step()
    assert all(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))


@given(
    st.integers(0, 2**31 - 1),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 0.99]),
    st.sampled_from([1e-3, 1e-1, 10.0, math.inf]),
    st.lists(st.sampled_from([0.0, 1e-3, 1.0, 1e3]), min_size=1, max_size=8),
)
def test_the_fused_form_which_cpus_use_is_the_plain_one_which_gpus_use(seed, inside, decay, max_norm, scales):
    """Gradients of all sizes, so that the clip factor jumps from step to step."""
    forms = []
    for fused in (True, False):
        parameters, generator = random_parameters(seed), torch.Generator().manual_seed(seed)
        optimizer = RMSProp(parameters, learning_rate=1e-2, decay=decay, epsilon=1e-4, epsilon_inside=inside,
                            max_grad_norm=max_norm, fused=fused)  # fmt: skip
        for scale in scales:
            for parameter, gradient in zip(parameters, random_gradients(generator, scale), strict=True):
                parameter.grad = gradient
            optimizer.step()
        forms.append(parameters)
    assert_parameters_equal(*forms)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_shows(fused, bad):
    theta = nn.Parameter(torch.ones(3))
    optimizer = RMSProp([theta], learning_rate=0.1, max_grad_norm=1.0, fused=fused)
    theta.grad = torch.tensor([0.0, bad, 1.0])
    optimizer.step()
    assert theta.isnan().any()
