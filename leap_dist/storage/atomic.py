"""Durable, verified, atomic files. Nothing here ever reads a pickle.

Every write goes to a temporary name, is flushed and fsynced, renamed, and the directory is fsynced: after any crash
there is the old file or the new one. Every file that is read back carries a SHA-256, because safetensors notices a
truncated file but not a flipped bit.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from leap_dist.protocol import schema
from leap_dist.testing.failpoints import failpoint

FORMAT = 3
"""Version of the files' layout. Newer files are refused, and older checkpoints too."""


class CorruptFile(RuntimeError):
    """A file is damaged, incomplete, or of a newer format. The message names it and says what is wrong."""


class NewerFormat(CorruptFile):
    """A file is of a newer format: sound, but not for this version to read, or to set aside."""


class OlderFormat(CorruptFile):
    """A file is of an older format: sound, but for the version to read that wrote it, and not to be set aside."""


DAMAGE = (SafetensorError, KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading our own formats may run into where the content is not ours."""


def read_regular(path: Path) -> bytes:
    """A file's content. Raises OSError, or CorruptFile where it is no regular file.

    A link could lead anywhere, and a pipe never ends.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CorruptFile(f"{path.name} is a symbolic link, which is not followed") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise CorruptFile(f"{path.name} is not a regular file")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def set_aside(path: Path) -> None:
    """Renames what is damaged to *.damaged, for a person to look at; where that fails it stays."""
    names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
    with contextlib.suppress(OSError):
        os.replace(path, next(name for name in names if not os.path.lexists(name)))


def write_atomic(path: Path, data: bytes, point: str, *, durable: bool = True, listed: bool = True) -> None:
    """Replaces `path` by `data` in one step. Raises OSError, and then the old content is still there.

    `point` is the first half of the names of the failpoints on the way. With `listed` False the content is durable, but
    not the name: that takes `sync_directory`, once for several files.
    """
    failpoint(f"{point}.write")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        failpoint(f"{point}.written")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    failpoint(f"{point}.renamed")
    if not listed:
        return
    if durable:
        sync_directory(path.parent)
    failpoint(f"{point}.durable")


def sync_directory(path: Path) -> None:
    """Makes renames and removals in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def pack(tensors: dict[str, np.ndarray], header: dict[str, Any]) -> bytes:
    """A safetensors file with `header` and a checksum over both in its metadata. The same input, the same bytes."""
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}  # 0-d ones get one dimension
    text = json.dumps(header, sort_keys=True)
    # One entry only: safetensors writes several in an order that changes from one process to the next.
    entry = json.dumps({"format": FORMAT, "header": text, "sha256": _digest(tensors, text)}, sort_keys=True)
    return save(tensors, {"leap_dist": entry})


def unpack(data: bytes, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and header of `pack`'s bytes. Raises CorruptFile, which names the file, on anything unexpected.

    Of a newer format it is NewerFormat.
    """
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        entry = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["leap_dist"])
        if int(entry["format"]) > FORMAT:
            raise NewerFormat(f"{name}: format {entry['format']} is newer than {FORMAT}; update leap-dist")
        if entry["sha256"] != _digest(tensors, entry["header"]):
            raise CorruptFile(f"{name} is damaged: its checksum does not match")
        header = json.loads(entry["header"])
        schema.check(header, {}, "header")
    except DAMAGE as error:
        raise CorruptFile(f"{name} is not a file of ours, or damaged: {reason(error)}") from None
    return tensors, header


def reason(error: BaseException) -> str:
    """An error on one line, and not longer than one: it may quote what it did not understand."""
    text = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return ascii(" ".join(text.split())[:200])[1:-1]


def _digest(tensors: dict[str, np.ndarray], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].dtype}{tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def remove(path: Path) -> None:
    """Removes a file, a link or a folder, as far as that works."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:  # not rmtree, which opens what it is given, and never returns from a pipe
            path.unlink(missing_ok=True)


def json_digest(data: dict[str, Any]) -> str:
    """SHA-256 of plain data, whatever the order of its names."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
