"""Checkpoints: the complete state of a server after a meta-update, in a folder that appears in one step."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leap_dist.storage.atomic import (
    DECODE_ERRORS,
    FORMAT,
    LARGEST,
    CorruptFile,
    NewerFormat,
    OlderFormat,
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


@dataclass(frozen=True)
class Checkpoint:
    """State from which a server continues after a meta-update, together with the journal."""

    version: int
    init: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]
    heads: dict[str, np.ndarray]
    state: dict[str, Any]


class CheckpointStore:
    """Folders `checkpoints/NNNNNN/` with {init,optimizer,heads}.safetensors and, written last, state.json."""

    def __init__(self, directory: Path, keep: int, replica: NoReplica = NO_REPLICA) -> None:
        """Create the directory, which will hold the newest `keep` checkpoints. Raises OSError."""
        self._directory = directory
        self._keep = keep
        self._replica = replica
        directory.mkdir(parents=True, exist_ok=True)

    def versions(self) -> list[int]:
        """Return the versions on disk, ascending, valid or not."""
        names = (path.name for path in self._directory.iterdir())
        return sorted(int(name) for name in names if re.fullmatch("[0-9]{6}|[1-9][0-9]{6,17}", name))

    def save(self, checkpoint: Checkpoint) -> None:
        """Save a checkpoint, durable on return, and remove old ones.

        Raises OSError, in which case the checkpoints are as they were.
        """
        final = self._directory / f"{checkpoint.version:06d}"
        temporary = self._directory / f".{final.name}.tmp"
        remove(temporary)
        failpoint("checkpoint.write")
        try:
            temporary.mkdir()
            files = {
                "init.safetensors": pack(checkpoint.init, {}),
                "optimizer.safetensors": pack(checkpoint.optimizer, {}),
                "heads.safetensors": pack(checkpoint.heads, {}),
            }
            for name, data in files.items():
                write_atomic(temporary / name, data, "checkpoint-file")
            state = {
                "format": FORMAT,
                "version": checkpoint.version,
                "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
                "state": checkpoint.state,
            }
            state["sha256"] = json_digest(state)
            marker = json.dumps(state).encode()
            if len(marker) > LARGEST:  # it could not be read back
                raise OSError(errno.EFBIG, f"state.json would be larger than {LARGEST:,} bytes", str(final))
            write_atomic(temporary / "state.json", marker, "checkpoint-file")
            failpoint("checkpoint.written")
            self._replica.put_checkpoint(checkpoint.version, {**files, "state.json": marker})
            if os.path.lexists(final):  # a damaged checkpoint that could not be set aside
                remove(final)
            os.replace(temporary, final)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        failpoint("checkpoint.renamed")
        sync_directory(self._directory)
        failpoint("checkpoint.durable")
        for version in self.versions()[: -self._keep]:
            remove(self._directory / f"{version:06d}")
            self._replica.remove_checkpoint(version)

    def load_newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest sound checkpoint or None, and a warning for each newer one that is damaged.

        Damaged checkpoints are renamed to NNNNNN.damaged for inspection, unless no checkpoint is sound. Raises
        NewerFormat or OlderFormat if the newest checkpoint that is not damaged is of another format.
        """
        warnings: list[str] = []
        damaged: list[Path] = []
        for version in reversed(self.versions()):
            try:
                checkpoint = self._load(version)
            except (NewerFormat, OlderFormat):
                raise
            except (CorruptFile, OSError) as error:
                warnings.append(f"checkpoint {version} cannot be used: {error}")
                damaged.append(self._directory / f"{version:06d}")
                continue
            for folder in damaged:
                set_aside(folder)
            self._sync(version)
            return checkpoint, warnings
        return None, warnings

    def _sync(self, version: int) -> None:
        """Make a checkpoint durable whose writer may have been killed before it had synced it. Raises OSError."""
        folder = self._directory / f"{version:06d}"
        for name in ("init.safetensors", "optimizer.safetensors", "heads.safetensors", "state.json"):
            sync_file(folder / name)
        sync_directory(folder)
        sync_directory(self._directory)

    def _load(self, version: int) -> Checkpoint:
        folder = self._directory / f"{version:06d}"
        if folder.is_symlink():
            raise CorruptFile("it is a symbolic link")
        try:
            state = json.loads(read_regular(folder / "state.json"))
            checksum = state.pop("sha256")
            if int(state["format"]) > FORMAT:
                raise NewerFormat(
                    f"checkpoint {version}: format {state['format']} is newer than {FORMAT}; update leap-dist"
                )
            if int(state["format"]) < FORMAT:
                raise OlderFormat(
                    f"checkpoint {version}: format {state['format']} is older than {FORMAT}; "
                    "finish the run with the version that started it"
                )
            if checksum != json_digest(state) or state["version"] != version:
                raise CorruptFile("state.json is damaged: its checksum does not match")
            contents = {}
            for name in ("init.safetensors", "optimizer.safetensors", "heads.safetensors"):
                data = read_packed(folder / name)
                if hashlib.sha256(data).hexdigest() != state["files"][name]:
                    raise CorruptFile(f"{name} is damaged: its checksum does not match")
                contents[name] = unpack(data, name)[0]
        except DECODE_ERRORS as error:
            raise CorruptFile(f"state.json is damaged: {one_line(error)}") from None
        init, optimizer, heads = contents.values()
        return Checkpoint(version, init, optimizer, heads, state["state"])
