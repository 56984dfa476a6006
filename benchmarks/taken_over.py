"""A run in an object store, which launches take over from each other in the middle of a request."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem

from benchmarks.history import History, Player, server_of
from leap_dist.server.meta_server import MetaServer
from leap_dist.storage import locks
from leap_dist.storage.locks import RunDirectoryBusy
from leap_dist.storage.objects import Storage
from leap_dist.storage.replica import Replica, pull

MAX_DEPTH = 3
"""Maximum depth to which launches interrupt each other's requests."""
MAX_TAKEOVERS = 8
"""Maximum number of take-overs in one history."""


class Bucket(MemoryFileSystem):  # type: ignore[misc]
    """An object store in memory that calls `interrupt` before and after every request."""

    protocol = "fuzzed"
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.store: dict[str, Any] = {}
        self.pseudo_dirs = [""]
        self.interrupt: Callable[[], None] = lambda: None

    def _request(self, call: Callable[[], Any]) -> Any:
        self.interrupt()
        answer = call()
        self.interrupt()
        return answer

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **more: Any) -> Any:
        """Put an object."""
        return self._request(lambda: super(Bucket, self).pipe_file(path, value, mode, **more))

    def cat_file(self, path: str, start: Any = None, end: Any = None, **more: Any) -> Any:
        """Get an object."""
        return self._request(lambda: super(Bucket, self).cat_file(path, start, end, **more))

    def find(self, path: str, *arguments: Any, **more: Any) -> Any:
        """List objects."""
        return self._request(lambda: super(Bucket, self).find(path, *arguments, **more))

    def rm(self, path: list[str], recursive: bool = False, maxdepth: Any = None) -> None:
        """Remove objects."""

        def remove() -> None:
            for one in path:
                self.store.pop(one, None)

        self._request(remove)


class TakeOvers:
    """Launches of one run. Each has its own workers, and continues after a take-over until it notices."""

    def __init__(self, history: History, chance: random.Random, folder: Path) -> None:
        self._history = history
        self._chance = chance
        self._folder = folder
        self._bucket = Bucket()
        self._depth = 0
        self._until = 0  # requests until the next take-over
        self.count = 0
        """Number of take-overs so far."""

    def run(self) -> MetaServer | None:
        """Let launches follow each other, then finish the run. Returns None if it does not finish."""
        self._bucket.interrupt = self._interrupt
        while self.count < MAX_TAKEOVERS:
            before = self.count
            self._until = self._chance.randint(0, 120)
            self._launch(turns=40)
            if self.count == before:  # the run has ended, or made no requests
                break
        self._bucket.interrupt = lambda: None
        started = self._start()
        assert started is not None, "no other launch wants the run"
        server, player = started
        for _ in range(2000):
            if server.finished:
                return server
            player.act(server, calm=True)
        return None

    def _interrupt(self) -> None:
        self._until -= 1
        if self._until == 0 and self._depth < MAX_DEPTH and self.count < MAX_TAKEOVERS:
            self.count += 1
            self._until = self._chance.randint(1, 120)
            self._launch(turns=self._chance.randint(1, 25))

    def _launch(self, turns: int) -> None:
        """Take the run over and work on it for a while, even after another launch has taken it over."""
        self._depth += 1
        try:
            started = self._start()
            if started is not None:
                server, player = started
                for _ in range(turns):
                    if server.finished:
                        break
                    player.act(server, calm=False)
                server.close()
        finally:
            self._depth -= 1

    def _start(self) -> tuple[MetaServer, Player] | None:
        """Return the server of a new launch, on a machine without any files, or None if another launch was faster."""
        number = sum(1 for _ in self._folder.iterdir())
        folder = self._folder / str(number)
        folder.mkdir()
        storage = Storage("fuzzed://bucket/run", self._bucket, "/bucket/run")
        player = Player(self._history, self._chance, str(number))
        try:
            claim, before = locks.take_over(storage, watch=0.0)
            pull(storage, folder, claim, before)
            replica = Replica(storage, claim, folder)
            return server_of(self._history.settings, folder, player.clock, str(number), replica), player
        except (RunDirectoryBusy, OSError):
            return None
