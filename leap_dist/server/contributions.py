"""Handling of the contributions that workers push: validate, store, count and acknowledge them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from leap_dist.config.settings import Config
from leap_dist.protocol.messages import Ack, Contribution
from leap_dist.server.admission import BackPressure, ContributionValidator, RateLimiter
from leap_dist.server.assignments import Assignments
from leap_dist.server.leases import ACCEPTED, OpenLease
from leap_dist.server.meta_state import MetaState
from leap_dist.server.monitoring import Alert, Counters
from leap_dist.server.scheduler import UpdateScheduler

LONG_WAIT_SECONDS = 5.0
"""Seconds that a worker waits if the server cannot serve it for now."""
RETRY_SECONDS = 1.0
"""Seconds that a worker waits before it repeats a push that could not be stored."""

_EMPTY = np.empty(0, np.float32)


class ContributionHandler:
    """Accepts contributions to open leases, and answers those to closed ones.

    Args:
        config: the run's configuration.
        state: φ and the contributions waiting for it.
        assignments: tasks and leases.
        scheduler: makes the meta-updates.
        counters: totals to update.
        validator: decides which contributions may count.
        limiter: limits the rate of partial contributions.
        pressure: determines how long a worker should wait before it reports again.
        alert: called with each message meant for the user.
    """

    def __init__(
        self,
        config: Config,
        state: MetaState,
        assignments: Assignments,
        scheduler: UpdateScheduler,
        counters: Counters,
        validator: ContributionValidator,
        limiter: RateLimiter,
        pressure: BackPressure,
        alert: Alert,
    ) -> None:
        self._config = config
        self._state = state
        self._assignments = assignments
        self._leases = assignments.leases
        self._scheduler = scheduler
        self._counters = counters
        self._validator = validator
        self._limiter = limiter
        self._pressure = pressure
        self._alert = alert

    def push(self, contribution: Contribution) -> Ack:
        """Take one contribution; see `MetaServer.push`."""
        return self._take(contribution) if self._settle() else self._refuse_unsettled(contribution)

    def push_together(self, contributions: Sequence[Contribution]) -> list[Ack]:
        """Take several contributions; see `MetaServer.push_together`."""
        if not self._settle():
            return [self._refuse_unsettled(contribution) for contribution in contributions]
        with self._scheduler.together():
            acks = [self._take(contribution) for contribution in contributions]
        if not self._settle():
            acks = [
                self._refuse_unsettled(contribution) if ack.durable else ack
                for contribution, ack in zip(contributions, acks, strict=True)
            ]
        return acks

    def accept_prefix(self, held: OpenLease) -> bool:
        """Accept the newest contribution of a lost lease as its final one. Return whether the lease is taken care of.

        In `stream` mode φ contains the prefix already, so if only the record that closes the lease could not be
        stored, the lease stays open and is closed later.
        """
        if held.newest is None:
            return False
        last = replace(held.newest, final=True)
        if self._validator.problem(held.lease, last):
            return False
        ack = self._accept(held, last)
        return ack.durable or bool(ack.wait and self._config.mode == "stream")

    def extend(self, held: OpenLease, steps: int) -> None:
        """Renew a lease, and count the steps that are new."""
        self._counters.events["steps"] += self._leases.extend(held, steps)

    def ack(
        self, accepted: bool, *, durable: bool = False, reason: str = "", proceed: bool = True, wait: float = 0.0
    ) -> Ack:
        """Return an acknowledgement with the server's current version."""
        return Ack(accepted, durable, reason, proceed, self._state.version, wait)

    def _settle(self) -> bool:
        """Return whether everything in the journal is durable, or could be made so."""
        try:
            self._state.backlog.journal.sync()
        except OSError as error:
            self._alert(f"the journal could not be flushed: {error}", kind="flush")
            return False
        return True

    def _take(self, contribution: Contribution) -> Ack:
        ack = self._answer(contribution)
        if ack.accepted and not contribution.final and ack.proceed:
            ack = replace(ack, wait=max(ack.wait, self._pressure.wait(len(self._leases))))
        return ack

    def _answer(self, contribution: Contribution) -> Ack:
        held = self._leases.get(contribution.lease)
        if held is None:
            return self._answer_closed(contribution)
        if (contribution.worker, contribution.incarnation) != (held.lease.worker, held.lease.incarnation):
            return self._refuse("incarnation", proceed=False)
        if contribution.seq <= held.seq:
            self._counters.events["duplicates"] += 1
            return self.ack(True, durable=self._config.mode == "stream", reason="duplicate")
        if not contribution.final and not self._limiter.admit():
            self.extend(held, contribution.steps)
            return self._refuse("busy", proceed=True, wait=self._limiter.wait(len(self._leases)))
        if problem := self._validator.problem(held.lease, contribution):
            return self._reject(held, contribution, problem)
        if contribution.final or self._config.mode == "stream":
            return self._accept(held, contribution)
        # Vectors are kept only if prefixes count, so that in other runs memory does not grow with open leases.
        keep = self._config.prefixes_count
        self._counters.events["partials"] += 1
        self._record_progress(
            held, contribution.owned() if keep else replace(contribution, vector=_EMPTY, start=None, packed=None)
        )
        return self.ack(True)

    def _answer_closed(self, contribution: Contribution) -> Ack:
        outcome = self._leases.outcome(contribution.lease)
        if outcome != ACCEPTED:
            return self._refuse(outcome, proceed=False)
        if contribution.seq > self._leases.last_seq(contribution.lease):  # its worker was believed lost
            return self._refuse("prefix-counts", proceed=False)
        self._counters.events["duplicates"] += 1
        return self.ack(True, durable=True, reason="duplicate", proceed=False)

    def _reject(self, held: OpenLease, contribution: Contribution, problem: str) -> Ack:
        """Refuse an unusable contribution. If no usable one can follow, the task has failed."""
        # A cumulative vector that is not finite stays so; further training is useless.
        hopeless = contribution.final or problem in ("non-finite", "exploding")
        if hopeless:
            self._assignments.fail(held, f"{problem} contribution")
            self._scheduler.update()  # in `sync` mode, a batch may be complete without a game that is now in quarantine
        return self._refuse(problem, proceed=not hopeless)

    def _accept(self, held: OpenLease, contribution: Contribution) -> Ack:
        """Store a valid contribution durably, then count it."""
        # In `stream` mode the end of a lost lease adds nothing to φ, so it cannot be stale.
        adds = self._config.mode != "stream" or contribution.seq > held.seq
        staleness = self._state.version - contribution.base_version
        if adds and self._config.mode != "sync" and staleness > self._config.max_staleness(self._assignments.workers):
            # What a stream has pushed is in φ already: if the task were trained again, it would be there twice.
            if self._config.mode != "stream" or not self.accept_prefix(held):
                self._assignments.take_back(held, "stale")
            return self._refuse("stale", proceed=False)
        if self._scheduler.congested:
            self._leases.extend(held)
            return self._refuse("busy", proceed=True, wait=LONG_WAIT_SECONDS)
        arrays, contribution = contribution.arrays(), contribution.owned()
        try:
            self._state.backlog.accept(held.lease, contribution, arrays)
        except OSError as error:
            self._alert(f"the contribution of {held.lease.worker} could not be stored: {error}", kind="store")
            self._leases.extend(held)  # its worker is alive, and will try again
            return self._refuse("storage", proceed=True, wait=RETRY_SECONDS)
        self._record_progress(held, contribution)
        if adds and self._config.meta_learner != "none" and not contribution.vector.any():
            self._counters.events["all_zero"] += 1
            self._alert(
                f"{held.lease.worker} sent nothing but zeros for {held.lease.task.game}; the task may not have trained"
            )
        if contribution.final:
            self._assignments.complete(held)
        else:
            self._counters.events["partials"] += 1
        self._scheduler.update()
        return self.ack(True, durable=True, proceed=not contribution.final)

    def _record_progress(self, held: OpenLease, contribution: Contribution) -> None:
        self.extend(held, contribution.steps)
        held.seq = contribution.seq
        held.newest = contribution

    def _refuse(self, reason: str, *, proceed: bool, wait: float = 0.0) -> Ack:
        self._counters.refused[reason] += 1
        return self.ack(False, reason=reason, proceed=proceed, wait=wait)

    def _refuse_unsettled(self, contribution: Contribution) -> Ack:
        held = self._leases.get(contribution.lease)
        if held is not None and contribution.incarnation == held.lease.incarnation:
            self._leases.extend(held)  # its worker is alive, and will try again
        return self._refuse("storage", proceed=True, wait=RETRY_SECONDS)
