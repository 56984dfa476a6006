"""Training rewards from the raw rewards of a game."""

from __future__ import annotations

import numpy as np

REWARD_BOUND = 5.0
"""The Leap paper, appendix E: "clip the absolute value of the rewards to maximum 5.0"."""


def clip_rewards(rewards: np.ndarray, kind: str) -> np.ndarray:
    """Return training rewards, float32: clipped to ±5 ("bound"), their sign ("sign"), or unchanged ("none")."""
    raw = rewards.astype(np.float32)
    if kind == "bound":
        return np.clip(raw, -REWARD_BOUND, REWARD_BOUND)
    return np.sign(raw) if kind == "sign" else raw
