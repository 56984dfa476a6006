"""Catch as a user's module: a ball falls, and a paddle below moves left or right."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np


class Catch(gymnasium.Env[np.ndarray, int]):
    """One ball per episode; the reward is 1 if the paddle is below it at the end, else −1."""

    def __init__(self, size: int = 12) -> None:
        self.observation_space = gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(3)
        self._size = size

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._ball = np.array([0, self.np_random.integers(self._size)])
        self._paddle = self._size // 2
        return self._image(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._paddle = int(np.clip(self._paddle + action - 1, 0, self._size - 1))
        self._ball[0] += 1
        over = self._ball[0] == self._size - 1
        reward = float(over) * (1 if abs(self._ball[1] - self._paddle) <= 1 else -1)
        return self._image(), reward, bool(over), False, {}

    def _image(self) -> np.ndarray:
        image = np.zeros((self._size, self._size, 3), np.uint8)
        image[tuple(self._ball)] = 255
        image[-1, max(0, self._paddle - 1) : self._paddle + 2] = (0, 255, 0)
        return image


for _size in (10, 12, 14):
    gymnasium.register(f"Catch{_size}-v0", Catch, kwargs={"size": _size}, max_episode_steps=100)
