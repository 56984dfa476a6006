"""Durable, verified, atomic files. Nothing here ever reads a pickle.

Every write goes to a temporary name, is flushed and fsynced, renamed, and the directory is fsynced: after any crash
there is the old file or the new one. Every file that is read back carries a SHA-256, because safetensors notices a
truncated file but not a flipped bit.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

FORMAT = 2
"""Version of the files' layout. Newer files are refused, and older checkpoints too."""


class CorruptFile(RuntimeError):
    """A file is damaged, incomplete, or of a newer format. The message names it and says what is wrong."""


class RunDirectoryBusy(RuntimeError):
    """Another live server holds the run directory."""


def write_atomic(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replaces `path` by `data` in one step. Raises OSError, and then the old content is still there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes renames and removals in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def pack(tensors: dict[str, np.ndarray], header: dict[str, Any]) -> bytes:
    """A safetensors file with `header` and a checksum over both in its metadata. The same input, the same bytes."""
    text = json.dumps(header, sort_keys=True)
    # One entry only: safetensors writes several in an order that changes from one process to the next.
    entry = json.dumps({"format": FORMAT, "header": text, "sha256": _digest(tensors, text)}, sort_keys=True)
    return save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, {"leap_dist": entry})


def unpack(data: bytes, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and header of `pack`'s bytes. Raises CorruptFile, which names the file, on anything unexpected."""
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        entry = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["leap_dist"])
        if int(entry["format"]) > FORMAT:
            raise CorruptFile(
                f"{name} has format {entry['format']}, this version reads up to {FORMAT}; update leap-dist"
            )
        if entry["sha256"] != _digest(tensors, entry["header"]):
            raise CorruptFile(f"{name} is damaged: its checksum does not match")
        header = json.loads(entry["header"])
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CorruptFile(f"{name} is not a file of ours, or damaged: {error}") from None
    return tensors, header


def _digest(tensors: dict[str, np.ndarray], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}{tensor.dtype}{tensor.shape}".encode())
        digest.update(tensor.data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """All that a server needs to go on from a meta-update, besides the journal."""

    version: int
    init: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]
    heads: dict[str, np.ndarray]
    state: dict[str, Any]


class CheckpointStore:
    """`checkpoints/NNNNNN/` with {init,optimizer,heads}.safetensors and, written last, state.json."""

    def __init__(self, directory: Path, keep: int) -> None:
        """Creates the directory. Raises OSError."""
        self._directory = directory
        self._keep = keep
        directory.mkdir(parents=True, exist_ok=True)

    def versions(self) -> list[int]:
        """Versions on disk, ascending, whether valid or not."""
        return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdigit())

    def save(self, checkpoint: Checkpoint) -> None:
        """Durable when this returns. Raises OSError, and then the checkpoints are as they were."""
        final = self._directory / f"{checkpoint.version:06d}"
        temporary = self._directory / f".{final.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            files = {
                "init.safetensors": pack(checkpoint.init, {}),
                "optimizer.safetensors": pack(checkpoint.optimizer, {}),
                "heads.safetensors": pack(checkpoint.heads, {}),
            }
            for name, data in files.items():
                write_atomic(temporary / name, data)
            state = {
                "format": FORMAT,
                "version": checkpoint.version,
                "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
                "state": checkpoint.state,
            }
            state["sha256"] = _json_digest(state)
            write_atomic(temporary / "state.json", json.dumps(state).encode())
            if final.exists():  # a checkpoint that did not load; see load_newest
                shutil.rmtree(final)
            os.replace(temporary, final)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_directory(self._directory)
        for version in self.versions()[: -self._keep]:
            shutil.rmtree(self._directory / f"{version:06d}", ignore_errors=True)

    def load_newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole, or None, with one warning for each newer one that is not.

        A damaged checkpoint is set aside as NNNNNN.damaged, for a person to look at.
        """
        warnings: list[str] = []
        for version in reversed(self.versions()):
            try:
                return self._load(version), warnings
            except (CorruptFile, OSError) as error:
                warnings.append(f"checkpoint {version} cannot be used: {error}")
                folder = self._directory / f"{version:06d}"
                with contextlib.suppress(OSError):
                    shutil.rmtree(folder.with_suffix(".damaged"), ignore_errors=True)
                    os.replace(folder, folder.with_suffix(".damaged"))
        return None, warnings

    def _load(self, version: int) -> Checkpoint:
        folder = self._directory / f"{version:06d}"
        try:
            state = json.loads((folder / "state.json").read_bytes())
            checksum = state.pop("sha256")
            if int(state["format"]) > FORMAT:
                raise CorruptFile(f"format {state['format']} is newer than {FORMAT}; update leap-dist")
            if int(state["format"]) < FORMAT:
                raise CorruptFile(f"format {state['format']} is older than {FORMAT}; end the run with what began it")
            if checksum != _json_digest(state) or state["version"] != version:
                raise CorruptFile("state.json is damaged: its checksum does not match")
            contents = {}
            for name in ("init.safetensors", "optimizer.safetensors", "heads.safetensors"):
                data = (folder / name).read_bytes()
                if hashlib.sha256(data).hexdigest() != state["files"][name]:
                    raise CorruptFile(f"{name} is damaged: its checksum does not match")
                contents[name] = unpack(data, name)[0]
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CorruptFile(f"state.json is damaged: {error}") from None
        init, optimizer, heads = contents.values()
        return Checkpoint(version, init, optimizer, heads, state["state"])


class Journal:
    """Accepted contributions that a kept checkpoint may still lack, and the leases that are open: one file each."""

    def __init__(self, directory: Path) -> None:
        """Creates the directory. Raises OSError."""
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".*.tmp"):  # of a write that a crash cut short
            leftover.unlink(missing_ok=True)

    def write(self, order: int, arrays: dict[str, np.ndarray], header: dict[str, Any]) -> None:
        """Durable when this returns. Raises OSError, and then there is no such entry."""
        write_atomic(self._path(order), pack(arrays, header))

    def orders(self) -> list[int]:
        """Of the entries there are, ascending."""
        names = (path.stem for path in self._directory.glob("contribution-*.safetensors"))
        return sorted(int(name.removeprefix("contribution-")) for name in names)

    def read(self, order: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays and header of an entry. Raises CorruptFile on a damaged one."""
        path = self._path(order)
        return unpack(path.read_bytes(), f"journal/{path.name}")

    def discard(self, order: int) -> None:
        """Removes an entry; where that fails it stays, harmlessly."""
        with contextlib.suppress(OSError):
            self._path(order).unlink(missing_ok=True)

    def open_lease(self, lease_id: str, header: dict[str, Any]) -> None:
        """Records a granted lease, so that a restarted server still knows it. Raises OSError."""
        write_atomic(self._directory / f"lease-{lease_id}.json", json.dumps(header).encode())

    def close_lease(self, lease_id: str) -> None:
        """Forgets a lease; where that fails, a restart takes the lease for open and lets it expire."""
        with contextlib.suppress(OSError):
            (self._directory / f"lease-{lease_id}.json").unlink(missing_ok=True)

    def leases(self) -> list[dict[str, Any]]:
        """Headers of the leases recorded; unreadable ones are skipped, which costs their tasks a second run."""
        headers = []
        for path in sorted(self._directory.glob("lease-*.json")):
            with contextlib.suppress(OSError, ValueError):
                headers.append(json.loads(path.read_bytes()))
        return headers

    def _path(self, order: int) -> Path:
        return self._directory / f"contribution-{order:08d}.safetensors"


class Ledger:
    """`ledger.jsonl`: one line per applied contribution, appended after the checkpoint that holds it is durable."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._path.stat().st_size if self._path.exists() else 0

    def append(self, offset: int, lines: list[dict[str, Any]]) -> None:
        """Makes `lines` the content from byte `offset` on: doing it twice is the same as once. Raises OSError."""
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with self._path.open("ab") as file:
            file.truncate(min(offset, self.size))  # a ledger that somebody shortened is not padded
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def read(self, offset: int) -> tuple[list[dict[str, Any]], int]:
        """Whole lines from byte `offset` on, and the offset after them. Starts over where the file has shrunk."""
        if not self._path.exists():
            return [], 0
        with self._path.open("rb") as file:
            file.seek(offset if offset <= self.size else 0)
            start = file.tell()
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        return [json.loads(line) for line in whole.splitlines()], start + len(whole)


class RunLock:
    """An advisory lock on the run directory, which the operating system drops when its holder dies."""

    def __init__(self, run_dir: Path) -> None:
        """Takes the lock. Raises RunDirectoryBusy, naming the holder, where another process keeps it; OSError."""
        self._file: TextIO = (run_dir / ".lock").open("a+")
        if not _flock(self._file, fcntl.LOCK_EX, attempts=20):
            self._file.close()
            raise RunDirectoryBusy(f"{run_dir} is in use by a live server ({_holder(run_dir)})")
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Gives the lock back. Idempotent."""
        self._file.close()


def lock_holder(run_dir: Path) -> str | None:
    """Who holds the lock on a run directory, None where nobody does. Raises OSError where that cannot be told."""
    path = run_dir / ".lock"
    if not path.exists():
        return None
    with path.open() as file:
        return None if _flock(file, fcntl.LOCK_SH, attempts=1) else _holder(run_dir)


def _flock(file: TextIO, kind: int, *, attempts: int) -> bool:
    """Tries to lock, `attempts` times in steps of 50 ms: somebody may just be looking, or a killed holder dying."""
    for attempt in range(attempts):
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if attempt + 1 < attempts:
                time.sleep(0.05)
    return False


def _holder(run_dir: Path) -> str:
    return (run_dir / ".lock").read_text().strip() or "an unknown process"


def _json_digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
