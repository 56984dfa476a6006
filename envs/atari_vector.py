"""A vector of environments of one Atari game, stepped by one thread, since the emulator does not release the GIL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from leap_dist.envs.emulator import FIRE, NOOP, clear, put_back, take
from leap_dist.envs.preprocessing import FRAME_SIZE, GRAY, RGB, Frames, palette

STACKS = {"gray4": (GRAY, 4), "rgb1": (RGB, 1), "rgb4": (RGB, 4)}
"""Kinds of observations: (color planes, number of stacked frames)."""


def channels(frames: str) -> int:
    """Return the number of channels of observations of kind `frames`."""
    colors, stack = STACKS[frames]
    return stack * (colors.stop - colors.start)


class Step(NamedTuple):
    """Result of one step of N environments. If an episode has ended, the next one has begun."""

    observations: np.ndarray
    """Observations, uint8 (N, C, 84, 84), a new array: oldest frame first, RGB planes within a frame."""
    rewards: np.ndarray
    """Raw rewards of the game, float32 (N,)."""
    terminated: np.ndarray
    """Whether the game is over, bool (N,)."""
    truncated: np.ndarray
    """Whether the episode was cut off at the frame limit, bool (N,)."""
    lives: np.ndarray
    """Lives left after the step, or at the start of the next episode, int (N,)."""
    final: np.ndarray
    """Last observations of the M truncated episodes, uint8 (M, C, 84, 84)."""


def make(
    game: str,
    count: int,
    *,
    frames: str = "gray4",
    frame_skip: int = 4,
    noop_max: int = 30,
    fire_on_reset: bool = True,
    sticky_actions: float = 0.0,
    max_episode_frames: int = 108_000,
    full_actions: bool = False,
    beat: Callable[[], None] = lambda: None,
) -> Atari:
    """Make `count` environments of a game, and call `beat` before each of them, since they take 0.1 s each.

    Raises ValueError for a game that does not exist or cannot be loaded, and whatever `beat` raises.
    """
    rules = frame_skip, noop_max, fire_on_reset, sticky_actions, max_episode_frames, full_actions
    return Atari(game, count, frames, *rules, beat)


def has_state(frame_skip: int, max_episode_frames: int) -> bool:
    """Return whether `Atari.state` returns a state with these settings: no step may play fewer than three frames."""
    return frame_skip >= 3 and not 0 < max_episode_frames % frame_skip < 3


def rebuild() -> None:
    """Make sure that new environments share nothing with those that were closed before."""
    clear()


class Atari:
    """N environments of one game; `make` has the defaults.

    An action is executed for `frame_skip` frames, of which the last two are max-pooled, so that sprites that flicker on
    alternate frames stay visible. An episode starts after a random number of frames, from 1 to `noop_max` but at least
    2, with action FIRE first if the game has it, then NOOP. Its first observation has one frame, after zeros.
    `sticky_actions` is the probability, for each frame, that the previous frame's action is repeated.

    Attributes:
        count: number of environments N.
        actions: the controller's actions (of 18) that correspond to actions 0, 1, …
    """

    def __init__(
        self,
        game: str,
        count: int,
        frames: str,
        frame_skip: int,
        noop_max: int,
        fire_on_reset: bool,
        sticky_actions: float,
        max_episode_frames: int,
        full_actions: bool,
        beat: Callable[[], None],
    ) -> None:
        self.count = count
        self._game, self._frame_skip, self._noop_max = game, frame_skip, noop_max
        self._sticky_actions, self._max_episode_frames = sticky_actions, max_episode_frames
        self._emulators = take(game, count, beat)
        self._ales = [emulator.ale for emulator in self._emulators]
        ale = self._ales[0]
        self.actions = [a.value for a in (ale.getLegalActionSet() if full_actions else ale.getMinimalActionSet())]
        self._first_action = FIRE if fire_on_reset and FIRE in self.actions else NOOP
        colors, stack = STACKS[frames]
        self._frames = Frames(count, ale.getScreenDims()[0], colors, palette(game))
        shape = (count, colors.stop - colors.start, FRAME_SIZE, FRAME_SIZE)
        self._history = [np.zeros(shape, np.uint8) for _ in range(stack)]  # oldest first
        self._elapsed = np.zeros(count, np.int64)  # frames of the episode, without those before its start
        self._executed = [NOOP] * count
        self._started = False

    @property
    def lives(self) -> np.ndarray:
        """Lives left in each environment, int (N,)."""
        return np.array([emulator.lives() for emulator in self._emulators])

    def reset(self, seed: int) -> np.ndarray:
        """Start a new episode in all environments, and return observations as in `Step`.

        From then on, `seed` and the actions determine everything. Raises RuntimeError if the environment is closed.
        """
        if not self._emulators:
            raise RuntimeError("the environment is closed")
        self._random = np.random.default_rng(seed)
        self._started = True
        return self._observe(restarted=np.ones(self.count, bool))

    def step(self, actions: np.ndarray) -> Step:
        """Execute one action in each environment, given as indices (N,) into `actions`.

        Raises RuntimeError before the first reset and after closing, and ValueError for an unknown action.
        """
        if not (self._emulators and self._started):
            raise RuntimeError("the environment is closed, or was not reset yet")
        if actions.shape != (self.count,) or actions.min() < 0 or actions.max() >= len(self.actions):
            raise ValueError(f"{actions} are not {self.count} actions of 0 to {len(self.actions) - 1}")
        chosen = [self.actions[action] for action in actions.tolist()]
        frames = np.minimum(self._frame_skip, self._max_episode_frames - self._elapsed)
        self._elapsed += frames
        rewards, over = self._play(chosen, frames)
        terminated = np.array(over)
        truncated = (self._elapsed >= self._max_episode_frames) & ~terminated
        last = [*self._history[1:], self._frames.images()] if truncated.any() else self._history
        final = np.concatenate([images[truncated] for images in last], axis=1)
        observations = self._observe(restarted=terminated | truncated)
        return Step(observations, np.array(rewards, np.float32), terminated, truncated, self.lives, final)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Return everything that the next steps depend on, as arrays and as JSON-compatible values, by name.

        Returns None if `has_state` is False: the emulator's screen is not a part of its state, and in some games one
        frame does not fill it.
        """
        if not has_state(self._frame_skip, self._max_episode_frames):
            return None
        machines = [np.frombuffer(emulator.state(), np.uint8) for emulator in self._emulators]
        arrays = {f"machine{n}": machine for n, machine in enumerate(machines)}
        arrays |= {f"frame{k}": images for k, images in enumerate(self._history)}
        generator = self._random.bit_generator.state
        return arrays, {"elapsed": self._elapsed.tolist(), "executed": list(self._executed), "random": generator}

    def load_state(self, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> np.ndarray:
        """Continue from what `state` returned, in environments made alike, and return the observations there.

        Raises KeyError, ValueError or RuntimeError for anything else.
        """
        for n, emulator in enumerate(self._emulators):
            emulator.load_state(arrays[f"machine{n}"].tobytes())
        for k, images in enumerate(self._history):
            images[:] = arrays[f"frame{k}"]
        self._elapsed[:] = values["elapsed"]
        self._executed = [int(action) for action in values["executed"]]
        self._random = np.random.default_rng()
        self._random.bit_generator.state = values["random"]
        self._started = True
        return np.concatenate(self._history, axis=1)

    def screen(self) -> np.ndarray:
        """Return the first environment's screen in color, uint8 (height, 160, 3), as the emulator shows it now."""
        pixels: np.ndarray = self._ales[0].getScreenRGB()
        return pixels

    def close(self) -> None:
        """Return the emulators to the pool. Closing twice is harmless."""
        put_back(self._game, self._emulators)
        self._emulators, self._ales = [], []

    def _play(self, actions: list[int], frames: np.ndarray) -> tuple[list[float], list[bool]]:
        """Emulate `frames` frames in each environment, read the last two screens, and return rewards and game overs.

        After the end of a game the emulator does nothing and gives no reward.
        """
        rewards, due = [0.0] * self.count, frames.tolist()
        for k in range(2):  # all frames but the last, then the last
            for n, emulator in enumerate(self._emulators):
                for _ in range(1 if k else due[n] - 1):
                    rewards[n] += self._act(n, actions[n])
                emulator.screen(self._frames.screens[k][n])
            self._frames.update(k, self._ales)
        self._frames.pool_alone(frames == 1, self._ales)
        return rewards, [emulator.over() for emulator in self._emulators]

    def _act(self, n: int, action: int) -> int:
        """Emulate one frame and return its reward."""
        if self._sticky_actions and self._random.random() < self._sticky_actions:
            action = self._executed[n]
        self._executed[n] = action
        reward: int = self._emulators[n].act(action)
        return reward

    def _start(self, n: int) -> None:
        """Start an episode and play up to its first observation."""
        emulator = self._emulators[n]
        due = int(self._random.integers(1, self._noop_max, endpoint=True)) if self._noop_max else 0
        action, since_restart = self._first_action, 0
        emulator.restart()
        self._executed[n] = NOOP
        while due > 0 or since_restart < 2:  # see Emulator.restart
            self._act(n, action)
            action, due, since_restart = NOOP, due - 1, since_restart + 1
            if emulator.over():
                emulator.restart()
                since_restart = 0
        self._elapsed[n] = 0
        emulator.screen(self._frames.screens[1][n])

    def _observe(self, restarted: np.ndarray) -> np.ndarray:
        """Start the next episode where one has ended, and return a copy of the observations."""
        if restarted.any():
            for n in np.flatnonzero(restarted).tolist():
                self._start(n)
            self._frames.update(1, self._ales)
            self._frames.pool_alone(restarted, self._ales)
            for images in self._history:
                images[restarted] = 0
        self._history = [*self._history[1:], self._frames.images().copy()]
        return np.concatenate(self._history, axis=1)
