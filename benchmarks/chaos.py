"""Train on a cluster of several nodes while workers, server, nodes, driver and disk fail at random.

    python -m benchmarks.chaos --minutes 60 --mtbf 15

At the end, `verdict` decides from the files alone whether any contribution that a worker was told is durable was lost
or counted twice. The exit code is 0 if none was and the run recovered from every fault, and 1 otherwise.

    worker     SIGKILL to a worker's process
    pause      SIGSTOP to a worker until its lease has expired, then SIGCONT
    server     SIGKILL to the server's process
    node       SIGKILL to a worker node's raylet and its processes; a new node joins seconds later
    driver     SIGKILL to launch.py, which is then restarted with --resume
    disk       no space left in the run directory for some seconds (only if a file system can be mounted)
    messages   throughout the run, a few percent of the workers' calls lose their request or their reply
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from benchmarks import verdict
from benchmarks.harness import command, hardware, progress
from benchmarks.rig import Rig, resident
from leap_dist.config.settings import Config

KINDS = ("worker", "pause", "server", "node", "driver", "disk")
CONDITIONS = ("messages",)
MODES = get_args(get_type_hints(Config)["mode"])

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

RECOVERY = {
    "worker": "kill → the same slot plays a new lease in a new process",
    "pause": "SIGSTOP → the same slot plays a new lease, in whatever process",
    "server": "kill → first status of the next server process",
    "node": "kill → all its slots play new leases in new processes, wherever",
    "driver": "kill → a worker of the resumed run plays",
    "disk": "space is back → first contribution that is acknowledged as durable",
}
"""Start and end of the recovery time by kind of fault. The driver's reports limit its resolution to 0.5 s."""


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
        """Return whether the run has recovered, as `RECOVERY` defines it."""
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


# The report ------------------------------------------------------------------------------------------------------


def by_kind(faults: Sequence[Fault], kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the number of trials, the number survived and the recovery times, by kind of fault."""
    found = {}
    for kind in kinds:
        own = [fault for fault in faults if fault.kind == kind]
        seconds = [fault.seconds for fault in own if fault.seconds is not None]
        alone = [fault.seconds for fault in own if fault.seconds is not None and not _disturbed(fault, faults)]
        found[kind] = {
            "trials": len(own),
            "survived": len(seconds),
            "p50": verdict.percentile(seconds, 0.5) if seconds else None,
            "p95": verdict.percentile(seconds, 0.95) if seconds else None,
            "longest": max(seconds, default=None),
            "alone": len(alone),
            "p50_alone": verdict.percentile(alone, 0.5) if alone else None,
            "is": RECOVERY[kind],
        }
    return found


def _disturbed(fault: Fault, faults: Sequence[Fault]) -> bool:
    """Return whether another fault was unresolved during this fault's recovery."""
    end = fault.recovered or math.inf
    return any(
        other is not fault and other.struck < end and fault.struck < (other.recovered or math.inf) for other in faults
    )


def text(report: dict[str, Any]) -> str:
    """Format the report as a table."""
    machine, judged = report["hardware"], report["contributions"]
    lines = [
        "Training under fault injection",
        f"  {report['command']}",
        f"  {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB; Python "
        f"{machine['python']}, torch {machine['torch']}",
        "  " + ", ".join(f"{key} {value}" for key, value in report["settings"].items()),
        "",
        f"  {'fault':<10}{'trials':>8}{'survived':>10}{'p50':>8}{'p95':>8}{'longest':>9}{'alone':>7}{'p50':>7}  "
        "seconds to recover:",
    ]
    for kind, one in report["faults"].items():
        figures = "".join(
            f"{'-' if one[key] is None else format(one[key], shape):>{width}}"
            for key, width, shape in (
                ("p50", 8, ".1f"),
                ("p95", 8, ".1f"),
                ("longest", 9, ".1f"),
                ("alone", 7, "d"),
                ("p50_alone", 7, ".1f"),
            )
        )
        lines.append(f"  {kind:<10}{one['trials']:>8}{one['survived']:>10}{figures}  {one['is']}")
    lines.append("  (alone: recoveries during which no other fault was active)")
    steps, speed = report["steps"], report["speed"]
    lines += [
        "",
        f"  contributions: {judged['issued']:,} issued, {judged['acknowledged']:,} acknowledged as durable, "
        f"{judged['applied']:,} applied, {judged['waiting']} waiting",
        f"                 {judged['duplicates']:,} duplicates, refused {judged['refused'] or 'none'} "
        "(as the server counts, at least)",
        f"                 sent over a network that lost {report['messages_lost']['requests']} requests and "
        f"{report['messages_lost']['replies']} replies",
        f"                 {len(judged['lost'])} LOST, {len(judged['doubled'])} APPLIED TWICE",
        f"  agent steps:   {steps['counted']:,} count, {steps['redone']:,} redone, {steps['unfinished']:,} unfinished "
        f"at the end: {steps['goodput']:.1%} of what the server heard of counts",
        f"  speed:         {speed['undisturbed']:,.0f} steps/s undisturbed, {speed['disturbed']:,.0f} disturbed, of "
        f"which {speed['useful']:,.0f} count: {speed['goodput']:.1%} of undisturbed",
        "  memory:        "
        + "; ".join(
            f"{name} "
            + (", ".join(f"{slope:+.1f} MB/h" for slope in slopes) or "no slope, no process lived long enough")
            for name, slopes in report["memory_slopes"].items()
        ),
        f"  stop:          exit code {report['exit_code']} after one SIGINT; {report['refused_resumes']} resumes were "
        "refused because the old server or the disk was not done yet",
        *(f"  note: {note}" for note in report["notes"]),
        *(f"  FAILED: {failure}" for failure in report["failures"]),
    ]
    return "\n".join(lines)


def failures(judged: verdict.Verdict, soak: Soak, code: int | None) -> list[str]:
    """Return a list of everything that went wrong."""
    found = [
        *(f"lost: {one}" for one in judged.lost),
        *(f"applied twice: {one}" for one in judged.doubled),
        *judged.problems,
        *(f"{fault.kind}: {fault.failure}" for fault in soak.faults if fault.failure),
        *soak.crashes,
    ]
    if code != 130:
        found.append(f"one SIGINT should end the run with exit code 130, not {code}")
    if not judged.acknowledged:
        found.append("no contribution was acknowledged, so the run proves nothing")
    return found


def run(rig: Rig, parsed: argparse.Namespace, kinds: Sequence[str], notes: list[str]) -> dict[str, Any]:
    """Run the whole soak test and return the report."""
    faults = plan(parsed.seed, parsed.minutes, parsed.mtbf, kinds)
    progress(f"{len(faults)} faults planned in {parsed.minutes:g} minutes; starting the cluster in {rig.folder}")
    rig.start_cluster()
    soak = Soak(rig, [*_training(parsed), "--address", rig.address], parsed.seed)
    soak.start()

    def heard() -> tuple[float, int]:
        return time.monotonic(), sum(soak.heard.values())

    begun = heard()
    progress(f"all workers train; measuring {parsed.baseline:g} s without faults")
    soak.undisturbed(parsed.baseline)
    disturbed = heard()
    unstruck = soak.disturbed(faults, 60 * parsed.minutes)
    settling = heard()
    if unstruck:
        notes.append(f"{unstruck} faults found no victim before the time ran out")
    progress("all faults injected; waiting until everything has recovered")
    soak.settle()
    code = soak.stop()
    messages = rig.lost_messages()
    evidence = verdict.read(rig.run_dir, rig.audit_dir)
    judged = verdict.judge(evidence, stream=parsed.mode == "stream")
    steps = verdict.account(soak.heard, evidence)
    seconds = settling[0] - disturbed[0]
    speeds = (disturbed[1] - begun[1]) / (disturbed[0] - begun[0]), (settling[1] - disturbed[1]) / seconds
    useful = speeds[1] - steps.redone / seconds
    return {
        "command": command(),
        "hardware": hardware(),
        "settings": {name: getattr(parsed, name) for name in ("minutes", "mtbf", "seed", "kinds", "mode", "on_lost")}
        | {name: getattr(parsed, name) for name in ("games", "task_steps", "workers", "nodes")}
        | {"lease_seconds": LEASE_SECONDS},
        "faults": by_kind(soak.faults, kinds),
        "contributions": {
            **vars(judged),
            "duplicates": soak.summary["duplicates"],
            "refused": soak.summary["refused"],
        },
        "messages_lost": {"requests": messages[0], "replies": messages[1]},
        "meta_updates": evidence.version,
        "steps": {**steps._asdict(), "goodput": steps.counted / max(1, steps.counted + steps.redone)},
        "speed": {
            "undisturbed": speeds[0],
            "disturbed": speeds[1],
            "useful": useful,
            "goodput": useful / speeds[0],
        },
        "memory_slopes": {name: verdict.memory_slopes(samples) for name, samples in soak.memory.items()},
        "exit_code": code,
        "refused_resumes": soak.refused_resumes,
        "timeline": [
            {"kind": f.kind, "at": f.struck - disturbed[0], "recovered": f.seconds, "failure": f.failure}
            for f in soak.faults
        ],
        "notes": notes,
        "failures": failures(judged, soak, code)
        + (["no message was lost, though some should have been"] if rig.lossy and not any(messages) else []),
    }


def _training(parsed: argparse.Namespace) -> list[str]:
    settings = {
        "preset": "smoke",
        "games": parsed.games,
        "mode": parsed.mode,
        "meta-updates": 10**6,
        "meta.batch-size": 3,
        "task-steps": parsed.task_steps,
        "workers": parsed.workers,
        "worker.cpus": 0.5,
        "worker.push-interval": max(1, parsed.task_steps // 12),
        "worker.heartbeat-seconds": 1,
        "server.lease-seconds": LEASE_SECONDS,
        "server.on-lost": parsed.on_lost,
    }
    return [part for name, value in settings.items() if value is not None for part in (f"--{name}", str(value))]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=_positive, default=5.0, help="duration of fault injection in minutes (default 5)"
    )
    parser.add_argument(
        "--mtbf", type=_positive, default=15.0, metavar="SECONDS", help="mean time between faults (default 15)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the schedule and the victims (default 0)")
    parser.add_argument(
        "--kinds",
        default=",".join((*KINDS, *CONDITIONS)),
        help=f"comma-separated kinds of faults, from {','.join((*KINDS, *CONDITIONS))}",
    )
    parser.add_argument(
        "--baseline",
        type=_baseline,
        default=60.0,
        metavar="SECONDS",
        help="time without faults before the first (default 60)",
    )
    parser.add_argument(
        "--mode", choices=MODES, default="buffered", help="aggregation mode of the run (default buffered)"
    )
    parser.add_argument(
        "--on-lost", choices=("keep", "retry"), help="server.on_lost of the run (default: the mode's default)"
    )
    parser.add_argument("--games", default="pong,freeway,breakout", help="comma-separated games to train on")
    parser.add_argument("--task-steps", type=int, default=4000, help="agent steps per task (default 4000)")
    parser.add_argument("--workers", type=int, default=3, help="number of workers (default 3)")
    parser.add_argument("--nodes", type=int, default=3, help="number of worker nodes, each with one CPU (default 3)")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="copy the run directory, audit and logs to this directory"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def _positive(given: str) -> float:
    value = float(given)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{given} is not positive")
    return value


def _baseline(given: str) -> float:
    value = _positive(given)
    if value < 10:  # in a shorter time, possibly no worker has reported a step
        raise argparse.ArgumentTypeError(f"{given} is less than 10")
    return value


def _kinds(parser: argparse.ArgumentParser, given: str) -> list[str]:
    chosen = list(filter(None, given.split(",")))
    for kind in chosen:
        if kind not in (*KINDS, *CONDITIONS):
            parser.error(f"--kinds: {kind!r} is not one of {', '.join((*KINDS, *CONDITIONS))}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the soak test from the command line and return the exit code."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    chosen = _kinds(parser, parsed.kinds)
    for number in (signal.SIGINT, signal.SIGTERM):  # also if SIGINT was ignored, as in a background job
        signal.signal(number, signal.default_int_handler)
    notes = []
    with Rig(nodes=parsed.nodes, lossy="messages" in chosen, disk="disk" in chosen) as rig:
        kinds = [kind for kind in KINDS if kind in chosen]
        if "disk" in kinds and not rig.has_disk:
            kinds.remove("disk")
            notes.append("disk faults are left out: mounting a file system is not permitted here")
        try:
            report = run(rig, parsed, kinds, notes)
        except NotStarted as error:
            progress(str(error))
            return 1
        except KeyboardInterrupt:
            progress("interrupted; shutting down the cluster")
            return 130
        finally:
            if parsed.keep:
                rig.keep(parsed.keep)
    if parsed.keep:
        (parsed.keep / "report.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1) if parsed.json else text(report))
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
