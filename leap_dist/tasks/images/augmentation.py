"""Random affine images out of a data set that stays bytes: looked up pixel by pixel, a batch at a time.

The authors' Omniglot code draws for each image an angle in [0°, 360°), a shift of up to a fifth of its width and height
and a scale between 0.8 and 1.2, takes the nearest pixel, and 0 where there is none. Appendix C speaks of 36 rotations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Family:
    """A family of affine maps to draw from."""

    angles: int
    """How many angles there are, evenly over the circle; 0: all of them."""
    shift: float
    """At most, of width and of height."""
    scales: tuple[float, float]


FAMILIES = {
    "affine": Family(angles=0, shift=0.2, scales=(0.8, 1.2)),
    "rotations": Family(angles=36, shift=0.0, scales=(1.0, 1.0)),
}


def draw(family: Family, count: int, generator: torch.Generator) -> Tensor:
    """(count, 2, 3) float32: where each pixel of an image comes from, both relative to the centre and the size.

    With θ the angle, s the scale and t the shift, an image turned, scaled and shifted has at p what was at
    R(−θ)(p − t)/s. Coordinates are (x, y), y downwards, and ±½ is an edge; images are square.
    """
    turn, move_x, move_y, size = torch.rand(count, 4, generator=generator).unbind(1)
    if family.angles:
        turn = (turn * family.angles).floor() / family.angles
    low, high = family.scales
    inverse = 1 / (low + (high - low) * size)
    cosine, sine = inverse * (2 * math.pi * turn).cos(), inverse * (2 * math.pi * turn).sin()
    x, y = family.shift * (2 * move_x - 1), family.shift * (2 * move_y - 1)
    return torch.stack(
        [cosine, sine, -cosine * x - sine * y, -sine, cosine, sine * x - cosine * y],
        dim=1,
    ).view(count, 2, 3)


def look_up(images: Tensor, index: Tensor, maps: Tensor) -> Tensor:
    """The images of the data set at `index`, each through its map: uint8 (N, S, S, C), 0 where it reaches outside.

    Args:
        images: uint8 (M, S, S, C).
        index: int64 (N,).
        maps: (N, 2, 3), as `draw` gives them.
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
