"""How the server applies contributions: six modes, one rule each, and the meta-optimizer behind them.

With s = s(τ) of staleness.py, c the norm clip, ρ the endpoint correction and n the contributions of a meta-update:

    sync              when a batch of one version is complete      (1/n) Σ c G                       Algorithm 1
    buffered          every |B| contributions                      (1/n) Σ s (c G + ρ Δ)             arXiv 2106.06639
    async             on each contribution                         (1/|B|) s (c G + ρ Δ)
    fedasync          on each contribution                         s (c G + Δ), learning rate α      arXiv 1903.03934
    delayed-nesterov  on each contribution                         s (c G + ρ Δ), see DelayedNesterov
    stream            on each push, of what it adds                (1/|B|) s c (G_k − G_{k−1})

is what the meta-optimizer descends along; Δ = φ_now − φ_lease. With G = φ_lease − θ_K, fedasync is the convex
combination φ ← (1 − α s) φ + α s θ_K of its paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from leap_dist.config.settings import MetaSettings
from leap_dist.server import staleness

_SMALLEST_NORM = 1e-30  # what float32 can still divide by


@dataclass(frozen=True)
class Pull:
    """One accepted contribution, reduced to what a meta-update needs."""

    version: int
    """That it was computed from."""
    norm: float
    vector: np.ndarray
    """Of the shared parameters."""
    start: np.ndarray | None = None
    """φ_lease, where the mode or ρ asks for it."""


@dataclass(frozen=True)
class Direction:
    """What a meta-update applies, and how each pull came into it."""

    gradient: np.ndarray
    weights: tuple[float, ...]
    """s(τ), in the order of the pulls."""
    clips: tuple[float, ...]
    """Factor that the norm clip, or the normalization, applied, in the order of the pulls."""
    agreement: float
    """Mean pairwise cosine of the pulls; 0 for a single one."""


def batch_size(mode: str, settings: MetaSettings) -> int:
    """Contributions that one meta-update consumes: |B|, or one where they are applied as they come."""
    return settings.batch_size if mode in ("sync", "buffered") else 1


def combine(
    mode: str,
    settings: MetaSettings,
    pulls: Sequence[Pull],
    *,
    version: int,
    vector: np.ndarray,
    recent: Sequence[float],
) -> Direction:
    """The gradient that the meta-optimizer gets from `pulls`, given in order of their task index.

    Args:
        version, vector: the present snapshot.
        recent: norms of pulls before these, oldest first.
    """
    norms = [pull.norm for pull in pulls]
    # sync clips against its own batch, so that it does not depend on what came before; the others look further back.
    reference = norms if mode == "sync" else [*recent, *norms][-max(settings.clip_window, len(norms)) :]
    weights = tuple(1.0 if mode == "sync" else staleness.weight(settings.staleness, version - p.version) for p in pulls)
    clips = tuple(
        staleness.norm_factor(norm, reference)
        if settings.normalize
        else staleness.clip_factor(norm, reference, settings.contribution_clip)
        for norm in norms
    )
    rho = 1.0 if mode == "fedasync" else settings.endpoint_correction
    terms = [pull.vector for pull in pulls]
    factors = [weight * clip for weight, clip in zip(weights, clips, strict=True)]
    if rho > 0:
        # Not clipped: where the path ended is what the correction is about, however far that is.
        terms += [vector - pull.start for pull in pulls if pull.start is not None]
        factors += [weight * rho for weight, pull in zip(weights, pulls, strict=True) if pull.start is not None]
    divisor = {"async": settings.batch_size, "stream": settings.batch_size}.get(mode, len(pulls))
    return Direction(staleness.weighted_mean(terms, factors, divisor), weights, clips, _agreement(pulls))


def _agreement(pulls: Sequence[Pull]) -> float:
    """Mean pairwise cosine, from the norm of the sum of the unit vectors."""
    pulls = [pull for pull in pulls if pull.norm > _SMALLEST_NORM]
    count = len(pulls)
    if count < 2:
        return 0.0
    total, unit = np.zeros_like(pulls[0].vector), np.empty_like(pulls[0].vector)
    for pull in pulls:  # one by one: to get memory for all of them takes longer than the sum
        total += np.divide(pull.vector, np.float64(pull.norm), out=unit, casting="same_kind")
    return float((np.dot(total, total) - count) / (count * (count - 1)))


class DelayedNesterov(torch.optim.Optimizer):
    """Nesterov's momentum on every N-th gradient only, the gradients themselves at once (arXiv 2401.09135).

    Each step θ ← θ − ε g/N; each N-th also m ← β m + ḡ and θ ← θ − ε β m, where ḡ is the mean of the last N gradients.
    With N = 1 this is torch's SGD with Nesterov's momentum.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], *, lr: float, momentum: float, delay: int) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "delay": delay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._apply(parameter, parameter.grad, group)

    def _apply(self, parameter: torch.nn.Parameter, gradient: torch.Tensor, group: dict[str, float]) -> None:
        state = self.state[parameter]
        if not state:
            state["count"] = torch.zeros(())
            state["mean"] = torch.zeros_like(parameter)
            state["momentum_buffer"] = torch.zeros_like(parameter)
        parameter.sub_(gradient, alpha=group["lr"] / group["delay"])
        state["mean"].add_(gradient, alpha=1.0 / group["delay"])
        state["count"] += 1
        if state["count"] >= group["delay"]:
            state["momentum_buffer"].mul_(group["momentum"]).add_(state["mean"])
            parameter.sub_(state["momentum_buffer"], alpha=group["lr"] * group["momentum"])
            state["mean"].zero_()
            state["count"].zero_()


def learning_rate(settings: MetaSettings, done: float) -> float:
    """β after the fraction `done` of the run's tasks: constant, falling linearly, or as half a cosine, to 0."""
    left = max(0.0, 1.0 - done)
    factor = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[settings.schedule]
    return settings.learning_rate * factor


class MetaOptimizer:
    """φ and the torch optimizer that moves it; a step is committed or discarded whole."""

    def __init__(self, mode: str, settings: MetaSettings, vector: np.ndarray) -> None:
        self._settings = settings
        self._parameter = torch.nn.Parameter(torch.from_numpy(np.array(vector, np.float32)))
        self._optimizer = _torch_optimizer(mode, settings, [self._parameter])

    @property
    def vector(self) -> np.ndarray:
        """A copy of φ."""
        return self._parameter.detach().numpy().copy()

    def step(self, gradient: np.ndarray, *, done: float = 0.0) -> bool:
        """φ ← φ − β · (what the optimizer makes of the gradient), `done` being the fraction of the run behind it.

        A gradient, or a result, that is not finite changes nothing, and the answer is False. An empty one is no
        gradient at all: there is nothing to apply.
        """
        if not np.isfinite(gradient).all():
            return False
        if gradient.size == 0:
            return True
        before, state = self.vector, self.state()
        norm = float(np.linalg.norm(gradient.astype(np.float64)))
        if 0 < self._settings.max_norm < norm:
            gradient = gradient * np.float32(self._settings.max_norm / norm)
        self._parameter.grad = torch.from_numpy(gradient)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._settings, done)
        self._optimizer.step()
        self._parameter.grad = None
        if all(np.isfinite(array).all() for array in (self.vector, *self.state().values())):
            return True
        self.restore(before, state)
        return False

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


def _torch_optimizer(mode: str, settings: MetaSettings, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    lr, momentum = settings.learning_rate, settings.momentum
    if mode == "delayed-nesterov":
        return DelayedNesterov(parameters, lr=lr, momentum=momentum, delay=settings.batch_size)
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=lr)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=settings.weight_decay)
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=lr, momentum=momentum)
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, nesterov=settings.nesterov)
