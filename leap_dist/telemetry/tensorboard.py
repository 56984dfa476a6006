"""TensorBoard: curves, images, text and settings of a run, as a projection of the ledger.

Every tag is written at most once per step, at strictly increasing steps: the last step of each tag is read back from
existing event files, and points that are not beyond it are skipped. So after a crash the driver calls `record` with the
ledger from the stored position (or from its first line), and no point of a curve is lost or doubled. `purge_step` would
not do: run `server` has several axes (versions, agent steps, seconds), and a purge would cut all of them at one number.

    run          tags                    step
    server       meta/*                  version, that is, number of meta-updates
    server       meta_frames/*           agent steps (or examples) of all contributions applied so far
    server       ops/*                   wall seconds over all launches
    game/<game>  task/*                  agent steps (or examples) of this game in all contributions applied so far
    game/<game>  play/<game>             the same, if all its tasks had been trained in full

What is not in the ledger (ops/* and images) may have a gap after a crash. `tags` lists all names. Values of one run and
step share a record, because TensorBoard opens the file anew for each record, which is slow on shared disks.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import summary as summaries

from leap_dist.config import registry
from leap_dist.config.loading import fixed_settings
from leap_dist.config.registry import ERROR, RETURN
from leap_dist.config.settings import Config
from leap_dist.tasks.atari.video import Clip, dimensions
from leap_dist.telemetry import projection
from leap_dist.telemetry.event_file import EventFile, read_events
from leap_dist.telemetry.overview import ABOUT, GROUP, overview
from leap_dist.telemetry.projection import GAME, SERVER, Event, Position, Projection, operations
from leap_dist.telemetry.tags import AGREEMENT, PLAY, custom_scalars

_OF_EVERY_RUN = ("meta/loss", "meta/path_length", "meta/agreement", "ops/steps_per_second")
METRICS = {
    RETURN: ("meta/score_human_normalized", "meta/score_iqm", *_OF_EVERY_RUN),
    ERROR: ("meta/error", *_OF_EVERY_RUN),
}
"""Tags whose last values are shown beside the settings."""


def session_start(config: Config) -> list[Summary.Value]:
    """Return the values that declare the hyperparameters and give this run's settings that cannot change."""
    settings = {
        # Booleans would be taken for numbers, and lists are not accepted; both become text.
        name: value if isinstance(value, int | float) and not isinstance(value, bool) else _text(value)
        for name, value in fixed_settings(config).items()
    }
    experiment, start, _ = summaries.hparams(settings, dict.fromkeys(METRICS[registry.for_config(config)]))
    return [*experiment.value, *start.value]


def session_end() -> list[Summary.Value]:
    """Return the values that mark the run as successful."""
    return list(summaries.hparams({}, {})[2].value)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


log = logging.getLogger(__name__)

RETRY_SECONDS = 60.0
"""Time between two attempts to write after a failure."""
POSITION_SECONDS = 30.0
"""Minimum time between two saves of the position in the ledger."""
MOST_PENDING = 200_000
"""Number of events that are kept while the disk fails. If there are more, the next launch takes up the ledger again."""
_OVER = ("done", "interrupted", "failed")  # final states of a launch
_RGB = 3  # color space of an image summary


class TensorBoard:
    """The single writer of `run_dir/tensorboard`.

    Training never stops because of TensorBoard: if the disk fails, curves are kept in memory and written once the disk
    works again, at the latest when the run is resumed.

    Args:
        run_dir: the run directory. Event files of earlier launches are read, but never changed.
        listener: called with what is written to the event files, each value once.
        agreement_interval: smallest number of meta-updates between two heat maps of agreement; 0 for none.
        clock: monotonic clock in seconds.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        agreement_interval: int = 10,
        clock: Callable[[], float] = time.monotonic,
        listener: Callable[[Event], None] | None = None,
    ) -> None:
        self._root = run_dir / "tensorboard"
        self._agreement_interval = agreement_interval
        self._clock = clock
        self._listener = listener
        self._retry_at = -math.inf
        self._position = projection.load(self._root)
        self._position_due = clock() + POSITION_SECONDS
        self._last: dict[str, dict[str, int]] = {}  # run → tag → last step written
        self._files: dict[str, EventFile] = {}
        self._pending: list[Event] = []  # events that may not be on disk
        self._projection = Projection(self._position.steps, self._position.scores)
        self._recorded = self._position.offset
        self._gave_up = False  # whether curves are left to the next launch
        self._about = ""
        self.failures = 0
        """Number of failures to read or write the event files."""
        self.alerts: list[str] = []
        """Messages for the user."""
        try:
            for folder in (self._root / SERVER, *self._root.glob("game/*")):
                self._last_steps(folder.relative_to(self._root).as_posix())
        except OSError as error:
            self._give_up(error)

    @property
    def offset(self) -> int:
        """Offset in bytes of the ledger line to begin with."""
        return self._position.offset

    def begin(self, config: Config) -> None:
        """Write the layout of the custom scalars and the hyperparameters, unless they were written before."""
        layout = custom_scalars(registry.for_config(config))
        self._pending.append(Event(SERVER, 0, [*layout.value, *session_start(config)]))
        self._write()

    def record(
        self,
        lines: list[dict[str, Any]],
        summary: dict[str, Any],
        clips: Sequence[Clip] = (),
        offset: int | None = None,
    ) -> None:
        """Write curves from new ledger lines, the state of the service from the driver's summary, and videos.

        The lines continue those of the last call in whole meta-updates; the first call starts at `self.offset`.
        `offset` is that after the lines. All is in the event files when this returns, unless writing failed.
        """
        if not self._gave_up:
            self._pending += self._projection.events(lines)
            self._recorded = self._recorded if offset is None else offset
        if len(self._pending) > MOST_PENDING:
            self._pending.clear()
            self._gave_up = True
        if summary["state"] == "done":  # a failed or interrupted run may be resumed
            self._pending.append(Event(SERVER, 0, session_end()))
        pictures = itertools.chain(self._description(summary), self._agreement(summary), _clips(clips))
        self._write(itertools.chain(self._operations(summary), pictures))

    def about(self, text: str) -> None:
        """Describe the run on the page Text, and in a picture on the first screen once training is under way."""
        self._about = text
        self.text("about", text)

    def text(self, tag: str, text: str) -> None:
        """Add Markdown to run `server`, unless the tag has some already."""
        self._pending.append(Event(SERVER, 0, list(summaries.text(tag, text).value)))
        self._write()

    def flush(self) -> None:
        """Write pending events at once, even if the next attempt is not due yet."""
        self._retry_at = -math.inf
        self._write()

    def close(self) -> None:
        """Flush and close the event files."""
        self._position_due = -math.inf
        self.flush()
        self._close_files()

    # Writing

    def _write(self, extra: Iterable[Event] = ()) -> None:
        """Write pending events, then `extra` ones, which are dropped if writing fails."""
        if self._clock() < self._retry_at:
            return
        try:
            for event in itertools.chain(self._pending, extra):
                self._add(event)
                for copy in overview(event):
                    self._add(copy)
            for file in self._files.values():
                file.flush()
        except OSError as error:
            self._give_up(error)
        else:
            self._pending.clear()
            self._save_position()

    def _add(self, event: Event) -> None:
        last = self._last_steps(event.run)
        fresh = [value for value in event.values if event.step > last.get(value.tag, -1)]
        if not fresh:
            return
        if event.run not in self._files:
            self._files[event.run] = EventFile(self._root / event.run)
        self._files[event.run].add(Summary(value=fresh), event.step)
        last.update((value.tag, event.step) for value in fresh)
        if self._listener is not None and not fresh[0].tag.startswith(GROUP):  # copies of values it already has
            self._listener(Event(event.run, event.step, fresh))

    def _last_steps(self, run: str) -> dict[str, int]:
        if run not in self._last:
            last = dict(self._position.last.get(run, {}))
            for path in (self._root / run).glob("events.out.tfevents.*"):
                if path.is_file() and not path.is_symlink():
                    _read_last_steps(path, self._position.sizes.get(path.relative_to(self._root).as_posix(), 0), last)
            self._last[run] = last
        return self._last[run]

    def _save_position(self) -> None:
        """Store the position now and then. All curves up to it are in the event files."""
        if self._clock() < self._position_due or self._gave_up or not self._recorded:
            return
        self._position_due = self._clock() + POSITION_SECONDS
        sizes = self._position.sizes | {
            file.path.relative_to(self._root).as_posix(): file.size for file in self._files.values()
        }
        last = self._position.last | {run: dict(steps) for run, steps in self._last.items()}
        state = self._projection
        self._position = Position(self._recorded, "", dict(state.steps), dict(state.scores), last, sizes)
        with contextlib.suppress(OSError):  # then the next launch reads more
            projection.save(self._root, self._position)

    def _give_up(self, error: Exception) -> None:
        """Stop writing until the next attempt. Since files may lack recent events, they are read back then."""
        self.failures += 1
        if self.failures == 1:
            self.alerts.append(f"TensorBoard's files cannot be written; curves are kept in memory for now: {error}")
            log.warning(self.alerts[-1])
        self._retry_at = self._clock() + RETRY_SECONDS
        self._close_files()
        self._last.clear()

    def _close_files(self) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        self._files.clear()

    # Values that are not in the ledger

    def _operations(self, summary: dict[str, Any]) -> Iterator[Event]:
        event = operations(summary, self.failures)
        last = self._last_steps(SERVER).get("ops/workers_alive", -1)
        # The longer the run, the larger the interval; otherwise a week's values would take minutes to read back.
        if event.step - last >= max(1, last // 1000):
            yield event

    def _description(self, summary: dict[str, Any]) -> Iterator[Event]:
        if self._about and (summary.get("steps_per_second") or summary["state"] == "done"):
            if ABOUT not in self._last_steps(SERVER):
                from leap_dist.telemetry.pictures import draw_text  # matplotlib is slow to import

                yield Event(SERVER, 0, [_image(ABOUT, *draw_text(self._about))])
            self._about = ""

    def _agreement(self, summary: dict[str, Any]) -> Iterator[Event]:
        """Return the heat map of agreement if it is due: the longer the run, the less often, and at the end."""
        version, agreement = int(summary["meta_updates"]), summary["agreement_between_games"]
        new = version - self._last_steps(SERVER).get(AGREEMENT, 0)
        due = new >= max(self._agreement_interval, version // 20) or (new > 0 and summary["state"] in _OVER)
        if self._agreement_interval and due and len(agreement["games"]) > 1:
            from leap_dist.telemetry.pictures import draw  # matplotlib is slow to import

            picture = draw(agreement["games"], agreement["cosines"], version)
            yield Event(SERVER, version, [_image(AGREEMENT, *picture)])


def _clips(clips: Iterable[Clip]) -> Iterator[Event]:
    """Return the events of valid videos. Invalid ones are dropped, since TensorBoard serves them to browsers."""
    for clip in clips:
        try:
            width, height = dimensions(clip.gif)
        except ValueError as error:
            log.warning("a video of %s is left out: %s", ascii(clip.game)[:80], error)
            continue
        if GAME.fullmatch(clip.game):
            yield Event(f"game/{clip.game}", clip.step, [_image(f"{PLAY}/{clip.game}", clip.gif, width, height)])


def _image(tag: str, encoded: bytes, width: int, height: int) -> Summary.Value:
    image = Summary.Image(width=width, height=height, colorspace=_RGB, encoded_image_string=encoded)
    return Summary.Value(tag=tag, image=image)


def _read_last_steps(path: Path, start: int, last: dict[str, int]) -> None:
    """Bring the last step of every tag up to date from byte `start` of an event file on. Raises OSError."""
    with contextlib.suppress(OverflowError):
        for event in read_events(path, start):
            for value in event.summary.value:
                last[value.tag] = max(event.step, last.get(value.tag, -1))
