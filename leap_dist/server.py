"""The server: it owns the initialization, leases tasks, takes contributions and makes meta-updates.

A plain, single-threaded class: `driver.py` puts it into a Ray actor, tests call it directly. The contract: a
contribution acknowledged as durable is applied exactly once, whatever is killed.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from leap_dist import aggregation
from leap_dist.aggregation import Direction, MetaOptimizer, Pull
from leap_dist.checkpoint import Checkpoint, CheckpointStore, CorruptFile, Journal, Ledger, RunLock, pack, write_atomic
from leap_dist.config import Config
from leap_dist.contribution import Ack, Contribution, Idle, Lease
from leap_dist.leases import ACCEPTED, LeaseBook, OpenLease, describe, lease_from
from leap_dist.models import Manifest
from leap_dist.tasks import MAX_FAILURES, TaskQueue

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Accepted:
    """A final contribution that is in the journal and waits for its meta-update."""

    order: int
    lease: Lease
    contribution: Contribution
    norm: float


class MetaServer:
    """Owns φ, its meta-optimizer and the run directory's checkpoints, journal and ledger.

    Args:
        config: the run's configuration.
        run_dir: an existing directory; it is locked while the server lives.
        manifest: names and shapes behind φ.
        initial: φ₀, used only where the run directory holds no checkpoint yet.
        session: names this launch; leases of other sessions are dropped, their workers being gone.
        clock: monotonic seconds.

    Raises RunDirectoryBusy where another server holds the directory, CorruptFile where nothing in it can be used,
    and ValueError where the checkpoint belongs to another encoder.
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
        self._run_dir = run_dir
        self._manifest = manifest
        self._clock = clock
        self._lock = RunLock(run_dir)
        self._checkpoints = CheckpointStore(run_dir / "checkpoints", config.server.keep_checkpoints)
        self._journal = Journal(run_dir / "journal")
        self._ledger = Ledger(run_dir / "ledger.jsonl")
        self._queue = TaskQueue(config.games, seed=config.seed, steps=config.task_steps)
        self._leases = LeaseBook(self._journal, session, clock)
        self._optimizer = MetaOptimizer(config.meta, initial)

        self.version = 0
        self._batch_size = aggregation.batch_size(config.mode, config.meta)
        self._batch_start = 0  # sync: first task of the batch being gathered
        self._buffer: list[_Accepted] = []  # accepted and journaled, not applied; ascending order
        self._next_order = 0  # of the next contribution to be accepted
        self._covered = deque([0], maxlen=config.server.keep_checkpoints)  # first order that each kept checkpoint lacks
        self._norms: deque[float] = deque(maxlen=config.meta.clip_window)
        self._unwritten: list[dict[str, Any]] = []  # ledger lines that are in a checkpoint, but not in the ledger yet
        self._counts: Counter[str] = Counter()  # applied, partials, duplicates, leases_lost
        self._refused: Counter[str] = Counter()  # by reason
        self._steps = Counter(reported=0, applied=0)  # agent steps; `reported` holds lost work too
        self._saved_at = clock()
        self.alerts: deque[str] = deque(maxlen=100)
        """What a person should know, oldest first."""
        self._restore(initial)

    # What workers call -------------------------------------------------------------------------------------------

    def lease(self, worker: str, incarnation: str) -> Lease | Idle:
        """Grants the next task to a worker, or says that there is none now. Raises OSError where it cannot be recorded.

        A worker holds one lease at most: what it held before is taken back.
        """
        self.tick()
        for held in self._leases.of(worker):
            self._lose(held, "superseded")
        missing = (self._config.meta_updates - self.version) * self._batch_size - len(self._buffer) - len(self._leases)
        if self.finished or missing <= 0:
            return Idle(finished=self.finished)
        task = self._queue.draw(self._batch_start + self._batch_size if self._config.mode == "sync" else None)
        if task is None:
            return Idle(finished=self.finished)
        try:
            return self._leases.grant(task, worker, incarnation, self.version, self._config.server.lease_seconds)
        except OSError:
            self._queue.give_back(task.index)
            raise

    def snapshot(self) -> tuple[int, np.ndarray]:
        """(version, φ): published together, never apart. The vector is a copy."""
        return self.version, self._optimizer.vector

    def renew(self, lease_id: str, incarnation: str) -> Ack:
        """Extends a lease. `proceed` is False where that incarnation holds it no longer."""
        held = self._leases.get(lease_id)
        if held is None or held.lease.incarnation != incarnation:
            return self._ack(False, reason=self._leases.outcome(lease_id), proceed=False)
        self._leases.extend(held)
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
    def finished(self) -> bool:
        """All meta-updates are made, or no game is left to play."""
        return self.version >= self._config.meta_updates or self._queue.exhausted

    def tick(self) -> None:
        """Takes back leases past their deadline, and retries a meta-update that could not be saved."""
        for held in self._leases.expired():
            self._alert(f"lease {held.lease.id} of {held.lease.worker} ({held.lease.task.game}) expired")
            self._lose(held, "expired")
        self._update()

    def release(self, worker: str) -> None:
        """Takes back at once what a worker holds that is known to be gone."""
        for held in self._leases.of(worker):
            self._lose(held, "worker-lost")

    def status(self) -> dict[str, Any]:
        """Counters and open leases, as plain data."""
        return {
            "meta_updates": self.version,
            "meta_updates_wanted": self._config.meta_updates,
            "contributions_applied": self._counts["applied"],
            "contributions_waiting": len(self._buffer),
            "partials": self._counts["partials"],
            "duplicates": self._counts["duplicates"],
            "leases_lost": self._counts["leases_lost"],
            "refused": dict(self._refused),
            "quarantined": sorted(self._queue.quarantined),
            "agent_steps": self._steps["reported"],
            "checkpoint_age": self._clock() - self._saved_at,
            "finished": self.finished,
            "alerts": list(self.alerts),
            "leases": [describe(held, self._clock()) for held in self._leases.all()],
        }

    def ledger(self, offset: int) -> tuple[list[dict[str, Any]], int]:
        """Ledger lines from byte `offset` on, and the offset to ask for next."""
        return self._ledger.read(offset)

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
        accepted = _Accepted(self._next_order, held.lease, contribution, norm)
        header = {"lease": asdict(held.lease), "norm": norm, "contribution": contribution.header()}
        try:
            self._journal.write(accepted.order, contribution.vector, header)
        except OSError as error:
            self._alert(f"the contribution of {held.lease.worker} could not be stored: {error}")
            return self._refuse("storage", proceed=True)
        self._note_progress(held, contribution)
        self._leases.end(held, ACCEPTED)
        self._count(accepted)
        self._update()
        return self._ack(True, durable=True, proceed=False)

    def _count(self, accepted: _Accepted) -> None:
        self._buffer.append(accepted)
        self._next_order = accepted.order + 1
        self._queue.succeed(accepted.lease.task)

    def _note_progress(self, held: OpenLease, contribution: Contribution) -> None:
        self._steps["reported"] += contribution.steps - (held.newest.steps if held.newest else 0)
        held.seq = contribution.seq
        # Only a server that lets prefixes count needs their vectors; the others stay small however many leases are open.
        needed = contribution.vector if self._config.server.on_lost == "keep" else contribution.vector[:0]
        held.newest = replace(contribution, vector=needed.copy())
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
        """How many contributions, from the front of the buffer, make the next meta-update; 0 where none is due."""
        if self._config.mode != "sync":
            return self._batch_size if len(self._buffer) >= self._batch_size else 0
        end = self._batch_start + self._batch_size
        unfinished = [*self._queue.waiting, *(held.lease.task.index for held in self._leases.all())]
        if self._queue.next < end or any(index < end for index in unfinished):
            return 0
        count = sum(accepted.lease.task.index < end for accepted in self._buffer)
        if count == 0:  # every task of the batch was of a quarantined game
            self._batch_start = end
        return count

    def _update(self) -> None:
        """Makes every meta-update that is due. One that cannot be saved is undone whole and waits for the next call."""
        while self.version < self._config.meta_updates and (count := self._ready()):
            # In the order of the tasks, whatever order they arrived in: the same contributions give the same bits.
            batch = sorted(self._buffer[:count], key=lambda accepted: accepted.lease.task.index)
            before = self._optimizer.vector, self._optimizer.state()
            lines = self._step(batch)
            try:
                self._checkpoints.save(self._checkpoint(self.version + 1, self._buffer[count:], lines))
            except OSError as error:
                self._optimizer.restore(*before)
                self._alert(f"meta-update {self.version + 1} could not be saved and waits: {error}")
                return
            self._commit(count, lines)

    def _step(self, batch: list[_Accepted]) -> list[dict[str, Any]]:
        """Moves φ. Returns the ledger's lines for it."""
        pulls = [Pull(a.lease.version, a.norm, a.contribution.vector) for a in batch]
        direction = aggregation.combine(self._config.mode, self._config.meta, pulls, self.version, self._norms)
        before, state = self._optimizer.vector, self._optimizer.state()
        self._optimizer.step(direction.gradient)
        change = float(np.linalg.norm((self._optimizer.vector - before).astype(np.float64)))
        if not np.isfinite(change):
            self._optimizer.restore(before, state)
            self._alert(f"meta-update {self.version + 1} was not finite: the initialization stays as it was")
            change = 0.0
        return self._ledger_lines(batch, direction, change)

    def _commit(self, count: int, lines: list[dict[str, Any]]) -> None:
        """What follows a durable checkpoint. A crash anywhere in here is made good by `_restore`."""
        batch, self._buffer = self._buffer[:count], self._buffer[count:]
        self.version += 1
        self._counts["applied"] += count
        self._steps["applied"] += sum(a.contribution.steps for a in batch)
        self._norms.extend(a.norm for a in batch)
        self._covered.append(batch[-1].order + 1)
        self._saved_at = self._clock()
        self._batch_start += self._batch_size
        self._unwritten += lines
        self._write_ledger()
        self._journal.discard_before(self._covered[0])

    def _write_ledger(self) -> None:
        try:
            self._ledger.append(self._ledger.size, self._unwritten)
            self._unwritten = []
            write_atomic(self._run_dir / "init.safetensors", self._export())
        except OSError as error:
            self._alert(f"the ledger or init.safetensors could not be written and waits: {error}")

    def _ledger_lines(self, batch: list[_Accepted], direction: Direction, update_norm: float) -> list[dict[str, Any]]:
        total_steps = self._steps["applied"] + sum(a.contribution.steps for a in batch)
        return [
            {
                "version_before": self.version,
                "version_after": self.version + 1,
                "task": a.lease.task.index,
                "game": a.lease.task.game,
                "visit": a.lease.task.visit,
                "lease": a.lease.id,
                "worker": a.lease.worker,
                "lease_version": a.lease.version,
                "staleness": self.version - a.lease.version,
                "weight": weight,
                "norm": a.norm,
                "clip": clip,
                "updates": a.contribution.updates,
                "steps": a.contribution.steps,
                "seconds": a.contribution.seconds,
                "path": asdict(a.contribution.path),
                "curve": [asdict(point) for point in a.contribution.curve],
                "update_norm": update_norm,
                "agreement": direction.agreement,
                "total_steps": total_steps,
            }
            for a, weight, clip in zip(batch, direction.weights, direction.clips, strict=True)
        ]

    def _export(self) -> bytes:
        """init.safetensors, for other programs."""
        atari = self._config.atari
        header = {
            "version": self.version,
            "preset": self._config.preset,
            "meta_learner": self._config.meta_learner,
            "games": list(self._config.games),
            "preprocessing": {"frames": atari.frames, "size": 84, "frame_skip": atari.frame_skip, "scale": "pixels / 255"},
        }
        return pack(self._manifest.split(self._optimizer.vector), header)

    # Durability --------------------------------------------------------------------------------------------------

    def _checkpoint(self, version: int, left: list[_Accepted], lines: list[dict[str, Any]]) -> Checkpoint:
        """All that a restart needs besides the journal, as of `version`, when only `left` remains in the buffer."""
        applied = self._buffer[: len(self._buffer) - len(left)]
        covered = left[0].order if left else self._next_order
        state = {
            "queue": self._queue.state(),
            "batch_start": self._batch_start + (self._batch_size if applied else 0),
            # Every task below `queue.next` that is neither here nor in the journal is done.
            "pending": sorted(
                [a.lease.task.index for a in left]
                + [held.lease.task.index for held in self._leases.all()]
                + self._queue.waiting
            ),
            "covered": [*self._covered, covered],
            "norms": [*self._norms, *(a.norm for a in applied)],
            "counts": {**self._counts, "applied": self._counts["applied"] + len(applied)},
            "refused": dict(self._refused),
            "steps": {**self._steps, "applied": self._steps["applied"] + sum(a.contribution.steps for a in applied)},
            "accepted_leases": self._leases.accepted(),
            "ledger": {"offset": self._ledger.size, "lines": [*self._unwritten, *lines]},
        }
        return Checkpoint(version, self._manifest.split(self._optimizer.vector), self._optimizer.state(), state)

    def _restore(self, initial: np.ndarray) -> None:
        """Newest whole checkpoint, then the ledger lines it carries, then the journal, then the leases still open."""
        checkpoint, warnings = self._checkpoints.load_newest()
        for warning in warnings:
            self._alert(warning)
        if checkpoint is None and warnings:
            raise CorruptFile("no usable checkpoint is left: " + "; ".join(warnings))
        if checkpoint is None:
            checkpoint = self._checkpoint(0, [], [])
            self._checkpoints.save(checkpoint)
        state = checkpoint.state
        self.version = checkpoint.version
        self._optimizer.restore(self._manifest.join(checkpoint.init), checkpoint.optimizer)
        self._queue.restore(state["queue"])
        self._batch_start = state["batch_start"]
        self._covered.extend(state["covered"])
        self._next_order = self._covered[-1]
        self._norms.extend(state["norms"])
        self._counts, self._refused = Counter(state["counts"]), Counter(state["refused"])
        self._steps = Counter(state["steps"])
        for lease_id in state["accepted_leases"]:
            self._leases.remember(lease_id, ACCEPTED)
        self._ledger.append(state["ledger"]["offset"], state["ledger"]["lines"])
        write_atomic(self._run_dir / "init.safetensors", self._export())
        self._restore_tasks(set(state["pending"]))
        self._update()

    def _restore_tasks(self, pending: set[int]) -> None:
        """Counts what the journal holds beyond the checkpoint, in order, and sorts all other tasks by what they need."""
        first_unknown = self._queue.next
        for order, vector, header in self._journal.entries(self._next_order):
            if order != self._next_order:
                self._alert(f"journal entries {self._next_order} to {order - 1} are missing")
            accepted = _Accepted(
                order, lease_from(header["lease"]), Contribution.of(header["contribution"], vector), header["norm"]
            )
            self._leases.remember(accepted.lease.id, ACCEPTED)
            self._count(accepted)
        done = {accepted.lease.task.index for accepted in self._buffer}
        leased, highest = self._leases.reopen(done)
        self._queue.next = max([first_unknown, highest, *(index + 1 for index in done)])
        self._queue.reconcile((pending | set(range(first_unknown, self._queue.next))) - done - leased)

    # Answers -----------------------------------------------------------------------------------------------------

    def _ack(self, accepted: bool, *, durable: bool = False, reason: str = "", proceed: bool = True) -> Ack:
        return Ack(accepted, durable, reason, proceed, self.version)

    def _refuse(self, reason: str, *, proceed: bool) -> Ack:
        self._refused[reason] += 1
        return self._ack(False, reason=reason, proceed=proceed)

    def _alert(self, text: str) -> None:
        log.warning(text)
        self.alerts.append(text)
