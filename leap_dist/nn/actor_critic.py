"""The actor-critic network for Atari games, and which of its parameters all tasks share.

It is the network of Mnih et al. (2013), as in appendix E of the Leap paper: two convolutions and one linear layer,
followed by a linear policy head and a linear value head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from leap_dist.nn.flat_vector import Manifest, flatten

FRAME_SIZE = 84
SCALE = "pixels / 255"
"""This text says how the bytes of an observation become the network's input."""
ALL_ACTIONS = 18
"""Number of actions of the Atari controller, and of a policy head that all games share."""


class Encoder(nn.Module):
    """conv 16·8×8/4 → conv 32·4×4/2 → linear 256, each with a ReLU: (N, C, 84, 84) in [0, 1] → (N, 256)."""

    features = 256

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, kernel_size=8, stride=4)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=4, stride=2)
        self.linear = nn.Linear(32 * 9 * 9, self.features)

    def forward(self, frames: Tensor) -> Tensor:
        """Return the features (N, 256) of frames (N, C, 84, 84)."""
        hidden = torch.relu(self.conv1(frames))
        hidden = torch.relu(self.conv2(hidden))
        return torch.relu(self.linear(hidden.flatten(1)))


class ActorCritic(nn.Module):
    """An encoder with a policy head (N, actions) and a value head (N,)."""

    def __init__(self, encoder: Encoder, actions: int, *, legal: Sequence[int] | None = None) -> None:
        """Make the heads. `legal` lists the game's actions where all games share a policy head; others are masked."""
        super().__init__()
        self.encoder = encoder
        self.policy = nn.Linear(encoder.features, actions)
        self.value = nn.Linear(encoder.features, 1)
        self._legal = None if legal is None else nn.Buffer(torch.tensor(legal), persistent=False)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (N, legal actions) and values (N,) of frames (N, C, 84, 84)."""
        return self.heads(self.encoder(frames))

    def heads(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (N, legal actions) and values (N,) of the encoder's features (N, 256)."""
        return self.logits(features), self.values(features)

    def logits(self, features: Tensor) -> Tensor:
        """Return logits (N, legal actions). Leaving an action out is equivalent to giving it the logit −∞."""
        logits: Tensor = self.policy(features)
        return logits if self._legal is None else logits[:, self._legal]

    def values(self, features: Tensor) -> Tensor:
        """Return the values V(s), (N,)."""
        values: Tensor = self.value(features)
        return values.squeeze(-1)

    def parameters_of(self, scope: str) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """Return the parameters that all tasks share and those that are the task's own, each by name.

        `scope` names the shared ones: "convolutions", "encoder", or "model" for all.
        """
        prefixes = {"convolutions": ("encoder.conv",), "encoder": ("encoder.",), "model": ("",)}[scope]
        shared: dict[str, nn.Parameter] = {}
        local: dict[str, nn.Parameter] = {}
        for name, parameter in self.named_parameters():
            (shared if name.startswith(prefixes) else local)[name.removeprefix("encoder.")] = parameter
        return shared, local


def initialize(model: nn.Module, generator: torch.Generator) -> None:
    """Set orthogonal weights and zero biases: gain √2, but 0.01 for a policy head and 1 for a value head.

    With PyTorch's default initialization, A2C does not learn at all on most games; this one is common practice.
    """
    gains = {"policy": 0.01, "value": 1.0}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.orthogonal_(layer.weight, gains.get(name, math.sqrt(2.0)), generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def network_for_game(channels: int, actions: Sequence[int], scope: str, seed: int) -> ActorCritic:
    """Return a fresh network for a game that uses the given ones of the controller's 18 actions.

    With scope "model" the policy head has all 18 actions and masks the others; else it has only the game's.
    """
    encoder = Encoder(channels)
    if scope == "model":
        model = ActorCritic(encoder, ALL_ACTIONS, legal=actions)
    else:
        model = ActorCritic(encoder, len(actions))
    initialize(model, torch.Generator().manual_seed(seed))
    return model


def initialization(channels: int, seed: int, scope: str = "encoder") -> tuple[Manifest, np.ndarray]:
    """Return a fresh random φ₀, flat float32, and its manifest. The same seed gives the same φ₀.

    `scope` names the shared parameters, see `ActorCritic.parameters_of`.
    """
    model = ActorCritic(Encoder(channels), ALL_ACTIONS)
    initialize(model, torch.Generator().manual_seed(seed))
    shared, _ = model.parameters_of(scope)
    return Manifest.of(shared), flatten(shared.values()).numpy()
