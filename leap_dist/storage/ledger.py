"""The ledger: one line of JSON per applied contribution."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from leap_dist.protocol import schema
from leap_dist.storage.atomic import DECODE_ERRORS
from leap_dist.storage.replica import NO_REPLICA, NoReplica
from leap_dist.testing.failpoints import failpoint

log = logging.getLogger(__name__)

PAGE_BYTES = 2**20
"""Size of a page of the ledger, so that no reader needs to hold all of it in memory."""

LINE: dict[Any, Any] = {
    **dict.fromkeys(("version_before", "version_after", "task", "seq", "staleness", "steps", "total_steps"), int),
    **dict.fromkeys(("weight", "norm", "clip", "update_norm", "agreement"), float),
    "game": str,
    "lease": str,
    "final": bool,
    "path": dict.fromkeys(("energy", "length", "loss_term_norm", "path_term_norm", "cosine"), float),
    "curve": [{"steps": int, "episodes": int, "score": (float, None), "means": {...: float}}],
}
"""Schema of the fields that every line has."""


class Ledger:
    """The file `ledger.jsonl`, to which lines are appended once the checkpoint that holds them is durable."""

    def __init__(self, path: Path, replica: NoReplica = NO_REPLICA) -> None:
        self._path = path
        self._replica = replica
        self._size = self._size_on_disk
        self._sum: hashlib._Hash | None = None  # over the first self._size bytes

    @property
    def size(self) -> int:
        """Size in bytes, without what a failed append may have left at the end."""
        return self._size

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the first `size` bytes. Raises OSError."""
        if self._sum is None:
            self._sum = self._sum_of(self._size)
        return self._sum.hexdigest()

    def begins_with(self, size: int, sha256: str) -> bool:
        """Return whether the first `size` bytes have that checksum. Raises OSError."""
        return self._size_on_disk >= size and self._sum_of(size).hexdigest() == sha256

    def append(self, offset: int, lines: list[dict[str, Any]]) -> None:
        """Make `lines` the content from byte `offset` on. Idempotent. Raises OSError."""
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        failpoint("ledger.write")
        with self._path.open("ab") as file:
            start = min(offset, self._size_on_disk)  # a ledger that somebody shortened is not padded
            file.truncate(start)
            sum_ = self._sum.copy() if self._sum is not None and start == self._size else self._sum_of(start)
            file.write(text)
            file.flush()
            failpoint("ledger.written")
            os.fsync(file.fileno())
        failpoint("ledger.durable")
        self._replica.append_ledger(start, text)
        sum_.update(text)
        self._size, self._sum = start + len(text), sum_

    def read(self, offset: int, page_bytes: int = PAGE_BYTES) -> tuple[list[dict[str, Any]], int]:
        """Return the next page of lines from byte `offset` on, and the offset after them. Raises OSError.

        A page consists of whole meta-updates. It is not larger than `page_bytes` unless its only meta-update is. After
        the last page the offset stays the same. Reading starts from the beginning if the file has shrunk. Damaged lines
        are left out, and the log says how many.
        """
        if not self._path.exists():
            return [], 0
        with self._path.open("rb") as file:
            start = file.seek(offset if offset <= self._size else 0)
            text = file.read(min(self._size - start, page_bytes))
            is_end = start + len(text) == self._size
        page, damaged = [], 0  # lines, and the size of the page before each
        size = 0
        for line in text[: text.rfind(b"\n") + 1].splitlines(keepends=True):
            try:
                page.append((_parse(line), size))
            except DECODE_ERRORS:
                damaged += 1
            size += len(line)
        if not is_end:  # the last meta-update may go on beyond the page
            if not page or page[0][0]["version_after"] == page[-1][0]["version_after"]:
                return self.read(start, 2 * page_bytes)
            last = page[-1][0]["version_after"]
            size = next(before for line, before in page if line["version_after"] == last)
            page = [(line, before) for line, before in page if before < size]
        if damaged:
            log.warning("%s: %d damaged lines are left out of what is shown", self._path.name, damaged)
        return [line for line, _ in page], start + size

    @property
    def _size_on_disk(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0

    def _sum_of(self, size: int) -> hashlib._Hash:
        digest = hashlib.sha256()
        if size:
            with self._path.open("rb") as file:
                while size and (block := file.read(min(size, 2**20))):
                    digest.update(block)
                    size -= len(block)
        return digest


def _parse(text: bytes) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(text)
    schema.check(line, LINE, "line")
    if not re.fullmatch("[a-z0-9_]{1,80}", line["game"]):  # it becomes the name of a folder
        raise ValueError("line.game is not the name of a game")
    return line
