"""Leap: the gradient of the length of the path that training takes (seed paper, equations 4, 6 and 8).

While a model trains, θ_0 → θ_1 → … → θ_K with losses f_0, f_1, …, `PullForward` accumulates

    G = Σ_i w_i (λ|Δf_i| ∇f(θ_i) − Δθ_i),    Δθ_i = θ_{i+1} − θ_i,  Δf_i = f_{i+1} − f_i,

with w_i = 1 (energy) or 1/n_i (length), n_i² = ‖Δθ_i‖² + λΔf_i². This is equation 8 with the Jacobians set to the
identity and the constant factor p left to the meta learning rate. Everything in it comes out of ordinary training.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

Metric = Literal["energy", "length"]

_SMALLEST_NORM = 1e-12  # a segment of length zero has no direction: its weight 1/n must not become infinite

Scalar = float | Tensor
"""A number; on a GPU a float64 tensor of shape () there, since to read it back would mean to wait."""


class PullForward:
    """Accumulates the pull-forward gradient of one learning process.

    Call `observe(loss)` after every backward pass and before the optimizer's step, `close()` after the last step, and
    read `gradient()` at any time: it then covers the path up to the last observation.

    Args:
        parameters: the meta-learned parameters; others may train along, but are not part of the path.
        metric: which functional of the path to shorten; its weights are 1 (energy) or 1/n_i (length).
        loss_weight: λ, the scale of the loss coordinate on the manifold. 1 is the paper; 0 measures the path in
            parameter space only, which makes `energy` the same as Reptile.
        stabilize: replace −Δf_i by |Δf_i|, so that a step that raised the loss does not push away (μ, section 2.3).
        loss_smoothing: d, decay of the moving average f̄_i = d f̄_{i−1} + (1−d) f_i, f̄_0 = f_0, that takes the place of
            f along the path; 0 is the paper. What is left of the noise of a batch weighs less then.
        copy_gradients: keep a copy of each gradient instead of the tensor itself. Needed when something, such as
            `torch.nn.utils.clip_grad_norm_` or `zero_grad(set_to_none=False)`, writes into `.grad` in place.

    Everything stays on the parameters' device, and nothing waits for it: `observe` never reads a number back.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        metric: Metric = "energy",
        loss_weight: float = 1.0,
        stabilize: bool = True,
        loss_smoothing: float = 0.0,
        copy_gradients: bool = False,
    ) -> None:
        self._parameters = list(parameters)
        if not self._parameters:
            raise ValueError("PullForward needs at least one parameter")
        if metric not in ("energy", "length"):
            raise ValueError(f"metric is {metric!r}; choose 'energy' or 'length'")
        if not loss_weight >= 0:
            raise ValueError(f"loss_weight is {loss_weight}; it must not be negative")
        if not 0 <= loss_smoothing < 1:
            raise ValueError(f"loss_smoothing is {loss_smoothing}; it must be at least 0 and below 1")
        self._metric = metric
        self._loss_weight = loss_weight
        self._stabilize = stabilize
        self._loss_smoothing = loss_smoothing
        self._copy_gradients = copy_gradients

        self._previous = [p.detach().clone() for p in self._parameters]  # θ_i of the last observation
        self._loss_term = [torch.zeros_like(p) for p in self._previous]  # Σ w_i λ|Δf_i| ∇f(θ_i)
        # Energy: −ΣΔθ_i telescopes to θ_0 − θ_i, so only the start is kept. Length: −ΣΔθ_i/n_i has to be summed.
        start = self._previous if metric == "energy" else self._loss_term
        self._path_term = [p.clone() for p in start]
        self._gradients: list[Tensor] | None = None  # ∇f(θ_i), and None until the first observation
        self._versions: list[int] = []
        self._waits = self._previous[0].device.type == "cpu"  # there is nothing to wait for
        self._energy: Scalar = 0.0
        self._length: Scalar = 0.0
        self._loss: Scalar = 0.0  # f(θ_i) of the last observation, smoothed
        self._shifted = False  # since the last observation
        self._closed = False

    @torch.no_grad()
    def observe(self, loss: Tensor | float) -> None:
        """Records that training stands at θ_i with loss f(θ_i) and ∇f(θ_i) in the parameters' `.grad`.

        Raises RuntimeError after `close`, where a parameter has no gradient, or where the gradient of the previous
        observation was overwritten in place (nothing is recorded then).
        """
        if self._closed:
            raise RuntimeError("observe after close: the path has ended; start a new PullForward for a new path")
        gradients = [p.grad for p in self._parameters]
        if any(gradient is None for gradient in gradients):
            raise RuntimeError("a parameter has no gradient: call observe after backward and before zero_grad")
        self._end_segment(loss)
        self._gradients = [g.clone() if self._copy_gradients else g for g in gradients if g is not None]
        self._versions = [gradient._version for gradient in self._gradients]

    @torch.no_grad()
    def close(self, final_loss: Tensor | float | None = None) -> None:
        """Ends the path. With f(θ_K) the last segment counts, without it that segment is dropped. Idempotent."""
        if not self._closed and final_loss is not None:
            self._end_segment(final_loss)
        self._closed = True
        self._gradients = None

    @torch.no_grad()
    def shift(self, amounts: Iterable[Tensor]) -> None:
        """Records that something other than training moved the parameters by `amounts`, one tensor for each.

        Such a move is not path: the points behind move along, and of the segment under way the change of the loss is
        left out, since the losses at its two ends belong to different places (trajectory shifting, Shin et al. 2021).
        """
        for previous, start, amount in zip(self._previous, self._path_term, amounts, strict=True):
            previous.add_(amount)
            if self._metric == "energy":  # there, the path term is θ_0
                start.add_(amount)
        self._shifted = True

    def gradient(self) -> Tensor:
        """G over the segments ended so far: a new flat float32 vector, in the order of the parameters."""
        loss_term, path_term = self.terms()
        return loss_term + path_term

    def terms(self) -> tuple[Tensor, Tensor]:
        """The two summands of G: (Σ w_i λ|Δf_i| ∇f(θ_i), −Σ w_i Δθ_i), each a new flat float32 vector."""
        path = self._path_term
        if self._metric == "energy":
            path = [start - end for start, end in zip(path, self._previous, strict=True)]
        return _flat(self._loss_term), _flat(path)

    @property
    def energy(self) -> float:
        """Σ n_i² over the segments ended so far (equation 4)."""
        return float(self._energy)

    @property
    def length(self) -> float:
        """Σ n_i over the segments ended so far (equation 4 with p = 1)."""
        return float(self._length)

    def _end_segment(self, loss: Tensor | float) -> None:
        """Adds the segment from the last observation to the parameters as they are now, where the loss is `loss`."""
        value = self._scalar(loss)
        if self._gradients is not None:
            self._refuse_overwritten()
            if self._shifted:  # the average starts anew, or what is left out here would come in bit by bit later
                loss_change: Scalar = 0.0
            else:
                value = value + self._loss_smoothing * (self._loss - value)
                loss_change = value - self._loss
            # −Δθ_i, in place of θ_i: every array that is read or written once more costs as much as the arithmetic.
            behind = self._previous
            torch._foreach_sub_(behind, [p.detach() for p in self._parameters])
            norms = torch.stack(torch._foreach_norm(behind)).double()
            squared: Scalar = self._scalar(norms.square().sum()) + self._loss_weight * loss_change**2  # n_i²
            norm: Scalar = squared**0.5
            weight: Scalar = 1.0
            if self._metric == "length":
                weight = 1.0 / _not_zero(norm)
            outward: Any = abs(loss_change) if self._stabilize else -loss_change
            _add(self._loss_term, self._gradients, self._loss_weight * weight * outward)
            if self._metric == "length":
                _add(self._path_term, behind, weight)
            self._energy = self._energy + squared
            self._length = self._length + norm
        torch._foreach_copy_(self._previous, [p.detach() for p in self._parameters])
        self._loss = value
        self._shifted = False

    def _scalar(self, value: Tensor | float) -> Scalar:
        if not isinstance(value, Tensor):
            return value
        return value.item() if self._waits else value.detach().to(self._previous[0].device, torch.float64)

    def _refuse_overwritten(self) -> None:
        assert self._gradients is not None
        if [gradient._version for gradient in self._gradients] != self._versions:
            raise RuntimeError(
                "a gradient was overwritten in place after observe (by clip_grad_norm_, or zero_grad without "
                "set_to_none): use PullForward(..., copy_gradients=True), or clip without writing into .grad"
            )


def _not_zero(norm: Scalar) -> Scalar:
    return norm.clamp_min(_SMALLEST_NORM) if isinstance(norm, Tensor) else max(norm, _SMALLEST_NORM)


def _add(totals: list[Tensor], tensors: list[Tensor], scale: Scalar) -> None:
    """totals += scale · tensors, in place."""
    if isinstance(scale, Tensor):
        torch._foreach_add_(totals, torch._foreach_mul(tensors, scale.to(totals[0].dtype)))
    else:
        torch._foreach_add_(totals, tensors, alpha=scale)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1).float() for tensor in tensors])
