"""Simulate a fleet of workers against a real server, with the message schedule of worker/run_task.py.

This is a discrete-event simulation. Training, network and Ray are simulated; the server is the project's own
`MetaServer`, and every call to it is really executed. It is a single first-come, first-served queue: the duration of a
call (service.py) delays the next one in simulated time. The server's clock is the simulation's.
"""

from __future__ import annotations

import heapq
import math
import pickle
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks.gathering import Gathering
from benchmarks.service import Service
from benchmarks.traffic import Call, Clock, Content, Load, Tally, Worker
from leap_dist.config.settings import Config
from leap_dist.driver.control_loop import POLL_SECONDS, pause_after
from leap_dist.protocol.messages import Ack, Contribution, Idle, Lease, Renewal
from leap_dist.server.meta_server import MetaServer

SETTLING_SECONDS = 25.0  # seconds between the warm-up and the measured window
RESTART_SECONDS = 10.0  # seconds from a worker's end to its successor's first call
MESSAGE_BYTES = 1000  # size of a call or answer without a vector


class Simulation:
    """One server, one driver and all workers. `run` simulates up to a point in time, and can be called again.

    The fleet warms up until SETTLING_SECONDS before time 0: answers take no time, leases are renewed rarely, and almost
    only final contributions are pushed. `granted` counts from the start.
    """

    def __init__(
        self,
        config: Config,
        server: MetaServer,
        clock: Clock,
        service: Service,
        load: Load,
        content: Content,
        seed: int = 0,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self.tally = Tally()
        self.granted = 0
        self._config, self._server, self._clock = config, server, clock
        self._service, self._load, self._content = service, load, content
        self._poll_seconds = poll_seconds
        self._random = np.random.default_rng(seed)
        self._rollout = config.agent.envs * config.agent.unroll  # agent steps per rollout
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self._queue: deque[Call] = deque()
        self._serving = False
        self._network_free = clock.now
        self._until = 0.0
        self._gone: list[str] = []
        self._hired = 0
        self._gatherings: dict[int, Gathering[Call]] = {}  # by node
        self._ledger_offset = 0
        self._fetched: dict[int, int] = {}  # newest fetched version by node
        priming = 1.5 * load.workers / config.server.pushes_per_second + config.server.lease_seconds / 4
        for number in range(load.workers):
            worker = self._hire(f"w{number}", number // load.workers_per_node, clock.now)
            worker.head_start = int(self._random.integers(config.rollouts_per_task))
            worker.primed_at = -SETTLING_SECONDS - priming * float(self._random.random())
            # Stagger the first calls, or the renewals would come in waves.
            spread = config.server.lease_seconds / 4 if _warming(clock.now) else 0.0
            self._at(clock.now + spread * float(self._random.random()), self._ask, worker)
        if poll_seconds < math.inf:
            self._at(clock.now, self._poll)

    def run(self, until: float) -> None:
        """Simulate all events before the time `until`."""
        self._until = until
        while self._events and self._events[0][0] < until:
            time, _, action, arguments = heapq.heappop(self._events)
            self._clock.now = time
            action(time, *arguments)
        self._clock.now = until

    @property
    def queued(self) -> int:
        """Number of calls waiting for the server."""
        return len(self._queue)

    # Workers -----------------------------------------------------------------------------------------------------

    def _hire(self, name: str, node: int, now: float) -> Worker:
        hours = self._load.hours_between_failures
        life = self._random.exponential(3600 * hours) if math.isfinite(hours) else math.inf
        slow = math.exp(self._load.straggling * self._random.standard_normal())
        self._hired += 1
        return Worker(name, node, slow, fails_at=max(0.0, now) + life, incarnation=f"i{self._hired}")

    def _ask(self, now: float, worker: Worker) -> None:
        """Request a lease for a worker without a task."""
        if worker.fails_at <= now:
            self._die(now, worker)
        else:
            make = partial(self._server.lease, worker.name, worker.incarnation)
            self._send(now, Call("lease", MESSAGE_BYTES, worker, make, None, now))

    def _leased(self, now: float, worker: Worker, answer: Lease | Idle) -> None:
        if isinstance(answer, Idle):
            if not answer.finished:
                self._at(now + max(worker.pause, answer.wait), self._ask, worker)
                worker.pause = min(2 * worker.pause, self._load.longest_pause)
            return
        self.granted += 1
        worker.lease, worker.pause = answer, 0.05
        worker.rollouts, worker.head_start = worker.head_start, 0
        worker.pushed = worker.rollouts * self._rollout
        worker.seq = worker.pushed // self._config.worker.push_interval
        worker.since = now if _warming(now) else now + self._fetch(worker, answer.version)
        worker.renewed = worker.quiet_until = worker.since
        self._content.lease(answer)
        self._train(worker)

    def _fetch(self, worker: Worker, version: int) -> float:
        """Return the seconds until φ has arrived and the first step begins. Each node fetches a version once."""
        size = 0
        if self._fetched.get(worker.node, -1) < version:
            self._fetched[worker.node] = version
            size = self._content.snapshot_bytes
            self.tally.bytes_out += size
        return self._load.between_tasks + self._load.latency + size / self._load.worker_bandwidth

    def _train(self, worker: Worker) -> None:
        """Schedule the worker's next message by the rules of worker/run_task.py, or its failure if that comes first."""
        lease = worker.lease
        assert lease is not None
        seconds = self._rollout * worker.slow / self._load.speeds[lease.task.game]  # per rollout

        def first_at(time: float) -> int:
            """Return the first future rollout that ends at `time` or later."""
            return worker.rollouts + max(1, math.ceil((time - worker.since) / seconds - 1e-9))

        kind, rollout = "final", self._config.rollouts_per_task
        if not _warming(worker.since) and (due := self._next_due(worker, first_at(worker.quiet_until))) < rollout:
            kind, rollout = "partial", due
        if (renewal := first_at(self._renewal(worker))) < rollout:
            kind, rollout = "renew", renewal
        time = worker.since + (rollout - worker.rollouts) * seconds
        if worker.fails_at <= time:
            self._at(max(worker.fails_at, worker.since), self._die, worker)
        else:
            self._at(time, self._report, worker, kind, rollout)

    def _next_due(self, worker: Worker, first: int) -> int:
        """Return the rollout after which the next partial contribution is due, at the earliest `first`."""
        interval = self._config.worker.push_interval
        if self._load.paced:
            return max(first, math.ceil((worker.pushed // interval + 1) * interval / self._rollout))
        ended = ((first - 1) * self._rollout // interval + 1) * interval
        return math.ceil(ended / self._rollout)

    def _renewal(self, worker: Worker) -> float:
        """Return when the lease must be renewed, unless something is pushed before."""
        longest = self._config.server.lease_seconds / 4
        if _warming(worker.since):
            return worker.renewed + longest
        heartbeat = worker.renewed + self._config.worker.heartbeat_seconds
        if not self._load.paced:
            return heartbeat
        silent = worker.renewed + longest
        return silent if silent < worker.quiet_until else max(heartbeat, worker.quiet_until)

    def _report(self, now: float, worker: Worker, kind: str, rollout: int) -> None:
        """Send the worker's next renewal or contribution."""
        worker.rollouts, worker.since = rollout, now
        lease = worker.lease
        assert lease is not None
        if kind == "renew" and worker.primed_at < now and _warming(now):
            kind, worker.primed_at = "partial", math.inf
        if kind == "renew":
            renewal = Renewal(lease.id, worker.incarnation, rollout * self._rollout)
            make = partial(self._server.renew, *renewal)
            self._tell(now, Call(kind, MESSAGE_BYTES, worker, make, renewal, now))
        else:
            worker.seq += 1
            worker.pushed = rollout * self._rollout
            self._push(now, worker, kind, self._content.contribution(lease, worker.seq, rollout, kind == "final"))

    def _push(self, now: float, worker: Worker, kind: str, made: Contribution) -> None:
        received = self._content.received(made)
        size = self._content.bytes(made)
        self._tell(now, Call(kind, size, worker, lambda: self._server.push(received()), made, now))

    def _answered(self, now: float, call: Call, ack: Ack) -> None:
        worker, kind, made = call.worker, call.kind, call.report
        assert worker is not None
        if worker.fails_at <= now:
            self._die(now, worker)
            return
        if (
            made is not None
            and ack.proceed
            and ack.wait
            and not ack.accepted
            and (kind == "final" or ack.reason != "busy")
        ):
            self._at(now + ack.wait, self._push, worker, kind, made)  # retry the same push, as driver/actors.py does
            return
        if kind == "partial" or self._load.paced:
            worker.quiet_until = max(worker.quiet_until, now + ack.wait)
        if kind == "final" or not ack.proceed:
            self.tally.steps_lost += 0 if ack.accepted else worker.rollouts * self._rollout
            worker.lease = None
            self._ask(now, worker)
            return
        worker.since = worker.renewed = now
        self._train(worker)

    def _die(self, now: float, worker: Worker) -> None:
        """End a worker and start its replacement; the server may be told."""
        self.tally.failures += 1
        self.tally.steps_lost += worker.rollouts * self._rollout if worker.lease else 0
        silent = self._random.random() < self._load.silent
        if not silent:
            self._gone.append(worker.incarnation)
        # If the node is gone, the driver starts the replacement under a new name.
        name = f"{worker.name}'" if silent else worker.name
        self._at(now + RESTART_SECONDS, self._ask, self._hire(name, worker.node, now + RESTART_SECONDS))

    # The driver --------------------------------------------------------------------------------------------------

    def _poll(self, now: float) -> None:
        gone, self._gone = self._gone, []
        self._send(now, Call("poll", MESSAGE_BYTES, None, partial(self._advance, gone), None, now))

    def _advance(self, gone: list[str]) -> list[dict[str, Any]]:
        """Advance the server as driver/actors.py does, including the cost of pickling the answer for Ray."""
        for incarnation in gone:
            self._server.release(incarnation, crashed=True)
        self._server.tick()
        lines, self._ledger_offset = self._server.ledger(self._ledger_offset)
        if not _warming(self._clock.now):
            pickle.dumps((self._server.status(), lines), protocol=5)
        return lines

    def _polled(self, now: float, lines: list[dict[str, Any]], sent: float) -> None:
        self.tally.lines += lines
        pause = pause_after(now - sent) if self._load.polls_paced else self._poll_seconds
        self._at(now + (self._config.server.lease_seconds / 4 if _warming(now) else pause), self._poll)

    # Network and server ------------------------------------------------------------------------------------------

    def _at(self, time: float, action: Callable[..., None], *arguments: Any) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, action, arguments))

    def _send(self, now: float, call: Call) -> None:
        """Send a call over the worker's own link and the server's shared link."""
        if _warming(now):
            self._deliver(now, call, call.make())
            return
        load, ready = self._load, now + self._load.latency
        self._network_free = max(self._network_free, ready) + call.size / load.server_bandwidth
        self.tally.network_seconds += call.size / load.server_bandwidth
        self._at(max(self._network_free, ready + call.size / load.worker_bandwidth), self._arrive, call)

    def _arrive(self, now: float, call: Call) -> None:
        self.tally.bytes_in += call.size
        self._queue.append(call._replace(arrived=now))
        if not self._serving:
            self._serve(now)

    def _serve(self, now: float) -> None:
        """Execute the first call in the queue."""
        call, tally = self._queue.popleft(), self.tally
        version = self._server.version
        kind = f"together {call.counting}" if call.kind == "together" else call.kind
        answer, seconds, cpu = self._service(kind, call.size, call.make)
        self._serving = True
        self._at(now + seconds, self._served, call, answer)
        inside = min(1.0, (self._until - now) / seconds) if seconds > 0 else 1.0  # share within the window
        tally.seconds[call.kind] += inside * seconds
        tally.cpu_seconds += inside * cpu
        tally.calls[call.kind] += 1
        tally.calls["update"] += self._server.version - version
        tally.delays[call.kind].append(now - call.arrived)
        for ack in answer if call.kind == "together" else [answer]:
            if isinstance(ack, Ack) and not ack.accepted:
                tally.refused[ack.reason] += 1

    def _served(self, now: float, call: Call, answer: Any) -> None:
        self._serving = False
        if self._queue:
            self._serve(now)
        back = now + self._load.latency
        self.tally.round_trips[call.kind].append(back - call.sent)
        self._deliver(back, call, answer)

    def _deliver(self, now: float, call: Call, answer: Any) -> None:
        if call.kind == "poll":
            self._polled(now, answer, call.sent)
        elif call.kind == "together":
            for waiting, ack in self._gatherings[call.node].answered(answer):
                self.tally.round_trips[waiting.kind].append(now - waiting.sent)
                self._answered(now, waiting, ack)
            self._see_to(call.node)
        elif call.worker is not None and call.kind == "lease":
            self._leased(now, call.worker, answer)
        else:
            self._answered(now, call, answer)

    # Batched delivery --------------------------------------------------------------------------------------------

    def _tell(self, now: float, call: Call) -> None:
        """Send a worker's report to the server, or to the aggregator of its node."""
        seconds, worker, report = self._config.server.gather_seconds, call.worker, call.report
        if not seconds or _warming(now):
            self._send(now, call)
            return
        assert worker is not None
        assert worker.lease is not None
        assert report is not None
        gathering = self._gatherings.setdefault(worker.node, Gathering(seconds))
        ack = gathering.take(now, worker.lease.id, report, call)
        self._see_to(worker.node)
        if ack is not None:
            self._answered(now, call, ack)

    def _see_to(self, node: int) -> None:
        if (due := self._gatherings[node].due) < math.inf:
            self._at(max(due, self._clock.now), self._hand_over, node)

    def _hand_over(self, now: float, node: int) -> None:
        gathering = self._gatherings[node]
        if gathering.due > now:  # the delivery was moved forward or is in progress
            return
        contributions, renewals = gathering.deliver(now)
        received = [self._content.received(made) for made in contributions]
        size = MESSAGE_BYTES + sum(map(self._content.bytes, contributions)) + 100 * len(renewals)
        self.tally.calls["gathered"] += len(contributions) + len(renewals)
        self.tally.calls["gathered finals"] += sum(made.final for made in contributions)
        self.tally.calls["gathered partials"] += sum(not made.final for made in contributions)

        def make() -> list[Ack]:
            return self._server.push_together([one() for one in received], renewals)

        counting = sum(made.final or self._config.mode == "stream" for made in contributions)
        self._send(now, Call("together", size, None, make, None, now, node=node, counting=counting))


def _warming(now: float) -> bool:
    return now < -SETTLING_SECONDS
