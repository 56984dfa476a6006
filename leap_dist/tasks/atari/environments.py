"""The interface through which an agent plays N copies of an environment, and the Atari games that implement it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from leap_dist.config.settings import AtariSettings
from leap_dist.envs import atari_vector
from leap_dist.envs.atari_vector import Step


class Environments(Protocol):
    """N copies of one environment, with the interface of `leap_dist.envs.atari_vector.Atari`."""

    @property
    def actions(self) -> list[int]:
        """The actions, one for each output of the policy."""

    @property
    def lives(self) -> np.ndarray:
        """Lives left in each copy, int (N,); constant if the environment has no lives."""

    def reset(self, seed: int) -> np.ndarray:
        """Start a new episode in all copies, and return observations, uint8 (N, C, 84, 84)."""

    def step(self, actions: np.ndarray) -> Step:
        """Execute one action in each copy."""

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Return everything that the next steps depend on, as arrays and JSON-compatible values, or None if unknown."""

    def load_state(self, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> np.ndarray:
        """Continue from what `state` returned, and return the observations there."""

    def close(self) -> None:
        """Release the environments."""


def make_atari(
    game: str, count: int, settings: AtariSettings, beat: Callable[[], None] = lambda: None
) -> atari_vector.Atari:
    """Make `count` copies of a game with these settings, and call `beat` before each of them.

    Raises ValueError for a game that cannot be loaded, and whatever `beat` raises.
    """
    return atari_vector.make(
        game,
        count,
        frames=settings.frames,
        frame_skip=settings.frame_skip,
        noop_max=settings.noop_max,
        fire_on_reset=settings.fire_on_reset,
        sticky_actions=settings.sticky_actions,
        max_episode_frames=settings.max_episode_frames,
        full_actions=settings.full_actions,
        beat=beat,
    )
