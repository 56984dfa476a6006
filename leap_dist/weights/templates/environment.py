"""A Gymnasium environment (1.0 or newer) with the observations that the encoder expects: `env = make("Breakout")`."""

import json
from pathlib import Path
from typing import Any

import ale_py
import gymnasium
import numpy as np
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation, TransformObservation

gymnasium.register_envs(ale_py)
PREPROCESSING = json.loads(Path(__file__).with_name("preprocessing.json").read_text())


def make(game: str, **kwargs: Any) -> gymnasium.Env[Any, Any]:
    """Make an environment with observations uint8 (C, 84, 84), to be divided by 255, and raw rewards.

    `kwargs` are passed to AtariPreprocessing, for example `terminal_on_life_loss=True`.
    """
    frames, size = PREPROCESSING["frames"], PREPROCESSING["size"]
    env = gymnasium.make(f"ALE/{game}-v5", frameskip=1, repeat_action_probability=0.0)
    env = AtariPreprocessing(
        env,
        frame_skip=PREPROCESSING["frame_skip"],
        screen_size=size,
        grayscale_obs=frames == "gray4",
        grayscale_newaxis=True,
        **kwargs,
    )
    env = FrameStackObservation(env, 1 if frames == "rgb1" else 4, padding_type="zero")
    box = gymnasium.spaces.Box(0, 255, (PREPROCESSING["channels"], size, size), np.uint8)
    return TransformObservation(env, channels_first, box)


def channels_first(stack: np.ndarray) -> np.ndarray:
    """Reorder frames (K, height, width, colors) to (K · colors, height, width), oldest frame first."""
    return stack.transpose(0, 3, 1, 2).reshape(-1, *stack.shape[1:3])
