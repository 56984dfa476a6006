"""What is accepted and not yet in every checkpoint, and what is applied: a file for each entry, a line for each."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

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
from leap_dist.storage.replica import NO_REPLICA, NoReplica
from leap_dist.testing.failpoints import failpoint


class Journal:
    """Accepted contributions that a kept checkpoint may still lack, and the leases that are open: one file each."""

    def __init__(self, directory: Path, replica: NoReplica = NO_REPLICA) -> None:
        """Creates the directory. Raises OSError."""
        self._directory = directory
        self._replica = replica
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
            self._replica.entry(order, data)
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
            self._replica.discard(self._discarded)
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
