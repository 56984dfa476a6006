"""From the emulator's screens to what the agent sees: colours, max-pooling, resizing.

From one step to the next, little of a screen changes: all work here is done for the words of eight pixels, and then
for the tiles, that did. The result is nonetheless a function of the last two screens alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from math import gcd

import numpy as np
from ale_py import ALEInterface

FRAME_SIZE = 84
WIDTH = 160
WORD = 8  # pixels that are compared at once
ACROSS = gcd(WIDTH, FRAME_SIZE)  # tiles side by side: 4
TILE_WIDTH, TILE_COLUMNS = WIDTH // ACROSS, FRAME_SIZE // ACROSS  # 40 pixels become 21
GRAY, RGB = slice(0, 1), slice(1, 4)
UNKNOWN = 255
MULTIPLICATIONS = 2**18
"""Of a matrix product, up to which OpenBLAS stays on the calling thread; waking others takes longer than they save."""


class Palette:
    """What a game's 256 colour indices stand for, learnt from the emulator's own conversion of its screens."""

    def __init__(self) -> None:
        self._known = np.zeros(256, bool)
        self._tables = np.full((4, 256), UNKNOWN, np.uint8)  # gray, red, green, blue
        self._rows = [table.tobytes() for table in self._tables]

    def convert(self, indices: bytes, colours: slice, shown_by: Iterable[ALEInterface]) -> bytes:
        """Looks up `indices`, which the emulators are showing just now. Returns one colour after the other."""
        converted = self._look_up(indices, colours)
        if UNKNOWN in converted and not self._known[wanted := list(set(indices))].all():
            for ale in shown_by:
                self._learn(ale)
                if self._known[wanted].all():
                    break
            assert self._known[wanted].all(), "an index that no emulator shows"
            converted = self._look_up(indices, colours)
        return converted

    def _look_up(self, indices: bytes, colours: slice) -> bytes:
        return b"".join([indices.translate(row) for row in self._rows[colours]])

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
    """The one of that game in this process: what it has learnt, it knows for the next task too."""
    return Palette()


def overlaps(size: int, into: int) -> np.ndarray:
    """Area averaging of `size` pixels to `into`: (into, size), rows sum to `size`; whole numbers, hence exact."""
    starts, ends = np.arange(size) * into, np.arange(1, into + 1)[:, None] * size
    shared = np.minimum(starts + into, ends) - np.maximum(starts, ends - size)
    return shared.clip(0).astype(np.float32)


class Frames:
    """The last two screens of N emulators, and the frames that they make.

    A tile is the smallest part of a screen that is resized to whole pixels: 5 × 40 → 2 × 21 where screens have 210
    rows, up to 125 × 40 where they have others.

    Args:
        count: N.
        height: of a screen, which is 160 pixels wide.
        colours: GRAY or RGB, C colours.
        palette: the game's.

    Attributes:
        screens: [2][N], uint8 (height, 160), colour indices of the last two frames: the last but one, then the last.
    """

    def __init__(self, count: int, height: int, colours: slice, palette: Palette) -> None:
        self._palette, self._colours = palette, colours
        self._pixels = np.zeros((2, count, height, WIDTH), np.uint8)
        self.screens = [list(screens) for screens in self._pixels]
        self._words = self._pixels.reshape(2, -1).view(np.uint64)
        self._seen = np.full_like(self._words, 2**64 - 1)  # nothing yet: indices are even
        planes = colours.stop - colours.start
        self._converted = np.zeros((2, planes, self._pixels[0].size), np.uint8)
        self._images = np.zeros((planes, count, FRAME_SIZE, FRAME_SIZE), np.uint8)

        bands = gcd(height, FRAME_SIZE)
        self._rows = overlaps(height // bands, FRAME_SIZE // bands)
        self._columns = overlaps(TILE_WIDTH, TILE_COLUMNS).T.copy()
        self._at_once = max(1, MULTIPLICATIONS // max(self._rows.size * TILE_WIDTH, self._columns.size))
        self._stale = np.ones(count * bands * ACROSS, bool)

    def see(self, k: int, emulators: Iterable[ALEInterface]) -> None:
        """Takes note of what changed on `screens[k]`, which the emulators must still be showing."""
        changed = np.flatnonzero(self._words[k] != self._seen[k])
        words = self._words[k][changed]
        self._seen[k][changed] = words
        converted = np.frombuffer(self._palette.convert(words.tobytes(), self._colours, emulators), np.uint64)
        self._converted[k].view(np.uint64)[:, changed] = converted.reshape(len(self._images), len(changed))
        row, column = np.divmod(changed, WIDTH // WORD)
        self._stale[row // self._rows.shape[1] * ACROSS + column // (TILE_WIDTH // WORD)] = True

    def pool_alone(self, where: np.ndarray, emulators: Iterable[ALEInterface]) -> None:
        """Pools the last frame with itself, in the environments `where`, bool (N,): there was none before it."""
        if where.any():
            self._pixels[0, where] = self._pixels[1, where]
            self.see(0, emulators)

    def images(self) -> np.ndarray:
        """The brighter of both screens, pixel by pixel and colour by colour, resized: uint8 (N, C, 84, 84), a view.

        Each pixel is the mean over its area, rounded, and half to even.
        """
        stale = np.flatnonzero(self._stale)
        self._stale[stale] = False
        for start in range(0, len(stale), self._at_once):
            self._resize(stale[start : start + self._at_once])
        return self._images.swapaxes(0, 1)

    def _resize(self, tiles: np.ndarray) -> None:
        """Pools and resizes K tiles, by number."""
        into, height = self._rows.shape
        rows = self._converted.view(f"V{TILE_WIDTH}").take(rows_of(tiles, height), axis=2)
        first, second = rows.view(np.uint8).reshape(2, -1, height, len(tiles) * TILE_WIDTH)
        pooled = np.maximum(first, second).astype(np.float32)  # (C, rows, pixels of that row in all tiles)
        sums = (self._rows @ pooled).reshape(-1, into, len(tiles), TILE_WIDTH) @ self._columns
        means = np.rint(sums / np.float32(height * TILE_WIDTH)).astype(np.uint8)
        images = self._images.reshape(len(self._images), -1).view(f"V{TILE_COLUMNS}")
        images[:, rows_of(tiles, into)] = means.view(images.dtype)[..., 0]


def rows_of(tiles: np.ndarray, height: int) -> np.ndarray:
    """Where the rows of tiles, `height` each, are among the rows of all tiles as pictures hold them: (height, K)."""
    band, column = np.divmod(tiles, ACROSS)
    return (band * height + np.arange(height)[:, None]) * ACROSS + column
