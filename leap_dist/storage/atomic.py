"""Durable, verified, atomic files. Nothing here ever reads a pickle.

A write goes to a temporary file, which is flushed, synced and renamed, and then the directory is synced: after a crash
at any moment there is either the old file or the new one. Every file that is read back carries a SHA-256, because
safetensors notices a truncated file but not a flipped bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from leap_dist.config import files
from leap_dist.protocol import schema
from leap_dist.testing.failpoints import failpoint

FORMAT = 3
"""Version of the file format. Newer files are refused, and so are older checkpoints."""


class CorruptFile(RuntimeError):
    """A file is damaged, incomplete or of another format. The message names the file and says what is wrong."""


class NewerFormat(CorruptFile):
    """A file is of a newer format. It cannot be read, but it is sound, so it is not set aside."""


class OlderFormat(CorruptFile):
    """A file is of an older format. It is sound, so it is not set aside: the version that wrote it can read it."""


LARGEST = 64 * 2**20
"""Size in bytes of the largest JSON file that is read."""
LARGEST_TENSORS = 2**33
"""Size in bytes of the largest safetensors file that is read."""
LARGEST_HEADER = 2**24
"""Size in bytes of the largest safetensors header that is parsed."""

DECODE_ERRORS = (SafetensorError, KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError)
"""Errors that decoding a damaged or foreign file may raise."""


def read_regular(path: Path, limit: int = LARGEST) -> bytes:
    """Return the content of a regular file of at most `limit` bytes. Raises OSError, or CorruptFile for anything else.

    A link could point anywhere, reading a pipe might never end, and a sparse file of terabytes fits on any disk.
    """
    try:
        return files.read_regular(path, limit)
    except files.Unreadable as error:
        raise CorruptFile(f"{path.name} cannot be read: {error.strerror}") from None


def read_packed(path: Path, name: str = "") -> bytes:
    """Return the content of a safetensors file whose size matches its header. Raises like `read_regular`.

    Errors call the file `name`, by default the last part of its path.

    Of a sparse file of terabytes, only the first bytes are therefore read.
    """
    try:
        with files.open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST_TENSORS or size != _size_by_header(file):
                raise CorruptFile(f"{name or path.name} is not a leap-dist file, or is damaged: its size is wrong")
            return file.read(size)
    except files.Unreadable as error:
        raise CorruptFile(f"{name or path.name} cannot be read: {error.strerror}") from None


def _size_by_header(file: IO[bytes]) -> int:
    """Return the size that a safetensors file has according to its header, or -1 if it has no sound header."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= LARGEST_HEADER:
        return -1
    try:
        entries = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        file.seek(0)
        return 8 + length + int(max(ends, default=0))
    except DECODE_ERRORS:
        return -1


def set_aside(path: Path) -> None:
    """Rename a damaged file or folder to *.damaged for inspection. Errors are ignored."""
    names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
    with contextlib.suppress(OSError):
        os.replace(path, next(name for name in names if not os.path.lexists(name)))


def replace_by_copy(path: Path) -> None:
    """Replace a regular file by a durable copy of it that has no other name. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with files.open_regular(path) as old, files.create_new(temporary) as new:
            shutil.copyfileobj(old, new)
            new.flush()
            os.fsync(new.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _of_file(error, temporary, path) from None
    sync_directory(path.parent)


def _of_file(error: OSError, temporary: Path, path: Path) -> OSError:
    """Remove the temporary file, and return the error with the name of the file that is meant.

    The reader knows that name, and equal errors should read alike.
    """
    temporary.unlink(missing_ok=True)
    return OSError(error.errno, error.strerror, str(path)) if error.filename == str(temporary) else error


def write_atomic(path: Path, data: bytes, point: str, *, durable: bool = True, listed: bool = True) -> None:
    """Replace the content of `path` by `data` in one step.

    Args:
        path: file to write; a symbolic link there is replaced, not followed.
        data: new content.
        point: prefix of the failpoints on the way.
        durable: whether to sync the content to disk.
        listed: whether to sync the directory too. False leaves that to one `sync_directory` for several files.

    Raises:
        OSError: the write failed, and the old content is still there.
    """
    failpoint(f"{point}.write")
    # The name cannot be guessed and must be new, so nobody can make this write go through a link.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with files.create_new(temporary) as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        failpoint(f"{point}.written")
        os.replace(temporary, path)
    except OSError as error:
        raise _of_file(error, temporary, path) from None
    failpoint(f"{point}.renamed")
    if not listed:
        return
    if durable:
        sync_directory(path.parent)
    failpoint(f"{point}.durable")


def sync_file(path: Path) -> None:
    """Make a file that another process wrote durable. Raises OSError, or Unreadable if it is not a file."""
    with files.open_regular(path) as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make renames and removals in a directory durable. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def pack(tensors: dict[str, np.ndarray], header: dict[str, Any]) -> bytes:
    """Return a safetensors file with `header`, and a checksum over both, in its metadata. Deterministic."""
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}  # 0-d arrays become 1-d
    text = json.dumps(header, sort_keys=True)
    # A single entry, because safetensors writes several in an order that differs between processes.
    entry = json.dumps({"format": FORMAT, "header": text, "sha256": _digest(tensors, text)}, sort_keys=True)
    return save(tensors, {"leap_dist": entry})


def is_packed(data: bytes) -> bool:
    """Return whether bytes are a file of `pack`, intact or damaged, and not a safetensors file of another program."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return not isinstance(header, dict) or "leap_dist" in header.get("__metadata__", {})
    except DECODE_ERRORS:
        return True


def unpack(data: bytes, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the tensors and the header that `pack` was given.

    Raises CorruptFile, which names the file, if the content is not sound, and NewerFormat if it is of a newer format.
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
    except DECODE_ERRORS as error:
        raise CorruptFile(f"{name} is not a leap-dist file, or is damaged: {one_line(error)}") from None
    return tensors, header


def one_line(error: BaseException) -> str:
    """Return an error as at most 200 printable characters on one line, because it may quote damaged content."""
    text = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return ascii(" ".join(text.split())[:200])[1:-1]


def _digest(tensors: dict[str, np.ndarray], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].dtype}{tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def remove(path: Path) -> None:
    """Remove a file, a link or a folder. Errors are ignored."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:  # rmtree would open a pipe and never return
            path.unlink(missing_ok=True)


def json_digest(data: dict[str, Any]) -> str:
    """Return the SHA-256 of JSON-compatible data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
