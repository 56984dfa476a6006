"""A few seconds of play as the agent sees them: recorded and encoded by the worker, to be shown by TensorBoard.

Pictures are only taken of what training looks at anyway: no step is played for them, no random number drawn.
"""

from __future__ import annotations

import io
import struct
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from leap_dist.config.settings import Config
from leap_dist.protocol.messages import Lease

SECONDS = 8.0
PICTURE_FRAMES = 8
"""ALE frames from picture to picture, of which there are 60 in a second."""
LARGEST = 300_000
"""Bytes of a GIF."""
LONGEST_SIDE = 512  # pixels


class Play(NamedTuple):
    """A GIF of a game being played."""

    game: str
    step: int
    """Agent steps of the game's tasks up to the end of the one that was filmed, had all been trained in full."""
    gif: bytes


class Film:
    """Films the end of every so many-th task of each game. It may go from task to task; it only watches."""

    def __init__(self, config: Config) -> None:
        self._interval = config.telemetry.gif_interval
        self._rollouts = config.rollouts_per_task
        self._unroll = config.agent.unroll
        frame_skip = config.atari.frame_skip
        self._every = max(1, PICTURE_FRAMES // frame_skip)  # agent steps from picture to picture
        self._milliseconds = self._every * frame_skip * 1000 / 60
        self._steps = int(SECONDS * 60 / frame_skip)
        self._seen = 0
        self._pictures: list[np.ndarray] = []
        self._done: deque[Play] = deque(maxlen=10)

    def start(self, lease: Lease) -> int:
        """A task begins. Returns the number of its rollout, counted from 1, from which on `see` is to be called.

        0 where this task is not filmed.
        """
        self._seen, self._pictures = 0, []
        if not self._interval or lease.task.visit % self._interval:
            return 0
        return max(1, self._rollouts - -(-self._steps // self._unroll) + 1)

    def see(self, picture: np.ndarray) -> None:
        """What one environment shows at an agent step, uint8 (C, H, W), C being 1 or 3. It is copied."""
        if self._seen % self._every == 0:
            self._pictures.append(picture.copy())
        self._seen += 1

    def finish(self, lease: Lease) -> None:
        """The task is over, and counts."""
        if self._pictures:
            step = (lease.task.visit + 1) * lease.task.steps
            self._done.append(Play(lease.task.game, step, encode(self._pictures, self._milliseconds)))
            self._pictures = []

    def hand_over(self) -> list[Play]:
        """What was filmed since the last call. Another thread than the one that films may ask."""
        return [self._done.popleft() for _ in range(len(self._done))]


class NoFilm:
    """Where nobody wants one."""

    def start(self, lease: Lease) -> int:
        """Never."""
        return 0

    def see(self, picture: np.ndarray) -> None:
        """Does nothing."""

    def finish(self, lease: Lease) -> None:
        """Does nothing."""

    def hand_over(self) -> list[Play]:
        """Nothing."""
        return []


def encode(pictures: Sequence[np.ndarray], milliseconds: float) -> bytes:
    """A GIF of uint8 (C, H, W) pictures, C being 1 or 3, that are shown for so long each, and then again.

    At most LARGEST bytes: half of the pictures are left out, and the others shown for twice as long, until it is.
    """
    while True:
        first, *rest = [_image(picture) for picture in pictures]
        file = io.BytesIO()
        first.save(file, "GIF", save_all=True, append_images=rest, duration=round(milliseconds, -1), loop=0)
        if file.tell() <= LARGEST or len(pictures) == 1:
            return file.getvalue()
        pictures, milliseconds = pictures[::2], 2 * milliseconds


def dimensions(gif: bytes) -> tuple[int, int]:
    """Width and height of a GIF as `encode` makes them. Raises ValueError where it is none, or too large."""
    if len(gif) > LARGEST:
        raise ValueError(f"a GIF of {len(gif):,} bytes")
    if not (gif.startswith(b"GIF89a") and gif.endswith(b";") and len(gif) > 13):
        raise ValueError("not a GIF")
    width, height = struct.unpack("<HH", gif[6:10])
    if not (1 <= width <= LONGEST_SIDE and 1 <= height <= LONGEST_SIDE):
        raise ValueError(f"a GIF of {width} × {height} pixels")
    return width, height


def _image(picture: np.ndarray) -> Image.Image:
    """With a palette, which is all that a GIF knows: of gray, or of the 256 colours that fit best."""
    if len(picture) == 1:
        return Image.fromarray(picture[0])
    return Image.fromarray(picture.transpose(1, 2, 0)).quantize(256, dither=Image.Dither.NONE)
