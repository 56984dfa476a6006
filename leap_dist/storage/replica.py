"""A replica in object storage of what makes a run durable: journal, checkpoints and ledger.

The server works in a local directory, the working copy. Whatever it acknowledges is put at the URL first, so losing the
machine loses nothing that was acknowledged. Between two launches the URL is authoritative; within a launch, even if
its server restarts, the working copy is.

    journal/contribution-NNNNNNNN.STAMP.safetensors    one put per attempt: a put that failed may still arrive, so each
                                                       attempt has its own name, and the latest one counts
    checkpoints/NNNNNN.STAMP/…                         one folder per attempt, with state.json put last; a launch puts
                                                       all its checkpoints at its start, and only those count later
    ledger/segment.STAMP.OFFSET.jsonl                  object stores cannot append: the ledger results from applying the
                                                       segments in order, each cutting it at OFFSET and appending

Lease records stay local: the tasks of lost leases are drawn again.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from leap_dist.config import files
from leap_dist.storage.locks import (
    ALIVE,
    CLAIM,
    Claim,
    LockLost,
    Stamp,
    check,
    is_generation,
    is_removable,
    new_stamp,
    parse_stamp,
)
from leap_dist.storage.objects import Storage, open_storage

MARKER = "state.json"
"""File that makes a checkpoint complete."""
FILES = ("init.safetensors", "optimizer.safetensors", "heads.safetensors", MARKER)
"""Files of a checkpoint."""
COPIES = ("config.yaml", "manifest.json", "summary.json", "init.safetensors", "progress.png", "tensorboard", "profile")
"""Files and folders that are copied one by one and are not needed to resume."""
LEDGER = "ledger.jsonl"
MOST_SEGMENTS = 256
"""Number of ledger segments, one for each append, that are merged into one. So each byte is put twice."""
LARGEST_WHOLE_LEDGER = 2**24
"""Size in bytes of the largest ledger that becomes one object again at the end: a longer one stays in segments."""
PATIENCE_SECONDS = 30.0
"""Seconds for which a starting server waits for the storage."""
PARALLEL_READS = 8

_ENTRY = re.compile(r"contribution-([0-9]{8}|[1-9][0-9]{8,17})\.safetensors")
# Entries and checkpoints have no stamp if somebody copied a plain run directory to the URL.
_REMOTE_ENTRY = re.compile(r"journal/contribution-([0-9]{8}|[1-9][0-9]{8,17})(?:\.[0-9a-f-]+)?\.safetensors")
_REMOTE_CHECKPOINT = re.compile(r"(checkpoints/([0-9]{6}|[1-9][0-9]{6,17})(?:\.[0-9a-f-]+)?)/([a-z.]+)")
_REMOTE_SEGMENT = re.compile(r"ledger/segment\.[0-9a-f-]+\.([0-9]{12,18})\.jsonl")


class Remote(NamedTuple):
    """URL of a run and the launch's claim to it. Contains no secret, and is sent to the server's process."""

    url: str
    claim: Claim


class NoReplica:
    """Null object for a run in a plain directory: every method does nothing."""

    def catch_up(self) -> None:
        """Make the replica equal to the working copy before the server answers anybody. Raises OSError."""

    def put_entry(self, order: int, data: bytes) -> None:
        """Put a journal entry, durable on return. If it raises OSError, the entry may be there or not."""

    def remove_entries(self, orders: Iterable[int]) -> None:
        """Remove journal entries. Errors are ignored."""

    def put_checkpoint(self, version: int, files: Mapping[str, bytes]) -> None:
        """Put the files of a checkpoint, `MARKER` among them; durable on return. Raises OSError as `put_entry` does."""

    def remove_checkpoint(self, version: int) -> None:
        """Remove a checkpoint. Errors are ignored."""

    def append_ledger(self, offset: int, data: bytes) -> None:
        """Make `data` the end of the ledger, from byte `offset` on. Raises OSError."""


class Replica(NoReplica):
    """Replica of a working copy at a URL, while the launch holds its claim. Methods are described in `NoReplica`.

    Every method but the removals raises LockLost, an OSError, once another launch has taken the run over.
    """

    def __init__(self, storage: Storage, claim: Claim, working_copy: Path) -> None:
        self._storage = storage
        self._claim = claim
        self._local = working_copy
        self._entries: dict[int, list[str]] = {}  # order → names of all attempts
        self._checkpoints: dict[int, list[str]] = {}  # version → folders of all attempts of which objects may exist
        self._segments: list[str] = []  # of the last appends, which are not merged yet
        self._segments_start = 0  # byte of the ledger at which they begin
        self._ledger_size = 0
        self._lost: LockLost | None = None

    def catch_up(self) -> None:
        """See `NoReplica.catch_up`. Waits up to `PATIENCE_SECONDS` for storage that does not answer."""
        deadline, pause = time.monotonic() + PATIENCE_SECONDS, 0.5
        while True:
            try:
                self._catch_up()
                return
            except LockLost:
                raise
            except OSError:
                if time.monotonic() + pause > deadline:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def put_entry(self, order: int, data: bytes) -> None:
        """See `NoReplica.put_entry`."""
        self._raise_if_lost()
        name = f"journal/contribution-{order:08d}.{new_stamp(self._claim)}.safetensors"
        self._entries.setdefault(order, []).append(name)
        self._storage.put(name, data)
        self._check()  # after the put: whoever takes the run over from now on sees the entry

    def remove_entries(self, orders: Iterable[int]) -> None:
        """See `NoReplica.remove_entries`."""
        names = [name for order in orders for name in self._entries.pop(order, [])]
        if self._lost is None:
            with contextlib.suppress(OSError):
                self._storage.remove(names)

    def put_checkpoint(self, version: int, files: Mapping[str, bytes]) -> None:
        """See `NoReplica.put_checkpoint`."""
        self._raise_if_lost()
        folder = f"checkpoints/{version:06d}.{new_stamp(self._claim)}"
        attempts = self._checkpoints.setdefault(version, [])
        attempts.append(folder)
        for name in sorted(files, key=lambda name: name == MARKER):
            self._storage.put(f"{folder}/{name}", files[name])
        self._check()  # after the puts: whoever takes the run over from now on sees the checkpoint
        self._remove_checkpoints(attempts[:-1])
        del attempts[:-1]

    def remove_checkpoint(self, version: int) -> None:
        """See `NoReplica.remove_checkpoint`."""
        self._remove_checkpoints(self._checkpoints.pop(version, []))

    def _remove_checkpoints(self, folders: Iterable[str]) -> None:
        """Remove folders of checkpoints, each with its marker first: what is left is not a checkpoint."""
        if self._lost is None:
            with contextlib.suppress(OSError):
                for folder in folders:
                    self._storage.remove([f"{folder}/{MARKER}"])
                    self._storage.remove([f"{folder}/{name}" for name in FILES if name != MARKER])

    def append_ledger(self, offset: int, data: bytes) -> None:
        """See `NoReplica.append_ledger`."""
        if not data and offset == self._ledger_size:
            return
        self._raise_if_lost()
        name = f"ledger/segment.{new_stamp(self._claim)}.{offset:012d}.jsonl"
        self._storage.put(name, data)
        self._segments.append(name)
        self._segments_start = min(self._segments_start, offset)
        self._ledger_size = offset + len(data)
        if len(self._segments) >= MOST_SEGMENTS:
            self._merge_segments()

    def _catch_up(self) -> None:
        self._check()
        # A launch that has taken the run over meanwhile needs its own objects, so they are left alone.
        names = [name for name in self._storage.names() if is_removable(name, self._claim)]
        for name in names:
            if match := _REMOTE_ENTRY.fullmatch(name):
                known = self._entries.setdefault(int(match[1]), [])
                known += [name] if name not in known else []
            elif match := _REMOTE_CHECKPOINT.fullmatch(name):
                known = self._checkpoints.setdefault(int(match[2]), [])
                known += [match[1]] if match[1] not in known else []
        self._segments = [name for name in names if _REMOTE_SEGMENT.fullmatch(name)]
        local = {int(m[1]): p for p in self._local.glob("journal/*") if (m := _ENTRY.fullmatch(p.name))}
        for order, path in sorted(local.items()):
            # Entries are put one after another, so only the put of the last one can have been interrupted.
            if order not in self._entries or order == max(local):
                self.put_entry(order, path.read_bytes())
        self._catch_up_with_checkpoints(names)
        self._segments_start = 0
        self._merge_segments()

    def _catch_up_with_checkpoints(self, names: Iterable[str]) -> None:
        """Put all local checkpoints that this launch has not put yet, the newest first, and remove those of others.

        A launch that was taken over may go on for a moment, and write or remove what only it knows. So nothing may
        depend on checkpoints that another launch has written.
        """
        own = {folder for folder in _complete_checkpoints(names) if _is_of(folder, self._claim)}
        there = {_version_of(folder) for folder in own}
        local = {int(path.name): path for path in self._local.glob("checkpoints/*") if path.name.isdecimal()}
        for version, path in sorted(local.items(), reverse=True):
            if version not in there and all((path / name).is_file() for name in FILES):
                self.put_checkpoint(version, {name: (path / name).read_bytes() for name in FILES})
        self._check()  # before the removal: another launch may be reading them
        for version, folders in list(self._checkpoints.items()):
            foreign = [folder for folder in folders if not _is_of(folder, self._claim)]
            self._remove_checkpoints(foreign)
            self._checkpoints[version] = [folder for folder in folders if folder not in foreign]

    def _merge_segments(self) -> None:
        """Replace the last segments by one: at the start all of them, which then is the whole ledger."""
        path, start = self._local / LEDGER, self._segments_start
        data = b""
        if path.exists():
            with files.open_regular(path) as file:
                file.seek(start)
                data = file.read()
        name = f"ledger/segment.{new_stamp(self._claim)}.{start:012d}.jsonl"
        self._storage.put(name, data)
        old, self._segments = self._segments, []
        self._segments_start = self._ledger_size = start + len(data)
        self._check()  # before the removal: another launch may be reading them
        with contextlib.suppress(OSError):
            self._storage.remove(old)

    def _check(self) -> None:
        try:
            check(self._storage, self._claim)
        except LockLost as error:
            self._lost = error
            raise

    def _raise_if_lost(self) -> None:
        if self._lost is not None:
            raise LockLost(str(self._lost))


NO_REPLICA = NoReplica()


def connect(remote: Remote | None, working_copy: Path) -> NoReplica:
    """Return the replica of a working copy, or the null object. Raises ConfigError if the URL cannot be used here."""
    return NO_REPLICA if remote is None else Replica(open_storage(remote.url), remote.claim, working_copy)


def pull(storage: Storage, folder: Path, claim: Claim, before: Claim | None) -> None:
    """Download a run into an empty working copy, and remove objects at the URL that are not needed. Raises OSError.

    Only the launch that took the run over from the claim `before`, and holds it by `claim`, may call this. If another
    launch takes the run over meanwhile, its checkpoints, journal and ledger are left alone.
    """
    names = storage.names()
    entries, checkpoints = _latest_entries(names, before), _latest_checkpoints(names, before)
    wanted = {name: f"journal/contribution-{order:08d}.safetensors" for order, name in entries.items()}
    for version, source in checkpoints.items():
        wanted |= {f"{source}/{name}": f"checkpoints/{version:06d}/{name}" for name in FILES}
    wanted |= {name: name for name in names if name.split("/")[0] in COPIES or name == LEDGER}
    fetch(storage, folder, wanted)
    write_ledger(storage, folder, names, before)
    rubbish = [name for name in names if _REMOTE_ENTRY.fullmatch(name) and name not in wanted]
    rubbish += [name for name in names if name.startswith(ALIVE) and name != ALIVE + claim.nonce]
    rubbish += [name for name in names if is_generation(name) and name < f"{CLAIM}{claim.generation:06d}"]
    # Checkpoints that do not count stay until this launch has put its own (`Replica.catch_up`): the rest of an
    # incomplete one may still arrive, and a launch that takes the run over before that would continue from it.
    with contextlib.suppress(OSError):
        storage.remove([name for name in rubbish if is_removable(name, claim)])


def has_begun(storage: Storage) -> bool:
    """Return whether the URL holds results. A failed start leaves only a description of the run. Raises OSError."""
    return any(name.split("/")[0] in ("checkpoints", "journal", "ledger", LEDGER) for name in storage.names())


def fetch(storage: Storage, folder: Path, wanted: Mapping[str, str]) -> None:
    """Download objects: `wanted` maps their names to paths below `folder`. Raises OSError."""

    def copy(name: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with files.create_new(path) as file:
            file.write(storage.get(name))

    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        list(pool.map(copy, wanted, (folder / path for path in wanted.values())))


def write_ledger(storage: Storage, folder: Path, names: Iterable[str], owner: Claim | None) -> None:
    """Apply the segments among `names` to the ledger in `folder`, which may be missing. Raises OSError.

    The first segment of a launch holds the whole ledger, so only segments of one launch count: of those with the
    highest generation, and among these of `owner` if it has written any.
    """
    segments: dict[Stamp, tuple[str, int]] = {}
    for name in names:
        match, when = _REMOTE_SEGMENT.fullmatch(name), parse_stamp(name)
        if match and when:
            segments[when] = name, int(match[1])
    if any(when.is_of(owner) for when in segments):
        segments = {
            when: found for when, found in segments.items()
            if when.is_of(owner) or owner is None or when.generation != owner.generation
        }  # fmt: skip
    if not segments:
        return
    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        contents = dict(zip(segments, pool.map(lambda found: storage.get(found[0]), segments.values()), strict=True))
    with files.open_to_append(folder / LEDGER) as file:
        for when, (_, offset) in sorted(segments.items()):
            file.truncate(min(offset, file.seek(0, 2)))
            file.write(contents[when])


def put_whole_ledger(storage: Storage, folder: Path, claim: Claim) -> None:
    """Replace all segments by one object when a launch has ended and no server writes any more. Raises OSError.

    A ledger of more than `LARGEST_WHOLE_LEDGER` bytes stays in segments, which saves putting all of it once more. If
    another launch has taken the run over from `claim`, its segments are left alone, and hold the whole ledger.
    """
    path = folder / LEDGER
    if not path.exists():
        return
    if path.stat().st_size > LARGEST_WHOLE_LEDGER:
        storage.remove([LEDGER])  # an earlier launch has put it when it was shorter
        return
    names = storage.names("ledger")
    segments = [name for name in names if _REMOTE_SEGMENT.fullmatch(name) and is_removable(name, claim)]
    storage.put(LEDGER, path.read_bytes())
    storage.remove(sorted(segments, key=lambda name: parse_stamp(name) or Stamp(0, 0, "")))  # the rest still adds up


def _version_of(folder: str) -> int:
    return int(folder.removeprefix("checkpoints/").partition(".")[0])


def _is_of(folder: str, owner: Claim | None) -> bool:
    stamp = parse_stamp(f"{folder}/")
    return stamp is not None and stamp.is_of(owner)


def _complete_checkpoints(names: Iterable[str]) -> set[str]:
    """Return the folders whose files are all there: a marker may arrive late, when the rest was removed."""
    there: dict[str, set[str]] = {}
    for name in names:
        if match := _REMOTE_CHECKPOINT.fullmatch(name):
            there.setdefault(match[1], set()).add(match[3])
    return {folder for folder, found in there.items() if found >= set(FILES)}


def _latest_checkpoints(names: Iterable[str], before: Claim | None) -> dict[int, str]:
    """Return the folder of each checkpoint that counts, by version.

    Only those of one launch count: of the last owner if it has put any, else of the launch before it.
    """
    stamps = {folder: parse_stamp(f"{folder}/") or Stamp(0, 0, "") for folder in _complete_checkpoints(names)}
    highest = max((stamp.rank(before)[:2] for stamp in stamps.values()), default=None)
    counting = [folder for folder, stamp in stamps.items() if stamp.rank(before)[:2] == highest]
    return {_version_of(folder): folder for folder in sorted(counting, key=lambda folder: stamps[folder].order)}


def _latest_entries(names: Iterable[str], before: Claim | None) -> dict[int, str]:
    """Return the name of the attempt that counts for each journal entry, by order."""
    attempts: dict[int, list[str]] = {}
    for name in names:
        if match := _REMOTE_ENTRY.fullmatch(name):
            attempts.setdefault(int(match[1]), []).append(name)
    return {
        order: max(found, key=lambda name: (parse_stamp(name) or Stamp(0, 0, "")).rank(before))
        for order, found in attempts.items()
    }
