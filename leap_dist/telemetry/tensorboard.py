"""TensorBoard: curves, pictures, text and settings of a run, a projection of the ledger.

Every tag is written at most once per step, at strictly increasing steps: the last step of each tag is read back from
the event files that exist, and a point that is not beyond it is skipped. So after a crash the driver calls `record`
with the whole ledger from its first line, and curves are neither lost nor doubled. `purge_step` is not used for this:
run `server` holds several axes (versions, agent steps, seconds), and a purge would cut them all at one number.

    run          tags                    step
    server       meta/*                  version, that is, meta-updates made; a picture among them
    server       meta_frames/*           agent steps (or examples) of all contributions applied so far
    server       ops/*                   wall seconds over all launches
    game/<game>  task/*                  agent steps (or examples) of this game in all contributions applied so far
    game/<game>  play/<game>             the same, had all its tasks been trained in full

What is not in the ledger, ops/* and pictures, may have a gap after a crash. `tags` has all names. Values of one run and
step share a record: TensorBoard opens the file anew for each, which is slow on shared disks.
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

from google.protobuf.message import DecodeError
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat import tf
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter
from torch.utils.tensorboard import summary as summaries

from leap_dist.config import metrics
from leap_dist.config.settings import Config
from leap_dist.tasks.atari.video import Clip, dimensions
from leap_dist.telemetry.heatmap import draw
from leap_dist.telemetry.hyperparameters import session_end, session_start
from leap_dist.telemetry.projection import GAME, SERVER, Event, Projection, operations
from leap_dist.telemetry.tags import AGREEMENT, PLAY, custom_scalars

log = logging.getLogger(__name__)

_ERRORS = (OSError, tf.errors.OpError)  # of the disk, as Python and as TensorBoard's file layer report them
RETRY_SECONDS = 60.0  # between two attempts to write after one failed
_OVER = ("done", "interrupted", "failed")  # states after which this launch reports no more
_RGB = 3  # a colour space, of pictures


class TensorBoard:
    """The single writer of `run_dir/tensorboard`.

    Writing never stops training: where the disk will not take it, what is in the ledger is kept in memory and written
    once that works again, at the latest when the run is resumed.

    Args:
        run_dir: the run directory; event files of earlier launches are read, never changed.
        agreement_interval: meta-updates between two pictures of how far the games agree, at least; 0 for none.
        clock: monotonic seconds.
    """

    def __init__(
        self, run_dir: Path, *, agreement_interval: int = 10, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._root = run_dir / "tensorboard"
        self._agreement_interval = agreement_interval
        self._clock = clock
        self._retry_at = -math.inf
        self._last: dict[str, dict[str, int]] = {}  # run → tag → last step written
        self._writers: dict[str, FileWriter] = {}
        self._pending: list[Event] = []  # not known to be on disk
        self._projection = Projection()
        self.failures = 0
        """How often the event files could not be read or written."""
        try:
            for folder in (self._root / SERVER, *self._root.glob("game/*")):
                self._last_steps(folder.relative_to(self._root).as_posix())
        except _ERRORS as error:
            self._give_up(error)

    def begin(self, config: Config) -> None:
        """Adds how the curves are laid out, and the settings to compare runs by, where they are not there yet."""
        layout = custom_scalars(metrics.for_config(config))
        self._pending.append(Event(SERVER, 0, [*layout.value, *session_start(config)]))
        self._write()

    def record(self, lines: list[dict[str, Any]], summary: dict[str, Any], clips: Sequence[Clip] = ()) -> None:
        """Writes what new ledger lines say, the state of operations from the driver's summary, and pictures.

        The lines follow those of the call before, in whole meta-updates; the first call of an instance starts with
        the ledger's first line. In the event files when this returns, unless writing failed.
        """
        self._pending += self._projection.events(lines)
        if summary["state"] == "done":  # what failed or was interrupted may be gone on with: its end is still open
            self._pending.append(Event(SERVER, 0, session_end()))
        self._write(itertools.chain(self._operations(summary), self._agreement(summary), _clips(clips)))

    def text(self, tag: str, text: str) -> None:
        """Adds Markdown to run `server`, where there is none of that tag yet."""
        self._pending.append(Event(SERVER, 0, list(summaries.text(tag, text).value)))
        self._write()

    def flush(self) -> None:
        """Writes what an earlier failure left over, without waiting for the next attempt to be due."""
        self._retry_at = -math.inf
        self._write()

    def close(self) -> None:
        """Flushes and closes the event files."""
        self.flush()
        self._close_files()

    # Writing -----------------------------------------------------------------------------------------------------

    def _write(self, extra: Iterable[Event] = ()) -> None:
        """Writes all that is pending, then `extra`, which is dropped where that fails."""
        if self._clock() < self._retry_at:
            return
        try:
            for event in itertools.chain(self._pending, extra):
                self._add(event)
            for writer in self._writers.values():
                writer.flush()
        except _ERRORS as error:
            self._give_up(error)
        else:
            self._pending.clear()

    def _add(self, event: Event) -> None:
        last = self._last_steps(event.run)
        fresh = [value for value in event.values if event.step > last.get(value.tag, -1)]
        if not fresh:
            return
        if event.run not in self._writers:
            self._writers[event.run] = FileWriter(self._root / event.run)
        self._writers[event.run].add_summary(Summary(value=fresh), event.step)
        last.update((value.tag, event.step) for value in fresh)

    def _last_steps(self, run: str) -> dict[str, int]:
        if run not in self._last:
            self._last[run] = _read_last_steps(self._root / run)
        return self._last[run]

    def _give_up(self, error: Exception) -> None:
        """Until the next attempt. Files of a failed writer may lack what it was given, so they are read again then."""
        self.failures += 1
        if self.failures == 1:
            log.warning("TensorBoard's files cannot be written; training goes on, curves wait: %s", error)
        self._retry_at = self._clock() + RETRY_SECONDS
        self._close_files()
        self._last.clear()

    def _close_files(self) -> None:
        for writer in self._writers.values():
            with contextlib.suppress(*_ERRORS):
                writer.close()
        self._writers.clear()

    # What is not in the ledger -----------------------------------------------------------------------------------

    def _operations(self, summary: dict[str, Any]) -> Iterator[Event]:
        event = operations(summary, self.failures)
        last = self._last_steps(SERVER).get("ops/workers_alive", -1)
        # Further apart the longer the run: a week of seconds would take minutes to read back on resume.
        if event.step - last >= max(1, last // 1000):
            yield event

    def _agreement(self, summary: dict[str, Any]) -> Iterator[Event]:
        """The picture, now and then and at the end; further apart the longer the run, too."""
        version, agreement = int(summary["meta_updates"]), summary["agreement_between_games"]
        new = version - self._last_steps(SERVER).get(AGREEMENT, 0)
        due = new >= max(self._agreement_interval, version // 20) or (new > 0 and summary["state"] in _OVER)
        if self._agreement_interval and due and len(agreement["games"]) > 1:
            picture = draw(agreement["games"], agreement["cosines"], version)
            yield Event(SERVER, version, [_image(AGREEMENT, *picture)])


def _clips(clips: Iterable[Clip]) -> Iterator[Event]:
    """What workers filmed, where it is what it should be: nothing else is to be served to a browser."""
    for clip in clips:
        try:
            width, height = dimensions(clip.gif)
        except ValueError as error:
            log.warning("a film of %s is left out: %s", ascii(clip.game)[:80], error)
            continue
        if GAME.fullmatch(clip.game):
            yield Event(f"game/{clip.game}", clip.step, [_image(f"{PLAY}/{clip.game}", clip.gif, width, height)])


def _image(tag: str, encoded: bytes, width: int, height: int) -> Summary.Value:
    image = Summary.Image(width=width, height=height, colorspace=_RGB, encoded_image_string=encoded)
    return Summary.Value(tag=tag, image=image)


def _read_last_steps(folder: Path) -> dict[str, int]:
    """The last step of every tag in the event files of a run. A record that is torn or damaged ends its file."""
    last: dict[str, int] = {}
    for path in folder.glob("events.out.tfevents.*"):
        if path.is_symlink() or not path.is_file():
            continue
        with contextlib.suppress(DecodeError, MemoryError, OverflowError):
            for event in LegacyEventFileLoader(str(path)).Load():
                for value in event.summary.value:
                    last[value.tag] = max(event.step, last.get(value.tag, -1))
    return last
