"""Aggregation modes: which direction a meta-update descends along, given the contributions it applies.

With the staleness weight s = s(τ) of `staleness`, the norm clip c, the endpoint correction ρ, Δ = φ_now − φ_lease, and
n contributions in the meta-update, the direction passed to the meta-optimizer is:

    sync              when a batch of one version is complete      (1/n) Σ c G                       Algorithm 1
    buffered          every |B| contributions                      (1/n) Σ s (c G + ρ Δ)             arXiv 2106.06639
    async             on each contribution                         (1/|B|) s (c G + ρ Δ)
    fedasync          on each contribution                         s (c G + Δ), learning rate α      arXiv 1903.03934
    delayed-nesterov  on each contribution                         s (c G + ρ Δ), see DelayedNesterov
    stream            on each push, for what it adds               (1/|B|) s c (G_k − G_{k−1})
                      with meta.shift trajectory                   (1/|B|) s c G_k                   arXiv 2102.07215

With G = φ_lease − θ_K, fedasync is the convex combination φ ← (1 − α s) φ + α s θ_K of its paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from leap_dist.config.settings import MetaSettings
from leap_dist.server import staleness

_MIN_NORM = 1e-30  # float32 cannot divide by less

BATCHED = ("sync", "buffered")
"""Modes in which a meta-update consumes |B| contributions at once."""


@dataclass(frozen=True)
class Pull:
    """The parts of an accepted contribution that a meta-update needs."""

    version: int
    """Version of φ from which the contribution was computed."""
    norm: float
    """Norm of `vector`."""
    vector: np.ndarray
    """G of the shared parameters, flat float32."""
    start: np.ndarray | None = None
    """φ_lease, flat float32, if the mode or ρ needs it."""


@dataclass(frozen=True)
class Direction:
    """Direction of a meta-update, and how each pull entered it."""

    gradient: np.ndarray
    """Flat float32 vector that the meta-optimizer descends along."""
    weights: tuple[float, ...]
    """Staleness weight s(τ) of each pull."""
    clips: tuple[float, ...]
    """Factor that the norm clip, or the normalization, applied to each pull."""
    agreement: float
    """Mean pairwise cosine of the pulls; 0 for a single one."""


def batch_size(mode: str, settings: MetaSettings) -> int:
    """Return how many contributions a meta-update consumes: |B|, or 1 in modes that apply each as it arrives."""
    return settings.batch_size if mode in BATCHED else 1


def combine(
    mode: str,
    settings: MetaSettings,
    pulls: Sequence[Pull],
    *,
    version: int,
    vector: np.ndarray,
    recent: Sequence[float],
) -> Direction:
    """Combine pulls into the direction of a meta-update, by the rule of the mode.

    Args:
        mode: name of the aggregation mode.
        settings: settings of the meta-update.
        pulls: contributions in order of their task index, which makes the sum reproducible.
        version: current version of φ.
        vector: current φ, flat float32.
        recent: norms of earlier pulls, oldest first.
    """
    norms = [pull.norm for pull in pulls]
    # sync clips against its own batch, so that the result does not depend on what came before.
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
        # Not clipped: the correction is about where the path ended, however far away that is.
        terms += [vector - pull.start for pull in pulls if pull.start is not None]
        factors += [weight * rho for weight, pull in zip(weights, pulls, strict=True) if pull.start is not None]
    divisor = {"async": settings.batch_size, "stream": settings.batch_size}.get(mode, len(pulls))
    return Direction(staleness.weighted_mean(terms, factors, divisor), weights, clips, _mean_cosine(pulls))


def _mean_cosine(pulls: Sequence[Pull]) -> float:
    """Return the mean pairwise cosine, computed from the norm of the sum of unit vectors."""
    pulls = [pull for pull in pulls if pull.norm > _MIN_NORM]
    count = len(pulls)
    if count < 2:
        return 0.0
    total, unit = np.zeros_like(pulls[0].vector), np.empty_like(pulls[0].vector)
    for pull in pulls:  # one by one: allocating memory for all of them takes longer than the sum
        total += np.divide(pull.vector, np.float64(pull.norm), out=unit, casting="same_kind")
    return float((np.dot(total, total) - count) / (count * (count - 1)))
