"""Random affine augmentation: pixels of a batch are looked up in a data set that stays bytes.

The authors' Omniglot code draws for each image an angle in [0°, 360°), a shift of up to a fifth of its width and height
and a scale between 0.8 and 1.2. It takes the nearest pixel, and 0 outside the image. Appendix C mentions 36 rotations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AffineDistribution:
    """A distribution of affine maps."""

    angles: int
    """Number of equally spaced angles to draw from; 0 for the continuous uniform distribution."""
    shift: float
    """Largest shift as a fraction of width and height."""
    scales: tuple[float, float]
    """Smallest and largest scale."""


DISTRIBUTIONS = {
    "affine": AffineDistribution(angles=0, shift=0.2, scales=(0.8, 1.2)),
    "rotations": AffineDistribution(angles=36, shift=0.0, scales=(1.0, 1.0)),
}
"""By value of the setting `supervised.augmentation`."""


def draw_maps(distribution: AffineDistribution, count: int, generator: torch.Generator) -> Tensor:
    """Draw affine maps from output to source coordinates, float32 (count, 2, 3).

    With angle θ, scale s and shift t, the output at p is the source at R(−θ)(p − t)/s. Coordinates are (x, y) with y
    pointing down, relative to the center of a square image, whose edges are at ±½.
    """
    turn, move_x, move_y, size = torch.rand(count, 4, generator=generator).unbind(1)
    if distribution.angles:
        turn = (turn * distribution.angles).floor() / distribution.angles
    low, high = distribution.scales
    inverse = 1 / (low + (high - low) * size)
    cosine, sine = inverse * (2 * math.pi * turn).cos(), inverse * (2 * math.pi * turn).sin()
    x, y = distribution.shift * (2 * move_x - 1), distribution.shift * (2 * move_y - 1)
    return torch.stack(
        [cosine, sine, -cosine * x - sine * y, -sine, cosine, sine * x - cosine * y],
        dim=1,
    ).view(count, 2, 3)


def transform(images: Tensor, index: Tensor, maps: Tensor) -> Tensor:
    """Apply affine maps to selected images, with 0 outside of the source image.

    Args:
        images: all images, uint8 (M, S, S, C).
        index: numbers of the images to select, int64 (N,).
        maps: one map for each, float32 (N, 2, 3), as returned by `draw_maps`.

    Returns:
        Transformed images, uint8 (N, S, S, C).
    """
    side = images.shape[1]
    assert images.shape[2] == side, images.shape
    along = (torch.arange(side, device=images.device) - (side - 1) / 2) / side
    down, right = torch.meshgrid(along, along, indexing="ij")
    here = torch.stack([right.flatten(), down.flatten(), torch.ones_like(right).flatten()])
    source = ((maps @ here) * side + (side - 1) / 2).round_().long()  # (N, 2, S²)
    inside = ((source >= 0) & (source < side)).all(1, keepdim=True).transpose(1, 2)
    x, y = source.clamp_(0, side - 1).unbind(1)
    pixels = images.reshape(-1, images.shape[3])[(index[:, None] * side + y) * side + x]  # (N, S², C)
    return (pixels * inside).view(len(index), *images.shape[1:])
