"""What makes a run durable, kept in object storage too: journal, checkpoints and ledger.

The server works in a local directory, the working copy, and what it promises is put at the URL before it is promised:
a node that is lost takes nothing along that was acknowledged. Between two launches the URL has the truth; within one,
where a server is restarted, the working copy has.

    journal/contribution-NNNNNNNN.STAMP.safetensors    one put each; a put that failed may still arrive, so that every
                                                       attempt has a name of its own, and the latest counts
    checkpoints/NNNNNN/…                               state.json last: without it there is no checkpoint
    ledger/segment.STAMP.OFFSET.jsonl                  stores do not append: the ledger is what is left when each
                                                       segment in turn cuts it at its offset, and follows

Records of leases stay local: where they are lost, their tasks are drawn again.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from leap_dist.storage.objects import Storage, open_storage
from leap_dist.storage.remote_lock import ALIVE, Claim, LockLost, Stamp, check, stamp, stamp_of

MARKER = "state.json"
"""Of a checkpoint that is complete."""
FILES = ("init.safetensors", "optimizer.safetensors", "heads.safetensors", MARKER)
PLAIN = ("config.yaml", "manifest.json", "summary.json", "init.safetensors", "progress.png", "tensorboard", "profile")
"""What is a copy, file by file, and not needed to go on."""
LEDGER = "ledger.jsonl"
MOST_SEGMENTS = 256  # of the ledger, before they become one
PATIENCE_SECONDS = 30.0  # that a server which starts waits for the storage
AT_ONCE = 8  # objects that are read together

_ENTRY = re.compile(r"contribution-([0-9]{8}|[1-9][0-9]{8,17})\.safetensors")
# Without a stamp where somebody has copied a run directory.
_REMOTE_ENTRY = re.compile(r"journal/contribution-([0-9]{8}|[1-9][0-9]{8,17})(?:\.[0-9a-f-]+)?\.safetensors")
_REMOTE_CHECKPOINT = re.compile(r"checkpoints/([0-9]{6}|[1-9][0-9]{6,17})/([a-z.]+)")
_REMOTE_SEGMENT = re.compile(r"ledger/segment\.[0-9a-f-]+\.([0-9]{12,18})\.jsonl")


class Remote(NamedTuple):
    """Where a run is kept, and by which right. Holds no secret; goes to the server's process."""

    url: str
    claim: Claim


class NoReplica:
    """For a run directory that is a plain one: nothing is put anywhere."""

    def catch_up(self) -> None:
        """Makes what is remote what is local. To be called before the server answers anybody. Raises OSError."""

    def entry(self, order: int, data: bytes) -> None:
        """An entry of the journal; durable when this returns. Raises OSError, and then it may be there or not."""

    def discard(self, orders: Iterable[int]) -> None:
        """Removes entries, as far as that works."""

    def checkpoint(self, version: int, files: Mapping[str, bytes]) -> None:
        """A checkpoint's files, `MARKER` among them; durable when this returns. Raises OSError, as `entry` does."""

    def retire(self, version: int) -> None:
        """Removes a checkpoint, as far as that works."""

    def segment(self, offset: int, data: bytes) -> None:
        """Makes `data` the end of the ledger, from byte `offset` on. Raises OSError."""


class Replica(NoReplica):
    """Of a working copy, at a URL, for as long as the run is claimed by this launch."""

    def __init__(self, storage: Storage, claim: Claim, working_copy: Path) -> None:
        self._storage = storage
        self._claim = claim
        self._local = working_copy
        self._entries: dict[int, list[str]] = {}  # names, by order
        self._versions: set[int] = set()  # of which something may be there
        self._segments: list[str] = []
        self._ledger_size = 0
        self._lost: LockLost | None = None

    def catch_up(self) -> None:
        """See NoReplica. Waits for storage that does not answer, but not for ever."""
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

    def entry(self, order: int, data: bytes) -> None:
        """See NoReplica."""
        self._refuse_if_lost()
        name = f"journal/contribution-{order:08d}.{stamp(self._claim)}.safetensors"
        self._entries.setdefault(order, []).append(name)
        self._storage.put(name, data)
        self._check()  # afterwards: who takes the run over from now on sees it

    def discard(self, orders: Iterable[int]) -> None:
        """See NoReplica."""
        names = [name for order in orders for name in self._entries.pop(order, [])]
        if self._lost is None:
            with contextlib.suppress(OSError):
                self._storage.remove(names)

    def checkpoint(self, version: int, files: Mapping[str, bytes]) -> None:
        """See NoReplica."""
        self._refuse_if_lost()
        self._check()  # beforehand: the name may be that of a later owner's
        if version in self._versions:
            self._storage.remove([f"checkpoints/{version:06d}/{MARKER}"])
        self._versions.add(version)
        for name in sorted(files, key=lambda name: name == MARKER):
            self._storage.put(f"checkpoints/{version:06d}/{name}", files[name])
        self._check()

    def retire(self, version: int) -> None:
        """See NoReplica."""
        if self._lost is None:
            self._versions.discard(version)
            with contextlib.suppress(OSError):
                remove_checkpoint(self._storage, version)

    def segment(self, offset: int, data: bytes) -> None:
        """See NoReplica."""
        if not data and offset == self._ledger_size:
            return
        self._refuse_if_lost()
        name = f"ledger/segment.{stamp(self._claim)}.{offset:012d}.jsonl"
        self._storage.put(name, data)
        self._segments.append(name)
        self._ledger_size = offset + len(data)
        if len(self._segments) > MOST_SEGMENTS:
            self._fold()

    def _catch_up(self) -> None:
        self._check()
        names = self._storage.names()
        for name in names:
            if match := _REMOTE_ENTRY.fullmatch(name):
                known = self._entries.setdefault(int(match[1]), [])
                known += [name] if name not in known else []
            elif match := _REMOTE_CHECKPOINT.fullmatch(name):
                self._versions.add(int(match[1]))
        self._segments = [name for name in names if _REMOTE_SEGMENT.fullmatch(name)]
        local = {int(m[1]): p for p in self._local.glob("journal/*") if (m := _ENTRY.fullmatch(p.name))}
        for order, path in sorted(local.items()):
            # Entries are put one after the other, so that only the last one's put can have been cut short.
            if order not in self._entries or order == max(local):
                self.entry(order, path.read_bytes())
        for folder in sorted(self._local.glob("checkpoints/[0-9]*")):
            complete = f"checkpoints/{folder.name}/{MARKER}" in names
            if not complete and folder.name.isdecimal() and all((folder / name).is_file() for name in FILES):
                self.checkpoint(int(folder.name), {name: (folder / name).read_bytes() for name in FILES})
        self._fold()

    def _fold(self) -> None:
        """Puts the whole ledger as one segment, in place of those that there are."""
        path = self._local / LEDGER
        data = path.read_bytes() if path.exists() else b""
        name = f"ledger/segment.{stamp(self._claim)}.{0:012d}.jsonl"
        self._storage.put(name, data)
        old, self._segments, self._ledger_size = self._segments, [name], len(data)
        with contextlib.suppress(OSError):
            self._storage.remove(old)

    def _check(self) -> None:
        try:
            check(self._storage, self._claim)
        except LockLost as error:
            self._lost = error
            raise

    def _refuse_if_lost(self) -> None:
        if self._lost is not None:
            raise LockLost(str(self._lost))


NO_REPLICA = NoReplica()


def connect(remote: Remote | None, working_copy: Path) -> NoReplica:
    """The mirror of a working copy, or none. Raises ConfigError where its URL cannot be used here."""
    return NO_REPLICA if remote is None else Replica(open_storage(remote.url), remote.claim, working_copy)


def pull(storage: Storage, folder: Path, claim: Claim, before: Claim | None) -> None:
    """Fills an empty working copy with what the URL holds, and removes there what nobody needs. Raises OSError.

    To be called by who has the lock, `claim`; `before` is the claim that it was taken over from.
    """
    names = storage.names()
    entries = _newest_entries(names, before)
    complete = {m[1] for name in names if (m := _REMOTE_CHECKPOINT.fullmatch(name)) and m[2] == MARKER}
    wanted = {name: f"journal/contribution-{order:08d}.safetensors" for order, name in entries.items()}
    for name in names:
        match = _REMOTE_CHECKPOINT.fullmatch(name)
        is_part = match is not None and match[1] in complete and match[2] in FILES
        if is_part or name.split("/")[0] in PLAIN or name == LEDGER:
            wanted[name] = name
    fetch(storage, folder, wanted)
    write_ledger(storage, folder, names, before)
    rubbish = [name for name in names if _REMOTE_ENTRY.fullmatch(name) and name not in wanted]
    rubbish += [name for name in names if (m := _REMOTE_CHECKPOINT.fullmatch(name)) and m[1] not in complete]
    rubbish += [name for name in names if name.startswith(ALIVE) and name != ALIVE + claim.nonce]
    with contextlib.suppress(OSError):
        storage.remove(rubbish)


def fetch(storage: Storage, folder: Path, wanted: Mapping[str, str]) -> None:
    """Copies objects to paths below a folder. Raises OSError."""

    def copy(name: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(storage.get(name))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(copy, wanted, (folder / path for path in wanted.values())))


def write_ledger(storage: Storage, folder: Path, names: Iterable[str], owner: Claim | None) -> None:
    """Puts the ledger together from its segments, over the whole one that may be in the folder. Raises OSError."""
    segments: dict[Stamp, tuple[str, int]] = {}
    for name in names:
        match, when = _REMOTE_SEGMENT.fullmatch(name), stamp_of(name)
        if match and when and not when.is_of_loser(owner):
            segments[when] = name, int(match[1])
    if not segments:
        return
    with ThreadPoolExecutor(AT_ONCE) as pool:
        contents = dict(zip(segments, pool.map(lambda found: storage.get(found[0]), segments.values()), strict=True))
    with (folder / LEDGER).open("ab") as file:
        for when, (_, offset) in sorted(segments.items()):
            file.truncate(min(offset, file.seek(0, 2)))
            file.write(contents[when])


def put_whole_ledger(storage: Storage, folder: Path) -> None:
    """At the end of a launch, when no server writes any more: the ledger as one object, in place of its segments."""
    path = folder / LEDGER
    if path.exists():
        segments = [name for name in storage.names("ledger") if _REMOTE_SEGMENT.fullmatch(name)]
        storage.put(LEDGER, path.read_bytes())
        storage.remove(segments)


def remove_checkpoint(storage: Storage, version: int) -> None:
    """The marker first: what is left is no checkpoint. Raises OSError."""
    folder = f"checkpoints/{version:06d}"
    storage.remove([f"{folder}/{MARKER}"])
    storage.remove([f"{folder}/{name}" for name in FILES if name != MARKER])


def _newest_entries(names: Iterable[str], before: Claim | None) -> dict[int, str]:
    """Of every entry the attempt that counts, by order."""
    newest: dict[int, tuple[Stamp, str]] = {}
    for name in names:
        match, when = _REMOTE_ENTRY.fullmatch(name), stamp_of(name) or Stamp(0, 0, "")
        if match and not when.is_of_loser(before):
            order = int(match[1])
            newest[order] = max(newest.get(order, (when, name)), (when, name))
    return {order: name for order, (_, name) in newest.items()}
