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
import json
import math
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from benchmarks import verdict
from benchmarks.harness import command, hardware, progress
from benchmarks.rig import Rig
from benchmarks.soak import KINDS, LEASE_SECONDS, NotStarted, Soak, plan
from benchmarks.soak_report import by_kind, failures, text
from leap_dist.config.settings import Config

CONDITIONS = ("messages",)
MODES = get_args(get_type_hints(Config)["mode"])


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
