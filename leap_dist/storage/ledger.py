"""The ledger: one line of JSON for each applied contribution."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from leap_dist.protocol import schema
from leap_dist.storage.atomic import DAMAGE
from leap_dist.storage.replica import NO_REPLICA, NoReplica
from leap_dist.testing.failpoints import failpoint

log = logging.getLogger(__name__)

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

    def __init__(self, path: Path, replica: NoReplica = NO_REPLICA) -> None:
        self._path = path
        self._replica = replica
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
        self._replica.segment(start, text)
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
