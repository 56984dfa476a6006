"""The journal: accepted contributions that a kept checkpoint may still lack, and open leases, one file each."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from leap_dist.config.files import Unreadable
from leap_dist.storage.atomic import (
    DECODE_ERRORS,
    CorruptFile,
    json_digest,
    one_line,
    pack,
    read_packed,
    read_regular,
    remove,
    set_aside,
    sync_directory,
    sync_file,
    unpack,
    write_atomic,
)
from leap_dist.storage.replica import NO_REPLICA, NoReplica
from leap_dist.testing.failpoints import failpoint

LARGEST_RECORD = 2**20
"""Size in bytes of the largest lease record that is read."""


class Journal:
    """Entries and lease records in one directory. An entry is named by its order, a record by its lease."""

    def __init__(self, directory: Path, replica: NoReplica = NO_REPLICA) -> None:
        """Create the directory. Raises OSError."""
        self._directory = directory
        self._replica = replica
        self._discarded: list[int] = []
        self._sync_deferred = False
        self._unclosed: list[Path] = []  # records of closed leases that could not be removed yet
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".*.tmp"):  # a crash cut this write short
            remove(leftover)
        # The process that wrote these may have been killed between renaming and syncing them.
        self._unsynced_files = [self._path(order) for order in self.orders()]
        self._unsynced = bool(self._unsynced_files)

    def write(self, order: int, arrays: dict[str, np.ndarray], header: dict[str, Any]) -> None:
        """Write an entry; durable on return, except inside `deferred_sync`.

        Raises OSError, in which case the entry does not exist.
        """
        data = pack(arrays, {**header, "order": order})
        try:
            write_atomic(self._path(order), data, "journal", listed=not self._sync_deferred)
            self._unsynced |= self._sync_deferred
            self._replica.put_entry(order, data)
        except Exception:  # it may be there already, as when the directory could not be synced
            remove(self._path(order))
            raise

    @contextlib.contextmanager
    def deferred_sync(self) -> Iterator[None]:
        """Make entries written inside the block durable only with the next `sync`, which costs one fsync for all."""
        self._sync_deferred = True
        try:
            yield
        finally:
            self._sync_deferred = False

    def sync(self) -> None:
        """Make all entries durable, including those of an earlier process. Raises OSError."""
        if self._unsynced:
            while self._unsynced_files:
                with contextlib.suppress(FileNotFoundError, Unreadable):  # discarded or set aside since, or no file
                    sync_file(self._unsynced_files[-1])
                self._unsynced_files.pop()
            sync_directory(self._directory)
            self._unsynced = False
            failpoint("journal.durable")

    def orders(self) -> list[int]:
        """Return the orders of all entries, ascending."""
        pattern = r"contribution-([0-9]{8}|[1-9][0-9]{8,17})\.safetensors"
        found = (re.fullmatch(pattern, path.name) for path in self._directory.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def read(self, order: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the arrays and the header of an entry. Raises OSError, or CorruptFile if it is damaged."""
        path = self._path(order)
        arrays, header = unpack(read_packed(path), f"journal/{path.name}")
        if header.pop("order", order) != order:  # a copy under another name would count twice
            raise CorruptFile(f"journal/{path.name} has the content of another entry")
        return arrays, header

    def set_aside(self, order: int) -> None:
        """Rename a damaged entry for inspection."""
        set_aside(self._path(order))

    def discard(self, order: int) -> None:
        """Remove an entry that no checkpoint needs; the replica follows with the next `flush_discarded`.

        Errors are ignored: an entry that stays does no harm.
        """
        self._discarded.append(order)
        with contextlib.suppress(OSError):
            failpoint("journal.discard")
            self._path(order).unlink(missing_ok=True)

    def flush_discarded(self) -> None:
        """Remove discarded entries from the replica, together, because each request takes time."""
        if self._discarded:
            self._replica.remove_entries(self._discarded)
            self._discarded = []

    def open_lease(self, lease_id: str, header: dict[str, Any]) -> None:
        """Record a granted lease, so that a restarted server still knows it.

        Raises OSError, in which case there is no record.
        """
        data = json.dumps({**header, "sha256": json_digest(header)}).encode()
        path = self._record(lease_id)
        try:
            write_atomic(path, data, "lease")
        except Exception:  # it may be there already, as when the directory could not be synced
            remove(path)
            raise

    def close_lease(self, lease_id: str) -> None:
        """Remove the record of a lease. If that fails, it is tried again when the next lease is closed."""
        self._unclosed.append(self._record(lease_id))
        with contextlib.suppress(OSError):
            while self._unclosed:
                failpoint("lease.close")
                self._unclosed[0].unlink(missing_ok=True)
                del self._unclosed[0]

    def leases(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Return the headers of all recorded leases, oldest first, and a warning for each damaged record.

        Damaged records are set aside, so their tasks are trained a second time.
        """
        headers, warnings = [], []
        for path in sorted(self._directory.glob("lease-*.json"), key=_age_and_name):
            try:
                header = json.loads(read_regular(path, LARGEST_RECORD))
                if header.pop("sha256") != json_digest(header):
                    raise CorruptFile("its checksum does not match")
                # The lease's id becomes part of paths.
                if not re.fullmatch("[0-9]{6,18}-[0-9a-f]{8}", header["id"]) or path.stem != f"lease-{header['id']}":
                    raise CorruptFile("it has the content of another lease")
                headers.append(header)
            except (CorruptFile, OSError, *DECODE_ERRORS) as error:
                warnings.append(f"journal/{ascii(path.name)[1:-1]} is damaged and set aside: {one_line(error)}")
                set_aside(path)
        return headers, warnings

    def _path(self, order: int) -> Path:
        return self._directory / f"contribution-{order:08d}.safetensors"

    def _record(self, lease_id: str) -> Path:
        return self._directory / f"lease-{lease_id}.json"


def _age_and_name(path: Path) -> tuple[int, str]:
    return path.lstat().st_mtime_ns, path.name
