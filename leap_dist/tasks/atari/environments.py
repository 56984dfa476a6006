"""What the agent plays: N copies of one environment, behind one interface for Atari games and others."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from leap_dist.envs.atari_vector import Step


class Environments(Protocol):
    """N copies of one environment, with the interface of `leap_dist.envs.atari_vector.Atari`."""

    @property
    def actions(self) -> list[int]:
        """The actions, one for each output of the policy."""

    @property
    def lives(self) -> np.ndarray:
        """Lives left in each copy, int (N,); constant where there is no such thing."""

    def reset(self, seed: int) -> np.ndarray:
        """Start a new episode in all copies, and return observations, uint8 (N, C, 84, 84)."""

    def step(self, actions: np.ndarray) -> Step:
        """Execute one action in each copy."""

    def close(self) -> None:
        """Release the environments."""
