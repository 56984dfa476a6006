"""How far the event files have got in the ledger, stored beside them, so that a resumed run need not read all of both.

The position is only a shortcut. If it is missing, damaged, or does not match the files, everything is read again.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from leap_dist.protocol import schema
from leap_dist.storage.atomic import DECODE_ERRORS, read_regular, write_atomic

NAME = "position.json"
_TAIL = 4096
_SHAPE = {
    "offset": int,
    "tail": str,
    "steps": {...: int},
    "scores": {...: float},
    "last": {...: {...: int}},
    "sizes": {...: int},
}


@dataclass
class Position:
    """State of the event files after some ledger lines."""

    offset: int = 0
    """Offset in bytes after the last ledger line whose points are in the event files."""
    tail: str = ""
    """SHA-256 of the 4 KiB of the ledger before the offset."""
    steps: dict[str, int] = field(default_factory=dict)
    """Agent steps by game in the lines so far."""
    scores: dict[str, float] = field(default_factory=dict)
    """Human-normalized score of each game's newest task."""
    last: dict[str, dict[str, int]] = field(default_factory=dict)
    """Last step written, by TensorBoard run and tag."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Sizes of the event files in bytes, by path relative to the folder `tensorboard`."""


def load(root: Path) -> Position:
    """Return the position stored in the folder `tensorboard` of a run, or the beginning if it cannot be used."""
    with suppress(OSError, *DECODE_ERRORS):
        data = json.loads(read_regular(root / NAME))
        schema.check(data, _SHAPE, "position")
        position = Position(**{name: data[name] for name in _SHAPE})
        sizes = position.sizes.items()
        if position.tail == _tail(root, position.offset) and all(_size(root / name) >= size for name, size in sizes):
            return position
    return Position()


def save(root: Path, position: Position) -> None:
    """Store a position for the next launch of the run. Raises OSError."""
    position.tail = _tail(root, position.offset)
    write_atomic(root / NAME, json.dumps(asdict(position)).encode(), "position", durable=False)


def _tail(root: Path, offset: int) -> str:
    """Return the checksum of the ledger's bytes before `offset`. Raises OSError if there are not so many."""
    start = max(0, offset - _TAIL)
    with (root.parent / "ledger.jsonl").open("rb") as file:
        data = os.pread(file.fileno(), offset - start, start)
    if offset <= 0 or len(data) < offset - start:
        raise OSError("the ledger is shorter")
    return hashlib.sha256(data).hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() and not path.is_symlink() else -1
