"""The control loop: polls the server, tends the pool, reports."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayError, RayTaskError

from leap_dist.config import ConfigError
from leap_dist.driver.pool import Pool, last_line
from leap_dist.progress import Progress
from leap_dist.stop_signal import StopSignal

POLL_SECONDS = 0.5
STOP_SECONDS = 20.0  # how long a clean stop waits for the workers

Record = Callable[[list[dict[str, Any]], dict[str, Any]], None]
"""Called about twice a second with the ledger's new lines and the summary."""


class _ServerLost(RuntimeError):
    """The server died and cannot be restarted, or is broken."""


class Control:
    """The control loop: polls the server, tends the pool, reports."""

    def __init__(self, server: Any, pool: Pool, progress: Progress, record: Record, stop: StopSignal) -> None:
        self._server = server
        self._pool = pool
        self._progress = progress
        self._record = record
        self._stop = stop
        self._status: dict[str, Any] = {}
        self._lines: list[dict[str, Any]] = []
        self._offset = 0
        self._server_restarts = 0

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
            self._pool.tend()
            self._poll()
            if self._status.get("finished"):
                return self._wind_down("done" if self._status["complete"] else "failed")
            self._report("running")
            self._stop.wait(POLL_SECONDS)
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
            status, lines, offset = ray.get(self._server.advance.remote(self._offset, gone), timeout=60)
        except ActorUnavailableError:
            self._server_restarts += 1
            self._pool.alerts.append("the server died; Ray restarts it from the run directory")
            self._stop.wait(1.0)
            return
        except GetTimeoutError:
            self._pool.alerts.append("the server has not answered for a minute")
            return
        except (ActorDiedError, RayTaskError) as error:
            raise _ServerLost(f"the server cannot go on: {last_line(error)}") from None
        del self._pool.gone[: len(gone)]
        self._status, self._offset = status, offset
        self._lines += lines

    def _report(self, state: str) -> None:
        if not self._status:
            return
        lines, self._lines = self._lines, []
        more = {
            "alerts": [*self._status["alerts"], *self._pool.alerts],
            "workers": self._pool.describe(),
            "workers_alive": self._pool.alive,
            "workers_wanted": self._pool.wanted,
            "restarts": self._pool.restarts,
            "server_restarts": self._server_restarts,
        }
        self._record(lines, self._progress.summary(self._status, state, more))
