"""A vector in 16 or 8 bits a number: blocks of 256, each with a scale of its own.

In a block with largest magnitude m the step is m / 32767 (16 bits) or m / 127 (8 bits), and a number becomes the
nearest whole number of steps, ties to even. So each element is off by at most half a step of its block, and by what
float32 rounds, which is less than 0.005 of a step; zeros stay zeros. Blocks of which m / 32767 (m / 127) is below
float32's smallest normal number, 2⁻¹²⁶, become zeros. A block that is not finite is NaN afterwards, all of it.

A contribution is cumulative, and each is packed anew, from the exact sum. So what one push rounds off the next one
brings back: however many pushes there were, the sum of what the server applied of a lease is off by half a step of
the *last* one. To pack the differences between pushes would add up their errors.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BLOCK = 256
LIMITS = {16: 32767, 8: 127}
"""Largest code by bits."""
_TYPES: dict[int, type[np.signedinteger]] = {16: np.int16, 8: np.int8}
_SMALLEST = np.finfo(np.float32).tiny  # below it, arithmetic depends on whether the processor flushes


class Quantized(NamedTuple):
    """A packed vector."""

    codes: np.ndarray
    """int16 or int8, one for each number."""
    scales: np.ndarray
    """Float32, one for each block: the step."""

    @property
    def vector(self) -> np.ndarray:
        """What it stands for, in a new float32 array: the same bits wherever it is computed."""
        vector = self.codes.astype(np.float32)
        whole = self.codes.size // BLOCK * BLOCK
        with np.errstate(invalid="ignore"):  # 0 × ∞, of a block that is to be refused
            blocks = vector[:whole].reshape(-1, BLOCK)
            blocks *= self.scales[: whole // BLOCK, None]
            vector[whole:] *= self.scales[whole // BLOCK :].repeat(vector.size - whole)
        return vector

    def check(self) -> None:
        """Raises ValueError where the parts do not belong together."""
        codes, scales = self.codes, self.scales
        if codes.ndim != 1 or codes.dtype not in _TYPES.values():
            raise ValueError("codes are not one row of int16 or int8")
        if scales.dtype != np.float32 or scales.shape != (-(-codes.size // BLOCK),):
            raise ValueError("scales are not float32, one for each block")
        if (scales < 0).any() or (codes < -LIMITS[8 * codes.itemsize]).any():
            raise ValueError("codes or scales are nothing that a vector is packed into")


def quantize(vector: np.ndarray, bits: int) -> Quantized:
    """Packs a flat float32 vector into 16 or 8 bits a number, and 32 bits a block. Raises ValueError otherwise."""
    if bits not in LIMITS or vector.ndim != 1 or vector.dtype != np.float32:
        raise ValueError(f"{bits} bits of {vector.dtype} with {vector.ndim} axes; choose 16 or 8 bits, flat float32")
    count = -(-vector.size // BLOCK)
    padded = np.zeros(count * BLOCK, np.float32)
    padded[: vector.size] = vector
    blocks = padded.reshape(count, BLOCK)
    with np.errstate(invalid="ignore", over="ignore"):
        scales = np.maximum(blocks.max(axis=1), -blocks.min(axis=1)) / np.float32(LIMITS[bits])
        finite = np.isfinite(scales)
        too_large = finite & ~np.isfinite(scales * np.float32(LIMITS[bits]))
        scales[too_large] = np.nextafter(scales[too_large], np.float32(0))
    scales[finite & (scales < _SMALLEST)] = 0
    scales[~finite] = np.nan
    usable = finite & (scales > 0)
    blocks[~usable] = 0
    blocks /= np.where(usable, scales, np.float32(1))[:, None]
    np.rint(blocks, out=blocks)
    return Quantized(padded[: vector.size].astype(_TYPES[bits]), scales)
