"""Pictures of known formats, decoded within bounds, and brought to one size."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from leap_dist.datasets.bounded import Unusable, read_within

_DAMAGE = (
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
"""What Pillow raises where a picture is damaged, or larger than it will unpack."""
MOST_BYTES = 32 * 2**20
"""Of a picture's file."""


def open_picture(path: Path, formats: Sequence[str], largest: int) -> Image.Image:
    """A decoded picture of one of these formats, at most `largest` pixels wide and high. Raises Unusable."""
    data = read_within(path, MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise Unusable(f"{path} has more than {MOST_BYTES:,} bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=list(formats))
            if max(image.size) > largest:
                raise ValueError(f"{image.width} × {image.height} pixels are more than {largest} × {largest}")
            image.load()
    except _DAMAGE as error:
        reason = ascii(" ".join(str(error).split())[:160])[1:-1]
        # Pillow names the buffer that it was given, which says nothing to anyone.
        reason = "it is no such file" if "cannot identify" in reason else reason
        raise Unusable(f"{path} cannot be read as {' or '.join(formats)}: {reason}") from None
    return image


def colour(image: Image.Image, size: int) -> np.ndarray:
    """The whole picture in colour at `size` × `size`, uint8 (size, size, 3); the sides' proportion is not kept."""
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def pad(images: np.ndarray, size: int) -> np.ndarray:
    """(N, H, H) with zeros around it, as (N, size, size)."""
    before = (size - images.shape[1]) // 2
    after = size - images.shape[1] - before
    return np.pad(images, ((0, 0), (before, after), (before, after)))


def resize(images: np.ndarray, size: int, how: Image.Resampling = Image.Resampling.LANCZOS) -> np.ndarray:
    """(N, H, W) grey as (N, size, size). Lanczos' filter averages where it makes images smaller."""
    resized = np.empty((len(images), size, size), np.uint8)
    for row, image in enumerate(images):
        resized[row] = np.asarray(Image.fromarray(image).resize((size, size), how))
    return resized
