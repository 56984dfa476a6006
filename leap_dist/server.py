"""The server: it owns the initialization, leases tasks, takes contributions and makes meta-updates.

A plain, single-threaded class: `driver.py` puts it into a Ray actor, tests call it directly. The contract: a
contribution acknowledged as durable is applied exactly once, whatever is killed.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from leap_dist import aggregation
from leap_dist.checkpoint import RunLock
from leap_dist.config import Config
from leap_dist.contribution import Ack, Contribution, Idle, Lease
from leap_dist.leases import ACCEPTED, LeaseBook, OpenLease, describe
from leap_dist.meta_state import Accepted, MetaState
from leap_dist.models import Manifest
from leap_dist.tasks import MAX_FAILURES, TaskQueue

log = logging.getLogger(__name__)


class MetaServer:
    """Owns φ, its meta-optimizer and the run directory's checkpoints, journal and ledger.

    Args:
        config: the run's configuration.
        run_dir: an existing directory; it is locked while the server lives.
        manifest: names and shapes behind φ.
        initial: φ₀, used only where the run directory holds no checkpoint yet.
        session: names this launch; leases of other sessions are dropped, their workers being gone.
        clock: monotonic seconds.

    Raises RunDirectoryBusy where another server holds the directory, CorruptFile where nothing in it can be used or it
    belongs to another encoder.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        *,
        manifest: Manifest,
        initial: np.ndarray,
        session: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._manifest = manifest
        self._clock = clock
        self.alerts: deque[str] = deque(maxlen=100)
        """What a person should know, oldest first."""
        self._state = MetaState(config, run_dir, manifest, initial, self._alert)
        self._queue = TaskQueue(config.games, seed=config.seed, steps=config.task_steps)
        self._leases = LeaseBook(self._state.journal, session, clock)
        self._batch_size = aggregation.batch_size(config.mode, config.meta)
        self._batch_start = 0  # sync: first task of the batch being gathered
        self._counts: Counter[str] = Counter()  # partials, duplicates, leases_lost, steps (lost work included)
        self._refused: Counter[str] = Counter()  # by reason
        self._saved_at = clock()
        self._lock = RunLock(run_dir)
        try:
            self._restore()
        except BaseException:
            self._lock.release()
            raise

    # What workers call -------------------------------------------------------------------------------------------

    def lease(self, worker: str, incarnation: str) -> Lease | Idle:
        """Grants the next task to a worker, or says that there is none now, as when the disk is full.

        A worker holds one lease at most: what it held before is taken back.
        """
        self.tick()
        for held in self._leases.of(worker):
            self._lose(held, "superseded")
        wanted = (self._config.meta_updates - self.version) * self._batch_size
        missing = wanted - len(self._state.waiting) - len(self._leases)
        if self.finished or missing <= 0:
            return Idle(finished=self.finished)
        task = self._queue.draw(self._batch_start + self._batch_size if self._config.mode == "sync" else None)
        if task is None:
            return Idle(finished=self.finished)
        try:
            return self._leases.grant(task, worker, incarnation, self.version, self._config.server.lease_seconds)
        except OSError as error:
            self._queue.give_back(task.index)
            self._alert(f"no lease can be granted while the journal cannot be written: {error}")
            return Idle(finished=False)

    def snapshot(self) -> tuple[int, np.ndarray]:
        """(version, φ): published together, never apart. The vector is a copy."""
        return self.version, self._state.vector

    def renew(self, lease_id: str, incarnation: str, steps: int) -> Ack:
        """Extends a lease, `steps` agent steps into its task. `proceed` is False where it is no longer held."""
        held = self._leases.get(lease_id)
        if held is None or held.lease.incarnation != incarnation:
            return self._ack(False, reason=self._leases.outcome(lease_id), proceed=False)
        self._extend(held, steps)
        return self._ack(True)

    def push(self, contribution: Contribution) -> Ack:
        """Takes a contribution. Repeated and reordered ones change nothing; a final one is durable once acknowledged.

        A refusal names its reason, is counted, and leaves everything as it was, except that an unusable final
        contribution ends its lease. "storage" means that the disk would not take it: push again later.
        """
        held = self._leases.get(contribution.lease)
        if held is None:
            return self._answer_closed(contribution)
        if (contribution.worker, contribution.incarnation) != (held.lease.worker, held.lease.incarnation):
            return self._refuse("incarnation", proceed=False)
        if contribution.seq <= held.seq:
            self._counts["duplicates"] += 1
            return self._ack(True, reason="duplicate")
        problem, norm = self._examine(contribution)
        if problem and contribution.final:
            self._fail(held, f"{problem} contribution")
        if problem:
            return self._refuse(problem, proceed=not contribution.final)
        if contribution.final:
            return self._accept(held, contribution, norm)
        self._counts["partials"] += 1
        self._note_progress(held, contribution)
        return self._ack(True)

    def fail(self, lease_id: str, incarnation: str, reason: str) -> Ack:
        """A worker's task raised: it will run again with another seed. A game that keeps failing is quarantined."""
        held = self._leases.get(lease_id)
        if held is None or held.lease.incarnation != incarnation:
            return self._ack(False, reason=self._leases.outcome(lease_id), proceed=False)
        self._fail(held, reason)
        return self._ack(True, proceed=False)

    # What the driver calls ---------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Meta-updates made."""
        return self._state.version

    @property
    def finished(self) -> bool:
        """All meta-updates are made, or no game is left to play."""
        return self.version >= self._config.meta_updates or self._queue.exhausted

    def tick(self) -> None:
        """Takes back leases past their deadline, and retries a meta-update that could not be saved."""
        for held in self._leases.expired():
            self._alert(f"lease {held.lease.id} of {held.lease.worker} ({held.lease.task.game}) expired")
            self._lose(held, "expired")
        self._update()

    def release(self, incarnation: str) -> None:
        """Takes back at once what an incarnation holds that is known to be gone."""
        for held in self._leases.all():
            if held.lease.incarnation == incarnation:
                self._lose(held, "worker-lost")

    def status(self) -> dict[str, Any]:
        """Counters and open leases, as plain data."""
        return {
            "meta_updates": self.version,
            "meta_updates_wanted": self._config.meta_updates,
            "contributions_applied": self._state.applied,
            "contributions_waiting": len(self._state.waiting),
            "partials": self._counts["partials"],
            "duplicates": self._counts["duplicates"],
            "leases_lost": self._counts["leases_lost"],
            "refused": dict(self._refused),
            "quarantined": sorted(self._queue.quarantined),
            "agent_steps": self._counts["steps"],
            "checkpoint_age": self._clock() - self._saved_at,
            "finished": self.finished,
            "alerts": list(self.alerts),
            "leases": [describe(held, self._clock()) for held in self._leases.all()],
        }

    def ledger(self, offset: int) -> tuple[list[dict[str, Any]], int]:
        """Ledger lines from byte `offset` on, and the offset to ask for next."""
        return self._state.ledger.read(offset)

    def close(self) -> None:
        """Gives the run directory back. There is nothing to save: everything durable has been so all along."""
        self._lock.release()

    # Contributions -----------------------------------------------------------------------------------------------

    def _examine(self, contribution: Contribution) -> tuple[str, float]:
        """Why a contribution cannot count ("" where it can), and its norm."""
        vector = contribution.vector
        if contribution.manifest != self._manifest.digest:
            return "manifest", 0.0
        if vector.dtype != np.float32:
            return "dtype", 0.0
        if vector.shape != (self._manifest.size,):
            return "shape", 0.0
        norm = float(np.linalg.norm(vector.astype(np.float64)))
        return ("", norm) if np.isfinite(norm) else ("non-finite", 0.0)

    def _accept(self, held: OpenLease, contribution: Contribution, norm: float) -> Ack:
        """Makes a final contribution durable, then counts it."""
        if self._config.mode != "sync" and self.version - held.lease.version > self._config.max_staleness:
            self._leases.end(held, "stale")
            return self._refuse("stale", proceed=False)
        # Ray's arrays are read-only views into its object store and must not be kept; this copy is.
        contribution = replace(contribution, vector=np.array(contribution.vector))
        try:
            self._state.accept(held.lease, contribution, norm)
        except OSError as error:
            self._alert(f"the contribution of {held.lease.worker} could not be stored: {error}")
            self._leases.extend(held)  # its worker is well, and will try again
            return self._refuse("storage", proceed=True)
        self._note_progress(held, contribution)
        self._leases.end(held, ACCEPTED)
        self._queue.succeed(held.lease.task)
        self._update()
        return self._ack(True, durable=True, proceed=False)

    def _note_progress(self, held: OpenLease, contribution: Contribution) -> None:
        self._extend(held, contribution.steps)
        held.seq = contribution.seq
        # Only a server that lets prefixes count needs their vectors; all others stay small, whatever is open.
        needed = contribution.vector if self._config.server.on_lost == "keep" else contribution.vector[:0]
        held.newest = replace(contribution, vector=needed.copy())

    def _extend(self, held: OpenLease, steps: int) -> None:
        self._counts["steps"] += max(0, steps - held.steps)
        held.steps = max(held.steps, steps)
        self._leases.extend(held)

    def _answer_closed(self, contribution: Contribution) -> Ack:
        outcome = self._leases.outcome(contribution.lease)
        if outcome != ACCEPTED:
            return self._refuse(outcome, proceed=False)
        self._counts["duplicates"] += 1
        return self._ack(True, durable=True, reason="duplicate", proceed=False)

    def _lose(self, held: OpenLease, outcome: str) -> None:
        """Ends a lease whose worker is gone: its prefix counts, where that is asked for, or its task runs again."""
        self._counts["leases_lost"] += 1
        if self._config.server.on_lost == "keep" and held.newest is not None:
            problem, norm = self._examine(held.newest)
            if not problem and self._accept(held, replace(held.newest, final=True), norm).durable:
                return
        if self._leases.get(held.lease.id) is held:
            self._leases.end(held, outcome)
        self._queue.give_back(held.lease.task.index)

    def _fail(self, held: OpenLease, reason: str) -> None:
        game = held.lease.task.game
        self._alert(f"{game} failed on {held.lease.worker}: {reason}")
        self._leases.end(held, "failed")
        if self._queue.fail(held.lease.task):
            self._alert(f"{game} is quarantined after {MAX_FAILURES} failures in a row; the last one: {reason}")
        self._update()  # sync: without the quarantined game the batch may be complete

    # Meta-updates ------------------------------------------------------------------------------------------------

    def _ready(self) -> int:
        """How many of the waiting contributions make the next meta-update; 0 where none is due."""
        waiting = self._state.waiting
        if self._config.mode != "sync":
            return self._batch_size if len(waiting) >= self._batch_size else 0
        end = self._batch_start + self._batch_size
        unfinished = [*self._queue.waiting, *(held.lease.task.index for held in self._leases.all())]
        if self._queue.next < end or any(index < end for index in unfinished):
            return 0
        count = sum(accepted.lease.task.index < end for accepted in waiting)
        if count == 0:  # every task of the batch was of a quarantined game
            self._batch_start = end
        return count

    def _update(self) -> None:
        """Makes every meta-update that is due. One that cannot be saved waits for the next call."""
        while self.version < self._config.meta_updates and (count := self._ready()):
            following = self._batch_start + self._batch_size
            try:
                self._state.update(count, self._rest(self._state.waiting[count:], following))
            except OSError as error:
                self._alert(f"meta-update {self.version + 1} could not be saved and waits: {error}")
                return
            self._batch_start = following
            self._saved_at = self._clock()

    def _rest(self, waiting: list[Accepted], batch_start: int) -> dict[str, Any]:
        """What a restart needs besides the state of φ, once only `waiting` waits."""
        held = [held.lease.task.index for held in self._leases.all()]
        return {
            "queue": self._queue.state(),
            # Every task below `queue.next` that is neither here nor in the journal is done.
            "pending": sorted([*held, *self._queue.waiting, *(a.lease.task.index for a in waiting)]),
            "batch_start": batch_start,
            "counts": dict(self._counts),
            "refused": dict(self._refused),
            "accepted_leases": self._leases.accepted(),
        }

    def _restore(self) -> None:
        """The newest checkpoint, the contributions accepted since, and the leases still open."""
        rest, accepted = self._state.restore()
        pending: set[int] = set()
        if rest is not None:
            self._queue.restore(rest["queue"])
            self._batch_start = rest["batch_start"]
            self._counts, self._refused = Counter(rest["counts"]), Counter(rest["refused"])
            pending.update(rest["pending"])
        for lease_id in [*(rest["accepted_leases"] if rest else ()), *(a.lease.id for a in accepted)]:
            self._leases.remember(lease_id, ACCEPTED)
        for one in accepted:
            self._queue.succeed(one.lease.task)
        done = {one.lease.task.index for one in accepted}
        leased, highest = self._leases.reopen(done)
        known = self._queue.next
        self._queue.next = max([known, highest, *(index + 1 for index in done)])
        self._queue.reconcile((pending | set(range(known, self._queue.next))) - done - leased)
        self._update()

    # Answers -----------------------------------------------------------------------------------------------------

    def _ack(self, accepted: bool, *, durable: bool = False, reason: str = "", proceed: bool = True) -> Ack:
        return Ack(accepted, durable, reason, proceed, self.version)

    def _refuse(self, reason: str, *, proceed: bool) -> Ack:
        self._refused[reason] += 1
        return self._ack(False, reason=reason, proceed=proceed)

    def _alert(self, text: str) -> None:
        if text not in list(self.alerts)[-3:]:  # what keeps failing is said once
            log.warning(text)
            self.alerts.append(text)
