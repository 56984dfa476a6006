"""The network, which of its parameters are shared by all tasks, and the flat vector that travels.

The network is the one of Mnih et al. (2013), as appendix E of the Leap paper takes it over: two convolutions and one
linear layer, from which a policy and a value are read linearly.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

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


@dataclass(frozen=True)
class Manifest:
    """Names and shapes of the parameters behind a flat vector, in the vector's order."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor]) -> Manifest:
        """The manifest of parameters by name."""
        return cls(tuple(parameters), tuple(tuple(parameter.shape) for parameter in parameters.values()))

    @property
    def size(self) -> int:
        """Length of the flat vector."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that differ whenever a name, a shape or the order does."""
        return hashlib.sha256(repr((self.names, self.shapes)).encode()).hexdigest()[:16]

    def split(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """Views of `vector` (size,) by parameter name. Raises ValueError where the length does not fit."""
        if vector.shape != (self.size,):
            raise ValueError(f"vector has shape {vector.shape}, the encoder needs ({self.size},)")
        return {
            name: part.numpy() for name, part in zip(self.names, self._views(torch.from_numpy(vector)), strict=True)
        }

    def join(self, tensors: dict[str, np.ndarray]) -> np.ndarray:
        """The flat float32 vector of `tensors`. Raises ValueError that lists every difference from this manifest."""
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wanted = dict(zip(self.names, self.shapes, strict=True))
        if found != wanted:
            names = [*wanted, *(name for name in found if name not in wanted)]
            lines = [f"{n}: {found.get(n, 'missing')} instead of {wanted.get(n, 'nothing')}"
                     for n in names if found.get(n) != wanted.get(n)]  # fmt: skip
            raise ValueError("encoder differs: " + "; ".join(lines))
        return np.concatenate([np.asarray(tensors[name], np.float32).ravel() for name in self.names])

    def _views(self, vector: Tensor) -> Iterator[Tensor]:
        start = 0
        for shape in self.shapes:
            stop = start + math.prod(shape)
            yield vector[start:stop].view(shape)
            start = stop


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Concatenates tensors into one new float32 vector, each in row-major order."""
    return torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])


@torch.no_grad()
def load_vector(parameters: Mapping[str, Tensor], vector: np.ndarray) -> None:
    """Copies a flat vector into parameters. Raises ValueError where the length does not fit."""
    parts = Manifest.of(parameters).split(np.array(vector, np.float32))
    for name, parameter in parameters.items():
        parameter.copy_(torch.from_numpy(parts[name]))


@torch.no_grad()
def add_vector(parameters: Mapping[str, Tensor], vector: np.ndarray) -> list[Tensor]:
    """Adds a flat vector to parameters, and returns its parts. Raises ValueError where the length does not fit."""
    split = Manifest.of(parameters).split(np.array(vector, np.float32))
    parts = [torch.from_numpy(split[name]).to(parameter.device) for name, parameter in parameters.items()]
    for parameter, part in zip(parameters.values(), parts, strict=True):
        parameter.add_(part)
    return parts


def initialization(channels: int, seed: int, scope: str = "encoder") -> tuple[Manifest, np.ndarray]:
    """A fresh random φ₀, float32, with its manifest; the same for the same seed. `scope`: see `parameters_of`."""
    model = ActorCritic(Encoder(channels), ALL_ACTIONS)
    initialize(model, torch.Generator().manual_seed(seed))
    shared, _ = model.parameters_of(scope)
    return Manifest.of(shared), flatten(shared.values()).numpy()
