"""Recovery: rebuild a server from the newest valid checkpoint, the journal, and the records of open leases.

Contributions accepted after that checkpoint are replayed from the journal. Damaged entries are set aside, with an
alert, and their tasks are trained again. Leases of the same session stay open, with a fresh deadline; those of earlier
sessions are orphans, because their workers are gone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from leap_dist.config.loading import fixed_settings, same_setting
from leap_dist.config.settings import Config
from leap_dist.nn.flat_vector import Manifest
from leap_dist.protocol import schema
from leap_dist.protocol.messages import Contribution, Lease
from leap_dist.server.assignments import Assignments
from leap_dist.server.leases import ACCEPTED, OpenLease
from leap_dist.server.meta_optimizer import MetaOptimizer
from leap_dist.server.meta_state import STATE_SHAPE, MetaState
from leap_dist.server.monitoring import Counters
from leap_dist.server.scheduler import BOOKKEEPING_SHAPE, UpdateScheduler
from leap_dist.storage.atomic import CorruptFile, NewerFormat
from leap_dist.storage.checkpoint import Checkpoint
from leap_dist.storage.replica import NoReplica

MAX_TASKS_BETWEEN_CHECKPOINTS = 1_000_000
"""Maximum credible number of tasks granted since a checkpoint; a larger task index can only be damage."""


class Recovery:
    """Restores the parts of a new server from its run directory, or begins the run if there is nothing to restore.

    Args:
        config: the run's configuration.
        manifest: names and shapes of the shared parameters.
        state: φ, checkpoints and journal; restored.
        assignments: tasks and leases; restored.
        scheduler: position within the tasks; restored.
        counters: totals; restored.
        alert: called with each message meant for the user.
        replica: remote copy of the run directory, if any.
    """

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        state: MetaState,
        assignments: Assignments,
        scheduler: UpdateScheduler,
        counters: Counters,
        alert: Callable[[str], None],
        replica: NoReplica,
    ) -> None:
        self._config = config
        self._manifest = manifest
        self._state = state
        self._backlog = state.backlog
        self._assignments = assignments
        self._scheduler = scheduler
        self._counters = counters
        self._alert = alert
        self._replica = replica

    def run(self) -> list[OpenLease]:
        """Restore everything, and return the leases of earlier sessions.

        Raises OSError, or CorruptFile if no checkpoint can be used, or it belongs to another format, encoder or run.
        """
        self._replica.catch_up()
        checkpoint = self._load_checkpoint()
        if checkpoint is None:
            self._state.begin()
        else:
            self._state.adopt(self._validated_vector(checkpoint), checkpoint)
        self._replay_journal()
        return self._restore_assignments(checkpoint.state["rest"] if checkpoint else None)

    def _load_checkpoint(self) -> Checkpoint | None:
        checkpoint, warnings = self._state.checkpoints.load_newest()
        for warning in warnings:
            self._alert(warning)
        if checkpoint is None and warnings:
            raise CorruptFile("no usable checkpoint is left: " + "; ".join(warnings))
        if checkpoint is None and (self._state.ledger.size or self._backlog.journal.orders()):
            raise CorruptFile("no checkpoint is left, but ledger.jsonl or journal/ show that there was one")
        return checkpoint

    # Checkpoint --------------------------------------------------------------------------------------------------

    def _validated_vector(self, checkpoint: Checkpoint) -> np.ndarray:
        """Return φ of a checkpoint. Raises CorruptFile if the run cannot continue from it, though it is intact."""
        try:
            vector = self._manifest.join(checkpoint.init)
        except ValueError as error:
            raise CorruptFile(f"checkpoint {checkpoint.version} belongs to a different encoder: {error}") from None
        try:
            schema.check(checkpoint.state, STATE_SHAPE, "state")
            self._check_settings(checkpoint.state)
            self._check_arrays(vector, checkpoint)
        except ValueError as error:
            raise CorruptFile(f"the run cannot continue from checkpoint {checkpoint.version}: {error}") from None
        return vector

    def _check_settings(self, state: dict[str, Any]) -> None:
        now = fixed_settings(self._config)
        then = {name: value for name, value in state["settings"].items() if name in now}
        differ = {name: value for name, value in then.items() if not same_setting(name, value, now[name])}
        if changed := [f"{name}: {value} -> {now[name]}" for name, value in differ.items()]:
            raise ValueError(f"it belongs to a run with different settings: {'; '.join(changed)}")
        if not state["covered"] or state["ledger"]["offset"] < 0:
            raise ValueError("its counts are inconsistent")

    def _check_arrays(self, vector: np.ndarray, checkpoint: Checkpoint) -> None:
        trial = MetaOptimizer(self._config.mode, self._config.meta, vector)
        trial.step(np.zeros_like(vector))
        found = {name: (array.size, array.dtype) for name, array in checkpoint.optimizer.items()}
        if found and found != {name: (array.size, array.dtype) for name, array in trial.state().items()}:
            raise ValueError(f"it was written with a different optimizer: {', '.join(found)}")
        arrays = [vector, *checkpoint.optimizer.values(), *checkpoint.heads.values()]
        if not all(np.isfinite(array).all() for array in (*arrays, np.array(checkpoint.state["norms"]))):
            raise ValueError("it is not finite")
        if any(head.ndim != 1 or head.dtype != np.float32 for head in checkpoint.heads.values()):
            raise ValueError("its heads are not vectors")

    # Journal -----------------------------------------------------------------------------------------------------

    def _replay_journal(self) -> None:
        """Append the contributions that the checkpoint lacks to the backlog."""
        backlog, first = self._backlog, self._backlog.next_order
        for order in backlog.journal.orders():
            if order < first:
                self._recall(order)
        for lease_id, order in backlog.drop_lost_bases():
            self._alert(
                f"journal entry {order} is lost, so lease {lease_id}, whose later pushes build on it, cannot continue"
            )
        for order in backlog.journal.orders():
            if order < first:
                continue
            if order > backlog.next_order:
                self._alert(f"journal entries {backlog.next_order} to {order - 1} are missing")
            backlog.next_order = order
            if (entry := self._read(order)) is None:
                backlog.next_order += 1
            else:
                backlog.append(*entry)

    def _recall(self, order: int) -> None:
        """Register an entry that the checkpoint contains: in `stream` mode it may be the base of a later push."""
        if self._config.mode != "stream":
            self._backlog.recall_unread(order)
        elif (entry := self._read(order)) is not None:
            self._backlog.recall(order, entry[1])

    def _read(self, order: int) -> tuple[Lease, Contribution] | None:
        """Return a journal entry, or None if it was damaged and is now set aside. Raises NewerFormat."""
        try:
            arrays, header = self._backlog.journal.read(order)
            lease = Lease.from_dict(header["lease"])
            contribution = Contribution.from_parts(header["contribution"], arrays).owned()
            if problem := self._mismatch(lease, contribution):
                raise ValueError(problem)
        except NewerFormat:
            raise
        except (CorruptFile, OSError, KeyError, ValueError) as error:
            self._alert(f"journal entry {order} is set aside, and its task is trained again unless it is done: {error}")
            self._backlog.journal.set_aside(order)
            return None
        return lease, contribution

    def _mismatch(self, lease: Lease, contribution: Contribution) -> str:
        """Return why a journal entry cannot be of this run, or "" if it can."""
        vector, start, size = contribution.vector, contribution.start, self._manifest.size
        if lease.id in self._backlog.unmeasurable:
            return f"the earlier entry that this push of lease {lease.id} builds on is lost"
        if contribution.lease != lease.id or lease.task.game not in self._config.task_names:
            return "it belongs to another lease or run"
        if contribution.manifest != self._manifest.digest or vector.ndim != 1:
            return "it belongs to a different encoder"
        if len(vector) != self._expected_length(lease, len(vector)) or (start is not None and start.shape != (size,)):
            return "it belongs to a different encoder"
        if self._config.corrects_endpoint != (start is not None):
            return "it belongs to a run with different settings"
        arrays = [vector] if start is None else [vector, start]
        if not all(array.dtype == np.float32 and np.isfinite(array).all() for array in arrays):
            return "it is not finite float32"
        return ""

    def _expected_length(self, lease: Lease, found: int) -> int:
        """Return how long an entry's vector must be. The first head of a game may have any length but 0."""
        size = self._manifest.size
        if self._config.meta_learner == "none":
            return 0
        if not self._config.keeps_heads:
            return size
        head = self._state.head_size(lease.task.game)
        return size + (max(1, found - size) if head is None else head)

    # Tasks and leases --------------------------------------------------------------------------------------------

    def _restore_assignments(self, rest: dict[str, Any] | None) -> list[OpenLease]:
        """Restore tasks, leases and totals from a checkpoint's bookkeeping and what was accepted since."""
        queue, leases = self._assignments.queue, self._assignments.leases
        pending: set[int] = set()
        progress: dict[str, int] = {}
        if rest is not None:
            try:
                schema.check(rest, BOOKKEEPING_SHAPE, "rest")
            except ValueError as error:
                raise CorruptFile(f"the newest checkpoint was not written by this program: {error}") from None
            queue.restore(rest["queue"])
            self._restore_quarantine(rest)
            self._scheduler.batch_start = rest["batch_start"]
            self._counters.events, self._counters.refused = Counter(rest["counts"]), Counter(rest["refused"])
            pending, progress = set(rest["pending"]), dict(rest["progress"])
            for lease_id, seq in rest["accepted_leases"].items():
                leases.remember(lease_id, ACCEPTED, seq)
        done = self._count_accepted(progress)
        for lease_id in self._backlog.unmeasurable:
            leases.remember(lease_id, "journal-damaged")
        known = queue.next
        orphans = self._reopen_leases(pending, done, progress)
        queue.reconcile((pending | set(range(known, queue.next))) - done - self._leased())
        for lease_id, newest in list(self._backlog.unfinished.items()):
            held = leases.get(lease_id)
            if held is None:
                self._backlog.forget(lease_id)
            else:
                held.seq, held.newest = newest.seq, newest
        return orphans

    def _count_accepted(self, progress: dict[str, int]) -> set[int]:
        """Count the replayed contributions, update `progress`, and return the tasks that they finish."""
        done = set()
        for one in self._backlog.waiting:
            before = progress.get(one.lease.id, 0)
            self._counters.events["steps"] += max(0, one.contribution.steps - before)
            progress[one.lease.id] = max(one.contribution.steps, before)
            if one.contribution.final:
                self._assignments.leases.remember(one.lease.id, ACCEPTED, one.contribution.seq)
                self._assignments.queue.succeed(one.lease.task)
                self._assignments.quarantine.succeed(one.lease.task.game, one.lease.worker)
                done.add(one.lease.task.index)
        return done

    def _restore_quarantine(self, rest: dict[str, Any]) -> None:
        """Restore the quarantine after a restart; a run that is resumed by a new launch gives games another try."""
        session = rest.get("session", self._assignments.leases.session)
        if session == self._assignments.leases.session:
            self._assignments.quarantine.restore(rest["queue"])
        elif games := rest["queue"]["quarantined"]:
            self._alert(f"the run is resumed: {', '.join(games)} left quarantine for another try")

    def _reopen_leases(self, pending: set[int], done: set[int], progress: dict[str, int]) -> list[OpenLease]:
        """Open the recorded leases and advance the queue past every task that was ever granted."""
        queue, leases = self._assignments.queue, self._assignments.leases
        known = queue.next
        orphans, highest, warnings = leases.reopen(
            lambda index: index not in done and (index in pending or index >= known)
        )
        for warning in warnings:
            self._alert(warning)
        for reopened in leases.all():
            reopened.steps = progress.get(reopened.lease.id, 0)
        # Lease records may be lost with a machine. An accepted partial contribution shows that its task was granted.
        granted = {one.lease.task.index for one in self._backlog.waiting} | pending
        queue.next = max([known, highest, *(index + 1 for index in granted)])
        if queue.next > known + MAX_TASKS_BETWEEN_CHECKPOINTS:
            raise CorruptFile(f"journal/ names task {queue.next - 1}, but checkpoints/ {known} tasks in all")
        return orphans

    def _leased(self) -> set[int]:
        return {held.lease.task.index for held in self._assignments.leases.all()}
