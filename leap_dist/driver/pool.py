"""The pool of workers: starts as many as wanted if they fit, places them on nodes, and replaces those that die."""

from __future__ import annotations

import math
import time
import uuid
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, OutOfMemoryError, RayError

from leap_dist.config.loading import ConfigError
from leap_dist.config.plurals import counted
from leap_dist.config.settings import Config
from leap_dist.driver import memory, mps, plan
from leap_dist.driver.actor_messages import EndedWorker, WorkerHealth
from leap_dist.driver.actors import WORKER
from leap_dist.driver.clients import Aggregators
from leap_dist.driver.deaths import Deaths
from leap_dist.driver.failures import RETRY_SECONDS, Failures
from leap_dist.driver.nodes import READ_SECONDS, Node, Nodes
from leap_dist.driver.placement import (
    MPS_LIMIT,
    UNLIMITED,
    Group,
    Need,
    Room,
    autoscaler_groups,
    can_be_joined,
    candidates,
    explain_lack,
    max_workers,
    of_one_kind,
    others_may_come,
    waits_for_nodes,
)
from leap_dist.driver.preflight import NoChecks
from leap_dist.driver.profiles import Profiles
from leap_dist.driver.resource_requests import Request, ResourceRequest
from leap_dist.driver.worker_request import worker_request
from leap_dist.driver.worker_slot import WorkerSlot
from leap_dist.tasks.atari.video import Clip

LEAVE_SECONDS = 5.0
"""A worker should be gone this many seconds before its node goes away."""
START_SECONDS = 60.0
"""An alert is raised if a worker that fits takes longer than this many seconds to start."""

_SHARE = "lower worker.cpus to share processors"
_REMEDIES = {
    MPS_LIMIT: "give --mps no, which admits more to a GPU",
    "worker.gpus": "lower worker.gpus to put more of them on a GPU",
}
"""Advice to a user whose workers do not all fit, by what limits a node's room."""


class Pool:
    """Keeps the wanted number of workers running, as far as they fit, and replaces those that die.

    With `workers` "auto", the wanted number is what fits on the current nodes. No worker starts before
    `config.min_workers` fit.

    Args:
        config: the run's configuration.
        nodes: the cluster's nodes.
        checks: decides which nodes may get workers.
        most_workers: number of workers beyond which some would never have a task.
        one_kind: whether all workers must compute on the same kind of device, and the user leaves open which. The
            first nodes that may get workers decide it, unless the configuration already does.
        profiles: directory for every worker's profiler trace and time breakdown, or None.
        alerts: alerts that were raised before the pool was created.
    """

    def __init__(
        self,
        config: Config,
        nodes: Nodes,
        profiles: Path | None = None,
        alerts: Iterable[str] = (),
        *,
        checks: NoChecks | None = None,
        most_workers: int = UNLIMITED,
        one_kind: bool = False,
    ) -> None:
        self._config = config
        self._checks = checks or NoChecks()
        self._failures = Failures(self._checks)
        self._deaths = Deaths(nodes, config.server.lease_seconds)
        self._most = most_workers
        self._need = Need.of(config, most_workers)
        self._one_kind = one_kind
        self._server: Any = None
        self._nodes = nodes
        self._daemons = mps.Daemons(config)
        self._aggregators = Aggregators(config.server.gather_seconds)
        self._slots: list[WorkerSlot] = []
        self._begun = False
        self._reported_capacity: int | None = None
        self._request: ResourceRequest | None = None
        self.restarts = 0
        self.ended: list[EndedWorker] = []
        """Ended workers whose leases the server has not been told to take back yet."""
        self.alerts: deque[str] = deque(alerts, maxlen=100)
        self._profiles = Profiles(profiles, self.alerts)
        self._clips: list[Clip] = []

    def require_capacity(self) -> None:
        """Ask the autoscaler for nodes. Raises ConfigError if too few workers fit and no further nodes can come."""
        self._settle_kind()
        fits, least, groups = self.capacity(), self._config.min_workers, autoscaler_groups(self._config.address)
        most = max(fits, max_workers(self._need, groups)) if groups is not None else fits
        if most < least and not (waits_for_nodes(self._config) and groups is None):
            nodes = list(self._nodes.view.staying.values())
            can_join = can_be_joined(self._config)
            raise ConfigError(explain_lack(self._need, least, most, nodes, groups is not None, can_join=can_join))
        if others_may_come(self._config):
            self._request = ResourceRequest(self._bundles(groups))
        elif fits < self.wanted:
            remedy = next((_REMEDIES[room.limit] for room in self._hosts().values() if room.limit in _REMEDIES), _SHARE)
            self.alerts.append(f"{self.wanted} workers requested, only {fits} fit; {remedy}")

    def _bundles(self, groups: Sequence[Group] | None) -> Request:
        """Return the request to an autoscaler that may add `groups`, or None if that is not known."""
        nodes = self._nodes.view.staying
        return worker_request(self._config, self._need, self._most, nodes, self._hosts(), groups)

    def open(self, server: Any) -> None:
        """Start workers for `server`, which may still be starting; `reconcile` keeps them from now on."""
        self._server = server
        self.reconcile()

    def close(self) -> None:
        """End checks and MPS daemons, and withdraw the request to the autoscaler."""
        self._checks.close()
        self._daemons.close()
        if self._request is not None:
            self._request.close()

    @property
    def wanted(self) -> int:
        """Number of workers that should run."""
        return min(self._most, self.capacity()) if self._config.workers == "auto" else self._config.workers

    @property
    def waiting(self) -> str:
        """Text that says what the pool waits for before the first worker can start; it is empty afterwards."""
        if self._begun:
            return ""
        nodes = counted(len(self._nodes.view.staying), "node")
        return (
            f"waiting for nodes: {nodes} can hold {counted(self.capacity(), 'worker')}, but at least "
            f"{self._config.min_workers} must fit; each takes {self._need}"
        )

    def reconcile(self) -> None:
        """Start, check and replace workers so that they match the current nodes.

        It waits only if a worker has died, for at most 5 s: Ray is asked whether memory ran out.
        """
        self._checks.follow(candidates(self._need, self._nodes.view.staying))
        self.alerts += self._checks.alerts
        self._checks.alerts.clear()
        self._settle_kind()
        self.ended += self._deaths.settle()
        hosts = self._hosts()
        fits = sum(room.workers for room in hosts.values())
        self._record_capacity(fits)
        self._vacate(self._nodes.view.leaving)
        self._free_gpus(hosts)
        self._aggregators.follow(hosts, self._server)
        self._daemons.follow(hosts, {slot.host for slot in self._slots if slot.host and slot.run is not None})
        if self._begun:
            self._resize(min(fits, self.wanted))
        for slot in self._slots:
            if slot.run is not None:
                self._check(slot, slot.run)
            elif slot.is_ready and (host := self._host(hosts)):
                self._start(slot, host, hosts[host])
                self._failures.record_start(host)
        for name in self._failures.follow(hosts, self._slots):
            self.alerts.append(
                f"most workers on node {self._address(name)} are in quarantine; it gets one worker every "
                f"{RETRY_SECONDS / 60:.0f} minutes"
            )

    def _resize(self, count: int) -> None:
        """Add slots up to `count`. If the number follows the nodes, empty slots beyond it are removed."""
        for number in range(len(self._slots), count):
            self._slots.append(WorkerSlot(f"w{number}"))
        while self._config.workers == "auto" and len(self._slots) > max(count, 1) and self._slots[-1].is_idle:
            self._slots.pop()

    def _host(self, hosts: Mapping[str, Room]) -> str | None:
        """Return the node for the next worker, or None."""
        shut = {name for name in hosts if self._daemons.is_undecided(name) or self._checks.is_doubted(name)}
        return self._failures.choose(hosts, self._slots, shut)

    def _record_capacity(self, fits: int) -> None:
        self._begun = self._begun or fits >= self._config.min_workers
        fits = min(fits, self.wanted)
        if self._reported_capacity is not None and fits != self._reported_capacity:
            of = "" if self._config.workers == "auto" else f" of {self.wanted}"
            self.alerts.append(f"{fits}{of} workers fit now (previously {self._reported_capacity})")
        self._reported_capacity = fits

    def handle_status(self, status: dict[str, Any]) -> None:
        """Replace workers that the server reports as silent, and stop those in quarantine."""
        for slot in self._slots:
            if slot.name in status["quarantined_workers"] and not (slot.quarantined or slot.done):
                slot.quarantined, slot.host = True, slot.node or slot.host
                if slot.host is not None:
                    self._failures.record_quarantine(slot.host)
                if slot.run is not None:
                    self._end(slot)
            elif slot.run is not None and slot.incarnation in status["silent"]:
                self._restart(slot, "was silent for too long")

    def capacity(self) -> int:
        """Return how many workers fit on the nodes that are not about to leave."""
        return sum(room.workers for room in self._hosts().values())

    def _hosts(self) -> dict[str, Room]:
        """Return the room on each node that may get workers, without the nodes that have none."""
        nodes = self._fit_nodes().items()
        rooms = {name: self._need.on(node, hosts_server=name == self._nodes.own) for name, node in nodes}
        return {name: room for name, room in rooms.items() if room.workers}

    def _fit_nodes(self) -> dict[str, Node]:
        """Return the nodes for workers that have passed their checks and are not about to leave."""
        return self._checks.passed(candidates(self._need, self._nodes.view.staying))

    def _address(self, name: str) -> str:
        """Return the address of a node, or its ID if it has gone meanwhile."""
        node = self._nodes.view.staying.get(name)
        return name if node is None else node.host

    def _settle_kind(self) -> None:
        """Decide whether workers get GPUs, if all are to have the same kind of device and some node can hold one."""
        if self._one_kind and self._need.device == "auto":
            self._need = of_one_kind(self._need, self._fit_nodes())

    def plan(self) -> str:
        """Return the plan of the workers, in one line."""
        idle = plan.idle_nodes(self._need, self._nodes.view.staying.values()) if self._one_kind else 0
        return plan.describe(self._config, [*self._hosts().values()], self.wanted, idle)

    @property
    def mps(self) -> dict[str, str]:
        """State of the MPS daemon on each node whose workers share GPUs, by Ray's ID."""
        return dict(self._daemons.states)

    def describe(self) -> list[dict[str, Any]]:
        """Return the state of every worker as JSON-compatible dicts."""
        return [slot.describe() for slot in self._slots]

    def take_clips(self) -> list[Clip]:
        """Return the episodes that workers have recorded since the last call."""
        clips, self._clips = self._clips, []
        return clips

    def write_breakdowns(self) -> None:
        """Write each worker's time breakdown and costliest operators to the directory for profiles."""
        self._profiles.write_breakdowns(self._slots)

    def abandon(self) -> None:
        """Give up all workers, so that the server takes back their leases."""
        self.ended += [EndedWorker(slot.incarnation, crashed=False) for slot in self._slots]

    @property
    def done(self) -> bool:
        """Whether every worker has returned because there is no more work, or has no process left to return."""
        return all(slot.done or slot.pid is None for slot in self._slots)

    @property
    def exhausted(self) -> bool:
        """Whether every worker is in quarantine."""
        return bool(self._slots) and all(slot.quarantined for slot in self._slots)

    @property
    def alive(self) -> int:
        """Number of workers whose process has answered."""
        return sum(slot.pid is not None for slot in self._slots)

    def _start(self, slot: WorkerSlot, host: str, room: Room) -> None:
        worker = WORKER.options(
            num_cpus=self._need.cpus,
            num_gpus=room.gpus,
            scheduling_strategy=self._nodes.reservation.strategy(host),
            # The pool restarts workers itself; but a local Ray spares actors that may not be restarted; see memory.py.
            max_restarts=-1 if self._config.address == "local" else 0,
        )
        incarnation = uuid.uuid4().hex
        settings = replace(self._config.worker, device=room.device, gpus=room.gpus)
        pipes = self._daemons.pipes.get(host, "")
        actor = worker.remote(
            slot.name, incarnation, replace(self._config, worker=settings), self._profiles.wants(slot), pipes
        )
        slot.fill(actor, incarnation, actor.run.remote(self._server, self._aggregators.handles), host, room.device)

    def _check(self, slot: WorkerSlot, run: ray.ObjectRef[Any]) -> None:
        """Read the slot's health report and the result of its worker, if they have arrived."""
        if slot.health is not None and ray.wait([slot.health], timeout=0)[0]:
            try:
                self._record_health(slot, ray.get(slot.health))
            except RayError:
                slot.health = None  # `run` fails as well and says why
        if not slot.late_reported and slot.pid is None and time.monotonic() - slot.started > START_SECONDS:
            slot.late_reported = True
            self.alerts.append(
                f"{slot.name} has not started within {START_SECONDS:.0f} s; other programs may be using the nodes"
            )
        if not ray.wait([run], timeout=0)[0]:
            return
        try:
            self._clips += ray.get(run)
        except RayError as error:
            if isinstance(error, OutOfMemoryError) or memory.was_killed(slot.pid, slot.node):
                together = sum(other.memory_bytes or 0 for other in self._slots)
                self._restart(slot, memory.explain_kill(slot.memory_bytes, together))
                return
            if isinstance(error, ActorUnschedulableError) or "never ran" in str(error):
                # The node was gone before the view of the nodes said so. The worker has not failed.
                slot.not_before = time.monotonic() + READ_SECONDS
                self._end(slot)
                return
            # A process that ended by itself may have been ended by its task; one whose node is gone was not.
            self._restart(slot, memory.explain_death(error), outlived_by=self._deaths.seconds(slot.node, error))
        else:
            if slot.gone_by is None:
                slot.done = True
                slot.clear()
            else:
                self._end(slot)

    def _record_health(self, slot: WorkerSlot, health: WorkerHealth) -> None:
        slot.record(health)
        self._clips += health.clips
        if health.profile is not None:
            trace, slot.operators = health.profile
            self._profiles.write_trace(slot, trace)

    def _vacate(self, leaving: Mapping[str, float]) -> None:
        """Tell the workers on nodes that are about to leave, and end those that are still there at the deadline.

        Such a worker completes its task if there is time, or else gives it back; then it starts again on another node.
        """
        now = time.monotonic()
        for slot in self._slots:
            if slot.run is None or slot.node is None or slot.node not in leaving:
                continue
            if slot.gone_by is None or slot.gone_by > leaving[slot.node]:
                slot.gone_by = leaving[slot.node]
                left = max(0.0, slot.gone_by - LEAVE_SECONDS - now)
                slot.actor.leave.remote(left)
                slot.not_before = 0.0
                self.alerts.append(f"{slot.name} leaves its node within {left:.0f} s, because the node is about to go")
            elif now >= slot.gone_by:
                self._end(slot)

    def _free_gpus(self, hosts: Mapping[str, Room]) -> None:
        """Let workers on processors leave after their tasks if the GPUs of their node can be used by now."""
        for host in (name for name, room in hosts.items() if room.device == "cuda"):
            there = [slot for slot in self._slots if slot.run is not None and slot.host == host]
            slow = [slot for slot in there if slot.device == "cpu" and slot.gone_by is None]
            for slot in slow:
                slot.gone_by = math.inf
                slot.actor.leave.remote(math.inf)
            if slow:
                self.alerts.append(
                    f"node {self._address(host)} has GPUs now; its {counted(len(slow), 'worker')} on "
                    "processors leave after their tasks"
                )

    def _restart(self, slot: WorkerSlot, reason: str, *, outlived_by: float | None = None) -> None:
        """End a worker and let it start again after a pause."""
        self.restarts += 1
        pause = max(slot.back_off(), outlived_by or 0.0)
        self.alerts.append(f"{slot.name} {reason}; it is restarted in {pause:.0f} s")
        if (host := slot.node or slot.host) is not None:  # in a placement group, Ray may have chosen another node
            self._failures.record(host)
        self._end(slot, outlived_by=outlived_by)

    def _end(self, slot: WorkerSlot, *, outlived_by: float | None = None) -> None:
        """End a worker, whatever it is doing. The server will be told to take back its lease.

        The worker has crashed if its node outlives it by `outlived_by` seconds; with None, it has not.
        """
        if outlived_by:
            self._deaths.hold(slot, outlived_by)
        else:
            self.ended.append(EndedWorker(slot.incarnation, crashed=outlived_by is not None))
        ray.kill(slot.actor)  # has no effect on an actor that is dead
        slot.clear()
