"""An object store in memory that fails where it is told to, and launches of a server against it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from crashes import Killed
from fsspec.implementations.memory import MemoryFileSystem
from protocol import serve

from leap_dist.server.meta_server import MetaServer
from leap_dist.storage import locks
from leap_dist.storage.objects import Storage
from leap_dist.storage.replica import Replica, pull

URL = "faulty://bucket/run"


class Bucket(MemoryFileSystem):
    """Every request is noted; `fault` is asked before and after each, and may raise."""

    protocol = "faulty"
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.store: dict[str, Any] = {}
        self.pseudo_dirs = [""]
        self.requests: list[tuple[str, str]] = []
        self.fault: Callable[[int, str], None] = lambda number, when: None

    def _request(self, kind: str, path: str, call: Callable[[], Any]) -> Any:
        number = len(self.requests)
        self.requests.append((kind, path.removeprefix("/bucket/run/")))
        self.fault(number, "before")
        try:
            return call()
        finally:
            self.fault(number, "after")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **more: Any) -> Any:
        return self._request("put", path, lambda: super(Bucket, self).pipe_file(path, value, mode, **more))

    def cat_file(self, path: str, start: Any = None, end: Any = None, **more: Any) -> Any:
        return self._request("get", path, lambda: super(Bucket, self).cat_file(path, start, end, **more))

    def find(self, path: str, *arguments: Any, **more: Any) -> Any:
        return self._request("list", path, lambda: super(Bucket, self).find(path, *arguments, **more))

    def rm(self, path: list[str], recursive: bool = False, maxdepth: Any = None) -> None:
        def remove() -> None:
            for one in path:
                self.store.pop(one, None)

        self._request("remove", path[0], remove)

    def names(self) -> set[str]:
        return {name.removeprefix("/bucket/run/") for name in self.store}

    @property
    def storage(self) -> Storage:
        return Storage(URL, self, "/bucket/run")


def kill(*numbers: int, when: str) -> Callable[[int, str], None]:
    """The machine dies at these requests: before they arrive, or after they are done."""

    def fault(number: int, now: str) -> None:
        if number in numbers and now == when:
            raise Killed

    return fault


def fail(first: int, last: int, when: str) -> Callable[[int, str], None]:
    """No answer for a while; `after`: what was asked for is done nevertheless."""

    def fault(number: int, now: str) -> None:
        if first <= number <= last and now == when:
            raise ConnectionError(f"request {number} has no answer")

    return fault


def launch(bucket: Bucket, folder: Path, settings: Any, session: str = "s") -> MetaServer:
    """A server of a new launch, on a machine that has nothing."""
    folder.mkdir()
    claim, before = locks.take_over(bucket.storage, watch=0.0)
    pull(bucket.storage, folder, claim, before)
    return serve(folder, settings, session=session, replica=Replica(bucket.storage, claim, folder))
