"""The meta-server: owns φ, leases tasks to workers, takes their contributions and makes meta-updates.

It is a plain, single-threaded class. `driver.actors` puts it into a Ray actor; tests call it directly. Its contract: a
contribution acknowledged as durable is applied exactly once, whichever process is killed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from leap_dist.config.settings import Config
from leap_dist.nn.flat_vector import Manifest
from leap_dist.protocol.messages import Ack, Contribution, Idle, Lease, Renewal, process_of
from leap_dist.server.admission import BackPressure, ContributionValidator, RateLimiter
from leap_dist.server.assignments import Assignments
from leap_dist.server.contributions import LONG_WAIT_SECONDS, ContributionHandler
from leap_dist.server.leases import OpenLease, describe
from leap_dist.server.meta_state import MetaState
from leap_dist.server.monitoring import Alerts, Counters, LatencyWindow
from leap_dist.server.recovery import Recovery
from leap_dist.server.scheduler import UpdateScheduler
from leap_dist.storage.locks import RunLock
from leap_dist.storage.replica import NO_REPLICA, NoReplica
from leap_dist.testing.failpoints import failpoint

MAX_SILENT = 100
"""Number of incarnations that are listed as silent."""
MAX_PAUSE = 0.25
"""Largest fraction of a lease for which a worker may be told to stay silent."""


class MetaServer:
    """Owns φ, its meta-optimizer, and the checkpoints, journal and ledger of a run directory.

    Args:
        config: the run's configuration.
        run_dir: directory of the run. It is locked until `close`.
        manifest: names and shapes of the parameters in φ.
        initial: φ₀, flat float32; ignored if the run directory has a checkpoint.
        session: name of this launch. Leases of other sessions are dropped, because their workers are gone.
        clock: returns monotonic seconds.
        work: returns the seconds of work done so far; see `BackPressure`. By default only the duration of calls counts.
        preprocessing: description of the network's input, for init.safetensors.
        replica: remote copy of the run directory, if any.

    Raises RunDirectoryBusy if another server holds the directory; CorruptFile if nothing in it can be used, or it is of
    another encoder or run; OSError.
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
        preprocessing: Mapping[str, Any] = MappingProxyType({}),
        replica: NoReplica = NO_REPLICA,
    ) -> None:
        self._config, self._clock = config, clock
        run_dir.mkdir(parents=True, exist_ok=True)
        self._lock = RunLock(run_dir)  # before anything reads or cleans up what another server may be writing
        try:
            self._alert = alert = Alerts(clock)
            self._counters = counters = Counters()
            self._state = state = MetaState(
                config, run_dir, manifest, initial, alert, preprocessing=preprocessing, replica=replica
            )
            self._assignments = assignments = Assignments(config, state.backlog, session, alert, clock)
            self._leases = assignments.leases
            scheduler = UpdateScheduler(config, state, assignments, counters, alert, clock, manifest.size)
            self._scheduler = scheduler
            max_pause = MAX_PAUSE * config.server.lease_seconds
            self._pressure = BackPressure(config.server.busy_share, max_pause, clock, work or (lambda: 0.0))
            limiter = RateLimiter(config.server.pushes_per_second, clock)
            validator = ContributionValidator(config, manifest, state)
            self._contributions = ContributionHandler(
                config, state, assignments, scheduler, counters, validator, limiter, self._pressure, alert
            )
            self._silent: deque[str] = deque(maxlen=MAX_SILENT)
            self._push_latency = LatencyWindow()
            orphans = Recovery(config, manifest, state, assignments, scheduler, counters, alert, replica).run()
            scheduler.update(wait=True)  # the versions at which the orphans were leased may only be in the journal
            for held in orphans:
                self._lose(held, "worker-lost")
            scheduler.update(wait=True)
        except BaseException:
            self._lock.release()
            raise

    # Called by workers -------------------------------------------------------------------------------------------

    def lease(self, worker: str, incarnation: str) -> Lease | Idle:
        """Lease the next task to a worker, or return Idle if there is none for it now, as when the disk is full.

        A worker holds at most one lease: what it held before is taken back.
        """
        with self._pressure.call():
            self._tick()
            for held in self._leases.of(worker):
                self._lose(held, "superseded")
            if not self.finished and self._assignments.must_wait(worker):
                return Idle(finished=False, wait=LONG_WAIT_SECONDS)
            if self.finished or self._scheduler.missing_tasks <= 0:
                return Idle(finished=self.finished)
            try:
                lease = self._assignments.grant(worker, incarnation, self.version, self._scheduler.task_limit)
            except OSError as error:
                self._alert(f"no lease can be granted while the journal cannot be written: {error}", kind="grant")
                return Idle(finished=False)
            if lease is None:
                return Idle(finished=self.finished)
            failpoint("lease.acknowledge")
            return lease

    def snapshot(self) -> tuple[int, np.ndarray]:
        """Return (version, φ), which always belong together. The vector is a copy, flat float32."""
        return self.version, self._state.vector

    def head(self, game: str) -> np.ndarray | None:
        """Return what training has added to a game's persistent head so far, flat float32; None if nothing has."""
        return self._state.heads.get(game)

    def renew(self, lease_id: str, incarnation: str, steps: int) -> Ack:
        """Renew the lease of a worker that is `steps` agent steps into its task.

        `proceed` is False in the answer if the worker no longer holds the lease.
        """
        with self._pressure.call(reports=1):
            return self._renew(Renewal(lease_id, incarnation, steps))

    def push(self, contribution: Contribution) -> Ack:
        """Take a contribution. Repeated or reordered ones change nothing; a final one is durable once acknowledged.

        A refusal names its reason, is counted, and leaves everything as it was, except that an unusable contribution
        ends its lease if nothing better can follow. "storage" means that it could not be written to disk, "busy" that
        the server is overloaded: push again after `wait` seconds. Even an accepted push may ask to wait.
        """
        failpoint("push.received")
        with self._pressure.call(reports=int(not contribution.final)), self._push_latency:
            ack = self._contributions.push(contribution)
        failpoint("push.acknowledge")
        return ack

    def push_together(self, contributions: Sequence[Contribution], renewals: Sequence[Renewal] = ()) -> list[Ack]:
        """Push each contribution and then renew each lease, at less cost than one by one.

        The journal's directory is flushed once for all of them, and before any meta-update. In `stream` mode one
        meta-update takes all that they add, with a clip and a weight for each. Returns the answers, contributions
        first, once everything is durable.
        """
        failpoint("push.received")
        only_reports = not any(contribution.final for contribution in contributions)
        with self._pressure.call(reports=only_reports * (len(contributions) + len(renewals))), self._push_latency:
            acks = self._contributions.push_together(contributions) + [self._renew(one) for one in renewals]
        failpoint("push.acknowledge")
        return acks

    def fail(self, lease_id: str, incarnation: str, reason: str) -> Ack:
        """Report that a worker's task raised an exception. The task will run again with another seed.

        A game, or a worker, that keeps failing is quarantined.
        """
        held = self._held(lease_id, incarnation)
        if held is None:
            return self._contributions.ack(False, reason=self._leases.outcome(lease_id), proceed=False)
        self._assignments.fail(held, reason)
        self._scheduler.update()  # in `sync` mode, a batch may be complete without a game that is now in quarantine
        return self._contributions.ack(True, proceed=False)

    # Called by the driver ----------------------------------------------------------------------------------------

    @property
    def alerts(self) -> deque[str]:
        """Messages meant for the user, oldest first."""
        return self._alert.messages

    @property
    def version(self) -> int:
        """Number of meta-updates made."""
        return self._state.version

    @property
    def finished(self) -> bool:
        """Whether the run is complete, or every game is in quarantine."""
        return self._scheduler.complete or self._assignments.queue.exhausted

    def tick(self) -> None:
        """Take back leases that have expired, and retry a meta-update or a file that could not be saved."""
        with self._pressure.call():
            self._tick()

    def release(self, incarnation: str, *, crashed: bool = False) -> None:
        """Immediately take back the leases of a worker that is known to be gone.

        Args:
            incarnation: the incarnation of the worker.
            crashed: whether its process died by itself, so that the game it played may be to blame.
        """
        for held in self._leases.all():
            if process_of(held.lease.incarnation) == incarnation:
                self._lose(held, "worker-lost")
                if crashed:
                    self._assignments.blame(held, "its process died", died=True)
        self._scheduler.update()

    def status(self) -> dict[str, Any]:
        """Return counters and open leases, as plain data."""
        with self._pressure.call():
            return self._status()

    def expect(self, workers: int) -> None:
        """Adapt the limits on leases and staleness to the number of workers, if `workers` is "auto"."""
        if self._config.workers == "auto":
            self._assignments.expect(workers)

    def ledger(self, offset: int) -> tuple[list[dict[str, Any]], int]:
        """Return the next page of the ledger from byte `offset` on, and the offset after it; see `MetaState`."""
        return self._state.read_ledger(offset)

    def close(self) -> None:
        """Unlock the run directory. Nothing needs to be saved: what was acknowledged is durable already."""
        self._lock.release()

    # -------------------------------------------------------------------------------------------------------------

    def _held(self, lease_id: str, incarnation: str) -> OpenLease | None:
        """Return the open lease with this id if this incarnation holds it."""
        held = self._leases.get(lease_id)
        return held if held is not None and held.lease.incarnation == incarnation else None

    def _renew(self, renewal: Renewal) -> Ack:
        held = self._held(renewal.lease, renewal.incarnation)
        if held is None:
            return self._contributions.ack(False, reason=self._leases.outcome(renewal.lease), proceed=False)
        self._contributions.extend(held, renewal.steps)
        return self._contributions.ack(True, wait=self._pressure.wait(len(self._leases)))

    def _tick(self) -> None:
        for held in self._leases.expired():
            silence = f"has not reported for {held.lease.seconds:g} s"
            self._alert(f"{held.lease.worker} {silence}: its task ({held.lease.task.game}) is withdrawn")
            self._silent.append(process_of(held.lease.incarnation))
            self._lose(held, "expired")
            self._assignments.blame(held, f"{held.lease.worker} {silence}")
        self._scheduler.update()
        self._state.write_files()

    def _lose(self, held: OpenLease, outcome: str) -> None:
        """End the lease of a worker that is gone: its prefix counts if `--on-lost keep`, or its task runs again."""
        self._counters.events["leases_lost"] += 1
        if self._config.server.on_lost == "keep" and self._contributions.accept_prefix(held):
            return
        if self._leases.get(held.lease.id) is held:  # a stale prefix has ended it already
            self._assignments.take_back(held, outcome)

    def _status(self) -> dict[str, Any]:
        state, scheduler, events = self._state, self._scheduler, self._counters.events
        return {
            "meta_updates": self.version,
            "tasks": state.applied_tasks,
            "tasks_waiting": scheduler.waiting_tasks,
            "tasks_wanted": self._config.total_tasks,
            "complete": scheduler.complete,
            "files_written": state.is_written,
            "contributions_applied": state.applied,
            "contributions_waiting": len(state.backlog.waiting),
            "partials": events["partials"],
            "duplicates": events["duplicates"],
            "leases_lost": events["leases_lost"],
            "refused": dict(self._counters.refused),
            "clipped": state.clipped,
            "all_zero": events["all_zero"],
            "quarantined": sorted(self._assignments.quarantine.games),
            "quarantined_workers": sorted(self._assignments.quarantine.workers),
            "silent": list(self._silent),
            "agent_steps": events["steps"],
            "checkpoint_age": self._clock() - scheduler.saved_at,
            "pushes": self._push_latency.count,
            "push_ms": self._push_latency.milliseconds(),
            "update_ms": scheduler.latency.milliseconds(),
            "pace_seconds": self._pressure.wait(len(self._leases)),
            "busy_share": self._pressure.busy_share,
            "agreement_between_games": scheduler.agreement.cosines(),
            "finished": self.finished,
            "alerts": list(self.alerts),
            "leases": [describe(held, self._leases.now()) for held in self._leases.all()],
        }
