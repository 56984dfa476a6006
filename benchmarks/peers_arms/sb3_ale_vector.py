"""Adapter from ale-py's C++ vector environment to Stable-Baselines3's interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv


class AleVectorEnv(VecEnv):
    """Vector environment of ale-py on all cores, with 84×84 gray frames in stacks of four."""

    def __init__(self, game: str, count: int) -> None:
        self._env = AtariVectorEnv(
            game,
            count,
            use_fire_reset=True,
            reward_clipping=True,
            autoreset_mode=AutoresetMode.SAME_STEP,
        )
        super().__init__(count, self._env.single_observation_space, self._env.single_action_space)

    def reset(self) -> np.ndarray:
        """Return the first observations, (N, 4, 84, 84)."""
        return self._env.reset(seed=0)[0]

    def step_async(self, actions: np.ndarray) -> None:
        """Store the actions for step_wait."""
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Step all environments."""
        observations, rewards, terminated, truncated, info = self._env.step(self._actions)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(terminated | truncated):
            infos[i] = {"terminal_observation": info["final_obs"][i], "TimeLimit.truncated": bool(truncated[i])}
        return observations, rewards.astype(np.float32), terminated | truncated, infos

    def close(self) -> None:
        """Close the emulator."""
        self._env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return None for every environment; Stable-Baselines3 asks for `render_mode`."""
        return [None for _ in range(self.num_envs)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Raise NotImplementedError, because training does not need it."""
        raise NotImplementedError

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Raise NotImplementedError, because training does not need it."""
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> Sequence[bool]:
        """Return False for every environment."""
        return [False] * self.num_envs
