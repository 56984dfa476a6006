"""Assignments: which task a worker gets next, and what becomes of the task when its lease ends."""

from __future__ import annotations

from collections.abc import Callable

from leap_dist.config.settings import Config
from leap_dist.protocol.messages import Lease
from leap_dist.protocol.task_queue import TaskQueue
from leap_dist.server.backlog import Backlog
from leap_dist.server.leases import ACCEPTED, LeaseBook, OpenLease
from leap_dist.server.quarantine import Quarantine

MIN_LEASES = 16
"""Number of leases that may always be open at once, even if few workers were configured."""


class Assignments:
    """The run's tasks, the leases on them, and the quarantine of games and workers that keep failing.

    Args:
        config: the run's configuration.
        backlog: accepted contributions; its journal records the leases.
        session: name of this launch.
        alert: called with each message meant for the user.
        clock: returns monotonic seconds.
    """

    def __init__(
        self,
        config: Config,
        backlog: Backlog,
        session: str,
        alert: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._seconds = config.server.lease_seconds
        self._stack = config.worker.stack
        self.workers = config.expected_workers
        """Largest number of workers that the run has had so far."""
        self._backlog = backlog
        self._alert = alert
        self.quarantine = Quarantine()
        self.queue = TaskQueue(
            config.task_names,
            self.quarantine.games,
            seed=config.seed,
            steps=config.steps_of_task,
            replace=config.sampling == "replacement",
        )
        # The driver calls every other second. After a longer silence, it was the server itself that stood still.
        self.leases = LeaseBook(backlog.journal, session, clock, max_gap=self._seconds / 4)

    def expect(self, workers: int) -> None:
        """Adapt limits to the number of workers. They never fall, because open tasks began under the higher ones."""
        self.workers = max(self.workers, workers)

    def must_wait(self, worker: str) -> bool:
        """Return whether a worker gets no lease now: it is in quarantine, or too many leases are open already."""
        return len(self.leases) >= max(MIN_LEASES, 2 * self.workers * self._stack) or worker in self.quarantine.workers

    def grant(self, worker: str, incarnation: str, version: int, limit: int | None) -> Lease | None:
        """Lease the next task with an index below `limit` to a worker; None if there is no such task.

        Raises OSError if the lease cannot be recorded. The task then goes back to the queue.
        """
        task = self.queue.draw(limit, avoid=self.quarantine.failed_on(worker))
        if task is None:
            return None
        try:
            return self.leases.grant(task, worker, incarnation, version, self._seconds)
        except Exception:
            self.queue.give_back(task.index)
            raise

    def complete(self, held: OpenLease) -> None:
        """End a lease whose final contribution was accepted."""
        self._end(held, ACCEPTED)
        self.queue.succeed(held.lease.task)
        self.quarantine.succeed(held.lease.task.game, held.lease.worker)

    def take_back(self, held: OpenLease, outcome: str) -> None:
        """End a lease; its task will run again with the same seed."""
        self._end(held, outcome)
        self.queue.give_back(held.lease.task.index)

    def fail(self, held: OpenLease, reason: str) -> None:
        """End the lease of a task that failed; it will run again with another seed."""
        self._alert(f"{held.lease.task.game} failed on {held.lease.worker}: {reason}")
        self._end(held, "failed")
        self.queue.fail(held.lease.task)
        self.blame(held, reason)

    def blame(self, held: OpenLease, reason: str, *, died: bool = False) -> None:
        """Count a lease that ended badly against its game and worker; see `Quarantine.fail`."""
        task, worker = held.lease.task, held.lease.worker
        news = self.quarantine.fail(task.game, worker, reason, granted=held.granted, now=self.leases.now(), died=died)
        if news:
            self._alert(news)

    def unfinished(self) -> list[int]:
        """Return the indices of the tasks that are leased, or were taken back and can be leased again."""
        return [*(held.lease.task.index for held in self.leases.all()), *self.queue.waiting]

    def _end(self, held: OpenLease, outcome: str) -> None:
        self.leases.end(held, outcome)
        self._backlog.forget(held.lease.id)
