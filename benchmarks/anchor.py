"""Measure what Ray adds to the server's calls, and compare fake workers on real Ray with their simulation.

A fake worker is a thread that leases a task, waits as long as training would take, renews its lease and pushes full
vectors through the worker's own client. All fake workers share this machine with the server, so only a few fit.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray

from benchmarks import clients
from benchmarks.fleet import SPEEDS, Point, configuration
from benchmarks.fleet import measure as measure_point
from benchmarks.harness import progress
from benchmarks.service import Disk, RayCost
from benchmarks.traffic import Load
from leap_dist.config.settings import Config
from leap_dist.driver.actor_messages import Grant
from leap_dist.driver.actors import ServerActor
from leap_dist.driver.clients import ServerClient
from leap_dist.protocol.messages import Ack, Contribution, Idle, Lease

CALLS = 1000  # number of calls that Ray's cost is averaged over
OBJECTS = 8  # number of different contributions to send
TASK = {"task_steps": 16_000, "worker__push_interval": 2_000, "worker__heartbeat_seconds": 0.5}
"""Settings of the fake workers' tasks: short tasks, so that a few workers make as many calls as a large fleet."""


class TimedServer(ServerActor):
    """Server actor that also records when it was inside its calls."""

    def __init__(self, *arguments: Any) -> None:
        self._inside: dict[str, list[tuple[float, float]]] = defaultdict(list)
        super().__init__(*arguments)

    def lease(self, worker: str, incarnation: str) -> Idle | Grant:
        """Record and forward `ServerActor.lease`."""
        return self._timed("lease", partial(super().lease, worker, incarnation))

    def renew(self, lease_id: str, incarnation: str, steps: int) -> Ack:
        """Record and forward `ServerActor.renew`."""
        return self._timed("renew", partial(super().renew, lease_id, incarnation, steps))

    def push(self, contribution: Contribution) -> Ack:
        """Record and forward `ServerActor.push`."""
        return self._timed("final" if contribution.final else "partial", partial(super().push, contribution))

    def advance(self, offset: int, ended: list[Any]) -> Any:
        """Record and forward `ServerActor.advance`."""
        return self._timed("poll", partial(super().advance, offset, ended))

    def taken(self) -> tuple[dict[str, list[tuple[float, float]]], float]:
        """Return (start, end) of every call since the last query, by kind, and this process's total CPU seconds."""
        found, self._inside = dict(self._inside), defaultdict(list)
        return found, time.process_time()

    def _timed(self, kind: str, call: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        try:
            return call()
        finally:
            self._inside[kind].append((started, time.perf_counter()))


_NOTHING = np.empty(0, np.float32)
TIMED: Any = ray.remote(num_cpus=0)(TimedServer)


def timed_server(config: Config, run_dir: Path) -> Any:
    """Return a started `TimedServer` whose run directory is created first."""
    run_dir.mkdir(parents=True)
    server = TIMED.remote(config, run_dir, "benchmark")
    assert ray.get(server.problem.remote()) is None
    return server


class Cost(NamedTuple):
    """Time in seconds that Ray adds to calls."""

    call: float
    """Seconds of the server's time per call without a vector, while calls queue up."""
    push: float
    """Seconds of the server's time per call with a whole vector."""
    call_trip: float
    """Round trip in seconds of a renewal when the server is idle."""
    push_trip: float
    """Round trip in seconds of a partial contribution when the server is idle, including the server's own work."""

    def ray_cost(self, megabytes: float) -> RayCost:
        """Return the cost model that the simulation uses."""
        return RayCost(self.call, max(0.0, self.push - self.call) / megabytes)


def cost(folder: Path, repeats: int) -> Cost:
    """Measure Ray's cost. The minimum over the repetitions is the least disturbed by other processes."""
    server = timed_server(clients.config(workers=64), folder / "cost")
    manifest, vector = clients.encoder()
    lease: Lease = ray.get(server.lease.remote("w", "i")).lease
    made = [ray.put(clients.contribution(lease, manifest.digest, vector, seq)) for seq in range(1, OBJECTS + 1)]
    renew = partial(server.renew.remote, lease.id, "i", 1)
    found = []
    for _ in range(repeats):
        call = _between(server, [renew] * CALLS)
        push = _between(server, [partial(server.push.remote, one) for one in made] * (CALLS // OBJECTS))
        trips = _trip(renew), _trip(lambda: server.push.remote(clients.contribution(lease, manifest.digest, vector, 1)))
        found.append((call, push, *trips))
    ray.kill(server)
    return Cost(*np.min(found, axis=0).tolist())


def _between(server: Any, calls: list[Callable[[], Any]]) -> float:
    """Return the mean seconds from the end of a call to the start of the next, with all calls sent at once."""
    ray.get(server.taken.remote())
    ray.get([call() for call in calls])
    taken, _ = ray.get(server.taken.remote())
    spans = sorted(span for spans in taken.values() for span in spans)
    return (spans[-1][1] - spans[0][0] - sum(end - start for start, end in spans)) / (len(spans) - 1)


def _trip(call: Callable[[], Any], count: int = 100) -> float:
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        ray.get(call())
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


class Fleet:
    """Actor that runs each of its fake workers in a thread."""

    def __init__(self, server: Any, config: Config, speeds: Mapping[str, float], first: int, count: int) -> None:
        manifest, self._vector = clients.encoder()
        self._digest = manifest.digest
        self._server, self._config, self._speeds = server, config, speeds
        self._ending = False
        self._trips: dict[str, list[float]] = defaultdict(list)
        self._threads = [threading.Thread(target=self._work, args=(f"w{first + k}",)) for k in range(count)]

    def start(self) -> None:
        """Start all workers, each at a random point within its first task."""
        for thread in self._threads:
            thread.start()

    def trips(self) -> tuple[dict[str, list[float]], float]:
        """Return the seconds of each call since the last query, by kind, and this process's total CPU seconds."""
        found, self._trips = dict(self._trips), defaultdict(list)
        return found, time.process_time()

    def end(self) -> None:
        """Stop all workers and wait for their threads."""
        self._ending = True
        for thread in self._threads:
            thread.join()

    def _work(self, name: str) -> None:
        client = ServerClient(self._server)
        begun = np.random.default_rng(int(name[1:])).random()
        while not self._ending:
            grant = self._timed("lease", lambda: client.call("lease", name, name))
            if isinstance(grant, Idle):
                time.sleep(max(0.05, grant.wait))
                continue
            self._task(client, grant.lease, begun)
            begun = 0.0

    def _task(self, client: ServerClient, lease: Lease, begun: float) -> None:
        """Push and renew as `worker/run_task.py` does."""
        worker, rollout = self._config.worker, self._config.agent.envs * self._config.agent.unroll
        last = self._config.rollouts_per_task
        seconds = rollout / self._speeds[lease.task.game]
        first = int(begun * last)
        renewed = quiet_until = time.monotonic()
        seq, pushed = 0, first * rollout
        for number in range(first + 1, last + 1):
            time.sleep(seconds)
            if self._ending:
                return
            now, steps = time.monotonic(), number * rollout
            due = steps // worker.push_interval > pushed // worker.push_interval
            longest = lease.seconds / 4 if now < quiet_until else worker.heartbeat_seconds
            ack: Ack | None = None
            if number == last or (due and now >= quiet_until):
                seq, pushed = seq + 1, steps
                vector = self._vector if number == last or self._config.prefixes_count else _NOTHING
                made = clients.contribution(lease, self._digest, vector, seq, final=number == last)
                ack = self._timed("final" if made.final else "partial", partial(client.push, made))
            elif now - renewed > longest:
                ack = self._timed("renew", partial(client.renew, lease.id, lease.incarnation, steps))
            if ack is not None:
                renewed = time.monotonic()
                quiet_until = max(quiet_until, renewed + ack.wait)
                if not ack.proceed:
                    return

    def _timed(self, kind: str, call: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        answer = call()
        self._trips[kind].append(time.perf_counter() - started)
        return answer


def fake_workers(config: Config, speeds: Mapping[str, float], folder: Path, window: float) -> dict[str, Any]:
    """Run `config.workers` fake workers and a polling driver; return what the server did in `window` seconds."""
    server = timed_server(config, folder)
    fleet = ray.remote(num_cpus=0, max_concurrency=4)(Fleet).remote(server, config, speeds, 0, config.workers)
    ray.get(fleet.start.remote())
    offset = _poll(server, 0, time.monotonic() + 1.2 * config.task_steps / float(np.mean(list(speeds.values()))))
    (_, cpu_before), _ = ray.get([server.taken.remote(), fleet.trips.remote()])
    started = time.monotonic()
    _poll(server, offset, started + window)
    (spans, cpu), (trips, _) = ray.get([server.taken.remote(), fleet.trips.remote()])
    passed = time.monotonic() - started
    ray.get(fleet.end.remote())
    for actor in (fleet, server):
        ray.kill(actor)
    return {
        "window": passed,
        "cpu": (cpu - cpu_before) / passed,
        "inside": sum(end - start for kind in spans.values() for start, end in kind) / passed,
        "calls/s": {kind: len(found) / passed for kind, found in spans.items()},
        "trips": {kind: {"p50": 1e3 * float(np.median(found)), "p99": 1e3 * float(np.percentile(found, 99))}
                  for kind, found in trips.items()},
    }  # fmt: skip


def simulated(config: Config, found: Cost, folder: Path, disk: Disk, window: float) -> dict[str, Any]:
    """Simulate the same fleet with the network of a single machine."""
    megabytes = clients.encoder()[1].nbytes / 1e6
    cost = found.ray_cost(megabytes)
    latency = max(0.0, found.call_trip - found.call) / 2
    copied = max(1e-4, found.push_trip - found.call_trip)  # extra seconds that a vector takes over a renewal
    load = Load(
        config.workers,
        SPEEDS,
        straggling=0.0,
        latency=latency,
        worker_bandwidth=1e6 * megabytes / copied,
        server_bandwidth=1e12,
        between_tasks=0.0,
    )
    point = Point("simulated", config, load, cost, window, full=True)
    return measure_point(point, folder, disk, {})


def measure(folder: Path, disk: Disk, repeats: int, counts: Sequence[int], window: float) -> list[dict[str, Any]]:
    """Run part `anchor`: measure Ray's cost, then run fleets of `counts` fake workers on Ray and in simulation."""
    with clients.local_ray():
        found = cost(folder, repeats)
        real = []
        for count in counts:
            config = configuration(count, meta__batch_size=16, server__lease_seconds=30.0, **TASK)
            real.append((config, fake_workers(config, SPEEDS, folder / f"ray-{count}", window)))
    rows: list[dict[str, Any]] = [{"Ray, in ms": {name: 1e3 * value for name, value in found._asdict().items()}}]
    for config, seen in real:
        made = simulated(config, found, folder, disk, window)
        rows.append(
            {
                "workers": config.workers,
                "pushes/s": [sum(seen["calls/s"].get(kind, 0.0) for kind in ("partial", "final")),
                             made["partials/s"] + made["finals/s"]],
                "renewals/s": [seen["calls/s"]["renew"], made["renewals/s"]],
                "server's processor": [seen["cpu"], made["cpu"]],
                "partial, ms": [seen["trips"]["partial"], made["round trips ms"]["partial"]],
                "final, ms": [seen["trips"]["final"], made["round trips ms"]["final"]],
                "renewal, ms": [seen["trips"]["renew"], made["round trips ms"]["renew"]],
            }
        )  # fmt: skip
        progress(json.dumps(rows[-1]))
    return rows


def _poll(server: Any, offset: int, until: float) -> int:
    """Poll the server as the driver does until the time `until`; return the new ledger offset."""
    while time.monotonic() < until:
        _, _, offset = ray.get(server.advance.remote(offset, []))
        time.sleep(min(0.5, max(0.0, until - time.monotonic())))
    return offset
