"""Films of play: GIF, MP4 and pictures for a terminal."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
from PIL import Image

from leap_dist.tasks.atari import film

SCREENS = [np.full((210, 160, 3), 10 * number, np.uint8) for number in range(24)]


@pytest.mark.parametrize(("rate", "pictures", "milliseconds"), [(15.0, 24, 70), (60.0, 6, 70), (5.0, 24, 200)])
def test_a_gif_is_in_real_time_and_twice_the_size(tmp_path, rate, pictures, milliseconds):
    film.write(tmp_path / "x.gif", SCREENS, rate)
    with Image.open(tmp_path / "x.gif") as gif:
        assert (gif.n_frames, gif.size) == (pictures, (320, 420))
        assert gif.info["duration"] == milliseconds
        gif.seek(3)
        first = 10 * 3 * round(max(1, rate / 15))
        assert abs(gif.convert("RGB").getpixel((100, 100))[0] - first) <= 2


def test_an_mp4_has_every_screen(tmp_path):
    cv2 = pytest.importorskip("cv2")
    film.write(tmp_path / "x.mp4", SCREENS, 15.0)
    video = cv2.VideoCapture(str(tmp_path / "x.mp4"))
    frames = []
    while (read := video.read())[0]:
        frames.append(read[1])
    assert len(frames) == len(SCREENS)
    assert frames[0].shape == (420, 320, 3)
    assert abs(int(frames[20].mean()) - 200) < 5


def test_what_cannot_be_written_is_said_before(tmp_path, monkeypatch):
    assert film.can_write(tmp_path / "x.gif") == ""
    assert film.can_write(tmp_path / "x.avi") == "x.avi is neither a .gif nor a .mp4"
    monkeypatch.setattr(film.importlib.util, "find_spec", lambda name: None)
    assert "opencv-python-headless" in film.can_write(tmp_path / "x.mp4")
    assert film.can_write(tmp_path / "x.gif") == ""
    assert "cv2" not in [name for name in sys.modules if name == "leap_dist.tasks.atari.cv2"]


def test_a_terminal_gets_two_pixels_for_each_character():
    screen = np.zeros((210, 160, 3), np.uint8)
    screen[105:] = (255, 0, 10)
    lines = film.for_terminal(screen, 30).splitlines()
    assert len(lines) == 13  # half as many as pixels, in the proportions of a television
    assert [len(re.sub("\x1b\\[[0-9;]*m", "", line)) for line in lines] == 13 * [30]
    assert "38;2;0;0;0m" in lines[0]
    assert "48;2;255;0;10m" in lines[-1]
