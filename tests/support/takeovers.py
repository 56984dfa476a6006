"""Random histories of launches that take a run at a URL over from each other, at any request of any of them."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

from faulty_storage import Bucket
from protocol import INITIAL, contribution, serve

from leap_dist.protocol.messages import Ack, Lease
from leap_dist.server.meta_server import MetaServer
from leap_dist.storage import locks
from leap_dist.storage.locks import RunDirectoryBusy
from leap_dist.storage.replica import Replica, pull

_DEEPEST = 3  # take-overs within a request of another one


class History:
    """One bucket, and launches that use it in an order that the seed decides. Ends with `check`."""

    def __init__(self, folder: Path, settings: Any, seed: int) -> None:
        self.folder, self.settings, self.rng = folder, settings, random.Random(seed)
        self.bucket = Bucket()
        self.bucket.fault = self._fault
        self.servers: list[tuple[MetaServer, Path, locks.Claim]] = []
        self.acknowledged: dict[tuple[str, int], int] = {}
        """Task of each contribution that was acknowledged as durable, by lease and seq."""
        self.delayed: list[tuple[str, bytes]] = []
        """Puts that failed and may still arrive."""
        self._busy: list[MetaServer] = []  # in the middle of a request
        self.launches = self._depth = self._pushes = 0
        self._put: tuple[str, bytes] = "", b""
        put = self.bucket.pipe_file

        def pipe_file(path: str, value: bytes, mode: str = "overwrite", **more: Any) -> Any:
            outer, self._put = self._put, (path, value if mode == "overwrite" else b"")
            try:
                return put(path, value, mode, **more)
            finally:
                self._put = outer

        self.bucket.pipe_file = pipe_file  # type: ignore[method-assign]

    def run(self, steps: int) -> None:
        """Let the launches do `steps` things."""
        self._launch()
        for _ in range(steps):
            self._step()

    def _step(self) -> None:
        what = self.rng.random()
        if what < 0.12:
            self._launch()
        elif what < 0.22:
            self._arrive()
        elif what < 0.28:
            self._restart()
        else:
            self._work()

    def _fault(self, number: int, when: str) -> None:
        """Now and then another launch does something in the middle of a request, or a put fails."""
        if self._depth >= _DEEPEST:
            return
        self._depth += 1
        try:
            if self.rng.random() < 0.06:
                for _ in range(self.rng.randint(1, 3)):
                    self._step()
        finally:
            self._depth -= 1
        if self.bucket.requests[number][0] == "put" and self.rng.random() < 0.05:
            if when == "before" and self._put[1]:
                self.delayed.append(self._put)
            raise ConnectionError("no answer")

    def _launch(self) -> None:
        folder = self.folder / str(self.launches)
        self.launches += 1
        folder.mkdir()
        with contextlib.suppress(RunDirectoryBusy, OSError):
            claim, before = locks.take_over(self.bucket.storage, watch=0.0)
            pull(self.bucket.storage, folder, claim, before)
            self._serve(folder, claim)

    def _serve(self, folder: Path, claim: locks.Claim) -> None:
        replica = Replica(self.bucket.storage, claim, folder)
        replica.catch_up = replica._catch_up  # type: ignore[method-assign]  # without waiting for storage
        session = f"{folder.name}.{self.rng.random()}"
        server = serve(folder, self.settings, session=session, replica=replica)
        self.servers.append((server, folder, claim))

    def _restart(self) -> None:
        """Let a server die and start again in its working copy, which only the newest launch may use."""
        if not (idle := [one for one in self.servers if one[0] not in self._busy]):
            return
        one = self.rng.choice(idle)
        self.servers.remove(one)
        server, folder, claim = one
        server.close()
        with contextlib.suppress(OSError, RunDirectoryBusy):
            self._serve(folder, claim)

    def _arrive(self) -> None:
        """Let a put that failed arrive now."""
        if self.delayed:
            path, value = self.delayed.pop(self.rng.randrange(len(self.delayed)))
            depth, self._depth = self._depth, _DEEPEST
            self.bucket.pipe_file(path, value)
            self._depth = depth

    def _work(self) -> None:
        if not (idle := [one for one in self.servers if one[0] not in self._busy]):
            return
        # Mostly the newest one: an owner that has lost the run does nothing more once it knows.
        server, *_ = idle[-1] if self.rng.random() < 0.7 else self.rng.choice(idle)
        self._busy.append(server)
        try:
            self._contribute(server)
        finally:
            self._busy.remove(server)

    def _contribute(self, server: MetaServer) -> None:
        name = f"w{self.rng.randrange(3)}"
        self._pushes += 1
        lease = server.lease(name, f"{name}-{self._pushes}")
        if isinstance(lease, Lease):
            sent = contribution(lease, INITIAL)
            ack = server.push(sent)
            if isinstance(ack, Ack) and ack.durable and ack.accepted:
                self.acknowledged[lease.id, sent.seq] = lease.task.index
        server.tick()

    def check(self) -> tuple[int, int]:
        """Return how many acknowledged contributions were lost, and how many contributions or tasks were doubled."""
        self._depth = _DEEPEST
        for path, value in self.delayed:
            self.bucket.pipe_file(path, value)
        for server, *_ in self.servers:
            server.close()
        folder = self.folder / "last"
        folder.mkdir()
        claim, before = locks.take_over(self.bucket.storage, watch=0.0)
        pull(self.bucket.storage, folder, claim, before)
        server = serve(folder, self.settings, session="last", replica=Replica(self.bucket.storage, claim, folder))
        read = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
        lines = [(line["lease"], line["seq"], line["task"]) for line in read]
        waiting = [(a.lease.id, a.contribution.seq, a.lease.task.index) for a in server._state.backlog.waiting]
        server.close()
        applied = [(lease, seq) for lease, seq, _ in (*lines, *waiting)]
        tasks = [task for *_, task in (*lines, *waiting)]
        lost = self.acknowledged.keys() - set(applied)
        doubled = len(applied) - len(set(applied)) + len(tasks) - len(set(tasks))
        shutil.rmtree(self.folder)
        return len(lost), doubled
