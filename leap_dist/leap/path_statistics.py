"""The two sums of the pull-forward gradient (equation 8), which `PullForward` adds up segment by segment.

They are computed from the parameters and their gradients, for any optimizer, or from the gradients alone, if the path
is that of plain gradient descent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

Metric = Literal["energy", "length"]

Scalar = float | Tensor
"""A number. On a GPU it is a float64 tensor of shape (), because reading it would wait for the device."""

_MIN_NORM = 1e-12


class PathSums:
    """Sums Σ a_i ∇f(θ_i) and −Σ b_i Δθ_i along a path, with weights a_i and b_i given segment by segment.

    Sums are in float32, or in float64 for parameters in float64, whatever the precision of the parameters.

    Args:
        points: the parameters, which move between two segments; detached.
        metric: with "energy" every b_i is 1, and the second sum telescopes to θ_0 − θ_i.
        copy_gradients: copy the gradients instead of keeping the tensors themselves.
    """

    step_factor = 1.0
    """Factor by which `squared_step` must be multiplied."""

    def __init__(self, points: list[Tensor], metric: Metric, *, copy_gradients: bool) -> None:
        self._points = points
        self._metric = metric
        self._copy_gradients = copy_gradients
        self._exact = all(p.dtype == sum_dtype(p) for p in points)
        self._previous = [p.to(sum_dtype(p), copy=True) for p in points]  # θ_i of the last observation
        self._loss_term = [torch.zeros_like(p) for p in self._previous]
        self._path_term = [p.clone() for p in (self._previous if metric == "energy" else self._loss_term)]
        self._gradients: list[Tensor] = []  # ∇f(θ_i) of the last observation
        self._versions: list[int] = []

    def observe(self, gradients: list[Tensor]) -> None:
        """Keep the gradients at the current point."""
        self._gradients = [gradient.clone() for gradient in gradients] if self._copy_gradients else gradients
        self._versions = [gradient._version for gradient in self._gradients]

    def squared_step(self) -> Tensor:
        """Return ‖Δθ_i‖², shape (). To be called once per segment; leaves −Δθ_i in place of θ_i.

        Raises RuntimeError if a gradient was overwritten since it was observed.
        """
        if [gradient._version for gradient in self._gradients] != self._versions:
            raise RuntimeError(
                "a gradient was overwritten in place after observe (by clip_grad_norm_, or zero_grad without "
                "set_to_none): use PullForward(..., copy_gradients=True), or clip without writing into .grad"
            )
        # In place: every array that is read or written once more costs as much as the arithmetic.
        torch._foreach_sub_(self._previous, self._points)
        return torch.stack(torch._foreach_norm(self._previous)).double().square().sum()

    def add(self, gradient_weight: Scalar, path_weight: Scalar) -> None:
        """Add the segment that `squared_step` measured to both sums."""
        gradients = self._gradients
        if not self._exact:
            gradients = [g.to(total.dtype) for g, total in zip(gradients, self._loss_term, strict=True)]
        _add_scaled(self._loss_term, gradients, gradient_weight)
        if self._metric == "length":
            _add_scaled(self._path_term, self._previous, path_weight)

    def advance(self) -> None:
        """Let the next segment begin at the current point."""
        torch._foreach_copy_(self._previous, self._points)

    def shift(self, amounts: Iterable[Tensor]) -> None:
        """Move the previous points by `amounts`, one tensor per parameter."""
        for previous, start, amount in zip(self._previous, self._path_term, amounts, strict=True):
            previous.add_(amount)
            if self._metric == "energy":  # the path term is θ_0 then
                start.add_(amount)

    def release(self) -> None:
        """Drop the newest gradients, after the end of the path."""
        self._gradients, self._versions = [], []

    def terms(self) -> tuple[Tensor, Tensor]:
        """Return both sums, each a new flat float32 vector."""
        path = self._path_term
        if self._metric == "energy":
            path = [start - end for start, end in zip(path, self._previous, strict=True)]
        return flat(self._loss_term), flat(path)


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which sums over values of a tensor are kept: float64 for float64, otherwise float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def flat(tensors: list[Tensor]) -> Tensor:
    """Concatenate tensors into a new flat float32 vector."""
    return torch.cat([tensor.reshape(-1).float() for tensor in tensors])


def _add_scaled(totals: list[Tensor], tensors: list[Tensor], scale: Scalar) -> None:
    """Add scale · tensors to totals in place."""
    if isinstance(scale, Tensor):
        if len({total.dtype for total in totals}) == 1:
            torch._foreach_add_(totals, torch._foreach_mul(tensors, scale.to(totals[0].dtype)))
        else:
            for total, tensor in zip(totals, tensors, strict=True):
                total.add_(tensor * scale.to(total.dtype))
    else:
        torch._foreach_add_(totals, tensors, alpha=scale)


CHECKED_SEGMENTS = 2
"""Number of steps that are compared with gradient descent: momentum shows in the second."""


class DescentSums:
    """Sums like `PathSums` where −Δθ_i = α∇f(θ_i): two weighted sums of the gradients.

    A few gradients are kept and added together. Between two steps the sums leave the processor's caches; this way they
    are loaded and stored once for all of these gradients.

    Args:
        points: the parameters, which move between two segments; detached.
        rate: α, the learning rate of the descent.
    """

    CAPACITY = 8
    """Number of gradients that are added together."""

    def __init__(self, points: list[Tensor], rate: float) -> None:
        self.step_factor = rate**2
        """Factor by which `squared_step` must be multiplied."""
        self._rate = rate
        self._points = points
        # On a GPU nothing is compared, because that would mean waiting for the result.
        self._unchecked = CHECKED_SEGMENTS if points[0].device.type == "cpu" else 0
        self._previous = [p.to(sum_dtype(p), copy=True) for p in points]  # θ_i, while steps are compared
        dtype = torch.float64 if torch.float64 in [p.dtype for p in points] else torch.float32
        self._sums = points[0].new_zeros(2, sum(p.numel() for p in points), dtype=dtype)
        self._kept = self._sums.new_zeros(self.CAPACITY, self._sums.shape[1])
        self._rows = [(row, self._split(row)) for row in self._kept]
        self._weights: list[Scalar] = []  # two for each kept gradient, except one that may still wait for its own
        self._squared_norm = self._sums.new_zeros(())  # ‖∇f(θ_i)‖² of the newest gradient

    def observe(self, gradients: list[Tensor]) -> None:
        """Copy the gradients at the current point."""
        whole, parts = self._rows[len(self._weights) // 2]
        torch._foreach_copy_(parts, gradients)
        self._squared_norm = torch.dot(whole, whole)

    def squared_step(self) -> Tensor:
        """Return ‖∇f(θ_i)‖², shape (). Raises RuntimeError if one of the first steps was not that of the descent."""
        if self._unchecked:
            self._check_step()
            self._unchecked -= 1
        return self._squared_norm

    def add(self, gradient_weight: Scalar, path_weight: Scalar) -> None:
        """Add the newest gradient to both sums with these weights of ∇f(θ_i) and −Δθ_i."""
        self._weights += [gradient_weight, self._rate * path_weight]
        if len(self._weights) == 2 * self.CAPACITY:
            self._sums.addmm_(self._weight_matrix(), self._kept)
            self._weights = []

    def advance(self) -> None:
        """Let the next segment begin at the current point."""
        if self._unchecked:
            torch._foreach_copy_(self._previous, self._points)

    def shift(self, amounts: Iterable[Tensor]) -> None:
        """Move the previous points by `amounts`, one tensor per parameter."""
        for previous, amount in zip(self._previous, amounts, strict=True):
            previous.add_(amount)

    def release(self) -> None:
        """Do nothing: the newest gradients are part of the sums."""

    def terms(self) -> tuple[Tensor, Tensor]:
        """Return both sums, each a new flat float32 vector."""
        count = len(self._weights) // 2
        loss_term, path_term = torch.addmm(self._sums, self._weight_matrix(), self._kept[:count])
        return flat(self._split(loss_term)), flat(self._split(path_term))

    def _check_step(self) -> None:
        _, parts = self._rows[len(self._weights) // 2]
        for start, gradient, end in zip(self._previous, parts, self._points, strict=True):
            rounding = 8 * torch.finfo(end.dtype).eps * (start.abs() + end.abs())
            error = (start - self._rate * gradient - end).abs()
            if (error > rounding + 1e-3 * self._rate * gradient.abs()).any():
                raise RuntimeError(
                    f"a parameter did not move by −{self._rate} times its gradient, as descent={self._rate} requires: "
                    "omit `descent` if you use another optimizer, clip gradients, or do not step once per `observe`"
                )

    def _weight_matrix(self) -> Tensor:
        """Return the weights, shape (2, number of gradients that have them)."""
        if any(isinstance(weight, Tensor) for weight in self._weights):  # on a GPU, where they stay
            weights = torch.stack([self._sums.new_zeros(()) + weight for weight in self._weights])
        else:
            weights = torch.tensor(self._weights)
        return weights.to(self._sums).view(-1, 2).t()

    def _split(self, vector: Tensor) -> list[Tensor]:
        """Split a flat vector into views with the shapes and layouts of the parameters."""
        parts = vector.split([tensor.numel() for tensor in self._previous])
        return [
            part.as_strided(tensor.shape, tensor.stride(), part.storage_offset())
            for part, tensor in zip(parts, self._previous, strict=True)
        ]


def inverse(norm: Scalar) -> Scalar:
    """Return 1/n. It stays finite for a segment of length zero, which has no direction and adds nothing."""
    return 1.0 / (norm.clamp_min(_MIN_NORM) if isinstance(norm, Tensor) else max(norm, _MIN_NORM))
