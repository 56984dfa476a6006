"""Statistics of the features that an encoder computes for frames of random play."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from leap_dist.envs import atari_vector
from leap_dist.nn import actor_critic
from leap_dist.nn.features import dead_units, effective_rank
from leap_dist.nn.flat_vector import load_vector


def frames(games: Sequence[str], count: int = 96) -> Tensor:
    """Return frames of random play in [0, 1], (n, 4, 84, 84): equally many of each game, and about `count` in all."""
    rng, found = np.random.default_rng(0), []
    each = max(1, count // len(games) // 4)  # from each of four environments
    for game in games:
        env = atari_vector.make(game, 4)
        try:
            env.reset(0)
            for number in range(10 * each):
                step = env.step(rng.integers(0, len(env.actions), 4))
                if number % 10 == 9:
                    found.append(step.observations)
        finally:
            env.close()
    return torch.from_numpy(np.concatenate(found)).float() / 255


class Features(NamedTuple):
    """What an encoder computes for some frames."""

    norm: float
    """Mean norm of the features."""
    dead: float
    """Share of units that are zero on all frames."""
    rank: float
    """Effective rank."""


@torch.no_grad()
def features_of(vector: np.ndarray, seen: Tensor) -> Features:
    """Return statistics of the features of the frames `seen`, (n, 4, 84, 84), for an encoder with this flat vector."""
    encoder = actor_critic.Encoder(4)
    load_vector(dict(encoder.named_parameters()), vector)
    features = encoder(seen)
    return Features(float(features.norm(dim=1).mean()), dead_units(features), effective_rank(features))
