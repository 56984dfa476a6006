"""Measure Stable-Baselines3's A2C with this project's network, preprocessing and batch size.

Modes: dummy and subproc are its own vector environments; ale-vector uses ale-py's C++ vector environment instead.
"""

from __future__ import annotations

import time
from typing import Any

from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack
from torch import Tensor

from benchmarks.peers_arms import EMULATOR, Stopwatch, arguments, environment_id
from benchmarks.peers_arms.network import FEATURES, encoder
from benchmarks.peers_arms.sb3_ale_vector import AleVectorEnv


def main() -> None:
    """Train until the measurement is complete."""
    given = arguments(__doc__)
    stopwatch = Stopwatch(given.warmup, given.seconds)
    agent = A2C(
        "CnnPolicy",
        make(given.game, given.envs, given.mode),
        n_steps=5,
        learning_rate=7e-4,
        ent_coef=0.01,
        vf_coef=0.25,
        use_rms_prop=True,
        policy_kwargs={"features_extractor_class": Features, "net_arch": []},
        device="cpu",
        seed=0,
    )
    agent.learn(10**12, callback=_Measure(stopwatch))
    agent.get_env().close()
    stopwatch.show()


def make(game: str, count: int, mode: str) -> VecEnv:
    """Return `count` copies of a game with 84×84 gray frames in stacks of four."""
    if mode == "ale-vector":
        return AleVectorEnv(game, count)
    env = make_atari_env(
        environment_id(game),
        count,
        seed=0,
        env_kwargs=EMULATOR,
        # so that the emulator does the same work per agent step as in this project
        wrapper_kwargs={"terminal_on_life_loss": False},
        vec_env_cls={"dummy": DummyVecEnv, "subproc": SubprocVecEnv}[mode],
    )
    return VecFrameStack(env, 4)


class Features(BaseFeaturesExtractor):
    """Encoder of this project; Stable-Baselines3 adds its linear heads."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, FEATURES)
        self.encoder = encoder(observation_space.shape[0])

    def forward(self, frames: Tensor) -> Tensor:
        """Return the features of frames that are already divided by 255."""
        return self.encoder(frames)


class _Measure(BaseCallback):
    """Callback that reads the stopwatch at the start of every rollout, so that only whole iterations count."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        super().__init__()
        self._stopwatch = stopwatch
        self._done = False

    def _on_rollout_start(self) -> None:
        self._done = self._stopwatch.done(time.perf_counter(), self.num_timesteps)

    def _on_step(self) -> bool:
        return not self._done


if __name__ == "__main__":
    main()
