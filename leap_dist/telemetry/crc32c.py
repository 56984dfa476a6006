"""CRC-32C (Castagnoli) of many short byte strings at once, as event files need it.

TensorBoard's own implementation handles one byte at a time in Python, which takes most of the time of writing curves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
