"""A disk on which a process is killed at a chosen write, and on which unsynced data may be lost."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple


class Crash(BaseException):
    """Represents SIGKILL or a power failure: nothing catches it."""


class _Change(NamedTuple):
    """A change of a directory that has not been synced."""

    directory: Path
    undo: Callable[[], None]


_Content = bytes | dict[str, bytes] | None
"""Content of a file or of a flat folder; None for neither."""


class CrashingDisk:
    """Counts the calls that change the disk, and raises Crash before or after one of them.

    Args:
        chance: decides what a power failure loses.
    """

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._changes: list[_Change] = []  # oldest first
        self._synced_sizes: dict[Path, int] = {}
        self._left: int | None = None  # calls until the crash
        self._after = False
        self._fsync, self._replace, self._unlink, self._rmtree = os.fsync, os.replace, Path.unlink, shutil.rmtree
        self._mkdir = Path.mkdir

    def crash_in(self, calls: int | None, *, after: bool = False) -> None:
        """Crash after this many further calls: 0 means at the next one, None not at all."""
        self._left, self._after = calls, after

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put the disk in place of the real one."""
        replaced: list[tuple[Any, str, Any, Callable[..., Any]]] = [
            (os, "fsync", self._fsync, self._on_fsync),
            (os, "replace", self._replace, self._on_replace),
            (Path, "unlink", self._unlink, self._on_unlink),
            (Path, "mkdir", self._mkdir, lambda *arguments, **more: None),
            (shutil, "rmtree", self._rmtree, self._on_rmtree),
        ]
        try:
            for owner, name, original, record in replaced:
                setattr(owner, name, self._wrapped(original, record))
            yield
        finally:
            for owner, name, original, _ in replaced:
                setattr(owner, name, original)

    def fail_power(self) -> None:
        """Lose changes of directories that were not synced, the newest ones of each, and the unsynced end of files."""
        for directory in sorted({change.directory for change in self._changes}):
            own = [change for change in self._changes if change.directory == directory]
            for change in reversed(own[self._chance.randint(0, len(own)) :]):
                change.undo()
        for path, size in self._synced_sizes.items():
            if path.name == "ledger.jsonl" and path.exists() and path.stat().st_size > size:
                os.truncate(path, self._chance.randint(size, path.stat().st_size))
        self._changes = []

    def _wrapped(self, original: Callable[..., Any], record: Callable[..., None]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            hit = self._left == 0
            if self._left is not None:
                self._left -= 1
            if hit and not self._after:
                raise Crash
            record(*arguments, **more)
            answer = original(*arguments, **more)
            if hit:
                raise Crash
            return answer

        return call

    def _on_fsync(self, handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.is_dir():
            self._changes = [change for change in self._changes if change.directory != path]
        else:
            self._synced_sizes[path] = os.fstat(handle).st_size

    def _on_replace(self, source: Any, target: Any) -> None:
        source, target = Path(source), Path(target)
        before = _content(target)
        moves_folder = source.is_dir()

        def undo() -> None:
            if moves_folder:
                self._replace(target, source)
            self._put_back(target, before)

        self._changes.append(_Change(target.parent, undo))

    def _on_unlink(self, path: Path, missing_ok: bool = False) -> None:
        if (content := _content(path)) is not None:
            self._changes.append(_Change(path.parent, lambda: self._put_back(path, content)))

    def _on_rmtree(self, path: Any, *arguments: Any, **more: Any) -> None:
        self._on_unlink(Path(path))

    def _put_back(self, path: Path, content: _Content) -> None:
        if path.is_dir():
            self._rmtree(path)
        elif path.exists():
            self._unlink(path)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            self._mkdir(path)
            for name, data in content.items():
                (path / name).write_bytes(data)


def _content(path: Path) -> _Content:
    if path.is_dir():
        return {child.name: child.read_bytes() for child in path.iterdir()}
    return path.read_bytes() if path.exists() else None
