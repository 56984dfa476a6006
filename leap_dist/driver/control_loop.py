"""The control loop: polls the server, reconciles the pool, reports."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from leap_dist.config.loading import ConfigError
from leap_dist.config.plurals import counted
from leap_dist.driver import memory
from leap_dist.driver.errors import RunDirectoryLost
from leap_dist.driver.nodes import Nodes
from leap_dist.driver.pool import Pool
from leap_dist.driver.signals import Stopped, StopSignal
from leap_dist.driver.waiting import last_line, may_come_back, result_of
from leap_dist.storage.ledger import PAGE_BYTES
from leap_dist.storage.redaction import redact_all
from leap_dist.tasks.atari.video import Clip
from leap_dist.telemetry.progress import Progress, tasks_done

POLL_SECONDS = 0.5
POLL_SHARE = 0.1
"""Largest share of the time that polls may take: the status of ten thousand leases keeps the server busy a while."""
MAX_PAUSE_SECONDS = 2.0
"""Longest pause between polls, however long they take: whoever watches the run waits for its summary."""
STOP_SECONDS = 20.0
"""How long a clean stop waits for the workers."""
AWAY_SECONDS = 60.0
"""Shortest absence after which the server counts as lost. Ray restarts it within seconds while there is a cluster."""
AWAY_STARTS = 5.0
"""The same as a multiple of the time that the first start took: a slow machine also restarts the server slowly."""
LAST_POLL_SECONDS = 10.0
"""How long the last poll waits: it only fetches what happened while the workers stopped."""

Record = Callable[[list[dict[str, Any]], dict[str, Any], list[Clip], int], None]
"""Called about twice a second with the ledger's new lines, the summary, the workers' recorded episodes, and the offset
in bytes after the lines."""


class _ServerLost(RuntimeError):
    """The server or its cluster is gone for good."""


def pause_after(seconds: float) -> float:
    """Return the seconds to wait after a poll that took `seconds`."""
    return max(POLL_SECONDS, min(MAX_PAUSE_SECONDS, seconds / POLL_SHARE - seconds))


def stop_message(status: dict[str, Any]) -> str:
    """Return the text that the first signal prints: what happens now, what is kept, and what a second signal does."""
    running = len(status["leases"])
    if status.get("kind") == "evaluation":
        kept = (
            f"{tasks_done(status, 'agent')} are kept, {counted(running, 'running agent')} will stop at the next report"
        )
        if status["saves_states"]:
            kept += " and save the state to continue from"
    else:
        kept = f"{tasks_done(status)} are kept, {counted(running, 'running task')} will be given up at the next report"
    return f"stopping: {kept}. Press Ctrl-C again to stop without waiting for them"


class ControlLoop:
    """Polls the server, reconciles the pool with the cluster, and reports.

    Args:
        server: handle of the server actor.
        pool: the workers.
        nodes: the cluster's nodes.
        progress: makes the summary from the server's status.
        record: called with each summary.
        folder: directory of the run.
        stop: whether the user has asked for a stop.
        offset: offset in bytes of the first ledger line to report.
    """

    def __init__(
        self,
        server: Any,
        pool: Pool,
        nodes: Nodes,
        progress: Progress,
        record: Record,
        folder: Path,
        stop: StopSignal,
        offset: int = 0,
    ) -> None:
        self._server = server
        self._pool = pool
        self._nodes = nodes
        self._progress = progress
        self._record = record
        self._folder = folder
        self._inode = folder.stat().st_ino
        self._stop = stop
        self._status: dict[str, Any] = {}
        self._lines: list[dict[str, Any]] = []
        self._offset = offset
        self._is_behind = False  # whether the ledger probably has another page
        self._server_restarts = 0
        self._away_since: float | None = None  # when the server stopped answering

    def run(self) -> str:
        """Run until the work is done, the user asks for a stop, or the server is lost for good.

        Returns "done", "interrupted" or "failed". Raises ConfigError if the server has never worked,
        RunDirectoryLost if the directory is gone.
        """
        try:
            return self._run()
        except _ServerLost as error:
            outcome = "interrupted" if self._stop.asked else "failed"
            if not self._status:  # the server never worked, so only the reason can be reported
                self._stop.check()
                raise ConfigError(f"run-dir: {error}") from None
            self._pool.alerts.append(str(error))
            self._report(outcome)
            return outcome

    def _run(self) -> str:
        while not self._stop.asked:
            if self._nodes.head_is_gone:
                self._server.leave.remote()  # it may be alive and would keep the run directory locked
                raise _ServerLost(
                    "the cluster's head node is gone; what was accepted is kept; continue on another cluster"
                )
            self._pool.reconcile()
            self._require_folder()
            asked = time.monotonic()
            with contextlib.suppress(Stopped):
                self._poll()
            pause = pause_after(time.monotonic() - asked)
            if self._status.get("finished"):
                return self._wind_down("done" if self._status["complete"] else "failed")
            if self._pool.exhausted:
                self._pool.alerts.append("every worker is in quarantine; find out what failed on them, then resume")
                return self._wind_down("failed")
            self._report("waiting" if self._pool.waiting else "running")
            if not self._is_behind:
                self._stop.wait(pause)
        return self._wind_down("interrupted")

    def _wind_down(self, outcome: str) -> str:
        """Let the workers end their tasks, then report for the last time."""
        deadline = time.monotonic() + STOP_SECONDS
        try:
            ray.get(self._server.stop.remote(), timeout=STOP_SECONDS)
        except RayError:
            deadline = 0.0  # the workers wait for the server, too
        while not self._pool.done and time.monotonic() < deadline:
            self._pool.reconcile()
            self._report("stopping")
            self._stop.wait(0.1)
        self._pool.abandon()
        self._pool.write_breakdowns()
        self._poll(LAST_POLL_SECONDS)
        while self._is_behind and outcome == "done":  # a run that is not done catches up when it is resumed
            self._report("stopping")
            self._poll(LAST_POLL_SECONDS)
        outcome = self._complete(outcome)
        self._report(outcome)
        return outcome

    def _complete(self, outcome: str) -> str:
        """Return the outcome, which is "done" only if the files of the last meta-update are written."""
        if outcome != "done" or self._wait_for_files():
            return outcome
        self._pool.alerts.append(
            "init.safetensors or the ledger could not be written, and may lack the last meta-updates, which are in the "
            "checkpoints; resume the run when the storage works"
        )
        return "failed"

    def _wait_for_files(self) -> bool:
        """Return whether the server has written the files of the last meta-update, for which it gets some time."""
        deadline = time.monotonic() + STOP_SECONDS
        while not (written := self._status.get("files_written", True)) and time.monotonic() < deadline:
            self._report("stopping")
            self._stop.wait(0.5)
            self._poll(LAST_POLL_SECONDS)
        return bool(written)

    def _poll(self, last_seconds: float | None = None) -> None:
        """Fetch the status and new ledger lines. While the server restarts, the last ones remain.

        Raises Stopped when a signal asks for a stop, unless this is the last poll, which takes up to `last_seconds`.
        """
        ended = list(self._pool.ended)
        try:
            answer = self._server.advance.remote(self._offset, ended, self._pool.wanted)
            if last_seconds is None:
                status, lines, offset = result_of(answer, AWAY_SECONDS, self._stop)
            else:
                status, lines, offset = ray.get(answer, timeout=last_seconds)
        except RayError as error:
            if may_come_back(error):
                self._miss()
                return
            raise _ServerLost(f"the server cannot go on: {last_line(error)}") from None
        self._away_since = None
        self._server_restarts += self._status.get("server_pid", status["server_pid"]) != status["server_pid"]
        del self._pool.ended[: len(ended)]
        self._is_behind = offset - self._offset >= PAGE_BYTES // 2
        self._status, self._offset = status, offset
        self._pool.handle_status(status)
        self._lines += lines
        self._stop.message = stop_message(status)

    def _require_folder(self) -> None:
        """Raise RunDirectoryLost if the run directory was removed or replaced."""
        try:
            lost = self._folder.stat().st_ino != self._inode
        except (FileNotFoundError, NotADirectoryError):
            lost = True
        except OSError:  # storage that does not answer may come back
            lost = False
        if lost:
            raise RunDirectoryLost(self._folder)

    @property
    def _longest_away(self) -> float:
        """Seconds after which a server that does not answer counts as lost."""
        return max(AWAY_SECONDS, AWAY_STARTS * self._progress.start.seconds.get("server", 0.0))

    def _miss(self) -> None:
        """Record that the server did not answer. Raises _ServerLost when it has been away for too long."""
        if self._away_since is None:
            self._away_since = self._nodes.clock()
            killed = memory.was_killed(self._status.get("server_pid"), self._nodes.own)
            reason = f"was killed because the memory was full; {memory.ADVICE}" if killed else "does not answer"
            self._pool.alerts.append(f"the server {reason}; if it died, Ray restarts it")
        elif (away := self._nodes.clock() - self._away_since) > self._longest_away:
            raise _ServerLost(
                f"the server has not answered for {away:.0f} s; what was accepted is kept; continue on another cluster"
            )
        self._stop.wait(1.0)

    def _report(self, state: str) -> None:
        if not self._status:
            return
        lines, self._lines = self._lines, []
        stopping = self._stop.message if self._stop.asked else ""  # a finished run winds down without a message
        more = {
            "alerts": redact_all([*self._status["alerts"], *self._pool.alerts]),
            "plan": self._pool.plan(),
            "waiting": {"waiting": self._pool.waiting, "stopping": stopping}.get(state, ""),
            "workers": self._pool.describe(),
            "mps": self._pool.mps,
            "workers_alive": self._pool.alive,
            "workers_wanted": self._pool.wanted,
            "restarts": self._pool.restarts,
            "server_restarts": self._server_restarts,
        }
        self._record(lines, self._progress.summary(self._status, state, more), self._pool.take_clips(), self._offset)
