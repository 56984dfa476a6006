"""The workers: as many as were asked for and fit, replaced when they die."""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from leap_dist.config import ConfigError
from leap_dist.driver.actors import WORKER, Gone
from leap_dist.driver.nodes import Nodes
from leap_dist.film import Play
from leap_dist.settings import Config
from leap_dist.stopwatch import breakdown, shares

RECONCILE_SECONDS = 5.0
LONGEST_BACKOFF = 30.0  # seconds before a worker that keeps dying is started again
HEALTHY_SECONDS = 60.0  # a worker that lived this long does not keep dying
READINGS = 120  # of a worker's stopwatch that are kept, about a minute's


@dataclass
class _Slot:
    """A place in the pool, and the actor that fills it."""

    name: str
    incarnation: str = ""
    actor: Any = None
    run: ray.ObjectRef[Any] | None = None
    health: ray.ObjectRef[Any] | None = None
    pid: int | None = None
    node: str | None = None
    memory_bytes: int | None = None
    readings: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=READINGS))
    """Of its stopwatch, oldest first."""
    operators: str | None = None
    """The profiler's table, once it is here."""
    started: float = 0.0
    failures: int = 0
    not_before: float = 0.0
    done: bool = False
    quarantined: bool = False


class Pool:
    """Keeps as many workers running as were asked for and fit, and replaces those that die.

    `profiles`: a folder for every worker's trace and breakdown, where they are wanted.
    """

    def __init__(self, config: Config, nodes: Nodes, profiles: Path | None = None) -> None:
        self._config = config
        self._profiles = profiles
        self._server: Any = None
        self._nodes = nodes
        self._slots: list[_Slot] = []
        self._reconciled = -RECONCILE_SECONDS
        self.restarts = 0
        self.gone: list[Gone] = []
        """Incarnations that ended and whose leases the server has not been told to take back yet."""
        self.alerts: deque[str] = deque(maxlen=100)
        self._plays: list[Play] = []

    def require_room(self) -> None:
        """Raises ConfigError where no node can take a worker; notes where fewer fit than were asked for."""
        fits = self.room()
        if fits == 0:
            wanted = self._config.worker
            raise ConfigError(
                f"worker.cpus: no node has room for a worker with {wanted.cpus:g} CPUs and {wanted.gpus:g} GPUs; "
                f"the cluster has {ray.cluster_resources().get('CPU', 0):g} CPUs"
            )
        if fits < self.wanted:
            self.alerts.append(f"{self.wanted} workers asked for, {fits} fit; a lower worker.cpus shares processors")

    def open(self, server: Any) -> None:
        """From now on `tend` starts workers for `server`."""
        self._server = server

    @property
    def wanted(self) -> int:
        """Workers asked for."""
        return self._config.workers

    def tend(self) -> None:
        """Starts, checks and replaces workers; never waits."""
        now = time.monotonic()
        if now - self._reconciled >= RECONCILE_SECONDS:
            self._reconciled = now
            self._leave(self._nodes.view.leaving)
            while len(self._slots) < min(self.wanted, self.room()):
                self._slots.append(_Slot(f"w{len(self._slots)}"))
        for slot in self._slots:
            if slot.run is not None:
                self._check(slot, slot.run)
            if slot.run is None and not (slot.done or slot.quarantined) and now >= slot.not_before:
                self._start(slot)

    def heed(self, status: dict[str, Any]) -> None:
        """Does what the server's status asks for: replaces workers that fell silent, stops those in quarantine."""
        for slot in self._slots:
            if slot.run is None:
                continue
            if slot.name in status["quarantined_workers"]:
                slot.quarantined = True
                self._end(slot, crashed=False)
            elif slot.incarnation in status["silent"]:
                self._restart(slot, "was silent for too long")

    def room(self) -> int:
        """How many workers the nodes that are alive, and stay, have resources for."""
        cpus, gpus = self._config.worker.cpus, self._config.worker.gpus
        return sum(
            int(min(node.get("CPU", 0) / cpus, node.get("GPU", 0) / gpus if gpus else float("inf")) + 1e-9)
            for node in self._nodes.view.alive.values()
        )

    def describe(self) -> list[dict[str, Any]]:
        """Every worker as plain data."""
        return [
            {
                "name": slot.name,
                "state": _state(slot),
                "pid": slot.pid,
                "memory_bytes": slot.memory_bytes,
                "time_share": shares(slot.readings[-1], slot.readings[0]) if slot.readings else {},
            }
            for slot in self._slots
        ]

    def plays(self) -> list[Play]:
        """What workers have filmed since the last call."""
        plays, self._plays = self._plays, []
        return plays

    def write_breakdowns(self) -> None:
        """Into the folder for profiles: where each worker's time went, and the costliest operators."""
        for slot in self._slots:
            if self._profiles is not None and slot.readings:
                text = f"{slot.name}\n\n{breakdown(slot.readings[-1])}\n\n{slot.operators or ''}"
                self._write_profile(f"{slot.name}.txt", text.encode())

    def abandon(self) -> None:
        """Gives up all workers: what they hold is to be taken back."""
        self.gone += [Gone(slot.incarnation, crashed=False) for slot in self._slots]

    @property
    def done(self) -> bool:
        """Every worker has been told that there is nothing left, and returned; or has no process that could."""
        return all(slot.done or slot.pid is None for slot in self._slots)

    @property
    def exhausted(self) -> bool:
        """Every worker is in quarantine."""
        return bool(self._slots) and all(slot.quarantined for slot in self._slots)

    @property
    def alive(self) -> int:
        """Workers whose process has answered."""
        return sum(_state(slot) == "running" for slot in self._slots)

    def _start(self, slot: _Slot) -> None:
        worker = WORKER.options(num_cpus=self._config.worker.cpus, num_gpus=self._config.worker.gpus)
        slot.incarnation = uuid.uuid4().hex
        slot.readings.clear()
        profile = self._profiles is not None and slot.operators is None
        slot.actor = worker.remote(slot.name, slot.incarnation, self._config, self._server, profile)
        slot.started = time.monotonic()
        slot.run = slot.actor.run.remote()
        slot.health = slot.actor.health.remote()

    def _check(self, slot: _Slot, run: ray.ObjectRef[Any]) -> None:
        if slot.health is not None and ray.wait([slot.health], timeout=0)[0]:
            try:
                health = ray.get(slot.health)
                slot.pid, slot.node, slot.memory_bytes = health.pid, health.node, health.memory_bytes
                slot.readings.append(health.seconds)
                self._plays += health.plays
                if health.profile is not None:
                    trace, slot.operators = health.profile
                    self._write_profile(f"{slot.name}.trace.json.gz", trace)
                slot.health = slot.actor.health.remote()
            except RayError:
                slot.health = None  # `run` fails too, and says why
        if not ray.wait([run], timeout=0)[0]:
            return
        try:
            self._plays += ray.get(run)
        except RayError as error:
            # A process that ended by itself may have been ended by its game; one whose node is gone was not.
            died = isinstance(error, RayActorError) and "node has died" not in str(error)
            self._restart(slot, f"died: {last_line(error)}", crashed=died and slot.node in self._nodes.view.alive)
        else:
            slot.done = True
            _clear(slot)

    def _leave(self, nodes: Container[str]) -> None:
        """Moves workers away from nodes that are about to go, while there is time."""
        for slot in self._slots:
            if slot.run is not None and slot.node in nodes:
                self.alerts.append(f"{slot.name} leaves its node, which is about to go")
                slot.not_before = 0.0
                self._end(slot, crashed=False)

    def _restart(self, slot: _Slot, reason: str, *, crashed: bool = False) -> None:
        """Ends a worker, to be started again: the later, the more often in a row that has happened."""
        now = time.monotonic()
        self.restarts += 1
        slot.failures = slot.failures + 1 if now - slot.started < HEALTHY_SECONDS else 1
        backoff = min(2.0 ** (slot.failures - 1), LONGEST_BACKOFF)
        slot.not_before = now + backoff
        self.alerts.append(f"{slot.name} {reason}; it is restarted in {backoff:.0f} s")
        self._end(slot, crashed=crashed)

    def _end(self, slot: _Slot, *, crashed: bool) -> None:
        """Ends a worker, whatever it is doing: what it holds is to be taken back."""
        self.gone.append(Gone(slot.incarnation, crashed))
        ray.kill(slot.actor)  # of no effect on one that is dead
        _clear(slot)

    def _write_profile(self, name: str, content: bytes) -> None:
        if self._profiles is None:
            return
        try:
            self._profiles.mkdir(exist_ok=True)
            (self._profiles / name).write_bytes(content)
        except OSError as error:
            self.alerts.append(f"{name} could not be written: {error}")


def _clear(slot: _Slot) -> None:
    slot.actor = slot.run = slot.health = slot.pid = slot.node = slot.memory_bytes = None


def _state(slot: _Slot) -> str:
    if slot.quarantined:
        return "quarantined"
    if slot.done:
        return "done"
    if slot.run is None:
        return "restarting" if slot.failures else "starting"
    return "running" if slot.pid is not None else "starting"


def last_line(error: BaseException) -> str:
    """Ray's errors are tracebacks; their last line says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
