"""Random histories of the protocol with crashes at random writes, and take-overs at random requests to a store.

    python -m benchmarks.fuzz_protocol --seconds 60
    python -m benchmarks.fuzz_protocol --crashes 30000 --takeovers 3000
    python -m benchmarks.fuzz_protocol --history 4711          repeat one history, to see what happened

A history is a short run in a random mode, on the plain server class: workers lease, push, repeat old pushes, fail, fall
silent and vanish. In one half of the histories the server repeatedly crashes at some write to its directory, and in
every other crash the power fails too, so that what was not synced may be lost. In the other half the run is kept in an
object store, and other launches repeatedly take it over in the middle of a request of the previous launch, which then
continues. In the end the run is finished without faults and judged from its ledger:

    lost       contributions that were acknowledged as durable and are not in φ
    doubled    contributions, or tasks, that are in φ twice
    wrong φ    runs whose φ is not what the contributions in the ledger add up to, in float64
    hung       runs that do not end
    failed     runs that end with an error

The exit code is 1 if any of these is not 0.
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.crashing_disk import Crash, CrashingDisk
from benchmarks.harness import Report, parser, progress
from benchmarks.history import History, Player, server_of, settings_of
from benchmarks.taken_over import TakeOvers

FAULTS = ("lost", "doubled", "wrong φ", "hung", "failed")
CRASHES = 25
"""Largest number of crashes in one history."""


def main() -> int:
    """Run the requested number of histories, and print the totals."""
    command = parser(__doc__, repeats=1)
    command.add_argument("--seconds", type=float, help="run histories for this long")
    command.add_argument("--crashes", type=int, default=0, help="run histories until there were this many crashes")
    command.add_argument("--takeovers", type=int, default=0, help="run histories until there were this many take-overs")
    command.add_argument("--seed", type=int, default=0, help="number of the first history")
    command.add_argument("--history", type=int, help="run only this history")
    given = command.parse_args()
    logging.getLogger("leap_dist").setLevel(logging.CRITICAL)  # thousands of alerts are expected here
    if given.history is not None:
        total = run(given.history)
    else:
        seconds = given.seconds or (float("inf") if given.crashes or given.takeovers else 60.0)
        total = run_many(given.seed, seconds, given.crashes, given.takeovers)
    report = Report("Random histories of the protocol", {"first history": given.seed})
    for name in ("histories", "crashes", "power failures", "take-overs", "contributions acknowledged", *FAULTS):
        report.add(name, "", [float(total[name])])
    report.show(given.json)
    return int(any(total[name] for name in FAULTS))


def run_many(seed: int, seconds: float, crashes: int = 0, takeovers: int = 0) -> Counter[str]:
    """Run histories from number `seed` on, until time is up or both numbers are reached. Return the totals."""
    total: Counter[str] = Counter()
    started = told = time.monotonic()
    number = seed
    while time.monotonic() - started < seconds:
        if (crashes or takeovers) and total["crashes"] >= crashes and total["take-overs"] >= takeovers:
            break
        found = run(number)
        total += found
        if bad := [f"{found[name]} {name}" for name in FAULTS if found[name]]:
            progress(f"history {number}: {', '.join(bad)}")
        if time.monotonic() - told > 10:
            told = time.monotonic()
            progress(f"{total['histories']} histories, {total['crashes']} crashes, {total['take-overs']} take-overs")
        number += 1
    return total


def run(number: int) -> Counter[str]:
    """Run one history. Return what happened in it, and what was wrong at its end."""
    chance = random.Random(number)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        history = History(settings_of(chance))
        try:
            faults = crashes_of(history, chance, Path(folder)) if number % 2 else takeovers_of(history, chance, folder)
        except Exception:
            progress(f"history {number}: {traceback.format_exc()}")
            faults = Counter({"failed": 1})
    acknowledged = len(history.acknowledged)
    return faults + Counter({"histories": 1, "contributions acknowledged": acknowledged})


def crashes_of(history: History, chance: random.Random, folder: Path) -> Counter[str]:
    """Run a history on a disk, with a server that crashes."""
    disk, faults = CrashingDisk(chance), Counter[str]()
    session, player = 0, Player(history, chance, "0")
    left = chance.randint(1, CRASHES)
    server: Any = None
    with disk.installed():
        for _ in range(2000):
            if server is not None and server.finished:
                break
            try:
                if server is None:
                    # A server does about ten writes when it starts, and three for each contribution.
                    disk.crash_in(int(chance.expovariate(1 / 20)) if left else None, after=chance.random() < 0.5)
                    server = server_of(history.settings, folder, player.clock, str(session))
                player.act(server, calm=not left)
            except Crash:
                left -= 1
                faults["crashes"] += 1
                if server is not None:
                    server.close()
                server = None
                if chance.random() < 0.5:
                    faults["power failures"] += 1
                    disk.fail_power()
                if chance.random() < 0.25:  # the driver is gone too, and with it the workers
                    session += 1
                    player = Player(history, chance, str(session))
        disk.crash_in(None)
        return faults + judged(history, server)


def takeovers_of(history: History, chance: random.Random, folder: str) -> Counter[str]:
    """Run a history in an object store, with launches that take it over from each other."""
    launches = TakeOvers(history, chance, Path(folder))
    server = launches.run()
    return Counter({"take-overs": launches.count}) + judged(history, server)


def judged(history: History, server: Any) -> Counter[str]:
    """Compare a finished run with what its workers were promised and what they sent."""
    if server is None or not server.finished:
        return Counter({"hung": 1})
    lines, _ = server.ledger(0)
    newest: Counter[str] = Counter()
    for line in lines:
        newest[line["lease"]] = max(newest[line["lease"]], line["seq"])
    lost = sum(seq > newest[lease] for lease, seq in history.acknowledged)
    names = Counter((line["lease"], line["seq"], line["final"]) for line in lines)
    tasks = Counter(line["task"] for line in lines if line["final"])
    doubled = sum(names.values()) - len(names) + sum(tasks.values()) - len(tasks)
    expected = history.expected(lines)
    wrong = expected is not None and not np.allclose(server.snapshot()[1], expected, rtol=1e-4, atol=1e-4)
    server.close()
    return Counter({"lost": lost, "doubled": doubled, "wrong φ": int(wrong)})


if __name__ == "__main__":
    sys.exit(main())
