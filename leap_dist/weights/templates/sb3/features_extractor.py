"""The encoder as a features extractor of Stable-Baselines3, and an actor-critic policy that starts from it."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from safetensors.torch import load_file
from stable_baselines3.common.policies import ActorCriticCnnPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("encoder.safetensors")


class LeapEncoder(BaseFeaturesExtractor):
    """The encoder: observations (N, C, 84, 84), already divided by 255, to features (N, 256).

    Raises ValueError if the observations differ in shape or type from those that the encoder was trained on.
    """

    def __init__(self, observation_space: gymnasium.spaces.Box) -> None:
        super().__init__(observation_space, features_dim=256)
        channels = load_file(WEIGHTS)["conv1.weight"].shape[1]
        if observation_space.shape != (channels, 84, 84) or observation_space.dtype != np.uint8:
            raise ValueError(
                f"observations are {observation_space.dtype} {observation_space.shape}, but the encoder was trained on "
                f"uint8 {(channels, 84, 84)}; environments.py makes these"
            )
        self.conv1 = nn.Conv2d(channels, 16, kernel_size=8, stride=4)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=4, stride=2)
        self.linear = nn.Linear(32 * 9 * 9, 256)
        self.load()

    def load(self) -> None:
        """Set the parameters to the initialization."""
        self.load_state_dict(load_file(WEIGHTS))

    def forward(self, observations: Tensor) -> Tensor:
        """Return the features (N, 256) of observations (N, C, 84, 84)."""
        hidden = self.conv1(observations).relu()
        hidden = self.conv2(hidden).relu()
        features: Tensor = self.linear(hidden.flatten(1)).relu()
        return features


class LeapPolicy(ActorCriticCnnPolicy):
    """A policy for A2C and PPO: the encoder with new linear policy and value heads. All parameters are trained."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"features_extractor_class": LeapEncoder, "net_arch": [], **kwargs})
        # By default (ortho_init), Stable-Baselines3 draws all weights anew, including those of the extractor.
        for module in self.modules():
            if isinstance(module, LeapEncoder):
                module.load()
