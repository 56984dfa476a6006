"""Event files of TensorBoard: records of protocol buffers, each with checksums.

TensorBoard's own writer works in a thread, which prints a traceback and leaves half a record behind on a full disk.
This one raises OSError in the calling thread and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SourceMetadata
from tensorboard.compat.proto.summary_pb2 import Summary

_POLYNOMIAL = 0x82F63B78  # reflected
_LONG = 4096
"""Length in bytes from which strings are handled one by one."""


def _make_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table.astype(np.uint32)


_TABLE = _make_table()
_ENTRIES: list[int] = _TABLE.tolist()


def masked_crc32c(strings: Sequence[bytes]) -> list[int]:
    """Return the checksum of each string, masked as in TensorFlow's record format."""
    checksums = np.array([_one(string) if len(string) > _LONG else 0 for string in strings], np.uint32)
    short = [index for index, string in enumerate(strings) if len(string) <= _LONG]
    if short:
        checksums[short] = _many([strings[index] for index in short])
    rotated = (checksums >> np.uint32(15)) | (checksums << np.uint32(17))
    masked: list[int] = (rotated + np.uint32(0xA282EAD8)).tolist()
    return masked


def _one(string: bytes) -> int:
    state, entries = 0xFFFFFFFF, _ENTRIES
    for byte in string:
        state = entries[(state ^ byte) & 0xFF] ^ (state >> 8)
    return state ^ 0xFFFFFFFF


def _many(strings: Sequence[bytes]) -> np.ndarray:
    """Compute all checksums together, one byte of each string at a time, longest strings first."""
    lengths = np.array([len(string) for string in strings])
    order = np.argsort(-lengths, kind="stable")
    longest = int(lengths[order[0]])
    data = np.frombuffer(b"".join([strings[row].ljust(longest, b"\0") for row in order]), np.uint8)
    columns = np.ascontiguousarray(data.reshape(len(strings), longest).T)
    state = np.full(len(strings), 0xFFFFFFFF, np.uint32)
    active = np.searchsorted(-lengths[order], -np.arange(longest), side="left")  # strings longer than each position
    for column, count in zip(columns, active.tolist(), strict=True):
        part = state[:count]
        state[:count] = _TABLE[(part ^ column[:count]) & 0xFF] ^ (part >> np.uint32(8))
    found = np.empty_like(state)
    found[order] = state ^ np.uint32(0xFFFFFFFF)
    return found


LARGEST_RECORD = 2**24
"""Largest credible size of a record in bytes; more is damage."""
_BLOCK = 256
"""Number of records that are read at once."""
_numbers = itertools.count()


class EventFile:
    """A new event file in a folder, which is created if needed. Records are kept in memory until `flush`.

    Raises OSError if it cannot be created.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names, also those that were made within one second.
        place = f"{socket.gethostname()}.{os.getpid()}.{next(_numbers):06d}"
        self.path = folder / f"events.out.tfevents.{int(time.time()):010d}.{place}"
        self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        self.size = 0
        """Bytes that were flushed."""
        self._records: list[bytes] = []
        source = SourceMetadata(writer="leap_dist")
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2", source_metadata=source))

    def add(self, summary: Summary, step: int) -> None:
        """Add values at a step."""
        self._append(Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        """Write all records. If that fails, drop them, remove what was written of them, and raise OSError."""
        data = memoryview(_framed(self._records))
        self._records.clear()
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(self._handle, data[written:], self.size + written)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, self.size)
            raise
        self.size += len(data)

    def close(self) -> None:
        """Close the file without flushing. Raises OSError."""
        os.close(self._handle)

    def _append(self, event: Event) -> None:
        self._records.append(event.SerializeToString())


def read_events(path: Path, start: int = 0) -> Iterator[Event]:
    """Read the events of a file from byte `start` on. A record that is torn or damaged ends the file.

    Raises OSError if the file cannot be read.
    """
    with path.open("rb") as file:
        file.seek(start)
        while records := list(itertools.islice(_read_records(file), _BLOCK)):
            headers, checksums, contents = zip(*records, strict=True)
            stated = [struct.unpack("<II", pair) for pair in checksums]
            found = zip(masked_crc32c(headers), masked_crc32c(contents), strict=True)
            for data, is_sound in zip(contents, map(tuple.__eq__, stated, found), strict=True):
                if not is_sound:
                    return
                try:
                    yield Event.FromString(data)
                except DecodeError:
                    return


def _read_records(file: IO[bytes]) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Read records up to the first that is torn: header, both checksums, and content of each."""
    while len(header := file.read(12)) == 12:
        (size,) = struct.unpack("<Q", header[:8])
        if size > LARGEST_RECORD:
            return
        record = file.read(size + 4)
        if len(record) < size + 4:
            return
        yield header[:8], header[8:] + record[size:], record[:size]


def _framed(contents: list[bytes]) -> bytes:
    """Return records with these contents, as they are in a file."""
    headers = [struct.pack("<Q", len(content)) for content in contents]
    parts = zip(headers, masked_crc32c(headers), contents, masked_crc32c(contents), strict=True)
    return b"".join(
        b"".join((header, struct.pack("<I", of_header), content, struct.pack("<I", of_content)))
        for header, of_header, content, of_content in parts
    )
