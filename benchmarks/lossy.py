"""Check that every contribution counts exactly once although requests and replies get lost.

    python -m benchmarks.lossy                          10,000 contributions, a quarter of the messages lost each way
    python -m benchmarks.lossy --contributions 500 --request-loss 10 --reply-loss 40 --clients 8 --seed 1

The benchmark runs the real server actor in mode stream, where every push is made durable, and clients that call it with
the workers' own code. They lease tasks and push four partial contributions and a final one for each. Ray itself drops
the messages in the clients' processes: a request before the server sees it, a reply after the server has acted.
Afterwards, both sides are counted and the run directory is read again. Each acknowledged contribution must be in the
ledger exactly once, and φ must equal the sum of the vectors in float64. The exit code is 1 if a check fails or if no
message was lost.

Clients are threads, several to a process, each with one outstanding call. Vectors have the size of the encoder's
convolutions.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray

from benchmarks import clients
from benchmarks.harness import Report, progress
from leap_dist.config.settings import Config
from leap_dist.driver.clients import ServerClient
from leap_dist.envs import atari_vector
from leap_dist.nn.actor_critic import initialization
from leap_dist.protocol.messages import Ack, Idle, Lease
from leap_dist.server.meta_server import MetaServer
from leap_dist.storage.locks import lock_holder

PUSHES = 5  # pushes per lease, the last of which is final
THREADS = 8  # clients per process
SCALE = 1e-3  # standard deviation of a push's change to each parameter
# maximum error of φ: thousands of float32 additions stay below it; one missing or repeated push exceeds it
TOLERANCE = 1e-2 * SCALE

Name = tuple[str, int]
"""Identity of a contribution: lease and seq."""


class Pushed(NamedTuple):
    """One contribution from the client's point of view."""

    name: Name
    ack: Ack
    sent: int
    """Number of requests that the push took."""
    seconds: float


class Outcome(NamedTuple):
    """Counts of the clients and the server, and the final contents of the run directory."""

    pushed: list[Pushed]
    executed: int
    """Number of pushes that reached the server."""
    duplicates: int
    refused: int
    ledger: list[Name]
    deviation: float
    """Largest difference between φ and the sum of all acknowledged vectors."""
    seconds: float

    @property
    def acknowledged(self) -> set[Name]:
        """Return the contributions that clients were told are durable."""
        return {one.name for one in self.pushed if one.ack.durable}

    @property
    def lost(self) -> int:
        """Number of contributions that were acknowledged but are missing from the ledger."""
        return len(self.acknowledged - set(self.ledger))

    @property
    def doubled(self) -> int:
        """Number of ledger lines that repeat another line."""
        return len(self.ledger) - len(set(self.ledger))

    @property
    def unknown(self) -> int:
        """Number of contributions in the ledger that were never acknowledged."""
        return len(set(self.ledger) - self.acknowledged)

    @property
    def sent(self) -> int:
        """Number of push requests sent."""
        return sum(one.sent for one in self.pushed)

    @property
    def requests_lost(self) -> int:
        """Number of requests that never reached the server."""
        return self.sent - self.executed

    @property
    def replies_lost(self) -> int:
        """Number of answers that never reached the client."""
        return self.executed - len(self.pushed)

    def figures(self) -> list[tuple[str, str, float]]:
        """Return (name, unit, value) of all figures to report."""
        retries = [one.sent - 1 for one in self.pushed]
        milliseconds = [1e3 * one.seconds for one in self.pushed]
        return [
            ("contributions issued", "", len(self.pushed)),
            ("requests sent", "", self.sent),
            ("requests lost (ActorUnavailableError)", "", self.requests_lost),
            ("executed by the server", "", self.executed),
            ("replies lost (ActorUnavailableError)", "", self.replies_lost),
            ("duplicates that the server recognized", "", self.duplicates),
            ("refused", "", self.refused),
            ("acknowledged as durable", "", len(self.acknowledged)),
            ("applied", "", len(self.ledger)),
            ("lost", "", self.lost),
            ("applied twice", "", self.doubled),
            ("largest deviation of φ", "", self.deviation),
            *((f"retries of a push: p{p}", "", float(np.percentile(retries, p))) for p in (50, 99)),
            *((f"a push, retries included: p{p}", "ms", float(np.percentile(milliseconds, p))) for p in (50, 99)),
            ("contributions", "per s", len(self.pushed) / self.seconds),
            ("requests executed", "per s", self.executed / self.seconds),
        ]

    def problems(self) -> list[str]:
        """Return the reasons why the run does not prove exactly-once delivery."""
        exact = {
            "acknowledged contributions were lost": self.lost,
            "contributions were applied twice": self.doubled,
            "contributions were applied that no client was told of": self.unknown,
            "contributions were refused": self.refused,
            "contributions were not acknowledged as durable": len(self.pushed) - len(self.acknowledged),
            "repeated requests were not recognized": self.replies_lost - self.duplicates,
        }
        found = [f"{count} {what}" for what, count in exact.items() if count]
        if not self.deviation <= TOLERANCE:
            found.append(f"φ is off by {self.deviation:.3g}")
        if not (self.requests_lost > 0 and self.replies_lost > 0):
            found.append(
                f"the messages were not lossy: {self.requests_lost} requests, {self.replies_lost} replies lost"
            )
        return found


def config(workers: int) -> Config:
    """Return plain SGD with β/|B| = 1, without weighting or clipping, so that φ is a sum."""
    plain = {
        "contribution_clip": 0.0,
        "staleness": "constant",
        "optimizer": "sgd",
        "learning_rate": 1.0,
        "batch_size": 1,
    }
    return clients.config(
        mode="stream", workers=workers, meta__shared="convolutions", **{f"meta__{k}": v for k, v in plain.items()}
    )


def path(lease: str, seed: int, size: int) -> np.ndarray:
    """Return the cumulative vectors of a lease's pushes, one per row."""
    chance = np.random.default_rng([seed, *lease.encode()])
    return np.cumsum(chance.normal(scale=SCALE, size=(PUSHES, size)), axis=0).astype(np.float32)


class Counting:
    """Wrapper of a server handle that counts the calls made through it."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self.sent = 0

    def __getattr__(self, method: str) -> Counting._Method:
        return Counting._Method(self, getattr(self._server, method))

    class _Method(NamedTuple):
        owner: Counting
        method: Any

        def remote(self, *arguments: Any) -> Any:
            self.owner.sent += 1
            return self.method.remote(*arguments)


class Clients:
    """Group of clients in one process whose messages get lost."""

    def work(self, server: Any, names: Sequence[str], leases: int, seed: int) -> list[Pushed]:
        """Let each client deliver `leases` tasks, and return everything that they pushed."""
        settings = config(len(names))
        manifest, _ = initialization(atari_vector.channels(settings.atari.frames), settings.seed, settings.scope)

        def one(name: str) -> list[Pushed]:
            counting = Counting(server)
            client = ServerClient(counting)
            pushed = []
            for _ in range(leases):
                answer = client.call("lease", name, "i")
                assert not isinstance(answer, Idle), answer
                lease: Lease = answer[0]
                for seq, vector in enumerate(path(lease.id, seed, manifest.size), 1):
                    contribution = clients.contribution(lease, manifest.digest, vector, seq, final=seq == PUSHES)
                    before, started = counting.sent, time.perf_counter()
                    ack = client.push(contribution)
                    seconds = time.perf_counter() - started
                    pushed.append(Pushed((lease.id, seq), ack, counting.sent - before, seconds))
            return pushed

        with ThreadPoolExecutor(len(names)) as threads:
            return [one for own in threads.map(one, names) for one in own]


def measure(run_dir: Path, *, count: int, names: Sequence[str], loss: tuple[int, int], seed: int) -> Outcome:
    """Push at least `count` contributions from `names`, losing the given percentages of requests and replies."""
    # Only clients lose messages, so that the counting calls always arrive. -1 means no limit on the number of failures.
    rule = {"num_failures": -1, "req_failure_prob": loss[0], "resp_failure_prob": loss[1], "in_flight_failure_prob": 0}
    environment = {
        "RAY_testing_rpc_failure": json.dumps({"CoreWorkerService.grpc_client.PushTask": rule}),
        # shortens the second that Ray waits before it reports "unavailable"
        "RAY_timeout_ms_task_wait_for_death_info": "100",
    }
    lossy = ray.remote(num_cpus=0, runtime_env={"env_vars": environment})(Clients)
    leases = -(-count // (PUSHES * len(names)))
    settings = config(len(names))
    server = clients.server_of(settings, run_dir)
    actors = [(lossy.remote(), names[k : k + THREADS]) for k in range(0, len(names), THREADS)]
    ray.get([actor.__ray_ready__.remote() for actor, _ in actors])
    progress(f"{len(names)} clients in {len(actors)} processes, {leases} leases each")
    started = time.perf_counter()
    work = [actor.work.remote(server, own, leases, seed) for actor, own in actors]
    pushed: list[Pushed] = []
    while work:
        done, work = ray.wait(work, timeout=10)
        for own in ray.get(done):
            pushed += own
        status, _, _ = ray.get(server.advance.remote(0, []))
        progress(f"{time.perf_counter() - started:.0f} s: {status['contributions_applied']:,} applied")
    seconds = time.perf_counter() - started
    refused = sum(status["refused"].values())
    counted = status["contributions_applied"] + status["contributions_waiting"] + status["duplicates"] + refused
    for actor in [*(actor for actor, _ in actors), server]:
        ray.kill(actor)
    acknowledged = {one.name for one in pushed if one.ack.durable}
    ledger, deviation = read_back(settings, run_dir, acknowledged, seed)
    return Outcome(pushed, counted, status["duplicates"], refused, ledger, deviation, seconds)


def read_back(settings: Config, run_dir: Path, acknowledged: Iterable[Name], seed: int) -> tuple[list[Name], float]:
    """Start a server from the run directory; return its ledger and the deviation of φ from what was acknowledged."""
    manifest, initial = initialization(atari_vector.channels(settings.atari.frames), settings.seed, settings.scope)
    while lock_holder(run_dir) is not None:  # a killed process takes a moment to exit
        time.sleep(0.05)
    server = MetaServer(settings, run_dir, manifest=manifest, initial=initial)
    expected = initial.astype(np.float64)
    seqs: dict[str, list[int]] = {}
    for lease, seq in acknowledged:
        seqs.setdefault(lease, []).append(seq)
    for lease, own in seqs.items():
        vectors = path(lease, seed, manifest.size).astype(np.float64)
        added = np.diff(vectors, axis=0, prepend=0.0)
        expected -= settings.meta.learning_rate / settings.meta.batch_size * added[np.array(own) - 1].sum(axis=0)
    deviation = float(np.abs(server.snapshot()[1] - expected).max())
    server.close()
    lines = [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]
    return [(line["lease"], line["seq"]) for line in lines], deviation


def main() -> int:
    """Run the benchmark, print the report and return the exit code."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--contributions", type=int, default=10_000, help="minimum number of contributions (default 10,000)"
    )
    arguments.add_argument("--request-loss", type=int, default=25, metavar="PERCENT", help="lost requests (default 25)")
    arguments.add_argument("--reply-loss", type=int, default=25, metavar="PERCENT", help="lost replies (default 25)")
    arguments.add_argument("--clients", type=int, default=32, help="number of clients (default 32)")
    arguments.add_argument("--seed", type=int, default=0, help="random seed of the vectors (default 0)")
    arguments.add_argument("--dir", type=Path, default=Path(), help="parent of the run directory (default: here)")
    arguments.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    chosen = arguments.parse_args()
    names = [f"w{k}" for k in range(chosen.clients)]
    loss = (chosen.request_loss, chosen.reply_loss)
    with tempfile.TemporaryDirectory(prefix=".benchmark-", dir=chosen.dir) as folder, clients.local_ray():
        run_dir = Path(folder).resolve() / "run"
        found = measure(run_dir, count=chosen.contributions, names=names, loss=loss, seed=chosen.seed)
    problems = found.problems()
    report = Report(
        "Lost messages: what was sent, what arrived, what counted",
        {
            "requests lost": f"{loss[0]} %",
            "replies lost": f"{loss[1]} %",
            "clients": len(names),
            "mode": "stream",
            "pushes per lease": PUSHES,
        },
    )
    for name, unit, value in found.figures():
        report.add(name, unit, [value])
    report.notes += [f"NOT SHOWN: {problem}" for problem in problems] or ["No contribution was lost or counted twice."]
    report.show(chosen.json)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
