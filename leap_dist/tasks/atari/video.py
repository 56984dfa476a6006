"""Short GIFs of play as the agent sees it, recorded and encoded by the worker and shown in TensorBoard.

Recording uses only frames that training produces anyway: it plays no extra step and draws no random number.
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
"""Length of a clip in game time."""
PICTURE_FRAMES = 8
"""ALE frames between two pictures; 60 frames are a second."""
LARGEST = 300_000
"""Largest size of a GIF in bytes."""
LONGEST_SIDE = 512
"""Largest width and height of a GIF in pixels."""


class Clip(NamedTuple):
    """A GIF of a game being played."""

    game: str
    step: int
    """Agent steps of the game's tasks up to the end of the recorded one, if all of them had been trained in full."""
    gif: bytes


class VideoRecorder:
    """Records the end of every n-th task of each game (setting `telemetry.gif_interval`).

    One recorder may be used for several tasks in turn; it only observes.
    """

    def __init__(self, config: Config) -> None:
        self._interval = config.telemetry.gif_interval
        self._rollouts = config.rollouts_per_task
        self._unroll = config.agent.unroll
        frame_skip = config.atari.frame_skip
        self._stride = max(1, PICTURE_FRAMES // frame_skip)  # agent steps from picture to picture
        self._milliseconds = self._stride * frame_skip * 1000 / 60
        self._steps = int(SECONDS * 60 / frame_skip)
        self._frames = 0
        self._pictures: list[np.ndarray] = []
        self._clips: deque[Clip] = deque(maxlen=10)

    def start(self, lease: Lease) -> int:
        """Begin a task. Return the number of the first rollout to record, counted from 1; 0 to record none."""
        self._frames, self._pictures = 0, []
        if not self._interval or lease.task.visit % self._interval:
            return 0
        return max(1, self._rollouts - -(-self._steps // self._unroll) + 1)

    def add_frame(self, picture: np.ndarray) -> None:
        """Add what one environment shows at an agent step, uint8 (C, H, W) with C = 1 or 3. The array is copied."""
        if self._frames % self._stride == 0:
            self._pictures.append(picture.copy())
        self._frames += 1

    def finish(self, lease: Lease) -> None:
        """End a task that was trained in full, and encode its clip."""
        if self._pictures:
            step = (lease.task.visit + 1) * lease.task.steps
            self._clips.append(Clip(lease.task.game, step, encode(self._pictures, self._milliseconds)))
            self._pictures = []

    def take_clips(self) -> list[Clip]:
        """Return the clips recorded since the last call. Safe to call from another thread."""
        return [self._clips.popleft() for _ in range(len(self._clips))]


class NoVideo:
    """No-op recorder, used for tasks that have nothing to record."""

    def start(self, lease: Lease) -> int:
        """Return 0: no rollout is recorded."""
        return 0

    def add_frame(self, picture: np.ndarray) -> None:
        """Do nothing."""

    def finish(self, lease: Lease) -> None:
        """Do nothing."""

    def take_clips(self) -> list[Clip]:
        """Return an empty list."""
        return []


def encode(pictures: Sequence[np.ndarray], milliseconds: float) -> bytes:
    """Encode pictures, uint8 (C, H, W) with C = 1 or 3, as an endless GIF of at most LARGEST bytes.

    `milliseconds` is the duration of each picture. As long as the GIF is too large, every other picture is dropped and
    the duration doubled.
    """
    while True:
        first, *rest = [_image(picture) for picture in pictures]
        file = io.BytesIO()
        first.save(file, "GIF", save_all=True, append_images=rest, duration=round(milliseconds, -1), loop=0)
        if file.tell() <= LARGEST or len(pictures) == 1:
            return file.getvalue()
        pictures, milliseconds = pictures[::2], 2 * milliseconds


def dimensions(gif: bytes) -> tuple[int, int]:
    """Return width and height of a GIF made by `encode`. Raises ValueError if it is not one, or too large."""
    if len(gif) > LARGEST:
        raise ValueError(f"a GIF of {len(gif):,} bytes")
    if not (gif.startswith(b"GIF89a") and gif.endswith(b";") and len(gif) > 13):
        raise ValueError("not a GIF")
    width, height = struct.unpack("<HH", gif[6:10])
    if not (1 <= width <= LONGEST_SIDE and 1 <= height <= LONGEST_SIDE):
        raise ValueError(f"a GIF of {width} × {height} pixels")
    return width, height


def _image(picture: np.ndarray) -> Image.Image:
    """Convert a picture to a palette image, the only kind a GIF can hold: gray, or the 256 best-fitting colors."""
    if len(picture) == 1:
        return Image.fromarray(picture[0])
    return Image.fromarray(picture.transpose(1, 2, 0)).quantize(256, dither=Image.Dither.NONE)
