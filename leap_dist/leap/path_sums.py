"""The two sums of the pull-forward gradient, taken from the parameters and their gradients, for any optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

Metric = Literal["energy", "length"]

Scalar = float | Tensor
"""A number. On a GPU it is a float64 tensor of shape (), because reading it would wait for the device."""


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
        """Move the points behind by `amounts`, one tensor per parameter."""
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
