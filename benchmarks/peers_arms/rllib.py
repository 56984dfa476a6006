"""Measure RLlib's IMPALA with this project's network and preprocessing, on the new API stack.

Mode N has N environment runners.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import ale_py  # noqa: F401 (the import registers the games)
import gymnasium
import ray
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation
from ray.rllib.algorithms.impala import IMPALAConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.env.wrappers.atari_wrappers import ClipRewardEnv, FireResetEnv
from ray.tune.registry import register_env
from torch import Tensor, nn

from benchmarks.peers_arms import EMULATOR, Stopwatch, arguments, environment_id
from benchmarks.peers_arms.network import FEATURES, encoder


def main() -> None:
    """Train until the measurement is complete."""
    given = arguments(__doc__)
    stopwatch = Stopwatch(given.warmup, given.seconds)
    runners = int(given.mode)
    ray.init("local", num_cpus=runners, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    register_env("atari", lambda config: make(given.game))
    algorithm = configuration(runners, given.envs).build_algo()
    try:
        while not stopwatch.done(time.perf_counter(), _steps(algorithm.train())):
            pass
    finally:
        algorithm.stop()
        ray.shutdown()
    stopwatch.show()


def configuration(runners: int, envs: int) -> IMPALAConfig:
    """Return IMPALA's default configuration with the common network and `envs` environments per runner."""
    return (
        IMPALAConfig()
        .environment("atari")
        .env_runners(num_env_runners=runners, num_envs_per_env_runner=envs)
        .learners(num_learners=0, num_gpus_per_learner=0)  # in this process, because two cores have no room for another
        .rl_module(rl_module_spec=RLModuleSpec(module_class=Network))
        .reporting(min_time_s_per_iteration=1)
        .debugging(log_level="ERROR", seed=0)
    )


def make(game: str) -> gymnasium.Env[Any, Any]:
    """Return a game with 84×84 gray frames, stacks of four, and rewards clipped to their sign.

    The wrappers are Gymnasium's. RLlib's own are much slower: they resize every skipped frame, in floating point.
    """
    env = gymnasium.make(environment_id(game), **EMULATOR)
    env = AtariPreprocessing(env, noop_max=30, frame_skip=4, screen_size=84)
    if "FIRE" in env.unwrapped.get_action_meanings():
        env = FireResetEnv(env)
    return ClipRewardEnv(FrameStackObservation(env, 4))


class Network(TorchRLModule, ValueFunctionAPI):
    """Encoder of this project with linear heads for policy and value."""

    def setup(self) -> None:
        """Build the layers; called by RLlib."""
        self.encoder = encoder(self.observation_space.shape[0])
        self.policy = nn.Linear(FEATURES, int(self.action_space.n))
        self.value = nn.Linear(FEATURES, 1)

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        return {Columns.ACTION_DIST_INPUTS: self.policy(self._features(batch))}

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        features = self._features(batch)
        return {Columns.ACTION_DIST_INPUTS: self.policy(features), Columns.EMBEDDINGS: features}

    def compute_values(self, batch: dict[str, Any], embeddings: Tensor | None = None) -> Tensor:
        """Return V(s). `embeddings` are the features if `_forward_train` has already computed them."""
        return self.value(self._features(batch) if embeddings is None else embeddings).squeeze(-1)

    def _features(self, batch: dict[str, Any]) -> Tensor:
        return self.encoder(batch[Columns.OBS].float() / 255.0)


def _steps(result: dict[str, Any]) -> int:
    """Return the agent steps sampled since the start, or 0 before the first fragment has arrived."""
    return int(result.get("env_runners", {}).get("num_env_steps_sampled_lifetime", 0))


if __name__ == "__main__":
    main()
