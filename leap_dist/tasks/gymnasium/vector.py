"""A vector of environments of one Gymnasium ID, with the observations of Atari games: images of 84 × 84 pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from leap_dist.envs.atari_vector import STACKS, Step
from leap_dist.envs.preprocessing import FRAME_SIZE, overlaps

_GRAY = np.array([0.299, 0.587, 0.114], np.float32)
"""Luminance of red, green and blue (ITU-R BT.601), as in the emulator and in OpenCV."""


class GymnasiumVector:
    """N environments of one ID. Implements `leap_dist.tasks.atari.environments.Environments`.

    Images are resized to 84 × 84 by area averaging, and stacked like those of Atari games: oldest first, zeros before
    the first. When an episode ends, the next one begins at once.

    Args:
        env_id: ID of the environment in Gymnasium's registry.
        count: number of environments N.
        frames: kind of observations: "gray4", "rgb1" or "rgb4".
        max_episode_steps: number of steps after which an episode is truncated; 0 for the environment's own limit.
        beat: called before each environment is made.

    Raises ValueError if observations are not images or actions are not discrete, and whatever the environment raises.
    """

    def __init__(
        self, env_id: str, count: int, frames: str, max_episode_steps: int = 0, beat: Callable[[], None] = lambda: None
    ) -> None:
        more: dict[str, Any] = {"max_episode_steps": max_episode_steps} if max_episode_steps else {}
        self._envs = []
        for _ in range(count):
            beat()
            self._envs.append(gymnasium.make(env_id, **more))
        space = self._envs[0].action_space
        if not isinstance(space, gymnasium.spaces.Discrete):
            raise ValueError(f"{env_id} has actions {space}, but only Discrete ones can be learned")
        self.actions = list(range(int(space.n)))
        self._first_action = int(space.start)
        self._scale = _scale_of(env_id, self._envs[0].observation_space)
        colors, stack = STACKS[frames]
        self._is_gray = colors.stop - colors.start == 1
        shape = (count, colors.stop - colors.start, FRAME_SIZE, FRAME_SIZE)
        self._history = [np.zeros(shape, np.uint8) for _ in range(stack)]
        self._resizing: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def lives(self) -> np.ndarray:
        """Zeros, int (N,): environments do not say how many lives are left."""
        return np.zeros(len(self._envs), np.int64)

    def reset(self, seed: int) -> np.ndarray:
        """Start a new episode everywhere. From then on, `seed` and the actions determine everything."""
        seeds = np.random.SeedSequence(seed).generate_state(len(self._envs))
        images = [env.reset(seed=int(own))[0] for env, own in zip(self._envs, seeds, strict=True)]
        return self._observe(images, np.ones(len(images), bool))

    def step(self, actions: np.ndarray) -> Step:
        """Execute one action in each environment, given as indices (N,) into `actions`."""
        images, rewards, finals = [], [], []
        terminated, truncated = np.zeros((2, len(self._envs)), bool)
        for n, env in enumerate(self._envs):
            image, reward, terminated[n], truncated[n], _ = env.step(self._first_action + int(actions[n]))
            truncated[n] &= not terminated[n]
            if truncated[n]:
                finals.append(image)
            if terminated[n] or truncated[n]:
                image, _ = env.reset()
            images.append(image)
            rewards.append(float(reward))
        final = np.zeros((0, len(self._history) * self._history[0].shape[1], FRAME_SIZE, FRAME_SIZE), np.uint8)
        if finals:
            before = [frames[truncated] for frames in self._history[1:]]
            final = np.concatenate([*before, self._resize(finals)], axis=1)
        observations = self._observe(images, terminated | truncated)
        return Step(observations, np.array(rewards, np.float32), terminated, truncated, self.lives, final)

    def state(self) -> None:
        """Return None: the state of a Gymnasium environment cannot be read."""

    def load_state(self, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> np.ndarray:
        """Raise RuntimeError, because there is no such state."""
        raise RuntimeError("a Gymnasium environment has no state to continue from")

    def close(self) -> None:
        """Close the environments. Closing twice is harmless."""
        for env in self._envs:
            env.close()
        self._envs = []

    def _observe(self, images: list[np.ndarray], restarted: np.ndarray) -> np.ndarray:
        """Return the stacked observations, in which episodes that have just begun have no earlier frames."""
        for frames in self._history:
            frames[restarted] = 0
        self._history = [*self._history[1:], self._resize(images)]
        return np.concatenate(self._history, axis=1)

    def _resize(self, images: list[np.ndarray]) -> np.ndarray:
        """Return images as uint8 (n, 1 or 3, 84, 84)."""
        pixels = np.asarray(images, np.float32) * self._scale
        if pixels.ndim == 3:
            pixels = pixels[..., None]
        elif pixels.shape[-1] not in (1, 3):
            pixels = np.moveaxis(pixels, 1, -1)
        if self._is_gray and pixels.shape[-1] == 3:
            pixels = (pixels @ _GRAY)[..., None]
        if not self._is_gray and pixels.shape[-1] == 1:
            pixels = np.repeat(pixels, 3, axis=-1)
        if self._resizing is None:
            height, width = pixels.shape[1:3]
            self._resizing = overlaps(height, FRAME_SIZE) / height, overlaps(width, FRAME_SIZE).T / width
        rows, columns = self._resizing
        resized = rows @ np.moveaxis(pixels, -1, 1) @ columns
        shown: np.ndarray = np.rint(resized).clip(0, 255).astype(np.uint8)
        return shown


def _scale_of(env_id: str, space: gymnasium.Space[Any]) -> float:
    """Return the factor from the environment's pixels to 0 … 255. Raises ValueError if it does not show images."""
    shape = space.shape or ()
    is_image = len(shape) == 2 or (len(shape) == 3 and (shape[-1] in (1, 3) or shape[0] in (1, 3)))
    if not isinstance(space, gymnasium.spaces.Box) or not is_image or min(sorted(shape)[-2:]) < 2:
        raise ValueError(
            f"{env_id} shows {space}, which is not an image of shape (H, W), (H, W, 3) or (3, H, W); "
            "gymnasium.wrappers.AddRenderObservation makes one of what an environment renders"
        )
    return 1.0 if space.dtype == np.uint8 or space.high.max() > 1 else 255.0
