"""Affine images: against a slow and explicit implementation, and in the cases whose answer is obvious."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leap_dist.tasks.images.augmentation import DISTRIBUTIONS, draw_maps, transform


def slowly(image: np.ndarray, angle: float, scale: float, shift: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """An image (S, S, C) turned by `angle`, scaled and shifted (pixels), and where rounding could go either way."""
    side = len(image)
    centre = (side - 1) / 2
    result, unsure = np.zeros_like(image), np.zeros((side, side), bool)
    for row in range(side):
        for column in range(side):
            x, y = (column - centre - shift[0]) / scale, (row - centre - shift[1]) / scale
            from_x = math.cos(angle) * x + math.sin(angle) * y + centre
            from_y = -math.sin(angle) * x + math.cos(angle) * y + centre
            unsure[row, column] = min(abs(from_x % 1 - 0.5), abs(from_y % 1 - 0.5)) < 1e-4
            if 0 <= round(from_x) < side and 0 <= round(from_y) < side:
                result[row, column] = image[round(from_y), round(from_x)]
    return result, unsure


def noise(seed: int, count: int, side: int, channels: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, (count, side, side, channels), dtype=np.uint8)


def read(maps: torch.Tensor, side: int) -> list[tuple[float, float, tuple[float, float]]]:
    """(angle, scale, shift in pixels) of each map, from its matrix alone."""
    found = []
    for inverse in maps.double().numpy():
        forward = np.linalg.inv(inverse[:, :2])
        scale = math.sqrt(np.linalg.det(forward))
        shift = -forward @ inverse[:, 2] * side
        found.append((math.atan2(forward[1, 0], forward[0, 0]), scale, (shift[0], shift[1])))
    return found


@settings(max_examples=20)
@given(
    st.integers(0, 2**31 - 1), st.sampled_from(sorted(DISTRIBUTIONS)), st.sampled_from([5, 8]), st.sampled_from([1, 3])
)
def test_a_batch_of_affine_images_is_what_a_slow_implementation_makes(seed, family, side, channels):
    images = noise(seed, 4, side, channels)
    index = torch.tensor([2, 0, 2])
    maps = draw_maps(DISTRIBUTIONS[family], 3, torch.Generator().manual_seed(seed))
    found = transform(torch.from_numpy(images), index, maps).numpy()
    assert found.dtype == np.uint8
    for one, source, transformation in zip(found, images[index], read(maps, side), strict=True):
        expected, unsure = slowly(source, *transformation)
        assert unsure.mean() < 0.9
        np.testing.assert_array_equal(one[~unsure], expected[~unsure])


def test_what_is_drawn_fills_the_ranges_of_the_authors():
    angles, scales, shifts = zip(
        *read(draw_maps(DISTRIBUTIONS["affine"], 4000, torch.Generator().manual_seed(0)), 28), strict=True
    )
    quarters = np.histogram(angles, 4, (-math.pi, math.pi))[0]
    assert (abs(quarters - 1000) < 120).all()
    assert min(scales) == pytest.approx(0.8, abs=0.001)
    assert max(scales) == pytest.approx(1.2, abs=0.001)
    assert np.mean(scales) == pytest.approx(1.0, abs=0.01)
    for along in np.array(shifts).T:
        assert along.min() == pytest.approx(-5.6, abs=0.02)
        assert along.max() == pytest.approx(5.6, abs=0.02)
        assert along.mean() == pytest.approx(0, abs=0.2)


def test_rotations_are_36_and_nothing_else():
    angles, scales, shifts = zip(
        *read(draw_maps(DISTRIBUTIONS["rotations"], 500, torch.Generator().manual_seed(0)), 28), strict=True
    )
    degrees = np.degrees(angles) % 360
    np.testing.assert_allclose(degrees, 10 * np.round(degrees / 10), atol=1e-3)
    assert {round(d / 10) % 36 for d in degrees} == set(range(36))
    np.testing.assert_allclose(scales, 1.0, rtol=1e-6)
    np.testing.assert_allclose(shifts, 0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ([[1, 0, 0], [0, 1, 0]], lambda image: image),
        ([[0, 1, 0], [-1, 0, 0]], lambda image: np.rot90(image, -1)),
        ([[-1, 0, 0], [0, -1, 0]], lambda image: np.rot90(image, 2)),
        ([[1, 0, -1 / 6], [0, 1, 0]], lambda image: np.pad(image, ((0, 0), (1, 0), (0, 0)))[:, :6]),
        ([[1, 0, 0], [0, 1, 2 / 6]], lambda image: np.pad(image, ((0, 2), (0, 0), (0, 0)))[2:]),
        ([[1, 0, 5], [0, 1, 0]], np.zeros_like),
    ],
    ids=["as it is", "a quarter clockwise", "a half", "one to the right", "two up", "out of the picture"],
)
def test_obvious_maps(matrix, expected):
    images = noise(0, 3, 6, 3)
    found = transform(torch.from_numpy(images), torch.tensor([1]), torch.tensor([matrix], dtype=torch.float32))
    np.testing.assert_array_equal(found[0].numpy(), expected(images[1]))


def test_the_data_set_is_left_alone():
    images = torch.from_numpy(noise(0, 3, 6, 1))
    before = images.clone()
    transform(
        images, torch.tensor([0, 1]), draw_maps(DISTRIBUTIONS["affine"], 2, torch.Generator().manual_seed(0))
    ).fill_(0)
    assert torch.equal(images, before)
