"""Many copies of one Atari game, played together by one thread: the emulator does not let a second one in."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from leap_dist.envs.emulator import FIRE, NOOP, clear, put_back, take
from leap_dist.envs.preprocessing import FRAME_SIZE, GRAY, RGB, Frames, palette

STACKS = {"gray4": (GRAY, 4), "rgb1": (RGB, 1), "rgb4": (RGB, 4)}
"""Observation kinds: (colours, frames stacked)."""


def channels(frames: str) -> int:
    """Input channels that observations of kind `frames` have."""
    colours, stack = STACKS[frames]
    return stack * (colours.stop - colours.start)


class Step(NamedTuple):
    """What N environments gave back. Where an episode ended, the next one has begun already."""

    observations: np.ndarray
    """uint8 (N, C, 84, 84), a new array: oldest frame first, RGB planes within a frame."""
    rewards: np.ndarray
    """float32 (N,), the game's own: neither clipped nor scaled."""
    terminated: np.ndarray
    """bool (N,), the game is over."""
    truncated: np.ndarray
    """bool (N,), cut off at the frame limit, not over."""
    lives: np.ndarray
    """int (N,), after the step, or of the next episode."""
    final: np.ndarray
    """uint8 (M, C, 84, 84), the last observations of the M truncated episodes, in their order."""


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
) -> Atari:
    """`count` environments of one game. Raises ValueError for a game that does not exist or cannot be loaded."""
    return Atari(
        game, count, frames, frame_skip, noop_max, fire_on_reset, sticky_actions, max_episode_frames, full_actions
    )


def rebuild() -> None:
    """From now on environments are made anew, with nothing left of those that were closed."""
    clear()


class Atari:
    """N environments of one game; `make` has the defaults.

    An action is executed for `frame_skip` frames, of which the last two are max-pooled: sprites that flicker on
    alternate frames stay visible. An episode starts after a random number of frames, 1 to `noop_max` but at least 2,
    with FIRE first where the game has it, then no action; its first observation is one frame, and nothing before it.
    `sticky_actions` is, frame by frame, the probability that the previous frame's action is executed again.

    Attributes:
        count: N.
        actions: what actions 0, 1, … are on the controller, which has 18.
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
    ) -> None:
        self.count = count
        self._game, self._frame_skip, self._noop_max = game, frame_skip, noop_max
        self._sticky_actions, self._max_episode_frames = sticky_actions, max_episode_frames
        self._emulators = take(game, count)
        self._ales = [emulator.ale for emulator in self._emulators]
        ale = self._ales[0]
        self.actions = [a.value for a in (ale.getLegalActionSet() if full_actions else ale.getMinimalActionSet())]
        self._first_action = FIRE if fire_on_reset and FIRE in self.actions else NOOP
        colours, stack = STACKS[frames]
        self._frames = Frames(count, ale.getScreenDims()[0], colours, palette(game))
        shape = (count, colours.stop - colours.start, FRAME_SIZE, FRAME_SIZE)
        self._history = [np.zeros(shape, np.uint8) for _ in range(stack)]  # oldest first
        self._elapsed = np.zeros(count, np.int64)  # frames of the episode, without those before its start
        self._executed = [NOOP] * count
        self._started = False

    @property
    def lives(self) -> np.ndarray:
        """Lives left in each environment, int (N,)."""
        return np.array([emulator.lives() for emulator in self._emulators])

    def reset(self, seed: int) -> np.ndarray:
        """Starts every episode anew. Returns observations as in `Step`. Raises RuntimeError on a closed environment.

        From here on, `seed` and the actions determine everything.
        """
        if not self._emulators:
            raise RuntimeError("the environment is closed")
        self._random = np.random.default_rng(seed)
        self._started = True
        return self._observe(restarted=np.ones(self.count, bool))

    def step(self, actions: np.ndarray) -> Step:
        """Executes one action in each environment, (N,), indices into `actions`.

        Raises RuntimeError before the first reset and after closing, ValueError for an action that is not there.
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

    def close(self) -> None:
        """Gives the emulators back, for the next environment of that game. Closing twice is harmless."""
        put_back(self._game, self._emulators)
        self._emulators, self._ales = [], []

    def _play(self, actions: list[int], frames: np.ndarray) -> tuple[list[float], list[bool]]:
        """Plays `frames` frames in each environment and sees the last two. Returns rewards, and whose game is over.

        When a game is over, the emulator stands still and gives no reward.
        """
        rewards, due = [0.0] * self.count, frames.tolist()
        for k in range(2):  # everyone's frames but the last, then everyone's last
            for n, emulator in enumerate(self._emulators):
                for _ in range(1 if k else due[n] - 1):
                    rewards[n] += self._act(n, actions[n])
                emulator.screen(self._frames.screens[k][n])
            self._frames.see(k, self._ales)
        self._frames.pool_alone(frames == 1, self._ales)
        return rewards, [emulator.over() for emulator in self._emulators]

    def _act(self, n: int, action: int) -> int:
        """Emulates one frame. Returns the reward."""
        if self._sticky_actions and self._random.random() < self._sticky_actions:
            action = self._executed[n]
        self._executed[n] = action
        reward: int = self._emulators[n].act(action)
        return reward

    def _start(self, n: int) -> None:
        """Starts an episode, up to its first observation."""
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
        """Starts the next episode where one ended. Returns the observations, a copy."""
        if restarted.any():
            for n in np.flatnonzero(restarted).tolist():
                self._start(n)
            self._frames.see(1, self._ales)
            self._frames.pool_alone(restarted, self._ales)
            for images in self._history:
                images[restarted] = 0
        self._history = [*self._history[1:], self._frames.images().copy()]
        return np.concatenate(self._history, axis=1)
