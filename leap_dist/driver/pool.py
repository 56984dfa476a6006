"""The workers: as many as were asked for and fit, replaced when they die."""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.driver.actors import WORKER, Gone
from leap_dist.driver.aggregators import Aggregators
from leap_dist.driver.nodes import Nodes
from leap_dist.driver.placement import Need, ask_autoscaler, autoscaler_groups, most_that_fit, no_room
from leap_dist.nn.profiling import breakdown, shares
from leap_dist.tasks.atari.video import Play

LEAVE_SECONDS = 5.0  # before its node goes, a worker should be gone
PLACED_SECONDS = 60.0  # in which a worker that fits should have started
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
    placed: bool = True
    """It has started, or is not known to be late."""
    failures: int = 0
    not_before: float = 0.0
    gone_by: float | None = None
    """When its node goes, once the worker has been told."""
    done: bool = False
    quarantined: bool = False


class Pool:
    """Keeps as many workers running as were asked for and fit, and replaces those that die.

    None starts before as many fit as there must be at least.

    `profiles`: a folder for every worker's trace and breakdown, where they are wanted.
    """

    def __init__(self, config: Config, nodes: Nodes, profiles: Path | None = None) -> None:
        self._config = config
        self._need = Need.of(config)
        self._profiles = profiles
        self._server: Any = None
        self._nodes = nodes
        self._aggregators = Aggregators(config.server.gather_seconds)
        self._slots: list[_Slot] = []
        self._begun = False
        self._room: int | None = None  # as last told of
        self._asked = False  # an autoscaler, for nodes
        self.restarts = 0
        self.gone: list[Gone] = []
        """Incarnations that ended and whose leases the server has not been told to take back yet."""
        self.alerts: deque[str] = deque(maxlen=100)
        self._plays: list[Play] = []

    def require_room(self) -> None:
        """Raises ConfigError where too few workers fit, and nothing may bring more; asks for what may come."""
        fits, least, bring = self.room(), self._config.min_workers, autoscaler_groups(self._config.address)
        wait = self._config.wait_for_nodes and self._config.address != "local"  # where none can join
        self._asked = bring is not None or wait
        most = max(fits, most_that_fit(self._need, bring)) if bring is not None else fits
        if most < least and not (wait and bring is None):
            nodes = list(self._nodes.view.staying.values())
            raise ConfigError(no_room(self._need, least, most, nodes, bring is not None))
        if self._asked:
            ask_autoscaler(self._need, self.wanted)
        elif fits < self.wanted:
            self.alerts.append(f"{self.wanted} workers asked for, {fits} fit; a lower worker.cpus shares processors")

    def open(self, server: Any) -> None:
        """From now on `tend` starts workers for `server`."""
        self._server = server

    def close(self) -> None:
        """Takes back what was asked of an autoscaler."""
        if self._asked:
            ask_autoscaler(self._need, 0)

    @property
    def wanted(self) -> int:
        """Workers asked for."""
        return self._config.workers

    @property
    def waiting(self) -> str:
        """What is waited for, where no worker can start yet; else empty."""
        if self._begun:
            return ""
        nodes = len(self._nodes.view.staying)
        return (
            f"waiting for nodes: {self.room()} workers with {self._need} fit on the {nodes} there are, "
            f"{self._config.min_workers} must"
        )

    def tend(self) -> None:
        """Starts, checks and replaces workers; never waits."""
        now, hosts = time.monotonic(), self._hosts()
        fits = sum(hosts.values())
        self._note_room(fits)
        self._leave(self._nodes.view.leaving)
        self._aggregators.follow(hosts, self._server)
        if self._begun:
            self._slots += [_Slot(f"w{number}") for number in range(len(self._slots), min(self.wanted, fits))]
        free = fits - sum(slot.run is not None and slot.gone_by is None for slot in self._slots)
        for slot in self._slots:
            if slot.run is not None:
                self._check(slot, slot.run)
            elif not (slot.done or slot.quarantined) and now >= slot.not_before and free > 0:
                free -= 1
                self._start(slot)

    def _note_room(self, fits: int) -> None:
        self._begun = self._begun or fits >= self._config.min_workers
        fits = min(fits, self.wanted)
        if self._room is not None and fits != self._room:
            self.alerts.append(f"{fits} of {self.wanted} workers fit now, {self._room} did before")
        self._room = fits

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
        """How many workers the nodes that are there, and stay, have resources for."""
        return sum(self._hosts().values())

    def _hosts(self) -> dict[str, int]:
        """The nodes that have room for workers, and for how many."""
        nodes = self._nodes.view.staying.items()
        return {name: fits for name, node in nodes if (fits := self._need.fits(node.resources, node.labels))}

    def describe(self) -> list[dict[str, Any]]:
        """Every worker as plain data."""
        return [
            {
                "name": slot.name,
                "state": _state(slot),
                "pid": slot.pid,
                "node": slot.node,
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
        return sum(slot.pid is not None for slot in self._slots)

    def _start(self, slot: _Slot) -> None:
        need = self._need
        worker = WORKER.options(num_cpus=need.cpus, num_gpus=need.gpus, label_selector=need.labels or None)
        slot.incarnation = uuid.uuid4().hex
        slot.readings.clear()
        slot.placed = True
        profile = self._profiles is not None and slot.operators is None
        aggregators = self._aggregators.handles
        slot.actor = worker.remote(slot.name, slot.incarnation, self._config, self._server, aggregators, profile)
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
        if slot.placed and slot.pid is None and time.monotonic() - slot.started > PLACED_SECONDS:
            slot.placed = False
            self.alerts.append(
                f"{slot.name} has not started for {PLACED_SECONDS:.0f} s: other programs may use what the nodes have"
            )
        if not ray.wait([run], timeout=0)[0]:
            return
        try:
            self._plays += ray.get(run)
        except RayError as error:
            # A process that ended by itself may have been ended by its game; one whose node is gone was not.
            died = isinstance(error, RayActorError) and "node has died" not in str(error)
            self._restart(slot, f"died: {last_line(error)}", crashed=died and slot.node in self._nodes.view.staying)
        else:
            if slot.gone_by is None:
                slot.done = True
                _clear(slot)
            else:
                self._end(slot, crashed=False)

    def _leave(self, leaving: Mapping[str, float]) -> None:
        """Tells workers whose node is about to go, and ends those that are still there when it does.

        They end their task, where there is time for that, or hand it over; then they start again elsewhere.
        """
        now = time.monotonic()
        for slot in self._slots:
            if slot.run is None or slot.node is None or slot.node not in leaving:
                continue
            if slot.gone_by is None:
                slot.gone_by = leaving[slot.node]
                left = max(0.0, slot.gone_by - LEAVE_SECONDS - now)
                slot.actor.leave.remote(left)
                slot.not_before = 0.0
                self.alerts.append(f"{slot.name} leaves its node, which is about to go, within {left:.0f} s")
            elif now >= slot.gone_by:
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
    slot.actor = slot.run = slot.health = slot.pid = slot.node = slot.memory_bytes = slot.gone_by = None


def _state(slot: _Slot) -> str:
    if slot.quarantined:
        return "quarantined"
    if slot.done:
        return "done"
    if slot.run is None:
        return "no room" if time.monotonic() >= slot.not_before else "restarting"
    if slot.gone_by is not None:
        return "leaving"
    return "running" if slot.pid is not None else "starting"


def last_line(error: BaseException) -> str:
    """Ray's errors are tracebacks; their last line says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
