"""Videos of play for people to watch: GIF, MP4 if OpenCV is installed, and pictures for a terminal."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SUFFIXES = (".gif", ".mp4")
"""Suffixes of the supported file formats."""
SCALE = 2
"""Factor by which screens are enlarged: the emulator's are 160 pixels wide."""
GIF_FRAMES_PER_SECOND = 15.0
"""Largest number of pictures per second of a GIF. Many programs play faster GIFs at another speed."""


def can_write(path: Path) -> str:
    """Return "" if a video can be written to a file of this name, else the reason why not."""
    if path.suffix not in SUFFIXES:
        return f"{path.name} is neither a .gif nor a .mp4"
    if path.suffix == ".mp4" and importlib.util.find_spec("cv2") is None:
        return f"{path.name} needs the package opencv-python-headless; install it, or name a .gif"
    return ""


def write(path: Path, screens: Sequence[np.ndarray], frames_per_second: float) -> None:
    """Write screens, uint8 (height, width, 3), as a video in real time.

    The suffix of the name determines the format; see `can_write`. Raises OSError if the file cannot be written.
    """
    if path.suffix == ".gif":
        _write_gif(path, screens, frames_per_second)
    else:
        _write_mp4(path, screens, frames_per_second)


def _write_gif(path: Path, screens: Sequence[np.ndarray], frames_per_second: float) -> None:
    stride = max(1, round(frames_per_second / GIF_FRAMES_PER_SECOND))
    first, *rest = [_enlarged(screen).quantize(128, dither=Image.Dither.NONE) for screen in screens[::stride]]
    milliseconds = round(stride * 1000 / frames_per_second, -1)  # GIFs count hundredths of a second
    first.save(path, "GIF", save_all=True, append_images=rest, duration=int(milliseconds), loop=0, optimize=False)


def _write_mp4(path: Path, screens: Sequence[np.ndarray], frames_per_second: float) -> None:
    import cv2  # an optional package

    height, width = (SCALE * side for side in screens[0].shape[:2])
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), frames_per_second, (width, height))
    if not writer.isOpened():
        raise OSError(f"{path} cannot be written by this version of OpenCV")
    for screen in screens:
        writer.write(np.ascontiguousarray(np.asarray(_enlarged(screen))[:, :, ::-1]))
    writer.release()


def _enlarged(screen: np.ndarray) -> Image.Image:
    height, width = screen.shape[:2]
    return Image.fromarray(screen).resize((SCALE * width, SCALE * height), Image.Resampling.NEAREST)


def for_terminal(screen: np.ndarray, columns: int) -> str:
    """Return a screen as text of `columns` characters a line, for terminals with 24-bit colors.

    Each character is an upper half block, whose two colors are two pixels.
    """
    rows = 2 * max(1, round(columns * screen.shape[0] / screen.shape[1] / 3))
    pixels = np.asarray(Image.fromarray(screen).resize((columns, rows), Image.Resampling.BOX))
    lines = []
    for pairs in zip(pixels[::2], pixels[1::2], strict=True):
        cells = [_cell(upper, lower) for upper, lower in zip(*pairs, strict=True)]
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


def _cell(upper: np.ndarray, lower: np.ndarray) -> str:
    colors = (";".join(map(str, color)) for color in (upper, lower))
    return "\x1b[38;2;{}m\x1b[48;2;{}m▀".format(*colors)
