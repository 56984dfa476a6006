"""When the server makes a meta-update, and from which contributions (notes with each mode in docs/architecture.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from leap_dist import staleness
from leap_dist.config import MetaSettings

_SMALLEST_NORM = 1e-30  # what float32 can still divide by


@dataclass(frozen=True)
class Pull:
    """One accepted contribution, reduced to what a meta-update needs."""

    version: int
    """That its lease started from."""
    norm: float
    vector: np.ndarray


@dataclass(frozen=True)
class Direction:
    """What a meta-update applies, and how each pull came into it."""

    gradient: np.ndarray
    weights: tuple[float, ...]
    """s(τ), in the order of the pulls."""
    clips: tuple[float, ...]
    """Factor that the norm clip applied, in the order of the pulls."""
    agreement: float
    """Mean pairwise cosine of the pulls; 0 for a single one."""


def batch_size(mode: str, settings: MetaSettings) -> int:
    """Contributions that one meta-update consumes: |B|, or one in `async`."""
    return 1 if mode == "async" else settings.batch_size


def combine(
    mode: str, settings: MetaSettings, pulls: Sequence[Pull], version: int, recent: Sequence[float]
) -> Direction:
    """The gradient that the meta-optimizer gets from `pulls`, given in order of their task index.

    sync:     (1/n) Σ G_j                Algorithm 1; every pull starts from `version`
    buffered: (1/n) Σ s(τ_j) G_j         FedBuff, arXiv 2106.06639
    async:    (1/|B|) s(τ) G             on each arrival
    """
    norms = [pull.norm for pull in pulls]
    # sync clips against its own batch, so that it does not depend on what came before; the others look further back.
    reference = norms if mode == "sync" else [*recent, *norms][-max(settings.clip_window, len(norms)) :]
    weights = tuple(1.0 if mode == "sync" else staleness.weight(settings.staleness, version - p.version) for p in pulls)
    clips = tuple(staleness.clip_factor(norm, reference, settings.contribution_clip) for norm in norms)
    divisor = settings.batch_size if mode == "async" else len(pulls)
    factors = [weight * clip for weight, clip in zip(weights, clips, strict=True)]
    gradient = staleness.weighted_mean([pull.vector for pull in pulls], factors, divisor)
    return Direction(gradient, weights, clips, _agreement(pulls))


def _agreement(pulls: Sequence[Pull]) -> float:
    """Mean pairwise cosine, from the norm of the sum of the unit vectors."""
    units = [pull.vector / np.float32(pull.norm) for pull in pulls if pull.norm > _SMALLEST_NORM]
    if len(units) < 2:
        return 0.0
    total = np.sum(units, axis=0, dtype=np.float32)
    count = len(units)
    return float((np.dot(total, total) - count) / (count * (count - 1)))


class MetaOptimizer:
    """φ and the torch optimizer that moves it; a step is committed or discarded whole."""

    def __init__(self, settings: MetaSettings, vector: np.ndarray) -> None:
        self._parameter = torch.nn.Parameter(torch.from_numpy(np.array(vector, np.float32)))
        if settings.optimizer == "adam":
            self._optimizer: torch.optim.Optimizer = torch.optim.Adam([self._parameter], lr=settings.learning_rate)
        else:
            self._optimizer = torch.optim.SGD([self._parameter], lr=settings.learning_rate, momentum=settings.momentum)

    @property
    def vector(self) -> np.ndarray:
        """A copy of φ."""
        return self._parameter.detach().numpy().copy()

    def step(self, gradient: np.ndarray) -> None:
        """φ ← φ − β · (what the optimizer makes of the gradient)."""
        self._parameter.grad = torch.from_numpy(gradient)
        self._optimizer.step()
        self._parameter.grad = None

    def state(self) -> dict[str, np.ndarray]:
        """Copies of the optimizer's tensors by name."""
        state = self._optimizer.state_dict()["state"].get(0, {})
        return {name: np.array(value.numpy()) for name, value in state.items() if isinstance(value, torch.Tensor)}

    def restore(self, vector: np.ndarray, state: dict[str, np.ndarray]) -> None:
        """Puts φ and the optimizer back to what `vector` and `state` once returned."""
        with torch.no_grad():
            self._parameter.copy_(torch.from_numpy(np.array(vector)))
        full = self._optimizer.state_dict()
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
        full["state"] = {0: tensors} if tensors else {}
        self._optimizer.load_state_dict(full)
