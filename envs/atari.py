"""The emulator: many copies of one game stepped together by ale-py's C++ threads."""

from __future__ import annotations

import numpy as np
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode

from envs.games import require

FRAME_SIZE = 84
STACKS = {"gray4": (True, 4), "rgb1": (False, 1), "rgb4": (False, 4)}
"""Observation kinds: (grayscale, frames stacked)."""


def channels(frames: str) -> int:
    """Input channels that observations of kind `frames` have."""
    grayscale, stack = STACKS[frames]
    return stack * (1 if grayscale else 3)


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
    threads: int = 1,
) -> AtariVectorEnv:
    """`count` environments of one game. Raises ValueError for a game that does not exist or cannot be loaded.

    Observations are uint8 (count, stack, 84, 84), with a trailing 3 for RGB. Rewards are the emulator's own.
    """
    require(game)
    grayscale, stack = STACKS[frames]
    return AtariVectorEnv(
        game,
        count,
        num_threads=threads,
        max_num_frames_per_episode=max_episode_frames,
        repeat_action_probability=sticky_actions,
        full_action_space=full_actions,
        autoreset_mode=AutoresetMode.SAME_STEP,  # hands over the last observation, which truncation bootstraps from
        img_height=FRAME_SIZE,
        img_width=FRAME_SIZE,
        grayscale=grayscale,
        stack_num=stack,
        frameskip=frame_skip,
        maxpool=True,  # sprites that flicker on alternate frames stay visible
        noop_max=noop_max,
        episodic_life=False,  # the learner ends the return at a lost life; the episode goes on
        life_loss_info=False,  # would report a lost life as a termination, and hide which of the two it was
        reward_clipping=False,  # raw rewards are what gets reported; the learner clips its own copy
        use_fire_reset=fire_on_reset,
    )


def actions(env: AtariVectorEnv) -> list[int]:
    """What an environment's actions 0, 1, … are on the controller, which has 18."""
    return [action.value for action in env.ale.get_action_set()]


def as_channels(observations: np.ndarray) -> np.ndarray:
    """(N, stack, 84, 84[, 3]) → (N, C, 84, 84): a view wherever the layout allows it."""
    if observations.ndim == 4:
        return observations
    count, stack, height, width, colours = observations.shape
    moved = observations.transpose(0, 1, 4, 2, 3)
    return moved.reshape(count, stack * colours, height, width)
