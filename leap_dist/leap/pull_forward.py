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
_PROVEN_SEGMENTS = 2  # an optimizer with momentum shows itself on its second step

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
        descent: α, where each step from one observation to the next is θ_{i+1} = θ_i − α∇f(θ_i) and nothing else. Then
            Δθ_i is known without a look at the parameters, which takes half the time. None: any optimizer.
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
        descent: float | None = None,
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
        if descent is not None and not descent > 0:
            raise ValueError(f"descent is {descent}; it must be above 0, or None")
        self._metric = metric
        self._loss_weight = loss_weight
        self._stabilize = stabilize
        self._loss_smoothing = loss_smoothing
        self._copy_gradients = copy_gradients

        self._points = [p.detach() for p in self._parameters]  # the same memory, outside the graph
        self._previous = [p.clone() for p in self._points]  # θ_i of the last observation
        self._loss_term = [torch.zeros_like(p) for p in self._previous]  # Σ w_i λ|Δf_i| ∇f(θ_i)
        # Energy: −ΣΔθ_i telescopes to θ_0 − θ_i, so only the start is kept. Length: −ΣΔθ_i/n_i has to be summed.
        start = self._previous if metric == "energy" else self._loss_term
        self._path_term = [p.clone() for p in start]
        self._descent = None if descent is None else _Descent(self._previous, descent)  # has the terms then
        self._gradients: list[Tensor] | None = None  # ∇f(θ_i), and None until the first observation
        self._versions: list[int] = []
        self._waits = self._previous[0].device.type == "cpu"  # there is nothing to wait for
        self._unproven = _PROVEN_SEGMENTS if descent is not None and self._waits else 0
        self._energy: Scalar = 0.0
        self._length: Scalar = 0.0
        self._loss: Scalar = 0.0  # f(θ_i) of the last observation, smoothed
        self._shifted = False  # since the last observation
        self._closed = False
        self._no_grad = torch.no_grad()  # made once, since between two steps to make one takes 50 µs

    def observe(self, loss: Tensor | float) -> None:
        """Records that training stands at θ_i with loss f(θ_i) and ∇f(θ_i) in the parameters' `.grad`.

        Raises RuntimeError after `close`, where a parameter has no gradient, where the gradient of the previous
        observation was overwritten in place, or where a step was not the one that `descent` promises (nothing is
        recorded then). The first two steps are compared; none on a GPU, which would have to be waited for.
        """
        with self._no_grad:
            if self._closed:
                raise RuntimeError("observe after close: the path has ended; start a new PullForward for a new path")
            gradients = [gradient for p in self._parameters if (gradient := p.grad) is not None]
            if len(gradients) < len(self._parameters):
                raise RuntimeError("a parameter has no gradient: call observe after backward and before zero_grad")
            self._end_segment(loss)
            if self._descent is not None:
                self._descent.keep(gradients)
                self._gradients = []
                return
            self._gradients = [gradient.clone() for gradient in gradients] if self._copy_gradients else gradients
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
        if self._descent is not None:
            loss_term, path_term = self._descent.sums()
            return _flat(loss_term), _flat(path_term)
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
            squared: Scalar = self._squared_distance() + self._loss_weight * loss_change**2  # n_i²
            norm: Scalar = squared**0.5
            weight: Scalar = 1.0
            if self._metric == "length":
                weight = 1.0 / _not_zero(norm)
            outward: Any = abs(loss_change) if self._stabilize else -loss_change
            if self._descent is not None:
                self._descent.weigh(self._loss_weight * weight * outward, weight)
            else:
                _add(self._loss_term, self._gradients, self._loss_weight * weight * outward)
                if self._metric == "length":
                    _add(self._path_term, self._previous, weight)
            self._energy = self._energy + squared
            self._length = self._length + norm
        if self._descent is None or self._unproven:
            torch._foreach_copy_(self._previous, self._points)
        self._loss = value
        self._shifted = False

    def _squared_distance(self) -> Scalar:
        """‖Δθ_i‖². Leaves −Δθ_i in place of θ_i, where that is needed."""
        if self._descent is not None:
            if self._unproven:
                self._descent.prove(self._previous, self._points)
                self._unproven -= 1
            return self._descent.rate**2 * self._scalar(self._descent.square)
        # In place: every array that is read or written once more costs as much as the arithmetic.
        torch._foreach_sub_(self._previous, self._points)
        norms = torch.stack(torch._foreach_norm(self._previous)).double()
        return self._scalar(norms.square().sum())

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


class _Descent:
    """The two terms of G along plain gradient descent, where −Δθ_i = α∇f(θ_i): two weighted sums of the gradients.

    A few gradients are kept and added together. Between two steps the sums leave the processor's caches; this way they
    are fetched and put back once for all of those.

    Args:
        like: tensors of the gradients' shapes and layouts.
        rate: α.
    """

    SEVERAL = 8

    def __init__(self, like: list[Tensor], rate: float) -> None:
        self.rate = rate
        self.square = torch.zeros(())
        """‖∇f(θ_i)‖² of the newest gradient."""
        self._like = like
        self._sums = like[0].new_zeros(2, sum(tensor.numel() for tensor in like))
        self._kept = self._sums.new_zeros(self.SEVERAL, self._sums.shape[1])
        self._rows = [(row, self._split(row)) for row in self._kept]
        self._weights: list[Scalar] = []  # two for each gradient that has them; one more may be waiting for its own

    def keep(self, gradients: list[Tensor]) -> None:
        """Takes a copy of ∇f(θ_i)."""
        whole, parts = self._rows[len(self._weights) // 2]
        torch._foreach_copy_(parts, gradients)
        self.square = torch.dot(whole, whole)

    def weigh(self, loss_weight: Scalar, path_weight: Scalar) -> None:
        """Adds so much of the newest gradient to the loss term, and so much of −Δθ_i to the path term."""
        self._weights += [loss_weight, self.rate * path_weight]
        if len(self._weights) == 2 * self.SEVERAL:
            self._sums.addmm_(self._matrix(), self._kept)
            self._weights = []

    def sums(self) -> tuple[list[Tensor], list[Tensor]]:
        """Loss term and path term."""
        count = len(self._weights) // 2
        loss_term, path_term = torch.addmm(self._sums, self._matrix(), self._kept[:count])
        return self._split(loss_term), self._split(path_term)

    def prove(self, before: list[Tensor], now: list[Tensor]) -> None:
        """Raises RuntimeError where a parameter did not go from `before` to `now` by a step of gradient descent."""
        _, parts = self._rows[len(self._weights) // 2]
        for start, gradient, end in zip(before, parts, now, strict=True):
            rounding = 8 * torch.finfo(end.dtype).eps * (start.abs() + end.abs())
            error = (start - self.rate * gradient - end).abs()
            if (error > rounding + 1e-3 * self.rate * gradient.abs()).any():
                raise RuntimeError(
                    f"a parameter did not move by −{self.rate} times its gradient, as descent={self.rate} says: leave "
                    "that out where the optimizer is another, clips, or does not step once after each `observe`"
                )

    def _matrix(self) -> Tensor:
        """The weights, (2, as many as there are pairs of them)."""
        if any(isinstance(weight, Tensor) for weight in self._weights):  # on a GPU, where they stay
            weights = torch.stack([self._sums.new_zeros(()) + weight for weight in self._weights])
        else:
            weights = torch.tensor(self._weights)
        return weights.to(self._sums).view(-1, 2).t()

    def _split(self, vector: Tensor) -> list[Tensor]:
        """Into parts of the shapes and layouts that the gradients have."""
        parts = vector.split([tensor.numel() for tensor in self._like])
        return [
            part.as_strided(tensor.shape, tensor.stride(), part.storage_offset())
            for part, tensor in zip(parts, self._like, strict=True)
        ]


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
