"""Weights by staleness, norm clipping, and the weighted mean that applies both.

The staleness τ of a contribution is the server's version when it is applied, minus the version it was computed from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

POLYNOMIAL_EXPONENT = 0.5
HINGE_SLOPE, HINGE_START = 10.0, 4


def weight(kind: str, tau: int) -> float:
    """Return the weight s(τ) in (0, 1], with s(0) = 1 (FedAsync, arXiv 1903.03934, section 5.2, default constants).

    constant: 1; polynomial: (1+τ)^−½; hinge: 1 up to τ = 4, then 1/(10(τ−4)+1); inverse: 1/max(1, τ).
    Raises ValueError for any other kind or a negative τ.
    """
    if tau < 0:
        raise ValueError(f"staleness is {tau}; it cannot be negative")
    if kind == "constant":
        return 1.0
    if kind == "polynomial":
        return float((1.0 + tau) ** -POLYNOMIAL_EXPONENT)
    if kind == "hinge":
        return 1.0 if tau <= HINGE_START else 1.0 / (HINGE_SLOPE * (tau - HINGE_START) + 1.0)
    if kind == "inverse":
        return 1.0 / max(1, tau)
    raise ValueError(f"staleness weight is {kind!r}; choose constant, polynomial, hinge or inverse")


def norm_factor(norm: float, reference_norms: Sequence[float]) -> float:
    """Return the factor that scales `norm` to the median of `reference_norms`; 1 if either is zero."""
    median = float(np.median(reference_norms)) if reference_norms else 0.0
    return median / norm if median > 0 and norm > 0 else 1.0


def clip_factor(norm: float, reference_norms: Sequence[float], multiple: float) -> float:
    """Return the factor that reduces `norm` to `multiple` × the median of `reference_norms`, or 1 if it is smaller.

    A `multiple` of 0 turns clipping off. Norms of different games differ by up to seven orders of magnitude: without
    clipping, one game would drown out the rest of a meta-batch.
    """
    if multiple == 0 or not reference_norms or norm == 0:
        return 1.0
    limit = multiple * float(np.median(reference_norms))
    return min(1.0, limit / norm) if limit > 0 else 1.0


def weighted_mean(vectors: Sequence[np.ndarray], weights: Sequence[float], count: int) -> np.ndarray:
    """Return (1/count) Σ weights_j vectors_j in float32, summed in the order given: same order, same bits."""
    total, scaled = np.zeros_like(vectors[0]), np.empty_like(vectors[0])
    with np.errstate(over="ignore"):  # the caller checks that the sum is finite
        for vector, factor in zip(vectors, weights, strict=True):
            total += np.multiply(vector, np.float32(factor), out=scaled)
    total /= np.float32(count)
    return total
