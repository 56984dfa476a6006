"""What is accepted and not yet in every checkpoint, and what is applied: a file for each entry, a line for each."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from leap_dist.protocol import schema
from leap_dist.storage.atomic import (
    DAMAGE,
    CorruptFile,
    json_digest,
    pack,
    read_regular,
    reason,
    remove,
    set_aside,
    sync_directory,
    unpack,
    write_atomic,
)
from leap_dist.storage.replica import NO_MIRROR, NoMirror
from leap_dist.testing.failpoints import failpoint

log = logging.getLogger(__name__)


class Journal:
    """Accepted contributions that a kept checkpoint may still lack, and the leases that are open: one file each."""

    def __init__(self, directory: Path, mirror: NoMirror = NO_MIRROR) -> None:
        """Creates the directory. Raises OSError."""
        self._directory = directory
        self._mirror = mirror
        self._discarded: list[int] = []
        self._together = self._unlisted = False
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".*.tmp"):  # of a write that a crash cut short
            remove(leftover)

    def write(self, order: int, arrays: dict[str, np.ndarray], header: dict[str, Any]) -> None:
        """Durable when this returns, but see `together`. Raises OSError, and then there is no such entry."""
        data = pack(arrays, {**header, "order": order})
        write_atomic(self._path(order), data, "journal", listed=not self._together)
        self._unlisted |= self._together
        try:
            self._mirror.entry(order, data)
        except OSError:
            remove(self._path(order))
            raise

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Entries written in here are durable after the next `settle`."""
        self._together = True
        try:
            yield
        finally:
            self._together = False

    def settle(self) -> None:
        """Makes every entry durable that is not. Raises OSError."""
        if self._unlisted:
            sync_directory(self._directory)
            self._unlisted = False
            failpoint("journal.durable")

    def orders(self) -> list[int]:
        """Of the entries there are, ascending."""
        pattern = r"contribution-([0-9]{8}|[1-9][0-9]{8,17})\.safetensors"
        found = (re.fullmatch(pattern, path.name) for path in self._directory.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def read(self, order: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays and header of an entry. Raises CorruptFile on a damaged one, OSError."""
        path = self._path(order)
        arrays, header = unpack(read_regular(path), f"journal/{path.name}")
        if header.pop("order", order) != order:  # a copy under another name would count twice
            raise CorruptFile(f"journal/{path.name} is another entry's content")
        return arrays, header

    def set_aside(self, order: int) -> None:
        """Renames a damaged entry, for a person to look at."""
        set_aside(self._path(order))

    def discard(self, order: int) -> None:
        """Removes an entry, in the mirror with the next `sweep`; where that fails it stays, harmlessly."""
        self._discarded.append(order)
        with contextlib.suppress(OSError):
            failpoint("journal.discard")
            self._path(order).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Removes what was discarded in the mirror too: together, because each request takes its time."""
        if self._discarded:
            self._mirror.discard(self._discarded)
            self._discarded = []

    def open_lease(self, lease_id: str, header: dict[str, Any]) -> None:
        """Records a granted lease, so that a restarted server still knows it. Raises OSError."""
        data = json.dumps({**header, "sha256": json_digest(header)}).encode()
        write_atomic(self._directory / f"lease-{lease_id}.json", data, "lease")

    def close_lease(self, lease_id: str) -> None:
        """Forgets a lease; where that fails, a restart takes the lease for open and lets it expire."""
        with contextlib.suppress(OSError):
            failpoint("lease.close")
            (self._directory / f"lease-{lease_id}.json").unlink(missing_ok=True)

    def leases(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Headers of the leases recorded, and a warning for each file that is damaged.

        Those are set aside, which costs their tasks a second run.
        """
        headers, warnings = [], []
        for path in sorted(self._directory.glob("lease-*.json")):
            try:
                header = json.loads(read_regular(path))
                if header.pop("sha256") != json_digest(header):
                    raise CorruptFile("its checksum does not match")
                # The name becomes part of paths.
                if not re.fullmatch("[0-9]{6,18}-[0-9a-f]{8}", header["id"]) or path.stem != f"lease-{header['id']}":
                    raise CorruptFile("it is another lease's content")
                headers.append(header)
            except (CorruptFile, OSError, *DAMAGE) as error:
                warnings.append(f"journal/{ascii(path.name)[1:-1]} is damaged and set aside: {reason(error)}")
                set_aside(path)
        return headers, warnings

    def _path(self, order: int) -> Path:
        return self._directory / f"contribution-{order:08d}.safetensors"


LINE: dict[Any, Any] = {
    **dict.fromkeys(("version_before", "version_after", "task", "seq", "staleness", "steps", "total_steps"), int),
    **dict.fromkeys(("weight", "norm", "clip", "update_norm", "agreement"), float),
    "game": str,
    "lease": str,
    "final": bool,
    "path": dict.fromkeys(("energy", "length", "loss_term_norm", "path_term_norm", "cosine"), float),
    "curve": [{"steps": int, "episodes": int, "score": (float, None), "means": {...: float}}],
}
"""What a line of the ledger has at least."""


class Ledger:
    """`ledger.jsonl`: one line per applied contribution, appended after the checkpoint that holds it is durable."""

    def __init__(self, path: Path, mirror: NoMirror = NO_MIRROR) -> None:
        self._path = path
        self._mirror = mirror
        self._size = self._on_disk
        self._sum: hashlib._Hash | None = None  # of the bytes so far

    @property
    def size(self) -> int:
        """Bytes so far. What an append that failed may have left behind them does not count."""
        return self._size

    @property
    def sha256(self) -> str:
        """Of the bytes so far. Raises OSError."""
        if self._sum is None:
            self._sum = self._sum_of(self._size)
        return self._sum.hexdigest()

    def begins_with(self, size: int, sha256: str) -> bool:
        """Whether the first `size` bytes have that checksum. Raises OSError."""
        return self._on_disk >= size and self._sum_of(size).hexdigest() == sha256

    def append(self, offset: int, lines: list[dict[str, Any]]) -> None:
        """Makes `lines` the content from byte `offset` on: doing it twice is the same as once. Raises OSError."""
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        failpoint("ledger.write")
        with self._path.open("ab") as file:
            start = min(offset, self._on_disk)  # a ledger that somebody shortened is not padded
            file.truncate(start)
            sum_ = self._sum.copy() if self._sum is not None and start == self._size else self._sum_of(start)
            file.write(text)
            file.flush()
            failpoint("ledger.written")
            os.fsync(file.fileno())
        failpoint("ledger.durable")
        self._mirror.segment(start, text)
        sum_.update(text)
        self._size, self._sum = start + len(text), sum_

    def read(self, offset: int) -> tuple[list[dict[str, Any]], int]:
        """Whole lines from byte `offset` on, and the offset after them. Starts over where the file has shrunk.

        A damaged line is left out, with a warning in the log. Raises OSError.
        """
        if not self._path.exists():
            return [], 0
        with self._path.open("rb") as file:
            start = file.seek(offset if offset <= self._size else 0)
            text = file.read(self._size - start)
        whole = text[: text.rfind(b"\n") + 1]
        lines, damaged = [], 0
        for line in whole.splitlines():
            try:
                lines.append(_line(line))
            except DAMAGE:
                damaged += 1
        if damaged:
            log.warning("%s: %d damaged lines are left out of what is shown", self._path.name, damaged)
        return lines, start + len(whole)

    @property
    def _on_disk(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0

    def _sum_of(self, size: int) -> hashlib._Hash:
        digest = hashlib.sha256()
        if size:
            with self._path.open("rb") as file:
                while size and (block := file.read(min(size, 2**20))):
                    digest.update(block)
                    size -= len(block)
        return digest


def _line(text: bytes) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(text)
    schema.check(line, LINE, "line")
    if not re.fullmatch("[a-z0-9_]{1,80}", line["game"]):  # it becomes the name of a folder
        raise ValueError("line.game is not a game's name")
    return line
