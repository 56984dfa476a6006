"""The server of an evaluation: it leases runs to workers, and stores their results.

It is a plain class with the same protocol as MetaServer. Workers train as in a run without meta-learning; arms differ
only in the initial parameters. Every run leaves a file, so an interrupted evaluation continues where it stopped.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from leap_dist.config.settings import Config
from leap_dist.envs.atari_vector import has_state
from leap_dist.evaluation.agents import AgentStore
from leap_dist.evaluation.run_queue import RunQueue
from leap_dist.evaluation.runs import Run, missing, result_of, save
from leap_dist.evaluation.states import StateStore
from leap_dist.protocol.messages import Ack, Contribution, Idle, Lease, Task, process_of
from leap_dist.protocol.seeds import derived_seed
from leap_dist.server.leases import ACCEPTED, LeaseBook, OpenLease, describe
from leap_dist.server.monitoring import Alerts
from leap_dist.storage.atomic import CorruptFile
from leap_dist.storage.journal import Journal
from leap_dist.storage.locks import RunLock
from leap_dist.storage.run_directory import counted_steps
from leap_dist.tasks.task import family_of

RETRY_SECONDS = 1.0
"""Time after which a worker resends a result that could not be stored."""
QUARANTINE_SECONDS = 5.0
"""Time after which a quarantined worker asks again."""


class EvaluationServer:
    """Leases the runs of an evaluation to workers, and stores their results.

    Args:
        config: settings of the learners and of the workers.
        runs: all runs; those with a result in `out` are not repeated.
        vectors: flat float32 φ by label of the arm. An arm without one starts from a new encoder with every seed.
        out: an existing folder, which is locked until `close`.
        session: name of the launch. A server that restarts in the same session keeps the leases that were open.
        clock: monotonic seconds.

    Raises RunDirectoryBusy if another server is working on `out`, and ConfigError if `out` holds other results.
    """

    def __init__(
        self,
        config: Config,
        runs: Sequence[Run],
        vectors: Mapping[str, np.ndarray],
        out: Path,
        *,
        session: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._runs = list(runs)
        self._vectors = vectors
        self._out = out
        self._alert = Alerts(clock)
        self.alerts: deque[str] = self._alert.messages
        """Messages that the user should read, oldest first."""
        self._counts: Counter[str] = Counter()  # steps, pushes, leases_lost, duplicates
        self._refused: Counter[str] = Counter()  # by reason
        self._silent: deque[str] = deque(maxlen=100)  # incarnations whose lease expired
        self._continued: dict[str, int] = {}  # steps that a run began with, by lease
        self._stuck: set[int] = set()  # indices of runs that have failed before they made progress
        self._lock = RunLock(out)
        try:
            left, warnings = missing(self._runs, config, out)
            self._queue = RunQueue(self._runs, left)
            self._agents = AgentStore(out, self._runs)
            self._states = StateStore(out, config)
            for index in set(range(len(self._runs))) - set(left):
                self._states.drop(self._runs[index])  # a killed server may have left it
            journal, max_gap = Journal(out / "journal"), config.server.lease_seconds / 4
            self._leases = LeaseBook(journal, session, clock, max_gap)
            self._counts["steps"], of_leases = counted_steps(out)
            warnings += self._reopen_leases(journal, session, of_leases)
        except BaseException:
            self._lock.release()
            raise
        for warning in warnings:
            self._alert(warning)

    # Calls from workers ------------------------------------------------------------------------------------------

    def lease(self, worker: str, incarnation: str) -> Lease | Idle:
        """Grant the next run to a worker. Any lease that the worker still holds ends."""
        self.tick()
        for held in self._leases.of(worker):
            self._lose(held, "superseded")
        if self.finished:
            return Idle(finished=True)
        if worker in self._queue.quarantined_workers:
            return Idle(finished=False, wait=QUARANTINE_SECONDS)
        index = self._queue.take(worker)
        if index is None:  # a run that another worker is performing may come back
            return Idle(finished=False)
        run = self._runs[index]
        # The same for every arm: heads, actions and environments depend on the seed and the game alone.
        own_seed = derived_seed(run.seed, run.game)
        task = Task(index, run.game, run.seed, own_seed, run.steps)
        try:
            return self._leases.grant(task, worker, incarnation, 0, self._config.server.lease_seconds)
        except OSError as error:
            self._queue.give_back(index)
            self._alert(f"no lease can be granted while the journal cannot be written: {error}", kind="grant")
            return Idle(finished=False)

    def start(self, lease: Lease) -> tuple[np.ndarray, str, float | None]:
        """Return what a run starts from.

        This consists of the initial parameters, flat float32; the name of the set that they belong to; and the arm's
        own learning rate, or None for the configured one.
        """
        arm = self._runs[lease.task.index].arm
        vector = self._vectors.get(arm.label)
        if vector is None:
            _, vector = family_of(self._config).initialization(self._config, lease.task.seed, arm.scope)
        return vector, arm.scope, arm.learning_rate

    def state_of(self, lease: Lease) -> bytes | None:
        """Return the state that a run continues from, or None if it starts from the beginning."""
        run, held = self._runs[lease.task.index], self._leases.get(lease.id)
        try:
            found = self._states.load(run)
        except (CorruptFile, OSError) as error:
            self._alert(f"{run.name} starts from the beginning: {error}")
            return None
        if found is None or held is None:
            return None
        state, held.steps = found  # only later steps count as work of this launch
        self._continued[lease.id] = held.steps
        return state

    def save_state(self, lease_id: str, incarnation: str, state: bytes, steps: int) -> Ack:
        """Store the state of a run after `steps` steps, so that it can continue from there, and extend its lease."""
        held = self._leases.get(lease_id)
        if held is None or held.lease.incarnation != incarnation:
            return _ack(False, reason=self._leases.outcome(lease_id), proceed=False)
        self._extend(held, steps)
        run = self._runs[held.lease.task.index]
        try:
            self._states.keep(run, state, steps)
        except OSError as error:  # the run continues; after a stop, it would only start from an earlier state
            self._alert(f"the state of {run.name} could not be stored: {error}", kind="state")
            return _ack(False, reason="storage")
        return _ack(True, durable=True)

    def renew(self, lease_id: str, incarnation: str, steps: int) -> Ack:
        """Extend a lease whose run is `steps` steps old. The answer's `proceed` is False if the lease has ended."""
        held = self._leases.get(lease_id)
        if held is None or held.lease.incarnation != incarnation:
            return _ack(False, reason=self._leases.outcome(lease_id), proceed=False)
        self._extend(held, steps)
        return _ack(True)

    def push(self, contribution: Contribution) -> Ack:
        """Record the progress of a run. Its final contribution is stored before it is acknowledged."""
        held = self._leases.get(contribution.lease)
        if held is None:
            return self._answer_closed(contribution)
        if (contribution.worker, contribution.incarnation) != (held.lease.worker, held.lease.incarnation):
            return self._refuse("incarnation")
        if contribution.seq <= held.seq:
            self._counts["duplicates"] += 1
            return _ack(True, reason="duplicate")
        self._counts["pushes"] += 1
        self._extend(held, contribution.steps)
        if contribution.final and (refusal := self._store(held, contribution)):
            return refusal
        held.seq, held.newest = contribution.seq, contribution
        if contribution.final:
            self._leases.end(held, ACCEPTED)
        return _ack(True, durable=contribution.final, proceed=not contribution.final)

    def fail(self, lease_id: str, incarnation: str, reason: str) -> Ack:
        """End a lease whose run has raised an error. The run is tried again, from its stored state if it has one."""
        held = self._leases.get(lease_id)
        if held is None or held.lease.incarnation != incarnation:
            return _ack(False, reason=self._leases.outcome(lease_id), proceed=False)
        self._fail(held, reason)
        return _ack(True, proceed=False)

    # Calls from the driver ---------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether every run is completed or given up."""
        return not self._queue.waiting and not len(self._leases)

    def expect(self, workers: int) -> None:
        """Ignore the number of workers, which matters only to MetaServer."""

    def tick(self) -> None:
        """End the leases that are past their deadline."""
        for held in self._leases.expired():
            silence = f"{held.lease.worker} has not reported for {held.lease.seconds:g} s"
            self._alert(f"{silence}: {self._runs[held.lease.task.index].name} is withdrawn")
            self._silent.append(process_of(held.lease.incarnation))
            self._lose(held, "expired")
            self._blame(held, silence)

    def release(self, incarnation: str, *, crashed: bool = False) -> None:
        """End the leases of an incarnation that is gone. `crashed` says that its process died by itself."""
        for held in self._leases.all():
            if process_of(held.lease.incarnation) == incarnation:
                self._lose(held, "worker-lost")
                if crashed:
                    self._blame(held, "its process died", died=True)

    def status(self) -> dict[str, Any]:
        """Return counters and open leases as JSON-compatible data."""
        open_leases = self._leases.all()
        done = len(self._runs) - len(self._queue.waiting) - len(open_leases) - len(self._queue.given_up)
        return {
            "kind": "evaluation",
            "saves_states": self._config.tasks == "atari"
            and has_state(self._config.atari.frame_skip, self._config.atari.max_episode_frames),
            "tasks": done,
            "tasks_waiting": 0,
            "tasks_wanted": len(self._runs),
            "given_up": [self._runs[index].name for index in sorted(self._queue.given_up)],
            "complete": done == len(self._runs),
            "finished": self.finished,
            "duplicates": self._counts["duplicates"],
            "leases_lost": self._counts["leases_lost"],
            "refused": dict(self._refused),
            "quarantined": self._queue.quarantined_games,
            "quarantined_workers": self._queue.quarantined_workers,
            "silent": list(self._silent),
            "agent_steps": self._counts["steps"],
            "pushes": self._counts["pushes"],
            "alerts": list(self.alerts),
            "leases": [self._describe(held) for held in open_leases],
        }

    def ledger(self, offset: int) -> tuple[list[dict[str, Any]], int]:
        """Return no lines and the same offset: an evaluation has no ledger, but a file for each run."""
        return [], offset

    def close(self) -> None:
        """Release the lock of the folder."""
        self._lock.release()

    # Leases and results ------------------------------------------------------------------------------------------

    def _reopen_leases(self, journal: Journal, session: str, counted: Mapping[str, int]) -> list[str]:
        """After a restart, keep the leases of runs without a result. Returns warnings about damaged records.

        `counted` has the steps of each lease that count already.
        """
        made = set(range(len(self._runs))) - set(self._queue.waiting)
        records, warnings = journal.leases()
        for record in records:
            with contextlib.suppress(ValueError):  # `reopen` warns of invalid records
                same_session, lease = record.pop("session", None) == session, Lease.from_dict(record)
                if same_session and lease.task.index in made:  # the acknowledgment may have been lost
                    self._leases.remember(lease.id, ACCEPTED)
        orphans, _, more = self._leases.reopen(lambda index: index not in made)
        for held in self._leases.all():
            # In another session, the same indices belonged to other runs.
            if held in orphans or not self._queue.take_run(held.lease.task.index):
                self._leases.end(held, "worker-lost")
            else:
                self._continue_from(held, self._runs[held.lease.task.index])
                held.steps = max(held.steps, counted.get(held.lease.id, 0))
        return warnings + more

    def _continue_from(self, held: OpenLease, run: Run) -> None:
        """Count only the steps beyond the stored state of a run, no matter which process stored it."""
        with contextlib.suppress(CorruptFile, OSError):
            if (found := self._states.load(run)) is not None:
                held.steps = self._continued[held.lease.id] = found[1]

    def _store(self, held: OpenLease, contribution: Contribution) -> Ack | None:
        """Store the result of a run. Returns the refusal if that is not possible."""
        index = held.lease.task.index
        run = self._runs[index]
        try:
            self._agents.keep(run, contribution.steps, contribution.vector)
        except OSError as error:  # a run without an agent to watch is still a result
            self._alert(f"the agent of {run.name} could not be stored: {error}", kind="agent")
        try:
            save(self._out, result_of(run, contribution), run.identity(self._config))
        except ValueError as error:
            self._fail(held, f"its result is invalid: {error}")
            return self._refuse("invalid")
        except OSError as error:
            self._alert(f"the result of {run.name} could not be stored: {error}", kind="result")
            return _ack(False, reason="storage", wait=RETRY_SECONDS)
        self._states.drop(run)
        self._queue.succeed(index, held.lease.worker)
        return None

    def _lose(self, held: OpenLease, outcome: str) -> None:
        self._counts["leases_lost"] += outcome != "failed"
        self._leases.end(held, outcome)
        self._queue.give_back(held.lease.task.index)

    def _fail(self, held: OpenLease, reason: str) -> None:
        run = self._runs[held.lease.task.index]
        self._alert(f"{run.name} failed on {held.lease.worker}: {reason}")
        # If it fails twice without progress, the state that it continues from may be the cause.
        if held.steps > self._continued.get(held.lease.id, 0):
            self._stuck.discard(held.lease.task.index)
        elif held.lease.task.index in self._stuck:
            self._states.drop(run)
        else:
            self._stuck.add(held.lease.task.index)
        self._lose(held, "failed")
        self._blame(held, reason)

    def _blame(self, held: OpenLease, reason: str, *, died: bool = False) -> None:
        for alert in self._queue.fail(held, reason, self._leases.now(), died=died):
            self._alert(alert)

    def _extend(self, held: OpenLease, steps: int) -> None:
        self._counts["steps"] += self._leases.extend(held, steps)

    def _answer_closed(self, contribution: Contribution) -> Ack:
        outcome = self._leases.outcome(contribution.lease)
        if outcome != ACCEPTED:
            return self._refuse(outcome)
        self._counts["duplicates"] += 1
        return _ack(True, durable=True, reason="duplicate", proceed=False)

    def _refuse(self, reason: str) -> Ack:
        self._refused[reason] += 1
        return _ack(False, reason=reason, proceed=False)

    def _describe(self, held: OpenLease) -> dict[str, Any]:
        run = self._runs[held.lease.task.index]
        return {**describe(held, self._leases.now()), "arm": run.arm.label, "seed": run.seed}


def _ack(accepted: bool, *, durable: bool = False, reason: str = "", proceed: bool = True, wait: float = 0.0) -> Ack:
    return Ack(accepted, durable, reason, proceed, version=0, wait=wait)
