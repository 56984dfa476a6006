"""Measure the cost of resuming a long run: time until the server leases a task, memory, and time to redraw the curves.

    python -m benchmarks.resume                                 100,000 contributions with 100 points each
    python -m benchmarks.resume --contributions 10000           a tenth of that

A run directory is made whose ledger has that many lines. Then the two processes of a resumed run are started, without
Ray: the server, and the driver's side, which fetches the ledger page by page and writes TensorBoard's event files. The
targets are: a lease within 5 s, no process above 400 MB, no call of the server above 1 s, and all points in the curves.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from leap_dist.config.loading import resolve
from leap_dist.config.settings import Config
from leap_dist.nn.flat_vector import Manifest
from leap_dist.protocol.messages import Contribution, CurvePoint, Lease, PathStatistics
from leap_dist.server.meta_server import MetaServer
from leap_dist.telemetry.event_file import read_events
from leap_dist.telemetry.tensorboard import TensorBoard

GAMES = ("breakout", "freeway", "pong", "seaquest")
PARAMETERS = 1000
TARGETS = {
    "seconds until a lease": 5.0,
    "slowest call in seconds": 1.0,
    "peak of the server in MB": 400.0,
    "peak of the driver in MB": 400.0,
}
"""Largest figures."""


def configuration() -> Config:
    """Return the run's configuration: mode buffered with small batches."""
    return resolve("smoke", {"games": GAMES, "mode": "buffered", "meta_updates": 10**6})


def serve(run_dir: Path) -> MetaServer:
    """Return the run's server."""
    manifest = Manifest(("weight",), ((PARAMETERS,),))
    return MetaServer(configuration(), run_dir, manifest=manifest, initial=np.zeros(PARAMETERS, np.float32))


def make_run(run_dir: Path, contributions: int, points: int) -> None:
    """Make a run whose ledger has made-up lines between its first meta-update and its last."""
    run_dir.mkdir()
    server = serve(run_dir)
    update(server)
    (line, *_), _ = server.ledger(0)
    ledger = server._state.ledger
    with (run_dir / "ledger.jsonl").open("a") as file:
        file.writelines(lines(line, contributions, points))
    ledger._size = (run_dir / "ledger.jsonl").stat().st_size
    update(server)
    server.close()


def lines(like: dict[str, Any], contributions: int, points: int) -> Iterator[str]:
    """Yield ledger lines of later meta-updates, four in each. All have the same curve."""
    means = {"loss": 0.123456789, "policy_loss": -0.0123456789, "value_loss": 1.23456789, "entropy": 1.09876543}
    curve = [{"steps": 320 * (n + 1), "episodes": 2, "score": 17.25 + n, "means": means} for n in range(points)]
    steps, version = 320 * points, like["version_after"]
    rest = {name: value for name, value in like.items() if name not in ("task", "game", "total_steps")}
    del rest["version_before"], rest["version_after"]
    end = json.dumps({**rest, "final": True, "steps": steps, "curve": curve})[1:]
    for number in range(contributions):
        after = version + 1 + number // 4
        changing = {
            "version_before": after - 1,
            "version_after": after,
            "task": number,
            "game": GAMES[number % len(GAMES)],
            "total_steps": like["total_steps"] + 4 * steps * (after - version),
        }
        yield f"{json.dumps(changing)[:-1]}, {end}\n"


def update(server: MetaServer) -> None:
    """Work on tasks until there is a meta-update."""
    before = server.status()["meta_updates"]
    while server.status()["meta_updates"] == before:
        lease = server.lease("w0", "i0")
        assert isinstance(lease, Lease), lease
        server.push(contribution(lease))
        server.tick()


def contribution(lease: Lease) -> Contribution:
    """Return the final contribution to a lease."""
    return Contribution(
        lease=lease.id,
        worker=lease.worker,
        incarnation=lease.incarnation,
        manifest=Manifest(("weight",), ((PARAMETERS,),)).digest,
        base_version=lease.version,
        seq=1,
        final=True,
        updates=1,
        steps=lease.task.steps,
        seconds=1.0,
        vector=np.full(PARAMETERS, 1e-3, np.float32),
        start=None,
        path=PathStatistics(1.0, 1.0, 1.0, 1.0, 0.0),
        curve=(CurvePoint(lease.task.steps, 1, 1.0, {"loss": 0.5}),),
        episodes=(),
    )


def run_server(run_dir: Path, connection: Connection) -> None:
    """Act as the server's process: resume, lease a task, answer calls for pages, and finally send the measurements."""
    started = time.perf_counter()
    server = serve(run_dir)
    lease = server.lease("w0", "i0")
    ready = time.perf_counter() - started
    assert isinstance(lease, Lease), lease
    slowest = 0.0
    started = time.perf_counter()
    server.push(contribution(lease))
    server.tick()
    slowest = time.perf_counter() - started
    connection.send(ready)
    while (offset := connection.recv()) is not None:
        started = time.perf_counter()
        page = server.ledger(offset)
        slowest = max(slowest, time.perf_counter() - started)
        connection.send((page, server.status()))
    connection.send((slowest, peak()))
    server.close()


def run_driver(run_dir: Path, server: Connection, results: Connection) -> None:
    """Act as the driver's process: fetch pages from the server and write the curves."""
    server.recv()
    started = time.perf_counter()
    board = TensorBoard(run_dir, agreement_interval=0)
    opened, offset, pages = time.perf_counter() - started, board.offset, 0
    while True:
        server.send(offset)
        (page, after), status = server.recv()
        if after == offset:
            break
        offset, pages = after, pages + 1
        board.record(page, {**status, **DRIVERS_PART}, (), offset)
    board.close()
    results.send((opened, time.perf_counter() - started, pages, peak()))


DRIVERS_PART = {
    "state": "running", "wall_seconds": 1.0, "steps_per_second": 0.0, "pushes_per_second": 0.0, "workers": [],
    "workers_alive": 1, "workers_wanted": 1, "restarts": 0, "server_restarts": 0,
}  # fmt: skip
"""Values that the driver adds to the server's status and that TensorBoard shows."""


def peak() -> float:
    """Return the largest resident memory of this process so far, in MB."""
    # Not ru_maxrss, which starts from the memory of the parent process.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1000


def resumed(run_dir: Path) -> dict[str, float]:
    """Resume the run in fresh processes, and return what they measured."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    mine, drivers = context.Pipe()
    server = context.Process(target=run_server, args=(run_dir, there))
    server.start()
    ready = here.recv()
    here.send(0)  # requests one page before the driver starts
    here.recv()
    relay, to_driver = context.Pipe()
    driver = context.Process(target=run_driver, args=(run_dir, to_driver, drivers))
    driver.start()
    relay.send(None)
    while driver.is_alive() or relay.poll():
        if relay.poll(0.1):
            try:
                here.send(relay.recv())
            except EOFError:
                break
            relay.send(here.recv())
    opened, seconds, pages, driver_peak = mine.recv()
    driver.join()
    here.send(None)
    slowest, server_peak = here.recv()
    server.join()
    return {
        "seconds until a lease": ready,
        "slowest call in seconds": slowest,
        "peak of the server in MB": server_peak,
        "peak of the driver in MB": driver_peak,
        "seconds until TensorBoard is open": opened,
        "seconds until the curves are complete": seconds,
        "pages": pages,
    }


def points_in(run_dir: Path) -> Counter[str]:
    """Return the number of points of each game's curve of returns, in all event files."""
    found: Counter[str] = Counter()
    for path in run_dir.glob("tensorboard/game/*/events.*"):
        for event in read_events(path):
            found[path.parent.name] += sum(value.tag == "task/return" for value in event.summary.value)
    return found


def main() -> None:
    """Print the figures as JSON, and fail if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contributions", type=int, default=100_000)
    parser.add_argument("--points", type=int, default=100)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        make_run(run_dir, given.contributions, given.points)
        size = (run_dir / "ledger.jsonl").stat().st_size
        print(json.dumps({"ledger in MB": size / 1e6}), flush=True)
        missed = []
        for name in ("first", "second"):  # the second finds the curves complete
            figures = resumed(run_dir)
            print(json.dumps({name: figures}), flush=True)
            missed += [f"{name}: {figure}" for figure, most in TARGETS.items() if figures[figure] > most]
        found = points_in(run_dir)
        print(json.dumps({"points": found}))
        missed += [game for game in GAMES if found[game] < given.contributions // len(GAMES) * given.points]
    sys.exit(f"missed: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
