"""Transfer evaluation: fresh learners from each initialization, on the same games with the same seeds.

The server's side, a plain class that speaks the workers' protocol: they train as in a run without meta-learning, and
what an arm changes is the start alone. Every run is a file, so an evaluation goes on where it was left.
"""

from __future__ import annotations

import bisect
import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.evaluation.initializations import Arm
from leap_dist.evaluation.results.runs import TransferRun, load, path_of, save
from leap_dist.protocol.messages import Ack, Contribution, Idle, Lease, Task
from leap_dist.server.leases import ACCEPTED, LeaseBook, OpenLease, Unrecorded, describe
from leap_dist.server.quarantine import Quarantine
from leap_dist.storage.atomic import CorruptFile
from leap_dist.storage.run_lock import RunLock
from leap_dist.tasks.task import family_of

log = logging.getLogger(__name__)

ATTEMPTS = 3  # of a run that fails by itself
DEATHS = 10  # of the process that runs it: more, because most have other reasons
RETRY_SECONDS = 1.0  # before a result that could not be stored is sent again
REST_SECONDS = 5.0  # before a worker in quarantine asks again


class Run(NamedTuple):
    """One learning process of an evaluation."""

    arm: Arm
    game: str
    seed: int

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.arm.label} on {self.game} with seed {self.seed}"

    def identity(self, config: Config) -> dict[str, Any]:
        """Everything that determines it, as plain data that JSON gives back unchanged."""
        return {
            "init": self.arm.sha256 or self.arm.source,
            "steps": config.task_steps,
            "precision": config.worker.precision,
            **family_of(config).identity(config, self.game),
        }


def plan(arms: Sequence[Arm], config: Config, seeds: int) -> list[Run]:
    """Every run, seed by seed, so that whatever is done when it ends early compares all arms.

    Seeds are numbered from the configuration's on.
    """
    numbers = range(config.seed, config.seed + seeds)
    return [Run(arm, game, seed) for seed in numbers for game in config.games for arm in arms]


def missing(runs: Sequence[Run], config: Config, out: Path) -> tuple[list[int], list[str]]:
    """Which of the runs are still to be made, by index, and a warning for each result that is damaged.

    Raises ConfigError where a result is there that was made with other settings, be it of another arm.
    """
    left, warnings = [], []
    common = _settings(runs[0].identity(config))
    planned = {path_of(out, run.arm.label, run.game, run.seed) for run in runs}
    for path in sorted(set(out.glob("runs/*/*/*.json")) - planned):
        with contextlib.suppress(CorruptFile, OSError):
            other, identity = load(path)
            _require_alike(f"{other.arm} on {other.game}", _settings(identity), common, out)
    for index, run in enumerate(runs):
        path = path_of(out, run.arm.label, run.game, run.seed)
        try:
            _, identity = load(path)
        except FileNotFoundError:
            left.append(index)
        except (CorruptFile, OSError) as error:
            left.append(index)
            warnings.append(f"{run.name} is run again: {error}")
        else:
            _require_alike(run.name, identity, run.identity(config), out)
    return left, warnings


def _require_alike(name: str, found: Mapping[str, Any], wanted: Mapping[str, Any], out: Path) -> None:
    """Raises ConfigError where a run that is there was made with other settings."""
    for setting in sorted(wanted.keys() | found.keys()):
        if wanted.get(setting) != found.get(setting):
            raise ConfigError(
                f"out: {out} holds {name} with {setting} {str(found.get(setting))[:40]}, not "
                f"{str(wanted.get(setting))[:40]}; choose another --out, or use the same settings"
            )


def _settings(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Of an identity, what runs of all arms and games have in common."""
    return {name: value for name, value in identity.items() if name not in ("init", "data")}


class EvaluationServer:
    """Leases the runs of an evaluation to workers, and writes what comes of them.

    Args:
        config: the learners' settings, and the workers'.
        runs: all of them; those whose result is in `out` are not run again.
        vectors: φ by label, flat float32; an arm without one starts from another fresh encoder with every seed.
        out: an existing folder; it is locked while the server lives.
        clock: monotonic seconds.

    Raises RunDirectoryBusy where another one works on `out`, ConfigError where `out` holds other results.
    """

    def __init__(
        self,
        config: Config,
        runs: Sequence[Run],
        vectors: Mapping[str, np.ndarray],
        out: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._runs = list(runs)
        self._vectors = vectors
        self._out = out
        self._clock = clock
        self.alerts: deque[str] = deque(maxlen=100)
        """What a person should know, oldest first."""
        self._leases = LeaseBook(Unrecorded(), "", clock)
        self._quarantine = Quarantine()
        self._failures: Counter[int] = Counter()  # by run
        self._deaths: Counter[int] = Counter()  # by run
        self._given_up: set[int] = set()
        self._counts: Counter[str] = Counter()  # steps, pushes, leases_lost, duplicates
        self._refused: Counter[str] = Counter()  # by reason
        self._silent: deque[str] = deque(maxlen=100)  # incarnations whose lease expired
        self._lock = RunLock(out)
        try:
            self._left, warnings = missing(self._runs, config, out)  # ascending
        except BaseException:
            self._lock.release()
            raise
        for warning in warnings:
            self._alert(warning)

    # What workers call -------------------------------------------------------------------------------------------

    def lease(self, worker: str, incarnation: str) -> Lease | Idle:
        """Grants the next run to a worker. What it held before is taken back."""
        self.tick()
        for held in self._leases.of(worker):
            self._lose(held, "superseded")
        if self.finished or worker in self._quarantine.workers:
            return Idle(finished=self.finished, wait=0.0 if self.finished else REST_SECONDS)
        if not self._left:
            return Idle(finished=False)  # a run that others are at may come back
        avoid = self._quarantine.failed_on(worker)  # a worker that breaks everything must not use up a run's attempts
        index = next((i for i in self._left if self._runs[i].game not in avoid), self._left[0])
        self._left.remove(index)
        run = self._runs[index]
        # The same for every arm: heads, actions and environments differ between seeds and games alone.
        own_seed = int(np.random.SeedSequence((run.seed, *run.game.encode())).generate_state(1)[0])
        task = Task(index, run.game, run.seed, own_seed, self._config.task_steps)
        return self._leases.grant(task, worker, incarnation, 0, self._config.server.lease_seconds)

    def start(self, lease: Lease) -> tuple[np.ndarray, str]:
        """What a run starts from, flat float32, and which parameters these are."""
        arm = self._runs[lease.task.index].arm
        vector = self._vectors.get(arm.label)
        if vector is None:
            _, vector = family_of(self._config).initialization(self._config, lease.task.seed, arm.scope)
        return vector, arm.scope

    def renew(self, lease_id: str, incarnation: str, steps: int) -> Ack:
        """Extends a lease, `steps` agent steps into its run. `proceed` is False where it is no longer held."""
        held = self._leases.get(lease_id)
        if held is None or held.lease.incarnation != incarnation:
            return _ack(False, reason=self._leases.outcome(lease_id), proceed=False)
        self._extend(held, steps)
        return _ack(True)

    def push(self, contribution: Contribution) -> Ack:
        """Takes note of progress, and of the end: durable once acknowledged."""
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
        if contribution.final:
            run = self._runs[held.lease.task.index]
            try:
                save(self._out, _result(run, contribution), run.identity(self._config))
            except ValueError as error:
                self._fail(held, f"its result is none: {error}")
                return self._refuse("invalid")
            except OSError as error:
                self._alert(f"the result of {run.name} could not be stored: {error}")
                return _ack(False, reason="storage", wait=RETRY_SECONDS)
            self._quarantine.succeed(run.game, held.lease.worker)
        held.seq, held.newest = contribution.seq, contribution
        if contribution.final:
            self._leases.end(held, ACCEPTED)
        return _ack(True, durable=contribution.final, proceed=not contribution.final)

    def fail(self, lease_id: str, incarnation: str, reason: str) -> Ack:
        """A worker's run raised: it will be tried again, as it was, on whatever worker asks next."""
        held = self._leases.get(lease_id)
        if held is None or held.lease.incarnation != incarnation:
            return _ack(False, reason=self._leases.outcome(lease_id), proceed=False)
        self._fail(held, reason)
        return _ack(True, proceed=False)

    # What the driver calls ---------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Every run is made, or given up."""
        return not self._left and not len(self._leases)

    def tick(self) -> None:
        """Takes back leases past their deadline."""
        for held in self._leases.expired():
            silence = f"{held.lease.worker} was not heard of for {held.lease.seconds:g} s"
            self._alert(f"{silence}: {self._runs[held.lease.task.index].name} is taken back")
            self._silent.append(held.lease.incarnation)
            self._lose(held, "expired")
            self._blame(held, silence)

    def release(self, incarnation: str, *, crashed: bool = False) -> None:
        """Takes back at once what an incarnation holds that is known to be gone. `crashed`: by itself."""
        for held in self._leases.all():
            if held.lease.incarnation == incarnation:
                self._lose(held, "worker-lost")
                if crashed:
                    self._blame(held, "its process died", died=True)

    def status(self) -> dict[str, Any]:
        """Counters and open leases, as plain data."""
        open_leases = self._leases.all()
        done = len(self._runs) - len(self._left) - len(open_leases) - len(self._given_up)
        return {
            "kind": "evaluation",
            "tasks": done,
            "tasks_waiting": 0,
            "tasks_wanted": len(self._runs),
            "given_up": [self._runs[index].name for index in sorted(self._given_up)],
            "complete": done == len(self._runs),
            "finished": self.finished,
            "duplicates": self._counts["duplicates"],
            "leases_lost": self._counts["leases_lost"],
            "refused": dict(self._refused),
            "quarantined": sorted(self._quarantine.games),
            "quarantined_workers": sorted(self._quarantine.workers),
            "silent": list(self._silent),
            "agent_steps": self._counts["steps"],
            "pushes": self._counts["pushes"],
            "alerts": list(self.alerts),
            "leases": [self._describe(held) for held in open_leases],
        }

    def ledger(self, offset: int) -> tuple[list[dict[str, Any]], int]:
        """Nothing: an evaluation keeps its results in files of their own."""
        return [], offset

    def close(self) -> None:
        """Gives the folder back."""
        self._lock.release()

    # Leases ------------------------------------------------------------------------------------------------------

    def _lose(self, held: OpenLease, outcome: str) -> None:
        self._counts["leases_lost"] += outcome != "failed"
        self._leases.end(held, outcome)
        bisect.insort(self._left, held.lease.task.index)

    def _fail(self, held: OpenLease, reason: str) -> None:
        self._alert(f"{self._runs[held.lease.task.index].name} failed on {held.lease.worker}: {reason}")
        self._lose(held, "failed")
        self._blame(held, reason)

    def _blame(self, held: OpenLease, reason: str, *, died: bool = False) -> None:
        """Counts a lease that ended badly. A run that keeps failing is given up; so is a game, and a worker."""
        index, game = held.lease.task.index, held.lease.task.game
        news = self._quarantine.fail(
            game, held.lease.worker, reason, granted=held.granted, now=self._clock(), died=died
        )
        if news:
            self._alert(news)
        (self._deaths if died else self._failures)[index] += 1
        hopeless = {i for i in self._left if self._runs[i].game in self._quarantine.games}
        if self._failures[index] >= ATTEMPTS or self._deaths[index] >= DEATHS:
            self._alert(f"{self._runs[index].name} is given up: {reason}")
            hopeless.add(index)
        self._given_up |= hopeless
        self._left = sorted(set(self._left) - hopeless)

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
        return {**describe(held, self._clock()), "arm": run.arm.label, "seed": run.seed}

    def _alert(self, text: str) -> None:
        log.warning(text)
        self.alerts.append(text)


def _result(run: Run, contribution: Contribution) -> TransferRun:
    return TransferRun(
        arm=run.arm.label,
        game=run.game,
        seed=run.seed,
        budget=contribution.steps,
        seconds=contribution.seconds,
        ended=np.array([episode.steps for episode in contribution.episodes], np.int64),
        returns=np.array([episode.score for episode in contribution.episodes], np.float64),
        curve=tuple({"steps": point.steps, **point.means} for point in contribution.curve),
    )


def _ack(accepted: bool, *, durable: bool = False, reason: str = "", proceed: bool = True, wait: float = 0.0) -> Ack:
    return Ack(accepted, durable, reason, proceed, version=0, wait=wait)
