"""The ledger: one line of JSON per applied contribution."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from leap_dist.config import files
from leap_dist.protocol import schema
from leap_dist.storage.atomic import DECODE_ERRORS, CorruptFile, replace_by_copy
from leap_dist.storage.replica import NO_REPLICA, NoReplica
from leap_dist.testing.failpoints import failpoint

log = logging.getLogger(__name__)

PAGE_BYTES = 2**20
"""Size of a page of the ledger, so that no reader needs to hold all of it in memory."""
VERIFIED_AT_ONCE = 2**24
"""Largest number of bytes whose checksum is verified at once."""

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


LONGEST_LINE = 2**25
"""Length in bytes of the longest line that is read."""


class Ledger:
    """The file `ledger.jsonl`, to which lines are appended once the checkpoint that holds them is durable."""

    def __init__(self, path: Path, replica: NoReplica = NO_REPLICA) -> None:
        self._path = path
        self._replica = replica
        self._size = self._size_on_disk
        self._sum, self._summed = hashlib.sha256(), 0  # checksum of the first bytes, and their number
        self._verification: threading.Thread | None = None

    @property
    def size(self) -> int:
        """Size in bytes, without what a failed append may have left at the end."""
        return self._size

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the first `size` bytes. Raises OSError."""
        self._wait()
        self._sum_up(self._size)
        return self._sum.hexdigest()

    def verify(self, size: int, sha256: str, on_mismatch: Callable[[], None]) -> None:
        """Call `on_mismatch` if the first `size` bytes do not have that checksum, or cannot be read.

        A large ledger is verified by a thread, so that the server need not wait for it.
        """
        if self._size_on_disk < size:
            on_mismatch()
        elif size <= VERIFIED_AT_ONCE:
            self._verify(size, sha256, on_mismatch)
        else:
            self._verification = threading.Thread(
                target=self._verify, args=(size, sha256, on_mismatch), name="ledger", daemon=True
            )
            self._verification.start()

    @property
    def is_verified(self) -> bool:
        """Whether no verification is running: only then does `sha256` return without waiting."""
        return self._verification is None or not self._verification.is_alive()

    def _verify(self, size: int, sha256: str, on_mismatch: Callable[[], None]) -> None:
        try:
            self._sum_up(size)
            is_equal = self._sum.hexdigest() == sha256
        except OSError:
            is_equal = False
        if not is_equal:
            on_mismatch()

    def _wait(self) -> None:
        """Wait for the end of the verification."""
        if self._verification is not None:
            self._verification.join()
            self._verification = None

    def rewind(self, offset: int) -> None:
        """Regard everything from byte `offset` on as not written, so that the next line is written there."""
        self._size = min(offset, self._size_on_disk)

    def append(self, offset: int, lines: list[dict[str, Any]]) -> None:
        """Make `lines` the content from byte `offset` on. Idempotent. Raises OSError."""
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        failpoint("ledger.write")
        with self._open() as file:
            start = min(offset, self._size_on_disk)  # a ledger that was shortened is not padded
            file.truncate(start)
            file.write(text)
            file.flush()
            failpoint("ledger.written")
            os.fsync(file.fileno())
        failpoint("ledger.durable")
        self._replica.append_ledger(start, text)
        self._size = start + len(text)
        if self._verification is None:
            if self._summed > start:
                self._sum, self._summed = hashlib.sha256(), 0
            if self._summed == start:
                self._sum.update(text)
                self._summed = self._size

    def _open(self) -> IO[bytes]:
        """Open the file for appending. If a backup shares it by a hard link, as `cp -al` makes, the backup keeps it."""
        try:
            return files.open_to_append(self._path)
        except files.Unreadable as error:
            if error.errno != errno.EMLINK:
                raise
        replace_by_copy(self._path)
        return files.open_to_append(self._path)

    def read_page(self, offset: int, page_bytes: int = PAGE_BYTES) -> tuple[list[dict[str, Any]], int]:
        """Return the next page of lines from byte `offset` on, and the offset after them. Raises OSError.

        A page consists of whole meta-updates. It is not larger than `page_bytes` unless its only meta-update is. After
        the last page the offset stays the same. Reading starts from the beginning if the file has shrunk. Damaged lines
        are left out, and the log says how many. Raises CorruptFile if a line never ends, as in a sparse file.
        """
        try:
            opened = files.open_regular(self._path)
        except FileNotFoundError:
            return [], 0
        with opened as file:
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
        if not is_end:  # the last meta-update may extend beyond the page
            if page_bytes >= LONGEST_LINE and b"\n" not in text:
                raise CorruptFile(f"{self._path.name} is damaged: a line has more than {LONGEST_LINE:,} bytes")
            if not page or page[0][0]["version_after"] == page[-1][0]["version_after"]:
                return self.read_page(start, 2 * page_bytes)
            last = page[-1][0]["version_after"]
            size = next(before for line, before in page if line["version_after"] == last)
            page = [(line, before) for line, before in page if before < size]
        if damaged:
            lines = "1 damaged line was" if damaged == 1 else f"{damaged:,} damaged lines were"
            log.warning("%s: %s skipped", self._path.name, lines)
        return [line for line, _ in page], start + size

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield all lines that are in the file now, with one page in memory at a time. Raises as `read_page` does."""
        offset, end = 0, self._size
        while offset < end:
            page, after = self.read_page(offset)
            if after <= offset:  # the rest is the beginning of a line, or the file has shrunk
                return
            yield from page
            offset = after

    @property
    def _size_on_disk(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0

    def _sum_up(self, size: int) -> None:
        """Extend the checksum to the first `size` bytes, or to the end of a shorter file."""
        if self._summed > size:
            self._sum, self._summed = hashlib.sha256(), 0
        if self._summed == size:
            return
        with files.open_regular(self._path) as file:
            file.seek(self._summed)
            while self._summed < size and (block := file.read(min(size - self._summed, 2**20))):
                self._sum.update(block)
                self._summed += len(block)


def _parse(text: bytes) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(text)
    schema.check(line, LINE, "line")
    if not re.fullmatch("[a-z0-9_]{1,80}", line["game"]):  # it becomes the name of a folder
        raise ValueError("line.game is not the name of a game")
    return line
