"""Plain version of this project's encoder, without its optimizations, for use in the peers."""

from __future__ import annotations

from torch import nn

FEATURES = 256


def encoder(channels: int) -> nn.Sequential:
    """Return conv 16·8×8/4 → conv 32·4×4/2 → linear 256, each with a ReLU: (N, C, 84, 84) in [0, 1] → (N, 256)."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, kernel_size=8, stride=4),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=4, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 9 * 9, FEATURES),
        nn.ReLU(),
    )
