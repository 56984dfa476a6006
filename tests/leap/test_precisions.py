"""PullForward on models of every precision: it sums in float32 at least, and takes parameters for what they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pull_forward_oracle import pull_forward
from torch import nn

from leap_dist.leap import PullForward

PRECISIONS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
STEPS = 300


def parameters(dtypes: list[torch.dtype]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(7, 5, generator=generator).to(dtype)) for dtype in dtypes]


def flat(tensors) -> np.ndarray:
    return np.concatenate([tensor.detach().double().numpy().reshape(-1) for tensor in tensors])


def walk(pulls: list[PullForward], points: list[nn.Parameter], rate: float | None = None):
    """Small steps along gradients of noise, watched by all `pulls`. Returns what the oracle needs."""
    generator = torch.Generator().manual_seed(1)
    thetas, losses, gradients = [], [], []
    for step in range(STEPS):
        loss = 2.0 - 0.001 * step + 0.01 * (step % 3)
        for point in points:
            point.grad = torch.randn(point.shape, generator=generator).to(point.dtype)
        thetas.append(flat(points))
        losses.append(loss)
        gradients.append(flat(point.grad for point in points))
        for pull in pulls:
            pull.observe(torch.tensor(loss, dtype=torch.float64))
        with torch.no_grad():
            for point in points:
                point.sub_(point.grad, alpha=rate or 0.02)
    thetas.append(flat(points))
    losses.append(1.0)
    for pull in pulls:
        pull.close(1.0)
    return thetas, losses, gradients


@pytest.mark.parametrize("metric", ["energy", "length"])
@pytest.mark.parametrize("waits", [True, False], ids=["cpu", "gpu"])
@pytest.mark.parametrize(
    "dtypes",
    [*([dtype] for dtype in PRECISIONS), PRECISIONS, PRECISIONS[::-1], [torch.float32, torch.bfloat16]],
    ids=str,
)
def test_sums_are_as_exact_as_float32_whatever_the_model(dtypes, metric, waits):
    points = parameters(dtypes)
    pull = PullForward(points, metric=metric)
    pull._waits = waits
    expected = pull_forward(*walk([pull], points), metric=metric)
    tolerance = 1e-6 * (np.linalg.norm(expected.loss_term) + np.linalg.norm(expected.path_term))
    for found, exact in zip(pull.terms(), (expected.loss_term, expected.path_term), strict=True):
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), exact, rtol=0, atol=tolerance)
    assert (pull.energy, pull.length) == pytest.approx((expected.energy, expected.length), rel=1e-5)


@pytest.mark.parametrize("metric", ["energy", "length"])
@pytest.mark.parametrize("dtypes", [[torch.bfloat16], [torch.float16], [torch.float32, torch.float64]], ids=str)
def test_so_are_those_along_plain_descent(dtypes, metric):
    """There, −Δθ is α∇f, not what the parameters' own rounding makes of it."""
    points, rate = parameters(dtypes), 0.02
    pull = PullForward(points, metric=metric, descent=rate)
    thetas, losses, gradients = walk([pull], points, rate)
    exact = [thetas[0] - rate * sum(gradients[:i], np.zeros_like(thetas[0])) for i in range(len(thetas))]
    expected = pull_forward(exact, losses, gradients, metric=metric)
    np.testing.assert_allclose(
        pull.gradient().numpy(), expected.gradient, rtol=0, atol=3e-6 * np.linalg.norm(expected.gradient)
    )


def test_a_float64_model_is_summed_in_float64():
    """Of a sum of 1 and −1 and 10⁻¹², what is small is left."""
    (point,) = parameters([torch.float64])
    pull = PullForward([point], loss_weight=1.0, stabilize=False)
    for loss, gradient in ((0.0, 1.0), (-1.0, -1.0), (-2.0, 1e-12), (-3.0, 0.0)):
        point.grad = torch.full_like(point, gradient)
        pull.observe(loss)
    np.testing.assert_allclose(pull.terms()[0].numpy(), 1e-12, rtol=1e-3)


def test_a_frozen_parameter_counts_as_zeros():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    net[0].requires_grad_(False)
    trained = list(net[2].parameters())
    whole, part = PullForward(net.parameters()), PullForward(trained)
    for _ in range(5):
        net.zero_grad()
        loss = net(torch.ones(2, 3)).square().mean()
        loss.backward()
        whole.observe(loss)
        part.observe(loss)
        with torch.no_grad():
            for parameter in trained:
                parameter.sub_(0.1 * parameter.grad)
    frozen = sum(parameter.numel() for parameter in net[0].parameters())
    assert not whole.gradient()[:frozen].any()
    assert torch.equal(whole.gradient()[frozen:], part.gradient())
    assert part.gradient().any()
    assert (whole.energy, whole.length) == pytest.approx((part.energy, part.length))


def test_a_parameter_that_the_loss_does_not_depend_on_is_named():
    used, unused = parameters([torch.float32] * 2)
    pull = PullForward([used, unused])
    loss = used.square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match=r"parameter 1, of shape \(7, 5\), has no gradient.*does not depend on"):
        pull.observe(loss)


def test_no_gradient_at_all_is_no_frozen_model():
    (point,) = parameters([torch.float32])
    with pytest.raises(RuntimeError, match=r"parameter 0, .* has no gradient: call observe after backward"):
        PullForward([point.detach()]).observe(1.0)


def test_a_parameter_given_twice_is_refused():
    first, second = parameters([torch.float32] * 2)
    with pytest.raises(ValueError, match="given twice"):
        PullForward([first, second, first])


def test_a_parameter_that_the_model_uses_twice_counts_once():
    (shared,) = parameters([torch.float64])
    pull, thetas, losses, gradients = PullForward([shared]), [], [], []
    for _ in range(4):
        shared.grad = None
        loss = (shared @ shared.T).square().mean()
        loss.backward()
        thetas.append(flat([shared]))
        losses.append(loss.item())
        gradients.append(flat([shared.grad]))
        pull.observe(loss)
        with torch.no_grad():
            shared.sub_(0.001 * shared.grad)
    expected = pull_forward(thetas, losses, gradients)
    np.testing.assert_allclose(pull.gradient().numpy(), expected.gradient, rtol=1e-5)
    assert pull.length == pytest.approx(expected.length)
