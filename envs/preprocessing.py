"""Preprocessing of the emulator's screens to observations: colors, max-pooling and resizing.

Little of a screen changes from step to step, so only changed words (of eight pixels) and changed tiles are processed.
The result is nevertheless a function of the last two screens alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from math import gcd

import numpy as np
from ale_py import ALEInterface

FRAME_SIZE = 84
WIDTH = 160
WORD = 8  # number of pixels that are compared at once
ACROSS = gcd(WIDTH, FRAME_SIZE)  # number of tiles side by side: 4
TILE_WIDTH, TILE_COLUMNS = WIDTH // ACROSS, FRAME_SIZE // ACROSS  # 40 pixels become 21
GRAY, RGB = slice(0, 1), slice(1, 4)
UNKNOWN = 255
MULTIPLICATIONS = 2**18
"""Largest matrix product that OpenBLAS computes on the calling thread; waking others would take longer."""


class Palette:
    """The colors of a game's 256 color indices, learned from the emulator's own conversion of its screens."""

    def __init__(self) -> None:
        self._known = np.zeros(256, bool)
        self._tables = np.full((4, 256), UNKNOWN, np.uint8)  # gray, red, green, blue
        self._rows = [table.tobytes() for table in self._tables]

    def convert(self, indices: bytes, colors: slice, shown_by: Iterable[ALEInterface]) -> bytes:
        """Convert `indices` that the emulators show at present. Return the planes one after the other."""
        converted = self._convert_known(indices, colors)
        if UNKNOWN in converted and not self._known[wanted := list(set(indices))].all():
            for ale in shown_by:
                self._learn(ale)
                if self._known[wanted].all():
                    break
            assert self._known[wanted].all(), "no emulator shows this index"
            converted = self._convert_known(indices, colors)
        return converted

    def _convert_known(self, indices: bytes, colors: slice) -> bytes:
        return b"".join([indices.translate(row) for row in self._rows[colors]])

    def _learn(self, ale: ALEInterface) -> None:
        indices = ale.getScreen()
        if self._known[indices].all():
            return
        self._known[indices] = True
        self._tables[0, indices] = ale.getScreenGrayscale()
        self._tables[1:, indices] = ale.getScreenRGB().transpose(2, 0, 1)
        self._rows = [table.tobytes() for table in self._tables]


@cache
def palette(game: str) -> Palette:
    """Return the game's palette in this process, which keeps what it has learned from task to task."""
    return Palette()


def overlaps(size: int, into: int) -> np.ndarray:
    """Return the matrix (into, size) of area averaging from `size` pixels to `into`, times `size`: whole numbers."""
    starts, ends = np.arange(size) * into, np.arange(1, into + 1)[:, None] * size
    shared = np.minimum(starts + into, ends) - np.maximum(starts, ends - size)
    return shared.clip(0).astype(np.float32)


class Frames:
    """The last two screens of N emulators, and the observations made from them.

    A tile is the smallest part of a screen that is resized to whole pixels: 5 × 40 becomes 2 × 21 for screens with 210
    rows; other screens have tiles of up to 125 × 40.

    Args:
        count: number of emulators N.
        height: height of a screen, which is 160 pixels wide.
        colors: GRAY or RGB, with C planes.
        palette: the game's palette.

    Attributes:
        screens: [2][N] arrays, uint8 (height, 160): color indices of the last frame but one, then of the last.
    """

    def __init__(self, count: int, height: int, colors: slice, palette: Palette) -> None:
        self._palette, self._colors = palette, colors
        self._pixels = np.zeros((2, count, height, WIDTH), np.uint8)
        self.screens = [list(screens) for screens in self._pixels]
        self._words = self._pixels.reshape(2, -1).view(np.uint64)
        self._seen = np.full_like(self._words, 2**64 - 1)  # no screen has this value, since indices are even
        planes = colors.stop - colors.start
        self._converted = np.zeros((2, planes, self._pixels[0].size), np.uint8)
        self._images = np.zeros((planes, count, FRAME_SIZE, FRAME_SIZE), np.uint8)

        bands = gcd(height, FRAME_SIZE)
        self._rows = overlaps(height // bands, FRAME_SIZE // bands)
        self._columns = overlaps(TILE_WIDTH, TILE_COLUMNS).T.copy()
        self._at_once = max(1, MULTIPLICATIONS // max(self._rows.size * TILE_WIDTH, self._columns.size))
        self._stale = np.ones(count * bands * ACROSS, bool)

    def update(self, k: int, emulators: Iterable[ALEInterface]) -> None:
        """Convert what has changed on `screens[k]`. The emulators must still show these screens."""
        changed = np.flatnonzero(self._words[k] != self._seen[k])
        words = self._words[k][changed]
        self._seen[k][changed] = words
        converted = np.frombuffer(self._palette.convert(words.tobytes(), self._colors, emulators), np.uint64)
        self._converted[k].view(np.uint64)[:, changed] = converted.reshape(len(self._images), len(changed))
        row, column = np.divmod(changed, WIDTH // WORD)
        self._stale[row // self._rows.shape[1] * ACROSS + column // (TILE_WIDTH // WORD)] = True

    def pool_alone(self, where: np.ndarray, emulators: Iterable[ALEInterface]) -> None:
        """Pool the last frame with itself in the environments `where`, bool (N,), which have no frame before it."""
        if where.any():
            self._pixels[0, where] = self._pixels[1, where]
            self.update(0, emulators)

    def images(self) -> np.ndarray:
        """Return the maximum of both screens for each pixel and plane, resized: uint8 (N, C, 84, 84), a view.

        Each pixel is the mean over its area, rounded half to even.
        """
        stale = np.flatnonzero(self._stale)
        self._stale[stale] = False
        for start in range(0, len(stale), self._at_once):
            self._resize(stale[start : start + self._at_once])
        return self._images.swapaxes(0, 1)

    def _resize(self, tiles: np.ndarray) -> None:
        """Pool and resize K tiles, given by number."""
        into, height = self._rows.shape
        rows = self._converted.view(f"V{TILE_WIDTH}").take(rows_of(tiles, height), axis=2)
        first, second = rows.view(np.uint8).reshape(2, -1, height, len(tiles) * TILE_WIDTH)
        pooled = np.maximum(first, second).astype(np.float32)  # (C, rows, pixels of that row in all tiles)
        sums = (self._rows @ pooled).reshape(-1, into, len(tiles), TILE_WIDTH) @ self._columns
        means = np.rint(sums / np.float32(height * TILE_WIDTH)).astype(np.uint8)
        images = self._images.reshape(len(self._images), -1).view(f"V{TILE_COLUMNS}")
        images[:, rows_of(tiles, into)] = means.view(images.dtype)[..., 0]


def rows_of(tiles: np.ndarray, height: int) -> np.ndarray:
    """Return the positions (height, K) of K tiles' rows among the rows of all tiles, in the order of an image."""
    band, column = np.divmod(tiles, ACROSS)
    return (band * height + np.arange(height)[:, None]) * ACROSS + column
