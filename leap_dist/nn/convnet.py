"""The network of the supervised experiments (appendices C and D), and which of its parameters all tasks share.

Four blocks of convolution 3 × 3 × 64, max-pooling 2 × 2, batch norm and ReLU, in the order of the authors' published
code, and one linear layer. On 28 × 28 pixels 64 features are left, on 32 × 32 four times as many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leap_dist.nn.flat_vector import Manifest, flatten

FILTERS = 64
BLOCKS = 4
SMALLEST = 2**BLOCKS
"""Side of an image, in pixels, that something is left of."""
SCOPES = {"convolutions": ("block",), "encoder": ("block",), "model": ("",)}
"""What is shared, by prefix of the name: all but the head, batch norm's weights and biases included; or all."""


class Convolution(nn.Conv2d):
    """Its bias is a constant: batch norm, which comes next, takes it away again while training.

    So its gradient is 0, but torch would find that out by a sum over the largest tensors of all.
    """

    def forward(self, images: Tensor) -> Tensor:
        """(N, channels, S, S) → (N, filters, S, S)."""
        assert self.bias is not None
        convolved: Tensor = self._conv_forward(images, self.weight, self.bias.detach())
        return convolved


class Block(nn.Module):
    """(N, channels, S, S) → (N, 64, ⌊S/2⌋, ⌊S/2⌋)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Convolution(channels, FILTERS, kernel_size=3, padding=1)
        self.norm = nn.BatchNorm2d(FILTERS)

    def forward(self, images: Tensor) -> Tensor:
        """Pooled before it is normalized, which leaves batch norm a quarter of the work."""
        return F.relu(self.norm(F.max_pool2d(self.conv(images), 2)), inplace=True)


class ConvNet(nn.Module):
    """Images (N, channels, size, size) → logits (N, classes). Its memory is laid out channels last.

    On a CPU that layout is the faster one, most of all for max-pooling (docs/performance.md).
    """

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.block1, self.block2, self.block3, self.block4 = (
            Block(channels if number == 0 else FILTERS) for number in range(BLOCKS)
        )
        self.head = nn.Linear(FILTERS * (size // 2**BLOCKS) ** 2, classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Logits. Batch norm normalizes by the batch while training, else by the averages over training so far."""
        features: Tensor = self.block4(self.block3(self.block2(self.block1(images))))
        with torch.autocast(images.device.type, enabled=False):  # so small a product costs less than the casts for it
            logits: Tensor = self.head(features.flatten(1).float())
        return logits

    def parameters_of(self, scope: str) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """The parameters that all tasks share, and those that are the task's own, by name. `scope`: see SCOPES."""
        shared: dict[str, nn.Parameter] = {}
        local: dict[str, nn.Parameter] = {}
        for name, parameter in self.named_parameters():
            (shared if name.startswith(SCOPES[scope]) else local)[name] = parameter
        return shared, local

    @contextmanager
    def without_trace(self) -> Iterator[None]:
        """What is computed in here leaves batch norm's averages as they are."""
        kept = [buffer.clone() for buffer in self.buffers()]
        try:
            yield
        finally:
            for buffer, before in zip(self.buffers(), kept, strict=True):
                buffer.copy_(before)


def initialize(model: ConvNet, generator: torch.Generator) -> None:
    """PyTorch's own: uniform within ±1/√(inputs), weights and biases; batch norm begins as the identity.

    With batch norm the scale of a convolution does not matter to what comes out of it, only to the size of the steps.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert layer.bias is not None
            bound = 1 / math.sqrt(layer.weight[0].numel())
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def initialization(
    channels: int, size: int, classes: int, seed: int, scope: str = "encoder"
) -> tuple[Manifest, np.ndarray]:
    """A fresh random φ₀, float32, with its manifest; the same for the same seed.

    Args:
        channels: of the images.
        size: side of the images, in pixels.
        classes: outputs of the head; they matter only where it is shared.
        seed: determines everything.
        scope: what is shared, see SCOPES.
    """
    model = ConvNet(channels, size, classes)
    initialize(model, torch.Generator().manual_seed(seed))
    shared, _ = model.parameters_of(scope)
    return Manifest.of(shared), flatten(shared.values()).numpy()
