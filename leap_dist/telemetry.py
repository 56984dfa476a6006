"""TensorBoard curves, a projection of the ledger.

Every tag is written at most once per step, at strictly increasing steps: the last step of each tag is read back from
the event files that exist, and a point that is not beyond it is skipped. So after a crash the driver calls `record`
with the whole ledger from its first line, and curves are neither lost nor doubled. `purge_step` is not used for this:
run `server` holds several axes (versions, agent steps, seconds), and a purge would cut them all at one number.

    run          tags                    step
    server       meta/*                  version, that is, meta-updates made
    server       meta_frames/*           agent steps of all contributions applied so far
    server       ops/*                   wall seconds over all launches; not in the ledger, so a crash may leave a gap
    game/<game>  task/*                  agent steps of this game in all contributions applied so far

Values of one run and step share a record: TensorBoard opens the file anew for each, which is slow on shared disks.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat import tf
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter
from torch.utils.tensorboard import summary as summaries

from envs.games import human_normalized

log = logging.getLogger(__name__)

SERVER = "server"
_ERRORS = (OSError, tf.errors.OpError)  # of the disk, as Python and as TensorBoard's file layer report them
RETRY_SECONDS = 60.0  # between two attempts to write after one failed
_GAME = re.compile("[a-z0-9_]{1,80}")  # it becomes the name of a folder
_CURVE_MEANS = ("entropy", "value_loss", "policy_loss", "loss")
_OPS = (
    "steps_per_second",
    "workers_alive",
    "restarts",
    "server_restarts",
    "duplicates",
    "partials",
    "leases_lost",
    "clipped",
    "all_zero",
    "checkpoint_age",
)


class _Event(NamedTuple):
    """Values of one run at one step."""

    run: str
    step: int
    values: list[Summary.Value]


class TensorBoard:
    """The single writer of `run_dir/tensorboard`.

    Writing never stops training: where the disk will not take it, what is in the ledger is kept in memory and written
    once that works again, at the latest when the run is resumed.

    Args:
        run_dir: the run directory; event files of earlier launches are read, never changed.
        clock: monotonic seconds.
    """

    def __init__(self, run_dir: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._root = run_dir / "tensorboard"
        self._clock = clock
        self._retry_at = -math.inf
        self._last: dict[str, dict[str, int]] = {}  # run → tag → last step written
        self._writers: dict[str, FileWriter] = {}
        self._pending: list[_Event] = []  # not known to be on disk
        self._steps: Counter[str] = Counter()  # by game, in all ledger lines so far
        self.failures = 0
        """How often the event files could not be read or written."""
        try:
            for folder in (self._root / SERVER, *self._root.glob("game/*")):
                self._last_steps(folder.relative_to(self._root).as_posix())
        except _ERRORS as error:
            self._give_up(error)

    def record(self, lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        """Writes what new ledger lines say, and the state of operations from the driver's summary.

        The lines follow those of the call before, in whole meta-updates; the first call of an instance starts with
        the ledger's first line. In the event files when this returns, unless writing failed.
        """
        self._pending += self._project(lines)
        self._write(self._operations(summary))

    def text(self, tag: str, text: str) -> None:
        """Adds Markdown to run `server`, where there is none of that tag yet."""
        self._pending.append(_Event(SERVER, 0, list(summaries.text(tag, text).value)))
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

    def _write(self, extra: Iterable[_Event] = ()) -> None:
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

    def _add(self, event: _Event) -> None:
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

    # What the values are -----------------------------------------------------------------------------------------

    def _project(self, lines: list[dict[str, Any]]) -> Iterator[_Event]:
        for version, group in itertools.groupby(lines, key=lambda line: int(line["version_after"])):
            tasks = list(group)
            values = _meta_values(tasks)
            yield _event(SERVER, version, "meta", values)
            yield _event(SERVER, tasks[0]["total_steps"], "meta_frames", values)
            for task in tasks:
                if task["final"] and _GAME.fullmatch(task["game"]):
                    yield from self._project_task(task)

    def _project_task(self, task: dict[str, Any]) -> Iterator[_Event]:
        game, path = task["game"], task["path"]
        by_step: defaultdict[int, dict[str, float]] = defaultdict(dict)
        for point in task["curve"]:
            by_step[point["steps"]] = _curve_values(game, point)
        by_step[task["steps"]] |= {
            "path_length": path["length"],
            "path_energy": path["energy"],
            "term_cosine": path["cosine"],
        }
        for step, values in by_step.items():
            yield _event(f"game/{game}", self._steps[game] + step, "task", values)
        self._steps[game] += task["steps"]  # also where the points were written long ago: the next task starts there

    def _operations(self, summary: dict[str, Any]) -> Iterator[_Event]:
        step = int(summary["wall_seconds"])
        last = self._last_steps(SERVER).get("ops/workers_alive", -1)
        # Further apart the longer the run: a week of seconds would take minutes to read back on resume.
        if step - last >= max(1, last // 1000):
            refused = {f"refused/{reason}": count for reason, count in summary["refused"].items()}
            yield _event(SERVER, step, "ops", {name: summary[name] for name in _OPS} | refused | _time_shares(summary))


def _time_shares(summary: dict[str, Any]) -> dict[str, float]:
    """Where the workers' time went in the last minute, as a mean over the workers that have told."""
    told = [worker["time_share"] for worker in summary["workers"] if worker["time_share"]]
    return {f"time_share/{part}": sum(shares[part] for shares in told) / len(told) for part in told[0]} if told else {}


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


def _event(run: str, step: int, group: str, values: dict[str, float]) -> _Event:
    return _Event(run, step, [Summary.Value(tag=f"{group}/{name}", simple_value=v) for name, v in values.items()])


def _meta_values(tasks: list[dict[str, Any]]) -> dict[str, float]:
    """One meta-update. What no task has a value for is left out."""
    done = [task for task in tasks if task["final"]]
    of_tasks = {
        "loss": [
            task["curve"][-1]["means"]["loss"]
            for task in done
            if task["curve"] and "loss" in task["curve"][-1]["means"]
        ],
        "score_human_normalized": [score for task in done if (score := _normalized_score(task)) is not None],
        "gradient_norm": [task["norm"] for task in tasks],
        "path_length": [task["path"]["length"] for task in done],
        "path_energy": [task["path"]["energy"] for task in done],
        "loss_term_norm": [task["path"]["loss_term_norm"] for task in tasks],
        "path_term_norm": [task["path"]["path_term_norm"] for task in tasks],
        "term_cosine": [task["path"]["cosine"] for task in tasks],
        "staleness": [task["staleness"] for task in tasks],
        "staleness_weight": [task["weight"] for task in tasks],
        "clip": [task["clip"] for task in tasks],
    }
    means = {name: sum(values) / len(values) for name, values in of_tasks.items() if values}
    return means | {"update_norm": tasks[0]["update_norm"], "agreement": tasks[0]["agreement"]}


def _normalized_score(task: dict[str, Any]) -> float | None:
    """Human-normalized return at the task's end: of its last curve point in which an episode ended."""
    scores = [point["score"] for point in task["curve"] if point["score"] is not None]
    return human_normalized(task["game"], scores[-1]) if scores else None


def _curve_values(game: str, point: dict[str, Any]) -> dict[str, float]:
    values = {name: point["means"][name] for name in _CURVE_MEANS if name in point["means"]}
    if point["score"] is not None:
        values["return"] = point["score"]
        if (normalized := human_normalized(game, point["score"])) is not None:
            values["human_normalized"] = normalized
    return values
