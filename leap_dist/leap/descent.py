"""The two sums of the pull-forward gradient along plain gradient descent, taken from the gradients alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from leap_dist.leap.path_sums import Scalar, flat, sum_dtype

CHECKED_SEGMENTS = 2
"""Number of steps that are compared with what gradient descent does: momentum shows itself in the second."""


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
        # Nothing is compared on a GPU, because the result would have to be waited for.
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
        """Move the points behind by `amounts`, one tensor per parameter."""
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
                    f"a parameter did not move by −{self._rate} times its gradient, as descent={self._rate} says: "
                    "leave that out if the optimizer is another, clips, or does not step once after each `observe`"
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
