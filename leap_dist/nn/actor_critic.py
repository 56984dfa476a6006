"""The network, which of its parameters are shared by all tasks, and the flat vector that travels.

The network is the one of Mnih et al. (2013), as appendix E of the Leap paper takes it over: two convolutions and one
linear layer, from which a policy and a value are read linearly.
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
"""From an observation's bytes to the network's input."""
ALL_ACTIONS = 18
"""Of the Atari controller: what one policy head for all games has."""


class Encoder(nn.Module):
    """conv 16·8×8/4 → conv 32·4×4/2 → linear 256, each with a ReLU: (N, C, 84, 84) in [0, 1] → (N, 256)."""

    features = 256

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, kernel_size=8, stride=4)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=4, stride=2)
        self.linear = nn.Linear(32 * 9 * 9, self.features)

    def forward(self, frames: Tensor) -> Tensor:
        """Features of frames."""
        hidden = torch.relu(self.conv1(frames))
        hidden = torch.relu(self.conv2(hidden))
        return torch.relu(self.linear(hidden.flatten(1)))


class ActorCritic(nn.Module):
    """An encoder with a policy head (N, actions) and a value head (N,). Only the encoder is meta-learned."""

    def __init__(self, encoder: Encoder, actions: int, *, legal: Sequence[int] | None = None) -> None:
        """`legal`: the actions that the game has, where the policy head is one for all games; others are masked."""
        super().__init__()
        self.encoder = encoder
        self.policy = nn.Linear(encoder.features, actions)
        self.value = nn.Linear(encoder.features, 1)
        self._legal = None if legal is None else nn.Buffer(torch.tensor(legal), persistent=False)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, legal actions) and values (N,)."""
        return self.heads(self.encoder(frames))

    def heads(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, legal actions) and values (N,) from the encoder's features (N, 256)."""
        return self.logits(features), self.values(features)

    def logits(self, features: Tensor) -> Tensor:
        """To leave an action out of the softmax is to give it the logit −∞: no probability, and no gradient."""
        logits: Tensor = self.policy(features)
        return logits if self._legal is None else logits[:, self._legal]

    def values(self, features: Tensor) -> Tensor:
        """V(s), (N,)."""
        values: Tensor = self.value(features)
        return values.squeeze(-1)

    def parameters_of(self, scope: str) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """The parameters that all tasks share, and those that are the task's own, by name.

        `scope` says what is shared: "convolutions", "encoder", or "model", which is all there is.
        """
        prefixes = {"convolutions": ("encoder.conv",), "encoder": ("encoder.",), "model": ("",)}[scope]
        shared: dict[str, nn.Parameter] = {}
        local: dict[str, nn.Parameter] = {}
        for name, parameter in self.named_parameters():
            (shared if name.startswith(prefixes) else local)[name.removeprefix("encoder.")] = parameter
        return shared, local


def initialize(model: nn.Module, generator: torch.Generator) -> None:
    """Orthogonal weights and zero biases: gain √2, but 0.01 for a policy head and 1 for a value head.

    PyTorch's default initialization keeps A2C from learning at all on most games; this one is what every working
    implementation uses.
    """
    gains = {"policy": 0.01, "value": 1.0}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.orthogonal_(layer.weight, gains.get(name, math.sqrt(2.0)), generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def initialization(channels: int, seed: int, scope: str = "encoder") -> tuple[Manifest, np.ndarray]:
    """A fresh random φ₀, float32, with its manifest; the same for the same seed. `scope`: see `parameters_of`."""
    model = ActorCritic(Encoder(channels), ALL_ACTIONS)
    initialize(model, torch.Generator().manual_seed(seed))
    shared, _ = model.parameters_of(scope)
    return Manifest.of(shared), flatten(shared.values()).numpy()
