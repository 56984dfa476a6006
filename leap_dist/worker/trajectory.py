"""Trajectory shifting: how far a running task follows when φ moves (Shin et al. 2021, arXiv 2102.07215)."""

from __future__ import annotations

import numpy as np

from leap_dist.config.settings import Config
from leap_dist.leap.learner import Learner
from leap_dist.nn.flat_vector import flatten


def limited_shift(shift: np.ndarray, learner: Learner, config: Config) -> np.ndarray:
    """Return the part of a change of φ, flat float32, that a running task follows.

    With `meta.shift increments`, a shift that is large relative to the parameters is scaled down: shifting assumes
    that θ_K changes as much as φ (J = I), which holds only locally. With `trajectory` the task follows all of it.
    """
    size = float(np.linalg.norm(shift))
    largest = config.meta.max_shift * float(flatten(learner.shared.values()).norm())
    if config.meta.shift == "trajectory" or size <= largest:
        return shift
    return shift * np.float32(largest / size)
