"""Quantization of vectors to 16 or 8 bits per number, in blocks of 256 with one scale each.

In a block with largest magnitude m the step is m / 32767 (16 bits) or m / 127 (8 bits), and each number is rounded to
the nearest multiple of it, ties to even. An element is off by at most half a step of its block, plus float32 rounding
of less than 0.005 of a step; zeros stay zeros. A block whose step would be below float32's smallest normal number,
2⁻¹²⁶, becomes zeros. A block that is not finite becomes NaN as a whole.

Contributions are cumulative, and each is quantized anew from the exact sum, so the next push corrects the rounding of
the last: after any number of pushes, what the server has applied for a lease is off by half a step of the *last*
push. Quantizing the differences between pushes would add up their errors instead.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BLOCK = 256
"""Numbers per block."""
LIMITS = {16: 32767, 8: 127}
"""Largest code by number of bits."""
_TYPES: dict[int, type[np.signedinteger]] = {16: np.int16, 8: np.int8}
_MIN_SCALE = np.finfo(np.float32).tiny  # below it, results depend on whether the processor flushes subnormal numbers


class Quantized(NamedTuple):
    """A quantized vector."""

    codes: np.ndarray
    """int16 or int8 code of each number."""
    scales: np.ndarray
    """float32 step of each block."""

    @property
    def vector(self) -> np.ndarray:
        """The vector that this represents, as a new float32 array; the same bits on every machine."""
        vector = self.codes.astype(np.float32)
        whole = self.codes.size // BLOCK * BLOCK
        with np.errstate(invalid="ignore"):  # 0 × ∞, in a block that will be refused
            blocks = vector[:whole].reshape(-1, BLOCK)
            blocks *= self.scales[: whole // BLOCK, None]
            vector[whole:] *= self.scales[whole // BLOCK :].repeat(vector.size - whole)
        return vector

    def check(self) -> None:
        """Raise ValueError if the parts do not belong together."""
        codes, scales = self.codes, self.scales
        if codes.ndim != 1 or codes.dtype not in _TYPES.values():
            raise ValueError("codes are not a flat array of int16 or int8")
        if scales.dtype != np.float32 or scales.shape != (-(-codes.size // BLOCK),):
            raise ValueError("scales are not float32, one for each block")
        if (scales < 0).any() or (codes < -LIMITS[8 * codes.itemsize]).any():
            raise ValueError("codes or scales are out of range")


def quantize(vector: np.ndarray, bits: int) -> Quantized:
    """Quantize a flat float32 vector to 16 or 8 bits per number, plus 32 bits per block. Raises ValueError."""
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
    scales[finite & (scales < _MIN_SCALE)] = 0
    scales[~finite] = np.nan
    usable = finite & (scales > 0)
    blocks[~usable] = 0
    blocks /= np.where(usable, scales, np.float32(1))[:, None]
    np.rint(blocks, out=blocks)
    return Quantized(padded[: vector.size].astype(_TYPES[bits]), scales)
