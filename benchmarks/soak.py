"""A training run under fault injection: the schedule, how each fault strikes, and when the run has recovered."""

from __future__ import annotations

import heapq
import itertools
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from benchmarks import verdict
from benchmarks.harness import progress
from benchmarks.rig import Rig, resident

KINDS = ("worker", "pause", "server", "node", "driver", "disk")

LEASE_SECONDS = 6.0
PAUSE_SECONDS = 2 * LEASE_SECONDS
NODE_AWAY_SECONDS = 3.0
DISK_FULL_SECONDS = 5.0
RECOVERY_SECONDS = 300.0
"""Time limit in seconds; a fault with a longer recovery counts as not survived."""
START_SECONDS = 180.0
MOST_CRASHES = 20
SETTLE_SECONDS = 20.0
STOP_SECONDS = 90.0
TICK_SECONDS = 0.2
MEMORY_SECONDS = 5.0


class Planned(NamedTuple):
    """Scheduled fault."""

    seconds: float
    kind: str


def plan(seed: int, minutes: float, mtbf: float, kinds: Sequence[str]) -> list[Planned]:
    """Return a reproducible schedule of faults. Gaps are exponential with a mean of `mtbf` seconds."""
    rng = random.Random(seed)
    faults = []
    now = rng.expovariate(1 / mtbf)
    while now < 60 * minutes and kinds:
        faults.append(Planned(now, rng.choice(kinds)))
        now += rng.expovariate(1 / mtbf)
    return faults


@dataclass
class Fault:
    """Injected fault and the conditions for having recovered from it."""

    kind: str
    struck: float
    wall: float
    """Time of day at which the fault struck; earlier reports of the driver are ignored."""
    pids: dict[str, int]
    """Processes that must be replaced, by slot."""
    leases: set[str] = field(default_factory=set)
    """Leases that existed before the fault."""
    slots: set[str] = field(default_factory=set)
    server_pid: int | None = None
    durable: int = 0
    begins: float | None = None
    """Start of the recovery time; None while the fault lasts."""
    recovered: float | None = None
    failure: str = ""

    @property
    def seconds(self) -> float | None:
        """Return the recovery time in seconds."""
        return None if self.recovered is None or self.begins is None else self.recovered - self.begins

    def over(self, summary: dict[str, Any], durable: int) -> bool:
        """Return whether the run has recovered, as `soak_report.RECOVERY` defines it."""
        if self.begins is None:
            return False
        if self.kind == "disk":
            return durable > self.durable
        if summary.get("state") != "running" or summary["updated"] <= self.wall:
            return False
        if self.kind == "server":
            return bool(summary["server_pid"] != self.server_pid)
        playing = {one["worker"] for one in summary["leases"] if one["steps"] and one["lease"] not in self.leases}
        if self.kind == "driver":
            return bool(playing)
        pids = {worker["name"]: worker["pid"] for worker in summary["workers"]}
        changed = {slot for slot in self.slots if pids.get(slot) and pids[slot] != self.pids.get(slot)}
        return self.slots <= playing and self.slots <= changed


class NotStarted(RuntimeError):
    """Raised when the run does not start or resume. The message ends with the last lines of its log."""


class Soak:
    """Training run under fault injection, with a record of what was observed."""

    def __init__(self, rig: Rig, arguments: Sequence[str], seed: int) -> None:
        self._rig = rig
        self._arguments = arguments
        self._rng = random.Random(f"victims {seed}")
        self._clock = time.monotonic
        self._todo: list[tuple[float, int, Callable[[], None]]] = []  # heap
        self._order = itertools.count()
        self._paused: set[int] = set()
        self._disk_full = False
        self._resuming = False
        self._memory_next = 0.0
        self.faults: list[Fault] = []
        self.summary: dict[str, Any] = {}
        self.heard: dict[str, int] = {}
        """Highest number of agent steps observed for each lease."""
        self.memory: dict[str, list[verdict.Sample]] = {"server": [], "driver": []}
        self.crashes: list[str] = []
        """Descriptions of unexpected driver exits."""
        self.refused_resumes = 0

    # Phases ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the run and wait until every worker trains. Raise NotStarted if that takes too long."""
        self._rig.start_driver(self._arguments)
        deadline = self._clock() + START_SECONDS
        while not (playing := self._playing()) or len(playing) < self.summary["workers_wanted"]:
            if self._clock() > deadline or self.crashes:
                raise NotStarted(f"the run did not start:\n{self._rig.log.read_text()[-3000:]}")
            self._tick()

    def undisturbed(self, seconds: float) -> None:
        """Let the run continue for `seconds` without faults."""
        deadline = self._clock() + seconds
        while self._clock() < deadline:
            self._tick()

    def disturbed(self, faults: Sequence[Planned], seconds: float) -> int:
        """Inject each fault when it is due, or as soon afterwards as there is a victim.

        Return the number of faults that never found a victim.
        """
        started = self._clock()
        due = list(faults)
        while self._clock() < started + seconds:
            self._tick()
            for fault in [one for one in due if started + one.seconds <= self._clock()]:
                if self._strike(fault.kind):
                    due.remove(fault)
        return len(due)

    def settle(self) -> None:
        """Wait until every fault has been recovered from, and a little longer."""
        deadline = self._clock() + RECOVERY_SECONDS
        while self._clock() < deadline and (self._todo or self._open()):
            self._tick()
        self.undisturbed(SETTLE_SECONDS)
        for fault in self._open():
            fault.failure = f"not recovered within {self._clock() - fault.struck:.0f} s"

    def stop(self) -> int | None:
        """Send one SIGINT and return the exit code, or None if the driver does not exit."""
        self._look()
        self._rig.send(self._rig.driver_pid, signal.SIGINT)
        code = self._rig.wait_driver(STOP_SECONDS)
        self._look()
        return code

    # One step ----------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        time.sleep(TICK_SECONDS)
        if self._disk_full:
            self._rig.fill_disk()
        while self._todo and self._todo[0][0] <= self._clock():
            heapq.heappop(self._todo)[2]()
        self._look()
        self._mind_driver()
        durable = self._rig.durable()
        for fault in self._open():
            if fault.over(self.summary, durable):
                fault.recovered = self._clock()
                progress(f"  {fault.kind}: recovered after {fault.seconds:.1f} s")
            elif fault.begins is not None and self._clock() - fault.begins > RECOVERY_SECONDS:
                fault.failure = f"not recovered within {RECOVERY_SECONDS:.0f} s"
                progress(f"  {fault.kind}: {fault.failure}")

    def _look(self) -> None:
        self.summary = self._rig.summary() or self.summary
        for lease in self.summary.get("leases", ()):
            self.heard[lease["lease"]] = max(lease["steps"], self.heard.get(lease["lease"], 0))
        if self._clock() >= self._memory_next:
            self._memory_next = self._clock() + MEMORY_SECONDS
            for name, pid in (("server", self.summary.get("server_pid")), ("driver", self._rig.driver_pid)):
                if pid and (size := resident(pid)):
                    self.memory[name].append(verdict.Sample(self._clock(), pid, size))

    def _mind_driver(self) -> None:
        """Restart the driver if it was killed or has exited by itself."""
        code = self._rig.driver_ended()
        if code is None:
            if self._resuming and self._reporting():
                self._resuming = False
            return
        said = self._rig.log.read_text().strip().splitlines()[-1:]
        refused = code == 2 and any("in use by" in line or "cannot be" in line for line in said)
        if self._resuming and refused:  # the old server is still exiting, or the disk is full
            self.refused_resumes += 1
        elif not self._resuming or code != -signal.SIGKILL:
            self.crashes.append(f"the driver ended with {code}: {' '.join(said)}")
            progress(self.crashes[-1])
            for fault in self._open():
                fault.failure = self.crashes[-1]
            if len(self.crashes) == MOST_CRASHES:
                raise NotStarted(f"the driver has ended {MOST_CRASHES} times, giving up")
        self._resuming = True
        self._rig.start_driver(["--resume"])

    def _open(self) -> list[Fault]:
        return [fault for fault in self.faults if fault.recovered is None and not fault.failure]

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._todo, (self._clock() + seconds, next(self._order), action))

    # Faults ------------------------------------------------------------------------------------------------------

    def _reporting(self) -> bool:
        """Return whether the driver is alive and has reported since its last start."""
        kills = [fault.wall for fault in self.faults if fault.kind == "driver"]
        return self.summary.get("state") == "running" and self.summary["updated"] > max(kills, default=0.0)

    def _playing(self) -> dict[str, int]:
        """Return the processes of workers in the middle of a task, by slot."""
        if not self._reporting():
            return {}
        busy = {lease["worker"] for lease in self.summary["leases"] if lease["steps"]}
        pids = {one["name"]: one["pid"] for one in self.summary["workers"] if one["pid"] and one["name"] in busy}
        alive = self._rig.processes()
        return {slot: pid for slot, pid in pids.items() if pid in alive and pid not in self._paused}

    def _strike(self, kind: str) -> bool:
        """Inject a fault; return False if there is currently no victim."""
        if self._resuming or not self._reporting():
            return False
        pids = {worker["name"]: worker["pid"] for worker in self.summary["workers"] if worker["pid"]}
        fault = Fault(kind, self._clock(), time.time(), pids, server_pid=self.summary["server_pid"])
        victim = getattr(self, f"_strike_{kind}")(fault)
        if victim:
            fault.leases = self._rig.leases()  # a summary may lack the newest leases
            progress(f"{len(self.faults) + 1}. {kind}: {victim}")
            self.faults.append(fault)
        return bool(victim)

    def _strike_worker(self, fault: Fault) -> str:
        victims = self._playing()
        if not victims:
            return ""
        slot = self._rng.choice(sorted(victims))
        if not self._rig.send(victims[slot], signal.SIGKILL):
            return ""
        fault.begins, fault.slots = fault.struck, {slot}
        return f"{slot}, process {victims[slot]}"

    def _strike_pause(self, fault: Fault) -> str:
        victims = self._playing()
        if not victims:
            return ""
        slot = self._rng.choice(sorted(victims))
        pid = victims[slot]
        if not self._rig.send(pid, signal.SIGSTOP):
            return ""
        self._paused.add(pid)
        fault.begins, fault.slots, fault.pids = fault.struck, {slot}, {}

        def resume() -> None:
            self._rig.send(pid, signal.SIGCONT)
            self._paused.discard(pid)

        self._later(PAUSE_SECONDS, resume)
        return f"{slot}, process {pid}"

    def _strike_server(self, fault: Fault) -> str:
        pid = self.summary["server_pid"]
        if not self._rig.send(pid, signal.SIGKILL):
            return ""
        fault.begins = fault.struck
        return f"process {pid}"

    def _strike_node(self, fault: Fault) -> str:
        slots = {pid: slot for slot, pid in fault.pids.items()}
        busy = [node for node in self._rig.nodes() if self._rig.workers_on(node) & slots.keys()]
        if not busy:
            return ""
        node = self._rng.choice(busy)
        fault.slots = {slots[pid] for pid in self._rig.workers_on(node) & slots.keys()}
        self._rig.kill_node(node)
        fault.begins = fault.struck
        self._later(NODE_AWAY_SECONDS, self._rig.add_node)
        return f"with {', '.join(sorted(fault.slots))}"

    def _strike_driver(self, fault: Fault) -> str:
        pid = self._rig.driver_pid
        self._resuming = True
        self._rig.kill_driver()
        fault.wall = time.time()
        fault.begins = fault.struck
        return f"process {pid}"

    def _strike_disk(self, fault: Fault) -> str:
        if self._disk_full:
            return ""
        self._rig.fill_disk()
        self._disk_full = True

        def free() -> None:
            self._disk_full = False
            self._rig.free_disk()
            fault.begins, fault.durable = self._clock(), self._rig.durable()

        self._later(DISK_FULL_SECONDS, free)
        return f"full for {DISK_FULL_SECONDS:.0f} s"
