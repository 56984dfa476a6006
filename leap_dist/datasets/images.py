"""Image files of known formats, decoded within bounds and resized."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from leap_dist.datasets.reading import DatasetError, read_bounded

_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    OverflowError,
    IndexError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""Exceptions of Pillow for image files that are damaged or too large."""
MOST_BYTES = 32 * 2**20
"""Largest size of an image file."""


def decode_image(path: Path, formats: Sequence[str], largest: int) -> Image.Image:
    """Decode an image file in one of these formats.

    Raises DatasetError if it is something else, damaged, or more than `largest` pixels wide or high.
    """
    data = read_bounded(path, MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise DatasetError(f"{path} has more than {MOST_BYTES:,} bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=list(formats))
            if max(image.size) > largest:
                raise ValueError(f"{image.width} × {image.height} pixels are more than {largest} × {largest}")
            image.load()
    except _DECODE_ERRORS as error:
        reason = ascii(" ".join(str(error).split())[:160])[1:-1]
        # Pillow's message names the memory buffer, which tells the user nothing.
        reason = "it is no such file" if "cannot identify" in reason else reason
        raise DatasetError(f"{path} cannot be read as {' or '.join(formats)}: {reason}") from None
    return image


def to_rgb(image: Image.Image, size: int) -> np.ndarray:
    """Return the whole image in color, uint8 (size, size, 3). Its aspect ratio is not kept."""
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def pad(images: np.ndarray, size: int) -> np.ndarray:
    """Pad images (N, H, H) with a border of zeros to (N, size, size)."""
    before = (size - images.shape[1]) // 2
    after = size - images.shape[1] - before
    return np.pad(images, ((0, 0), (before, after), (before, after)))


def resize(images: np.ndarray, size: int, how: Image.Resampling = Image.Resampling.LANCZOS) -> np.ndarray:
    """Resize gray images, uint8 (N, H, W), to (N, size, size)."""
    resized = np.empty((len(images), size, size), np.uint8)
    for row, image in enumerate(images):
        resized[row] = np.asarray(Image.fromarray(image).resize((size, size), how))
    return resized
