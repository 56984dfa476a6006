"""The pull-forward gradient of a recorded trajectory, in float64, one segment after the other: slow and obvious.

Written from the paper (equations 4 and 8) and from the notes, not from the code. A trajectory of K+1 points is

    thetas     θ_0 … θ_K       K+1 arrays
    losses     f_0 … f_K       K+1 numbers, or K where f(θ_K) was never evaluated: the last segment is dropped then
    gradients  ∇f_0 … ∇f_{K-1} at least one array per segment
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Segment(NamedTuple):
    """One segment, θ_i → θ_{i+1}."""

    norm: float
    """n_i, the length of the chord on the manifold with coordinates (θ, √λ f)."""
    loss_part: np.ndarray
    """w_i λ |Δf_i| ∇f(θ_i)."""
    path_part: np.ndarray
    """−w_i Δθ_i."""


class Path(NamedTuple):
    """All that is known of a path."""

    gradient: np.ndarray
    """G, without the factor p and with J = I."""
    loss_term: np.ndarray
    path_term: np.ndarray
    energy: float
    """Σ n_i² (equation 4)."""
    length: float
    """Σ n_i."""


def segments(
    thetas: Sequence[np.ndarray],
    losses: Sequence[float],
    gradients: Sequence[np.ndarray],
    *,
    metric: str,
    loss_weight: float,
    stabilize: bool,
) -> Iterator[Segment]:
    """Yields what equation 8 sums, segment by segment."""
    for i in range(len(losses) - 1):
        theta, following = thetas[i].astype(np.float64), thetas[i + 1].astype(np.float64)
        gradient = gradients[i].astype(np.float64)
        step = following - theta
        loss_change = float(losses[i + 1]) - float(losses[i])
        squared = sum(x * x for x in step.tolist()) + loss_weight * loss_change**2
        norm = math.sqrt(squared)

        if metric == "energy":
            weight = 1.0
        elif norm > 0:
            weight = 1 / norm
        else:
            weight = 0.0  # the segment is a point: whatever its weight, it adds nothing

        # −Δf∇f − Δθ is the gradient of n²/2; the regularizer μ turns −Δf into |Δf| (section 2.3).
        pull = abs(loss_change) if stabilize else -loss_change
        yield Segment(norm, weight * loss_weight * pull * gradient, -weight * step)


def pull_forward(
    thetas: Sequence[np.ndarray],
    losses: Sequence[float],
    gradients: Sequence[np.ndarray],
    *,
    metric: str = "energy",
    loss_weight: float = 1.0,
    stabilize: bool = True,
) -> Path:
    """Sums the segments."""
    loss_term = np.zeros(len(thetas[0]))
    path_term = np.zeros(len(thetas[0]))
    energy = length = 0.0
    for segment in segments(thetas, losses, gradients, metric=metric, loss_weight=loss_weight, stabilize=stabilize):
        loss_term += segment.loss_part
        path_term += segment.path_part
        energy += segment.norm**2
        length += segment.norm
    return Path(loss_term + path_term, loss_term, path_term, energy, length)


def pull_forward_with_shifts(
    thetas: Sequence[np.ndarray],
    losses: Sequence[float],
    gradients: Sequence[np.ndarray],
    shifts: Mapping[int, Sequence[np.ndarray]],
    **settings: object,
) -> Path:
    """The same where something other than training moved θ by `shifts[i]` between observations i and i+1.

    A shift is not path, and the losses on its two sides belong to different places. So such a segment ends where
    training alone would have led, at the loss it started with.
    """
    total = Path(np.zeros(len(thetas[0])), np.zeros(len(thetas[0])), np.zeros(len(thetas[0])), 0.0, 0.0)
    for i in range(len(losses) - 1):
        end, end_loss = thetas[i + 1].astype(np.float64), losses[i + 1]
        for shift in shifts.get(i, ()):
            end, end_loss = end - shift, losses[i]
        segment = pull_forward([thetas[i], end], [losses[i], end_loss], [gradients[i]], **settings)
        total = Path(*(a + b for a, b in zip(total, segment, strict=True)))
    return total


def smoothed(losses: Sequence[float], decay: float) -> list[float]:
    """f̄_0 = f_0, f̄_i = d f̄_{i−1} + (1−d) f_i."""
    averages = [float(losses[0])]
    for loss in losses[1:]:
        averages.append(decay * averages[-1] + (1 - decay) * float(loss))
    return averages
