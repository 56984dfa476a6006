"""Atari environments of Stable-Baselines3 with the observations that the encoder expects."""

import json
from pathlib import Path
from typing import Any

import ale_py
import gymnasium
from gymnasium.wrappers import ResizeObservation
from stable_baselines3.common import atari_wrappers
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack

gymnasium.register_envs(ale_py)
PREPROCESSING = json.loads(Path(__file__).with_name("preprocessing.json").read_text())
EMULATOR = {"frameskip": 1, "repeat_action_probability": 0.0}
"""Options of the emulator. By default ALE skips frames and repeats actions; here only the wrappers skip frames."""


def make(game: str, count: int, *, seed: int = 0, **kwargs: Any) -> VecEnv:
    """Make `count` environments of a game such as "Breakout": lost lives end episodes, and rewards are −1, 0 or 1.

    `kwargs` are passed to Stable-Baselines3, for example `vec_env_cls=SubprocVecEnv`.
    """
    shared = {"n_envs": count, "seed": seed, "env_kwargs": EMULATOR, **kwargs}
    frames, skip = PREPROCESSING["frames"], PREPROCESSING["frame_skip"]
    if frames == "gray4":
        envs = make_atari_env(f"ALE/{game}-v5", wrapper_kwargs={"frame_skip": skip}, **shared)
    else:  # make_atari_env would make them gray
        envs = make_vec_env(f"ALE/{game}-v5", wrapper_class=color_wrappers, **shared)
    return envs if frames == "rgb1" else VecFrameStack(envs, 4)


def color_wrappers(env: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
    """Wrap an environment as Stable-Baselines3's AtariWrapper does, but keep the colors."""
    env = atari_wrappers.NoopResetEnv(env, noop_max=30)
    env = atari_wrappers.MaxAndSkipEnv(env, skip=PREPROCESSING["frame_skip"])
    env = atari_wrappers.EpisodicLifeEnv(env)
    if "FIRE" in env.unwrapped.get_action_meanings():  # type: ignore[attr-defined]
        env = atari_wrappers.FireResetEnv(env)
    return atari_wrappers.ClipRewardEnv(ResizeObservation(env, (PREPROCESSING["size"], PREPROCESSING["size"])))
