"""The control loop: polls the server, tends the pool, reports."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayError, RayTaskError

from leap_dist.config.loading import ConfigError
from leap_dist.driver.nodes import Nodes
from leap_dist.driver.pool import Pool, last_line
from leap_dist.driver.signals import StopSignal
from leap_dist.storage.redaction import redact_all
from leap_dist.tasks.atari.video import Play
from leap_dist.telemetry.progress import Progress

POLL_SECONDS = 0.5
POLL_PART = 0.1
"""Of the time, that polls take at most: a status of ten thousand leases keeps the server busy for a while."""
MOST_SECONDS = 2.0  # between two polls, however long they take: who watches a run from elsewhere waits for its summary
STOP_SECONDS = 20.0  # how long a clean stop waits for the workers
AWAY_SECONDS = 60.0  # how long a server may be away: Ray brings one back in seconds, where there is a cluster left

Record = Callable[[list[dict[str, Any]], dict[str, Any], list[Play]], None]
"""Called about twice a second with the ledger's new lines, the summary, and what workers have filmed."""


class _ServerLost(RuntimeError):
    """The server, or the cluster under it, is gone for good."""


def pause_after(seconds: float) -> float:
    """Seconds until the next poll, where one took so long."""
    return max(POLL_SECONDS, min(MOST_SECONDS, seconds / POLL_PART - seconds))


class Control:
    """The control loop: polls the server, tends the pool, reports."""

    def __init__(
        self, server: Any, pool: Pool, nodes: Nodes, progress: Progress, record: Record, stop: StopSignal
    ) -> None:
        self._server = server
        self._pool = pool
        self._nodes = nodes
        self._progress = progress
        self._record = record
        self._stop = stop
        self._status: dict[str, Any] = {}
        self._lines: list[dict[str, Any]] = []
        self._offset = 0
        self._server_restarts = 0
        self._away_since: float | None = None  # the server, that is

    def loop(self) -> str:
        """Runs until the work is done, a stop was asked for, or the server is lost for good."""
        try:
            return self._loop()
        except _ServerLost as error:
            if not self._status:  # it never worked: there is nothing to report but the reason
                raise ConfigError(f"run-dir: {error}") from None
            self._pool.alerts.append(str(error))
            self._report("failed")
            return "failed"

    def _loop(self) -> str:
        while not self._stop.asked:
            if self._nodes.head_is_gone:
                self._server.leave.remote()  # it may live on, and would keep others out of the run directory
                raise _ServerLost("the cluster's head is gone; --resume goes on, on another cluster")
            self._pool.tend()
            asked = time.monotonic()
            self._poll()
            pause = pause_after(time.monotonic() - asked)
            if self._status.get("finished"):
                return self._wind_down("done" if self._status["complete"] else "failed")
            if self._pool.exhausted:
                self._pool.alerts.append("every worker is in quarantine; look into what failed on them, and resume")
                return self._wind_down("failed")
            self._report("waiting" if self._pool.waiting else "running")
            self._stop.wait(pause)
        return self._wind_down("interrupted")

    def _wind_down(self, outcome: str) -> str:
        """Lets the workers end their tasks, then reports for the last time."""
        deadline = time.monotonic() + STOP_SECONDS
        try:
            ray.get(self._server.stop.remote(), timeout=STOP_SECONDS)
        except RayError:
            deadline = 0.0  # no use in waiting for workers that wait for the server
        while not self._pool.done and time.monotonic() < deadline:
            self._pool.tend()
            self._report("stopping")
            self._stop.wait(0.1)
        self._pool.abandon()
        self._pool.write_breakdowns()
        self._poll()
        self._report(outcome)
        return outcome

    def _poll(self) -> None:
        """Fetches status and new ledger lines. While the server restarts, what is known stays."""
        gone = list(self._pool.gone)
        try:
            status, lines, offset = ray.get(self._server.advance.remote(self._offset, gone), timeout=AWAY_SECONDS)
        except (ActorUnavailableError, GetTimeoutError):
            self._miss()
            return
        except (ActorDiedError, RayTaskError) as error:
            raise _ServerLost(f"the server cannot go on: {last_line(error)}") from None
        self._away_since = None
        self._server_restarts += self._status.get("server_pid", status["server_pid"]) != status["server_pid"]
        del self._pool.gone[: len(gone)]
        self._status, self._offset = status, offset
        self._pool.heed(status)
        self._lines += lines

    def _miss(self) -> None:
        """The server does not answer. Raises _ServerLost where it has not done so for too long."""
        if self._away_since is None:
            self._away_since = time.monotonic()
            self._pool.alerts.append("the server does not answer; where it died, Ray restarts it")
        elif time.monotonic() - self._away_since > AWAY_SECONDS:
            raise _ServerLost(
                f"the server has been away for {AWAY_SECONDS:.0f} s; --resume goes on, on another cluster if need be"
            )
        self._stop.wait(1.0)

    def _report(self, state: str) -> None:
        if not self._status:
            return
        lines, self._lines = self._lines, []
        more = {
            "alerts": redact_all([*self._status["alerts"], *self._pool.alerts]),
            "waiting": self._pool.waiting if state == "waiting" else "",
            "workers": self._pool.describe(),
            "workers_alive": self._pool.alive,
            "workers_wanted": self._pool.wanted,
            "restarts": self._pool.restarts,
            "server_restarts": self._server_restarts,
        }
        self._record(lines, self._progress.summary(self._status, state, more), self._pool.plays())
