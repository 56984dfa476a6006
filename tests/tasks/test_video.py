"""GIFs of play: what is in them, how large they are, and that filming changes nothing."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from a2c_learners import playing
from PIL import Image, ImageSequence
from protocol import config

from leap_dist.config.settings import AtariSettings
from leap_dist.envs import atari_vector
from leap_dist.nn.actor_critic import initialization
from leap_dist.protocol.messages import Ack, Contribution, Idle, Lease, Task
from leap_dist.server.meta_server import MetaServer
from leap_dist.tasks.atari.video import LARGEST, NoVideo, VideoRecorder, dimensions, encode
from leap_dist.worker.run_task import run_task
from leap_dist.worker.start import Start


def lease(visit: int, game: str = "pong", steps: int = 400) -> Lease:
    return Lease(f"{visit:06d}-abc", Task(visit, game, visit, 7, steps), "w0", "i0", 0, 20.0)


def frames(gif: bytes) -> list[np.ndarray]:
    """As RGB."""
    with Image.open(io.BytesIO(gif)) as image:
        assert image.format == "GIF"
        return [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]


def moving(count: int, channels: int) -> list[np.ndarray]:
    """A white square on its way over black."""
    pictures = np.zeros((count, channels, 84, 84), np.uint8)
    for k in range(count):
        pictures[k, :, 20:30, k % 75 : k % 75 + 9] = 255
    return list(pictures)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_gif_shows_the_pictures_in_their_order(channels: int) -> None:
    pictures = moving(40, channels)
    gif = encode(pictures, 133.3)
    assert dimensions(gif) == (84, 84)
    shown = frames(gif)
    assert len(shown) == 40
    for picture, frame in zip(pictures, shown, strict=True):
        assert np.array_equal(np.broadcast_to(picture.transpose(1, 2, 0), (84, 84, 3)), frame)
    with Image.open(io.BytesIO(gif)) as image:
        assert (image.info["duration"], image.info["loop"]) == (130, 0)


def test_gray_is_exact_and_colours_are_close() -> None:
    rng = np.random.default_rng(0)
    gray = rng.integers(0, 256, (3, 1, 84, 84), dtype=np.uint8)
    for picture, frame in zip(gray, frames(encode(list(gray), 130)), strict=True):
        assert np.array_equal(np.repeat(picture[0][..., None], 3, axis=2), frame)
    ramp = np.indices((84, 84)).sum(0).astype(np.uint8)
    colour = np.stack([ramp, 200 - ramp, np.full_like(ramp, 90)])
    (frame,) = frames(encode([colour], 130))
    assert np.abs(frame.astype(int) - colour.transpose(1, 2, 0)).max() <= 16


def test_one_still_picture_is_a_gif_as_well() -> None:
    still = np.full((1, 84, 84), 7, np.uint8)
    assert dimensions(encode([still], 130)) == dimensions(encode([still] * 9, 130)) == (84, 84)


def test_what_is_too_large_loses_pictures_not_time() -> None:
    noise = list(np.random.default_rng(0).integers(0, 256, (120, 1, 84, 84), dtype=np.uint8))
    gif = encode(noise, 130)
    assert LARGEST / 4 < len(gif) <= LARGEST
    shown = frames(gif)
    with Image.open(io.BytesIO(gif)) as image:
        assert len(shown) * image.info["duration"] == pytest.approx(120 * 130, rel=0.1)


@pytest.mark.parametrize(("visits", "interval"), [([0, 5, 10], 5), ([*range(12)], 1), ([], 0)])
def test_every_so_many_visits_are_filmed(visits: list[int], interval: int) -> None:
    recorder = VideoRecorder(config(telemetry__gif_interval=interval))
    assert [visit for visit in range(12) if recorder.start(lease(visit)) > 0] == visits


@pytest.mark.parametrize(
    ("steps", "frame_skip", "first", "pictures"),
    [
        (100_000, 4, 5000 - 24 + 1, 60),
        (100_000, 1, 5000 - 96 + 1, 60),
        (100_000, 30, 5000 - 4 + 1, 20),
        (400, 4, 1, 50),
    ],
)
def test_the_last_eight_seconds_are_filmed(steps: int, frame_skip: int, first: int, pictures: int) -> None:
    settings = config(task_steps=steps, atari__frame_skip=frame_skip)
    recorder = VideoRecorder(settings)
    begin = recorder.start(lease(0))
    assert begin == first
    for picture in moving((settings.rollouts_per_task - begin + 1) * settings.agent.unroll, 1):
        recorder.add_frame(picture)
    recorder.finish(lease(0, steps=steps))
    (clip,) = recorder.take_clips()
    assert (clip.game, clip.step) == ("pong", steps)
    assert len(frames(clip.gif)) == pictures
    assert recorder.take_clips() == []


def test_a_picture_may_be_a_view_into_memory_that_is_used_again() -> None:
    recorder, screen = VideoRecorder(config()), np.zeros((1, 84, 84), np.uint8)
    recorder.start(lease(0))
    for picture in moving(100, 1):
        screen[:] = picture
        recorder.add_frame(screen)
    recorder.finish(lease(0))
    (clip,) = recorder.take_clips()
    assert clip.gif == encode(moving(100, 1)[::2], 2 * 4 * 1000 / 60)


def test_a_task_that_was_broken_off_leaves_nothing_to_the_next() -> None:
    recorder = VideoRecorder(config())
    recorder.start(lease(0))
    recorder.add_frame(moving(1, 1)[0])
    recorder.start(lease(1))  # which is not filmed
    recorder.finish(lease(1))
    assert recorder.take_clips() == []


@pytest.mark.parametrize("kind", ["gray4", "rgb1", "rgb4"])
def test_a_learner_shows_its_newest_frame_of_its_first_environment(kind: Any) -> None:
    seen: list[np.ndarray] = []
    observed: list[np.ndarray] = []
    with playing(settings=AtariSettings(frames=kind)) as learner:
        step = learner._env.step

        def note(actions: np.ndarray) -> atari_vector.Step:
            result = step(actions)
            observed.append(result.observations)
            return result

        learner._env.step = note  # type: ignore[method-assign]
        learner.backward()
        learner.show(lambda picture: seen.append(picture.copy()))
        learner.backward()
    channels = 1 if kind == "gray4" else 3
    assert len(seen) == len(observed[5:]) == 5
    for picture, observation in zip(seen, observed[5:], strict=True):
        assert np.array_equal(picture, observation[0, -channels:])


class Inbox:
    """A server that takes everything, or nothing."""

    def __init__(self, durable: bool = True) -> None:
        self.pushed: list[Contribution] = []
        self._durable = durable

    def renew(self, lease_id: str, incarnation: str, steps: int) -> Ack:
        return Ack(True, False, "", True, 0)

    def push(self, contribution: Contribution) -> Ack:
        self.pushed.append(contribution)
        return Ack(self._durable, contribution.final and self._durable, "", True, 0)

    def snapshot(self) -> tuple[int, np.ndarray]:
        raise AssertionError("nobody shifts here")


def pushed_by(recorder: VideoRecorder | NoVideo, inbox: Inbox, **settings: Any) -> list[Contribution]:
    run = config(worker__device="cpu", **settings)
    start = Start(initialization(atari_vector.channels(run.atari.frames), 0, run.scope)[1])
    run_task(lease(0), start, run, inbox, video=recorder, clock=lambda: 0.0)
    return inbox.pushed


@pytest.mark.parametrize("frames_kind", ["gray4", "rgb1"])
def test_a_filmed_task_sends_the_same_bits(frames_kind: str) -> None:
    settings = {"atari__frames": frames_kind}
    recorder = VideoRecorder(config(**settings))
    filmed, plain = pushed_by(recorder, Inbox(), **settings), pushed_by(NoVideo(), Inbox(), **settings)
    assert len(filmed) == len(plain) == 4
    for one, other in zip(filmed, plain, strict=True):
        assert one.vector.tobytes() == other.vector.tobytes()
        assert one.header() == other.header()
    (clip,) = recorder.take_clips()
    assert (clip.game, clip.step) == ("pong", 400)
    shown = frames(clip.gif)
    assert len(shown) > 10, "the ball moves"
    assert dimensions(clip.gif) == (84, 84)
    assert len(clip.gif) < 50_000


def test_a_task_that_does_not_count_is_not_shown() -> None:
    recorder = VideoRecorder(config())
    pushed_by(recorder, Inbox(durable=False))
    assert recorder.take_clips() == []


def test_in_sync_the_initialization_has_the_same_bits_with_films_and_without(tmp_path: Path) -> None:
    """Of a whole run, heads and ledger included."""
    results = []
    for interval in (0, 1):
        run = config(mode="sync", telemetry__gif_interval=interval, worker__device="cpu")
        run_dir = tmp_path / str(interval)
        run_dir.mkdir()
        manifest, initial = initialization(atari_vector.channels(run.atari.frames), run.seed, run.scope)
        server, recorder = MetaServer(run, run_dir, manifest=manifest, initial=initial), VideoRecorder(run)
        clips = 0
        while not isinstance(granted := server.lease("w0", "i0"), Idle):
            run_task(granted, Start(server.snapshot()[1]), run, server, video=recorder)
            clips += len(recorder.take_clips())
        lines, _ = server.ledger(0)
        results.append(
            (server.snapshot()[1].tobytes(), [line["path"] for line in lines], run.total_tasks if interval else 0)
        )
        assert clips == results[-1][-1]
        server.close()
    assert results[0][:2] == results[1][:2]
    assert len(results[0][1]) == replace(run, meta_updates=2).total_tasks == 4
