"""A small training that is watched and recorded, for tests that compare what was watched with an oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from pull_forward_oracle import Path, pull_forward_with_shifts, smoothed
from torch import Tensor, nn

from leap_dist.leap.optimizers import RMSProp
from leap_dist.leap.pull_forward import PullForward

METRICS = ("energy", "length")


class Net(nn.Module):
    """An encoder that is watched and a head that only trains along."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
        self.head = nn.Linear(2, 1).to(dtype)

    def loss(self, generator: torch.Generator) -> Tensor:
        """On a fresh batch of noise: it rises about as often as it falls."""
        batch = torch.randn(5, 3, generator=generator).to(self.head.weight.dtype)
        return (self.head(self.encoder(batch)) - 2 * batch[:, :1]).square().mean()


@dataclass
class Recording:
    """A trajectory for the oracle: K+1 points, K+1 losses, K gradients, and the shifts of each segment."""

    thetas: list[np.ndarray] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradients: list[np.ndarray] = field(default_factory=list)
    shifts: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def oracle(self, points: int, *, loss_smoothing: float = 0.0, loss_warmup: int = 0, **settings: object) -> Path:
        """Of the path through the first `points` points. During the warm-up, the loss stays where it ends.

        Energy and length are those of the losses as they were, whatever the gradient makes of them.
        """
        left = self.losses[loss_warmup:points] or self.losses[points - 1 : points]
        averages = smoothed(left, loss_smoothing)
        losses = [averages[0]] * (points - len(averages)) + averages
        measured = pull_forward_with_shifts(self.thetas, self.losses[:points], self.gradients, self.shifts, **settings)
        path = pull_forward_with_shifts(self.thetas, losses, self.gradients, self.shifts, **settings)
        return path._replace(energy=measured.energy, length=measured.length)


def flat(tensors) -> np.ndarray:
    return np.concatenate([np.array(t.detach(), np.float64).reshape(-1) for t in tensors])


def optimizer_for(kind: str, net: nn.Module):
    """The clipped forms clip hard, so that ∇f and what the optimizer uses differ."""
    if kind == "momentum":
        return torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    return RMSProp(net.parameters(), learning_rate=0.01, epsilon_inside=kind == "inside", max_grad_norm=0.1)


def train(
    net: Net,
    pull: PullForward,
    *,
    updates: int,
    kind: str = "momentum",
    seed: int = 0,
    after_observe: Callable[[int], None] = lambda i: None,
    after_step: Callable[[int], None] = lambda i: None,
) -> tuple[Recording, Tensor]:
    """Trains and observes. Returns the recording and f(θ_K), with which the path may be closed."""
    optimizer = optimizer_for(kind, net)
    batches = torch.Generator().manual_seed(seed)
    record = Recording()
    for i in range(updates):
        net.zero_grad()
        loss = net.loss(batches)
        loss.backward()
        record.thetas.append(flat(net.encoder.parameters()))
        record.losses.append(loss.item())
        record.gradients.append(flat(p.grad for p in net.encoder.parameters()))
        pull.observe(loss)
        after_observe(i)
        optimizer.step()
        after_step(i)
    final_loss = net.loss(batches)
    record.thetas.append(flat(net.encoder.parameters()))
    record.losses.append(final_loss.item())
    return record, final_loss


def make_net(seed: int, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(seed)
    return Net(dtype)


def watched(net: Net) -> SimpleNamespace:
    """What a meta-learner looks at."""
    return SimpleNamespace(
        shared=dict(net.encoder.named_parameters()), local=dict(net.head.named_parameters()), descent=None
    )


def assert_path(pull: PullForward, expected: Path, *, tolerance: float = 1e-6) -> None:
    """`tolerance` is relative to the size of the summands; float64 training leaves the final rounding to float32."""
    assert np.isfinite(expected.gradient).all(), "the test's own training diverged"
    size = np.linalg.norm(expected.loss_term) + np.linalg.norm(expected.path_term)
    loss_term, path_term = (t.numpy() for t in pull.terms())
    np.testing.assert_allclose(loss_term, expected.loss_term, rtol=0, atol=tolerance * size)
    np.testing.assert_allclose(path_term, expected.path_term, rtol=0, atol=tolerance * size)
    np.testing.assert_allclose(pull.gradient().numpy(), expected.gradient, rtol=0, atol=tolerance * size)
    assert pull.gradient().dtype == torch.float32
    assert pull.energy == pytest.approx(expected.energy, rel=10 * tolerance)
    assert pull.length == pytest.approx(expected.length, rel=10 * tolerance)


settings_of_leap = st.fixed_dictionaries(
    {
        "metric": st.sampled_from(METRICS),
        "loss_weight": st.sampled_from([0.0, 1.0]) | st.floats(0.01, 100),
        "stabilize": st.booleans(),
    }
)
optimizers = st.sampled_from(["momentum", "inside", "outside"])
seeds = st.integers(0, 2**31 - 1)
