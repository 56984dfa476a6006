"""Scheduler of meta-updates: when one is due, which contributions it applies, and when the run is complete."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from leap_dist.config.settings import Config
from leap_dist.server import aggregation
from leap_dist.server.assignments import Assignments
from leap_dist.server.backlog import Accepted
from leap_dist.server.meta_state import MetaState
from leap_dist.server.monitoring import Agreement, Alert, Counters, LatencyWindow

MIN_WAITING = 64
"""Number of contributions that may wait in any case while no meta-update can be saved."""
BOOKKEEPING_SHAPE = {
    "queue": {
        "next": int,
        "failures": [[int]],
        "in_a_row": {...: int},
        "deaths_in_a_row": {...: int},
        "quarantined": [str],
    },
    "pending": [int],
    "batch_start": int,
    "counts": {...: int},
    "progress": {...: int},
    "refused": {...: int},
    "accepted_leases": {...: int},
}
"""Shape of what `UpdateScheduler` stores in a checkpoint besides φ; see `schema.check`."""


class UpdateScheduler:
    """Makes each meta-update once its contributions are in.

    Args:
        config: the run's configuration.
        state: φ and the contributions waiting for it.
        assignments: tasks and leases, which determine what may still arrive.
        counters: totals to store with each checkpoint.
        alert: called with each message meant for the user.
        clock: returns monotonic seconds.
        size: number of shared parameters.
    """

    def __init__(
        self,
        config: Config,
        state: MetaState,
        assignments: Assignments,
        counters: Counters,
        alert: Alert,
        clock: Callable[[], float],
        size: int,
    ) -> None:
        self._config = config
        self._state = state
        self._assignments = assignments
        self._counters = counters
        self._alert = alert
        self._clock = clock
        self._size = size
        self._batch_size = 1 if config.is_joint else aggregation.batch_size(config.mode, config.meta)
        self._batched = config.mode in aggregation.BATCHED
        self._min_batch = 0  # `stream` mode: contributions that the next update takes while several arrive together
        self.batch_start = 0
        """Index of the first task of the batch being gathered, in `sync` mode."""
        self.saved_at = clock()
        """Time of the newest checkpoint, in monotonic seconds."""
        self.latency = LatencyWindow()
        """Durations of the meta-updates."""
        self.agreement = Agreement(size)
        """Cosines between the games' pulls."""

    @property
    def complete(self) -> bool:
        """Whether all meta-updates are made or, in modes with one per contribution, all tasks are applied."""
        if self._batched:
            return self._state.version >= self._config.meta_updates
        return self._state.applied_tasks >= self._config.total_tasks

    @property
    def waiting_tasks(self) -> int:
        """Number of tasks that are done and whose contribution is not applied yet."""
        return sum(accepted.contribution.final for accepted in self._state.backlog.waiting)

    @property
    def missing_tasks(self) -> int:
        """Number of tasks still to be leased."""
        left = self._config.total_tasks - self._state.applied_tasks
        if self._batched:  # a batch may lack the tasks of a quarantined game
            left = (self._config.meta_updates - self._state.version) * self._batch_size
        return left - self.waiting_tasks - len(self._assignments.leases)

    @property
    def task_limit(self) -> int | None:
        """Index below which tasks may be leased, or None if any may."""
        return self.batch_start + self._batch_size if self._config.mode == "sync" else None

    @property
    def congested(self) -> bool:
        """Whether so many contributions wait that no more can be accepted: meta-updates cannot be saved."""
        return len(self._state.backlog.waiting) >= max(MIN_WAITING, 4 * self._batch_size)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Accept several contributions with one flush of the journal, and in `stream` mode one meta-update.

        That update takes all of them, or if there are more, MIN_WAITING at a time.
        """
        stream = self._config.mode == "stream"
        try:
            self._min_batch = MIN_WAITING * stream
            with self._state.backlog.journal.deferred_sync():
                yield
            self._min_batch = len(self._state.backlog.waiting) * stream
            self.update()
        finally:
            self._min_batch = 0

    def update(self, *, wait: bool = False) -> None:
        """Make every meta-update that is due. One that cannot be saved is tried again with the next call.

        While a long ledger is still being verified after a restart, meta-updates are put off until a later call, so
        that no caller has to wait. With `wait`, this call waits for the verification instead.
        """
        if not wait and not self._state.ledger.is_verified:
            return
        waiting = self._state.backlog.waiting
        while not self.complete and (count := self._due()):
            following = self.batch_start + self._batch_size
            batch = waiting[:count]
            try:
                with self.latency:
                    self._state.update(count, self._bookkeeping(waiting[count:], following))
            except (OSError, MemoryError) as error:
                self._alert(
                    f"meta-update {self._state.version + 1} could not be saved and waits: {error}", kind="update"
                )
                return
            self.batch_start = following
            self.saved_at = self._clock()
            for one in batch:
                self.agreement.add(one.lease.task.game, one.vector[: self._size], one.norm)

    def _due(self) -> int:
        """Return how many of the waiting contributions make up the next meta-update, or 0 if none is due."""
        waiting = self._state.backlog.waiting
        if self._config.mode != "sync":
            due = max(self._batch_size, self._min_batch)
            return due if len(waiting) >= due else 0
        end = self.batch_start + self._batch_size
        if self._assignments.queue.next < end or any(index < end for index in self._assignments.unfinished()):
            return 0
        count = sum(accepted.lease.task.index < end for accepted in waiting)
        if count == 0:  # every task of the batch was of a quarantined game
            self.batch_start = end
        return count

    def _bookkeeping(self, waiting: list[Accepted], batch_start: int) -> dict[str, Any]:
        """Return what a restart needs besides φ, once only `waiting` is left to apply."""
        assignments, open_leases = self._assignments, self._assignments.leases.all()
        return {
            "queue": assignments.queue.state() | assignments.quarantine.state(),
            # Every task below `queue.next` that is neither here nor in the journal is done.
            "pending": sorted([*assignments.unfinished(), *(a.lease.task.index for a in waiting)]),
            "batch_start": batch_start,
            "counts": dict(self._counters.events),
            "progress": {held.lease.id: held.steps for held in open_leases},  # steps that `counts` already contains
            "refused": dict(self._counters.refused),
            "accepted_leases": assignments.leases.accepted(),
            "session": assignments.leases.session,
        }
