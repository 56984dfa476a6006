"""The network of the supervised experiments (appendices C and D), and which of its parameters all tasks share.

It has four blocks of convolution 3 × 3 × 64, max-pooling 2 × 2, batch norm and ReLU, and one linear layer. An image of
28 × 28 pixels becomes 64 features, one of 32 × 32 becomes 256. The order of the layers in a block differs between
sources (setting `supervised.network`):

    pool-norm   pooling, batch norm, ReLU: the authors' published code
    norm-pool   batch norm, ReLU, pooling: Vinyals et al. 2016 and Finn et al. 2017, whom appendix C cites
    authors     pool-norm, with the scales γ of batch norm drawn from [0, 1), as the PyTorch of that time did
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
"""Smallest height and width in pixels of an image that still has features after the last block."""
NETWORKS = ("pool-norm", "norm-pool", "authors")
"""Values of the setting `supervised.network`."""


def computes_alike(one: str, other: str) -> bool:
    """Return whether two of NETWORKS compute the same: "authors" has other initial values than "pool-norm"."""
    return (one == "norm-pool") == (other == "norm-pool")


SCOPES = {"convolutions": ("block",), "encoder": ("block",), "model": ("",)}
"""Prefixes of the names of the shared parameters: all but the head (with those of batch norm), or all."""


class Convolution(nn.Conv2d):
    """A convolution whose bias gets no gradient.

    Batch norm, which follows, removes the bias again, so the gradient is 0. Torch would compute that 0 as a sum over
    the largest tensors of the network.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Return the convolution (N, filters, S, S) of images (N, channels, S, S)."""
        assert self.bias is not None
        convolved: Tensor = self._conv_forward(images, self.weight, self.bias.detach())
        return convolved


class Block(nn.Module):
    """Convolution, max-pooling, batch norm and ReLU: (N, channels, S, S) → (N, 64, ⌊S/2⌋, ⌊S/2⌋).

    Args:
        channels: number of channels of the input.
        norm_first: whether batch norm and ReLU come before pooling. Pooling first leaves them a quarter of the work.
    """

    def __init__(self, channels: int, norm_first: bool = False) -> None:
        super().__init__()
        self._norm_first = norm_first
        self.conv = Convolution(channels, FILTERS, kernel_size=3, padding=1)
        self.norm = nn.BatchNorm2d(FILTERS)

    def forward(self, images: Tensor) -> Tensor:
        """Apply the block."""
        if self._norm_first:
            return F.max_pool2d(F.relu(self.norm(self.conv(images)), inplace=True), 2)
        return F.relu(self.norm(F.max_pool2d(self.conv(images), 2)), inplace=True)


class ConvNet(nn.Module):
    """Images (N, channels, size, size) → logits (N, classes).

    Its memory layout is channels last, which is faster on a CPU, most of all for max-pooling (docs/performance.md).
    `network` is the setting `supervised.network`.
    """

    def __init__(self, channels: int, size: int, classes: int, network: str = "pool-norm") -> None:
        super().__init__()
        self.draws_scales = network == "authors"
        self.block1, self.block2, self.block3, self.block4 = (
            Block(channels if number == 0 else FILTERS, network == "norm-pool") for number in range(BLOCKS)
        )
        self.head = nn.Linear(FILTERS * (size // 2**BLOCKS) ** 2, classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes).

        In training mode batch norm uses the statistics of the batch, else the averages over training so far.
        """
        features: Tensor = self.block4(self.block3(self.block2(self.block1(images))))
        with torch.autocast(images.device.type, enabled=False):  # the product is so small that casts would cost more
            logits: Tensor = self.head(features.flatten(1).float())
        return logits

    def parameters_of(self, scope: str) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """Return the parameters that all tasks share and those that are the task's own, by name (see SCOPES)."""
        shared: dict[str, nn.Parameter] = {}
        local: dict[str, nn.Parameter] = {}
        for name, parameter in self.named_parameters():
            (shared if name.startswith(SCOPES[scope]) else local)[name] = parameter
        return shared, local

    @contextmanager
    def without_trace(self) -> Iterator[None]:
        """Return a context that restores batch norm's averages when it ends."""
        kept = [buffer.clone() for buffer in self.buffers()]
        try:
            yield
        finally:
            for buffer, before in zip(self.buffers(), kept, strict=True):
                buffer.copy_(before)


def initialize(model: ConvNet, generator: torch.Generator) -> None:
    """Set weights and biases as PyTorch does by default: uniform within ±1/√(inputs). Batch norm starts as identity.

    With `authors`, the scales of batch norm are drawn from [0, 1) instead, after all other values.
    With batch norm, the scale of a convolution does not change its output, only the relative size of the steps.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert layer.bias is not None
            bound = 1 / math.sqrt(layer.weight[0].numel())
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    for layer in model.modules():
        if model.draws_scales and isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0, 1, generator=generator)


def initialization(
    channels: int, size: int, classes: int, seed: int, scope: str = "encoder", network: str = "pool-norm"
) -> tuple[Manifest, np.ndarray]:
    """Return a fresh random φ₀, flat float32, and its manifest. The same seed gives the same φ₀.

    Args:
        channels: number of channels of the images.
        size: height and width of the images in pixels.
        classes: number of outputs of the head; it matters only if the head is shared.
        seed: seed of all weights and biases.
        scope: name of the set of shared parameters, a key of SCOPES.
        network: order of layers and initial scales, as in the setting `supervised.network`.
    """
    model = ConvNet(channels, size, classes, network)
    initialize(model, torch.Generator().manual_seed(seed))
    shared, _ = model.parameters_of(scope)
    return Manifest.of(shared), flatten(shared.values()).numpy()
