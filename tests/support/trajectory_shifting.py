"""Continual trajectory shifting as its paper states it (Shin et al. 2021, arXiv 2102.07215), in NumPy.

With Reptile's meta-gradient φ − θ_k, as in the paper. After every step k, φ moves by Δ_k = −β mean_t (φ − θ_k^t), which
is a part of the whole displacement so far, and every task's parameters move by Δ_k as well. `interval` makes this
happen after every so many steps only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def shifted(
    phi: np.ndarray,
    gradients: Sequence[Callable[[np.ndarray], np.ndarray]],
    *,
    inner_rate: float,
    meta_rate: float,
    steps: int,
    interval: int,
) -> np.ndarray:
    """Return φ after one batch of tasks, each given by the gradient of its loss."""
    phi = phi.astype(np.float64)
    thetas = [phi.copy() for _ in gradients]
    for k in range(1, steps + 1):
        thetas = [theta - inner_rate * gradient(theta) for theta, gradient in zip(thetas, gradients, strict=True)]
        if k % interval == 0 or k == steps:
            delta = -meta_rate * np.mean([phi - theta for theta in thetas], axis=0)
            phi = phi + delta
            thetas = [theta + delta for theta in thetas]
    return phi
