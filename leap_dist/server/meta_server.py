"""The server: it owns the initialization, leases tasks, takes contributions and makes meta-updates.

A plain, single-threaded class: `driver` puts it into a Ray actor, tests call it directly. The contract: a
contribution acknowledged as durable is applied exactly once, whatever is killed.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from leap_dist.config.settings import Config
from leap_dist.nn.flat_vector import Manifest
from leap_dist.protocol import schema
from leap_dist.protocol.messages import Ack, Contribution, Idle, Lease, Renewal
from leap_dist.protocol.task_queue import TaskQueue
from leap_dist.server import aggregation
from leap_dist.server.admission import BackPressure, ContributionValidator, RateLimiter
from leap_dist.server.leases import ACCEPTED, LeaseBook, OpenLease, describe
from leap_dist.server.meta_state import Accepted, MetaState
from leap_dist.server.monitoring import Agreement, LatencyWindow
from leap_dist.server.quarantine import Quarantine
from leap_dist.storage.atomic import CorruptFile
from leap_dist.storage.replica import NO_REPLICA, NoReplica
from leap_dist.storage.run_lock import RunLock
from leap_dist.testing.failpoints import failpoint

log = logging.getLogger(__name__)

_NOTHING = np.empty(0, np.float32)
_MOST_GRANTED = 1_000_000  # tasks between two checkpoints; what claims more is damage
_REST = {
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
"""What `MetaServer._rest` returns."""

_PART_OF_LEASE = 0.25  # for which a worker is told to stay silent at most
LEAST_LEASES = 16  # open at once that are granted to anybody, however few workers were asked for
LEAST_WAITING = 64  # contributions that are kept waiting at least, while no meta-update can be saved
LONG_WAIT = 5.0  # seconds for which a worker is sent away that is one too many


class MetaServer:
    """Owns φ, its meta-optimizer and the run directory's checkpoints, journal and ledger.

    Args:
        config: the run's configuration.
        run_dir: an existing directory; it is locked while the server lives.
        manifest: names and shapes behind φ.
        initial: φ₀, used only where the run directory holds no checkpoint yet.
        session: names this launch; leases of other sessions are dropped, their workers being gone.
        clock: monotonic seconds.
        work: seconds of work so far; see Pace. None: no more than what the clock says of each call.
        replica: where the run directory is kept too, if anywhere.

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
        work: Callable[[], float] | None = None,
        replica: NoReplica = NO_REPLICA,
    ) -> None:
        self._config = config
        self._manifest = manifest
        self._clock = clock
        self.alerts: deque[str] = deque(maxlen=100)
        """What a person should know, oldest first."""
        self._state = MetaState(config, run_dir, manifest, initial, self._alert, replica)
        self._examination = ContributionValidator(config, manifest, self._state)
        self._quarantine = Quarantine()
        self._queue = TaskQueue(
            config.games,
            self._quarantine.games,
            seed=config.seed,
            steps=config.task_steps,
            replace=config.sampling == "replacement",
        )
        self._intake = RateLimiter(config.server.pushes_per_second, clock)
        longest_wait = _PART_OF_LEASE * config.server.lease_seconds
        self._pace = BackPressure(config.server.busy_share, longest_wait, clock, work or (lambda: 0.0))
        self._leases = LeaseBook(self._state.journal, session, clock)
        self._batch_size = aggregation.batch_size(config.mode, config.meta)
        self._batched = config.mode in ("sync", "buffered")
        self._gathered = 0  # mode stream: how many contributions the next meta-update is of, where they come together
        self._batch_start = 0  # sync: first task of the batch being gathered
        self._counts: Counter[str] = Counter()  # partials, duplicates, leases_lost, all_zero, steps (also of lost work)
        self._refused: Counter[str] = Counter()  # by reason
        self._silent: deque[str] = deque(maxlen=100)  # incarnations whose lease expired
        self._saved_at = clock()
        self._push_times, self._update_times = LatencyWindow(), LatencyWindow()
        self._agreement = Agreement(manifest.size)
        self._lock = RunLock(run_dir)
        try:
            self._restore()
        except BaseException:
            self._lock.release()
            raise

    # What workers call -------------------------------------------------------------------------------------------

    def lease(self, worker: str, incarnation: str) -> Lease | Idle:
        """Grants the next task to a worker, or says that there is none now, as when the disk is full.

        A worker holds one lease at most: what it held before is taken back. A quarantined worker gets none, and nobody
        gets one while twice as many are open as workers were asked for.
        """
        with self._pace.call():
            return self._lease(worker, incarnation)

    def _lease(self, worker: str, incarnation: str) -> Lease | Idle:
        self.tick()
        for held in self._leases.of(worker):
            self._lose(held, "superseded")
        crowded = len(self._leases) >= max(LEAST_LEASES, 2 * self._config.workers)
        if not self.finished and (crowded or worker in self._quarantine.workers):
            return Idle(finished=False, wait=LONG_WAIT)
        if self.finished or self._missing_tasks() <= 0:
            return Idle(finished=self.finished)
        limit = self._batch_start + self._batch_size if self._config.mode == "sync" else None
        task = self._queue.draw(limit, avoid=self._quarantine.failed_on(worker))
        if task is None:
            return Idle(finished=self.finished)
        try:
            lease = self._leases.grant(task, worker, incarnation, self.version, self._config.server.lease_seconds)
        except OSError as error:
            self._queue.give_back(task.index)
            self._alert(f"no lease can be granted while the journal cannot be written: {error}")
            return Idle(finished=False)
        failpoint("lease.acknowledge")
        return lease

    def snapshot(self) -> tuple[int, np.ndarray]:
        """(version, φ): published together, never apart. The vector is a copy."""
        return self.version, self._state.vector

    def head(self, game: str) -> np.ndarray | None:
        """What training has added to a game's persistent head so far; None where there is none."""
        return self._state.heads.get(game)

    def renew(self, lease_id: str, incarnation: str, steps: int) -> Ack:
        """Extends a lease, `steps` agent steps into its task. `proceed` is False where it is no longer held."""
        with self._pace.call(reports=1):
            return self._renew(lease_id, incarnation, steps)

    def _renew(self, lease_id: str, incarnation: str, steps: int) -> Ack:
        held = self._leases.get(lease_id)
        if held is None or held.lease.incarnation != incarnation:
            return self._ack(False, reason=self._leases.outcome(lease_id), proceed=False)
        self._extend(held, steps)
        return self._ack(True, wait=self._pace.wait(len(self._leases)))

    def push(self, contribution: Contribution) -> Ack:
        """Takes a contribution. Repeated and reordered ones change nothing; a final one is durable once acknowledged.

        A refusal names its reason, is counted, and leaves everything as it was, except that an unusable contribution
        ends its lease where nothing better can follow. "storage" means that the disk would not take it, "busy" that
        the server has too much to do: push again later, after `wait` seconds. Whose task goes on may be told to wait
        in any case.
        """
        failpoint("push.received")
        with self._pace.call(reports=int(not contribution.final)), self._push_times:
            ack = self._take(contribution) if self._settle() else self._refuse_unsettled()
        failpoint("push.acknowledge")
        return ack

    def push_together(self, contributions: Sequence[Contribution], renewals: Sequence[Renewal] = ()) -> list[Ack]:
        """The same as to push each contribution and then to renew each lease, in that order, at less cost.

        The journal's directory is flushed once for all of them, and before a meta-update; in mode stream one
        meta-update takes all that they add (or every LEAST_WAITING of them), with a clip and a weight for each.
        Answers contributions first, when all are durable.
        """
        failpoint("push.received")
        only_reports = not any(contribution.final for contribution in contributions)
        with self._pace.call(reports=only_reports * (len(contributions) + len(renewals))), self._push_times:
            acks = self._take_all(contributions) + [self._renew(*renewal) for renewal in renewals]
        failpoint("push.acknowledge")
        return acks

    def fail(self, lease_id: str, incarnation: str, reason: str) -> Ack:
        """A worker's task raised: it will run again with another seed. A game, or a worker, that keeps failing is
        quarantined."""
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
        """All that was asked for is done, or no game is left to play."""
        return self._complete or self._queue.exhausted

    def tick(self) -> None:
        """Takes back leases past their deadline, and retries a meta-update that could not be saved."""
        with self._pace.call():
            self._tick()

    def _tick(self) -> None:
        for held in self._leases.expired():
            silence = f"was not heard of for {held.lease.seconds:g} s"
            self._alert(f"{held.lease.worker} {silence}: its task ({held.lease.task.game}) is taken back")
            self._silent.append(held.lease.incarnation)
            self._lose(held, "expired")
            self._blame(held, f"{held.lease.worker} {silence}")
        self._update()

    def release(self, incarnation: str, *, crashed: bool = False) -> None:
        """Takes back at once what an incarnation holds that is known to be gone.

        `crashed`: by itself, so that the game which it played may be to blame.
        """
        for held in self._leases.all():
            if held.lease.incarnation == incarnation:
                self._lose(held, "worker-lost")
                if crashed:
                    self._blame(held, "its process died", died=True)

    def status(self) -> dict[str, Any]:
        """Counters and open leases, as plain data."""
        with self._pace.call():
            return self._status()

    def _status(self) -> dict[str, Any]:
        return {
            "meta_updates": self.version,
            "tasks": self._state.applied_tasks,
            "tasks_waiting": self._waiting_tasks,
            "tasks_wanted": self._config.total_tasks,
            "complete": self._complete,
            "contributions_applied": self._state.applied,
            "contributions_waiting": len(self._state.waiting),
            "partials": self._counts["partials"],
            "duplicates": self._counts["duplicates"],
            "leases_lost": self._counts["leases_lost"],
            "refused": dict(self._refused),
            "clipped": self._state.clipped,
            "all_zero": self._counts["all_zero"],
            "quarantined": sorted(self._quarantine.games),
            "quarantined_workers": sorted(self._quarantine.workers),
            "silent": list(self._silent),
            "agent_steps": self._counts["steps"],
            "checkpoint_age": self._clock() - self._saved_at,
            "pushes": self._push_times.count,
            "push_ms": self._push_times.milliseconds(),
            "update_ms": self._update_times.milliseconds(),
            "pace_seconds": self._pace.wait(len(self._leases)),
            "busy_share": self._pace.busy_share,
            "agreement_between_games": self._agreement.cosines(),
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

    def _take_all(self, contributions: Sequence[Contribution]) -> list[Ack]:
        if not self._settle():
            return [self._refuse_unsettled() for _ in contributions]
        stream = self._config.mode == "stream"
        try:
            self._gathered = LEAST_WAITING * stream
            with self._state.journal.deferred_sync():
                acks = [self._take(contribution) for contribution in contributions]
            self._gathered = len(self._state.waiting) * stream
            self._update()
        finally:
            self._gathered = 0
        if not self._settle():
            acks = [self._refuse_unsettled() if ack.durable else ack for ack in acks]
        return acks

    def _settle(self) -> bool:
        """Whether all that is in the journal is durable, or could be made so."""
        try:
            self._state.journal.sync()
        except OSError as error:
            self._alert(f"the journal could not be flushed: {error}")
            return False
        return True

    def _refuse_unsettled(self) -> Ack:
        return self._refuse("storage", proceed=True, wait=1.0)

    def _take(self, contribution: Contribution) -> Ack:
        ack = self._answer(contribution)
        if ack.accepted and not contribution.final and ack.proceed:
            ack = replace(ack, wait=max(ack.wait, self._pace.wait(len(self._leases))))
        return ack

    def _answer(self, contribution: Contribution) -> Ack:
        held = self._leases.get(contribution.lease)
        if held is None:
            return self._answer_closed(contribution)
        if (contribution.worker, contribution.incarnation) != (held.lease.worker, held.lease.incarnation):
            return self._refuse("incarnation", proceed=False)
        if contribution.seq <= held.seq:
            self._counts["duplicates"] += 1
            return self._ack(True, durable=self._config.mode == "stream", reason="duplicate")
        if not contribution.final and not self._intake.admit():
            self._extend(held, contribution.steps)
            return self._refuse("busy", proceed=True, wait=self._intake.wait(len(self._leases)))
        problem = self._examination.problem(held.lease, contribution)
        # What is cumulative and not finite stays so: there is no use in training on.
        hopeless = contribution.final or problem in ("non-finite", "exploding")
        if problem and hopeless:
            self._fail(held, f"{problem} contribution")
        if problem:
            return self._refuse(problem, proceed=not hopeless)
        if contribution.final or self._config.mode == "stream":
            return self._accept(held, contribution)
        # Only a server that lets prefixes count needs their vectors; all others stay small, whatever is open.
        keep = self._config.prefixes_count
        self._counts["partials"] += 1
        self._note_progress(
            held, contribution.owned() if keep else replace(contribution, vector=_NOTHING, start=None, packed=None)
        )
        return self._ack(True)

    def _accept(self, held: OpenLease, contribution: Contribution) -> Ack:
        """Makes a contribution durable, then counts it."""
        # In a stream, what closes a lost lease holds nothing that is not in φ already, so it cannot come too late.
        adds = self._config.mode != "stream" or contribution.seq > held.seq
        limited = self._config.mode != "sync" and adds
        if limited and self.version - contribution.base_version > self._config.max_staleness:
            self._end(held, "stale")
            self._queue.give_back(held.lease.task.index)
            return self._refuse("stale", proceed=False)
        if len(self._state.waiting) >= max(LEAST_WAITING, 4 * self._batch_size):  # no meta-update can be saved
            self._leases.extend(held)
            return self._refuse("busy", proceed=True, wait=LONG_WAIT)
        arrays, contribution = contribution.arrays(), contribution.owned()
        try:
            self._state.accept(held.lease, contribution, arrays)
        except OSError as error:
            self._alert(f"the contribution of {held.lease.worker} could not be stored: {error}")
            self._leases.extend(held)  # its worker is well, and will try again
            return self._refuse("storage", proceed=True, wait=1.0)
        self._note_progress(held, contribution)
        if adds and self._config.meta_learner != "none" and not contribution.vector.any():
            self._counts["all_zero"] += 1
            self._alert(f"{held.lease.worker} sent nothing but zeros for {held.lease.task.game}: did it train?")
        if contribution.final:
            self._end(held, ACCEPTED)
            self._queue.succeed(held.lease.task)
            self._quarantine.succeed(held.lease.task.game, held.lease.worker)
        else:
            self._counts["partials"] += 1
        self._update()
        return self._ack(True, durable=True, proceed=not contribution.final)

    def _note_progress(self, held: OpenLease, contribution: Contribution) -> None:
        self._extend(held, contribution.steps)
        held.seq = contribution.seq
        held.newest = contribution

    def _end(self, held: OpenLease, outcome: str) -> None:
        self._leases.end(held, outcome)
        self._state.forget(held.lease.id)

    def _extend(self, held: OpenLease, steps: int) -> None:
        self._counts["steps"] += self._leases.extend(held, steps)

    def _answer_closed(self, contribution: Contribution) -> Ack:
        outcome = self._leases.outcome(contribution.lease)
        if outcome != ACCEPTED:
            return self._refuse(outcome, proceed=False)
        if contribution.seq > self._leases.last(contribution.lease):  # its worker was taken for lost
            return self._refuse("prefix-counts", proceed=False)
        self._counts["duplicates"] += 1
        return self._ack(True, durable=True, reason="duplicate", proceed=False)

    def _lose(self, held: OpenLease, outcome: str) -> None:
        """Ends a lease whose worker is gone: its prefix counts, where that is asked for, or its task runs again."""
        self._counts["leases_lost"] += 1
        if self._config.server.on_lost == "keep" and held.newest is not None:
            last = replace(held.newest, final=True)
            ack = None if self._examination.problem(held.lease, last) else self._accept(held, last)
            # A stream's prefix is in φ: where the disk has no room for what closes it, that is tried again later.
            if ack and (ack.durable or (ack.wait and self._config.mode == "stream")):
                return
        if self._leases.get(held.lease.id) is held:  # not so where it was too stale
            self._end(held, outcome)
            self._queue.give_back(held.lease.task.index)

    def _fail(self, held: OpenLease, reason: str) -> None:
        self._alert(f"{held.lease.task.game} failed on {held.lease.worker}: {reason}")
        self._end(held, "failed")
        self._queue.fail(held.lease.task)
        self._blame(held, reason)

    def _blame(self, held: OpenLease, reason: str, *, died: bool = False) -> None:
        """Counts a lease that ended badly; see Quarantine."""
        news = self._quarantine.fail(
            held.lease.task.game, held.lease.worker, reason, granted=held.granted, now=self._clock(), died=died
        )
        if news:
            self._alert(news)
        self._update()  # sync: without a quarantined game the batch may be complete

    # Meta-updates ------------------------------------------------------------------------------------------------

    @property
    def _complete(self) -> bool:
        """Every meta-update is made, or where they come with each contribution, every task is in."""
        if self._batched:
            return self.version >= self._config.meta_updates
        return self._state.applied_tasks >= self._config.total_tasks

    def _missing_tasks(self) -> int:
        """Tasks still to be leased."""
        left = self._config.total_tasks - self._state.applied_tasks
        if self._batched:  # of a batch, tasks of a quarantined game may be missing
            left = (self._config.meta_updates - self.version) * self._batch_size
        return left - self._waiting_tasks - len(self._leases)

    @property
    def _waiting_tasks(self) -> int:
        """Tasks that are in, and whose contribution is still to be applied."""
        return sum(accepted.contribution.final for accepted in self._state.waiting)

    def _ready(self) -> int:
        """How many of the waiting contributions make the next meta-update; 0 where none is due."""
        waiting = self._state.waiting
        if self._config.mode != "sync":
            due = max(self._batch_size, self._gathered)
            return due if len(waiting) >= due else 0
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
        while not self._complete and (count := self._ready()):
            following = self._batch_start + self._batch_size
            batch = self._state.waiting[:count]
            try:
                with self._update_times:
                    self._state.update(count, self._rest(self._state.waiting[count:], following))
            except OSError as error:
                self._alert(f"meta-update {self.version + 1} could not be saved and waits: {error}")
                return
            self._batch_start = following
            self._saved_at = self._clock()
            for one in batch:
                self._agreement.add(one.lease.task.game, one.vector[: self._manifest.size], one.norm)

    def _rest(self, waiting: list[Accepted], batch_start: int) -> dict[str, Any]:
        """What a restart needs besides the state of φ, once only `waiting` waits."""
        held = [held.lease.task.index for held in self._leases.all()]
        return {
            "queue": self._queue.state() | self._quarantine.state(),
            # Every task below `queue.next` that is neither here nor in the journal is done.
            "pending": sorted([*held, *self._queue.waiting, *(a.lease.task.index for a in waiting)]),
            "batch_start": batch_start,
            "counts": dict(self._counts),
            "progress": {held.lease.id: held.steps for held in self._leases.all()},  # that `counts` has already
            "refused": dict(self._refused),
            "accepted_leases": self._leases.accepted(),
        }

    def _restore(self) -> None:
        """The newest checkpoint, the contributions accepted since, and the leases still open."""
        rest, accepted = self._state.restore()
        pending: set[int] = set()
        if rest is not None:
            try:
                schema.check(rest, _REST, "rest")
            except ValueError as error:
                raise CorruptFile(f"the newest checkpoint is not of this program: {error}") from None
            self._queue.restore(rest["queue"])
            self._quarantine.restore(rest["queue"])
            self._batch_start = rest["batch_start"]
            self._counts, self._refused = Counter(rest["counts"]), Counter(rest["refused"])
            pending.update(rest["pending"])
        progress: dict[str, int] = dict(rest["progress"]) if rest is not None else {}
        for one in accepted:
            before = progress.get(one.lease.id, 0)
            self._counts["steps"] += max(0, one.contribution.steps - before)
            progress[one.lease.id] = max(one.contribution.steps, before)
        finals = [one for one in accepted if one.contribution.final]
        for lease_id, seq in (rest["accepted_leases"] if rest else {}).items():
            self._leases.remember(lease_id, ACCEPTED, seq)
        for one in finals:
            self._leases.remember(one.lease.id, ACCEPTED, one.contribution.seq)
            self._queue.succeed(one.lease.task)
            self._quarantine.succeed(one.lease.task.game, one.lease.worker)
        done = {one.lease.task.index for one in finals}
        for lease_id in self._state.unmeasurable:
            self._leases.remember(lease_id, "journal-damaged")
        orphans, highest, warnings = self._leases.reopen(done)
        for warning in warnings:
            self._alert(warning)
        leased = {held.lease.task.index for held in self._leases.all()}
        for reopened in self._leases.all():
            reopened.steps = progress.get(reopened.lease.id, 0)
        known = self._queue.next
        self._queue.next = max([known, highest, *(index + 1 for index in done)])
        if self._queue.next > known + _MOST_GRANTED:
            raise CorruptFile(f"journal/ names task {self._queue.next - 1}, but checkpoints/ {known} tasks in all")
        self._queue.reconcile((pending | set(range(known, self._queue.next))) - done - leased)
        for lease_id, newest in list(self._state.unfinished.items()):
            held = self._leases.get(lease_id)
            if held is None:
                self._state.forget(lease_id)
            else:
                held.seq, held.newest = newest.seq, newest
        self._update()  # the versions that the orphans were leased at and pushed with may be in the journal only
        for held in orphans:
            self._lose(held, "worker-lost")
        self._update()

    # Answers -----------------------------------------------------------------------------------------------------

    def _ack(
        self, accepted: bool, *, durable: bool = False, reason: str = "", proceed: bool = True, wait: float = 0.0
    ) -> Ack:
        return Ack(accepted, durable, reason, proceed, self.version, wait)

    def _refuse(self, reason: str, *, proceed: bool, wait: float = 0.0) -> Ack:
        self._refused[reason] += 1
        return self._ack(False, reason=reason, proceed=proceed, wait=wait)

    def _alert(self, text: str) -> None:
        if text not in list(self.alerts)[-3:]:  # what keeps failing is said once
            log.warning(text)
            self.alerts.append(text)
