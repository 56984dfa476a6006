"""Locks that allow only one live server per run: locks of the operating system for directories, claims for URLs.

Object stores have no lock that is released when its holder dies, so a launch claims a run there, and a counter that it
increments shows that it is alive; docs/storage.md describes the rules.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

from leap_dist.config import files
from leap_dist.protocol import schema
from leap_dist.storage.atomic import DECODE_ERRORS
from leap_dist.storage.objects import Storage

LOCK = ".lock"
LAUNCH = ".launch"


class RunDirectoryBusy(RuntimeError):
    """Another live server holds the run directory."""


class RunLock:
    """An advisory lock (flock) on a run directory, which the operating system drops when its holder dies.

    Args:
        run_dir: existing directory.
        name: file to lock. A server locks `LOCK`; a launch locks `LAUNCH` before it writes anything.

    Raises OSError, or RunDirectoryBusy, which names the holder, if another process has the lock.
    """

    def __init__(self, run_dir: Path, name: str = LOCK) -> None:
        self._file = _open(run_dir / name)
        if not _flock(self._file, fcntl.LOCK_EX, attempts=20):
            self._file.close()
            who = "a live server" if name == LOCK else "another launch"
            raise RunDirectoryBusy(f"run-dir: {run_dir} is in use by {who} ({_holder(run_dir, name)})")
        if os.fstat(self._file.fileno()).st_nlink == 0:  # a failed start removed it at this very moment
            self._file.close()
            raise RunDirectoryBusy(f"run-dir: {run_dir} was in use by another launch until now; try again")
        with contextlib.suppress(OSError):  # on a full disk, only the holder's name is missing
            os.ftruncate(self._file.fileno(), 0)
            os.write(self._file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())

    def release(self) -> None:
        """Release the lock. Idempotent."""
        self._file.close()


def _open(path: Path) -> IO[bytes]:
    """Open a lock file to write to it. If a backup shares it by a hard link and nobody holds it, it becomes a new file.

    If somebody holds it, the shared file is returned, whose lock cannot be taken.
    """
    try:
        return files.open_to_append(path)
    except files.Unreadable as error:
        if error.errno != errno.EMLINK:
            raise
    shared = files.open_to_lock(path)
    if not _flock(shared, fcntl.LOCK_EX, attempts=20):
        return shared
    with shared:
        if os.fstat(shared.fileno()).st_ino == path.stat().st_ino:  # another launch has not replaced it meanwhile
            path.unlink()
    return files.open_to_append(path)


def lock_holder(run_dir: Path, name: str = LOCK) -> str | None:
    """Return the process that holds the lock on a run directory, or None. Raises OSError if that is unknown."""
    try:
        with files.open_regular(run_dir / name) as file:
            return None if _flock(file, fcntl.LOCK_SH, attempts=1) else _holder(run_dir, name)
    except FileNotFoundError:
        return None


def other_host(run_dir: Path) -> str | None:
    """Return the last holder of the lock if it runs on another host, whose lock may be invisible here; else None."""
    try:
        holder = _holder(run_dir)
    except OSError:
        return None
    match = re.fullmatch(r"process \d+ on (\S+)", holder)
    return holder if match and match[1] != socket.gethostname() else None


def _flock(file: IO[bytes], kind: int, *, attempts: int) -> bool:
    """Try to lock, up to `attempts` times, 50 ms apart: another process may be testing the lock, or about to exit."""
    for attempt in range(attempts):
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if attempt + 1 < attempts:
                time.sleep(0.05)
    return False


def _holder(run_dir: Path, name: str = LOCK) -> str:
    with files.open_regular(run_dir / name) as file:
        text = file.read(200).decode(errors="replace").strip()
    return ascii(text)[1:-1] or "an unknown process"


ALIVE = ".alive-"
CLAIM = ".claim-"
BEAT_SECONDS = 2.0
"""Seconds between two increments of the counter."""
WATCH_SECONDS = 10.0
"""Seconds without an increment after which a launch that wants the run regards its owner as dead."""
STATUS_SECONDS = 5.0
"""Seconds for which a command that only reads watches the counter."""
SETTLE_SECONDS = 0.5
"""Seconds between writing the lock and reading it back, in case another launch takes the run over at that moment."""
BEATS_MISSED = 3
"""Failed increments in a row that raise an alert."""


class Claim(NamedTuple):
    """A launch's claim to a run."""

    holder: str
    nonce: str
    generation: int
    """Number of the launch: one more than the generation of the launch before."""


class LockLost(OSError):
    """Another launch has taken the run over, so nothing may be written any more."""


class Stamp(NamedTuple):
    """Part of the name of an object that may be written more than once. A later write has a greater stamp."""

    generation: int
    order: int
    """Monotonic clock in nanoseconds. All writers of a launch run on one machine and share this clock."""
    nonce: str
    """First eight digits of the claim's nonce."""

    def __str__(self) -> str:
        return f"{self.generation:06d}-{self.order:020d}-{self.nonce}"

    def is_of(self, owner: Claim | None) -> bool:
        """Return whether an object with this stamp was written under the claim `owner`."""
        return owner is not None and self.generation == owner.generation and owner.nonce.startswith(self.nonce)

    def rank(self, owner: Claim | None) -> tuple[int, bool, int]:
        """Return a sort key: the object with the highest one counts.

        Without conditional writes two launches may have the same generation; `owner`, whom the lock names, prevails.
        """
        return self.generation, self.is_of(owner), self.order


def new_stamp(claim: Claim) -> Stamp:
    """Return a stamp greater than all earlier ones of the claim."""
    return Stamp(claim.generation, time.monotonic_ns(), claim.nonce[:8])


def parse_stamp(name: str) -> Stamp | None:
    """Return the stamp in an object's name, or None if there is none."""
    match = re.search(r"\.([0-9]{6})-([0-9]{20})-([0-9a-f]{8})[./]", name)
    return Stamp(int(match[1]), int(match[2]), match[3]) if match else None


def is_removable(name: str, claim: Claim) -> bool:
    """Return whether a launch may remove an object: one that has no stamp, or that it or an earlier launch has written.

    A launch does not notice at once that another one has taken the run over, which needs its own objects.
    """
    stamp = parse_stamp(name)
    return stamp is None or stamp.generation < claim.generation or stamp.is_of(claim)


def read_claim(storage: Storage) -> Claim | None:
    """Return the current claim, or None if there is none. Raises OSError.

    A lock that this program did not write yields a claim with an empty nonce.
    """
    data = storage.find(LOCK)
    if data is None:
        return None
    try:
        content = json.loads(data)
        schema.check(content, {"holder": str, "nonce": str, "generation": int}, "lock")
        if not re.fullmatch("[0-9a-f]{32}", content["nonce"]) or not 0 <= content["generation"] < 10**6:
            raise ValueError("lock has an invalid nonce or generation")
        return Claim(ascii(content["holder"])[1:-1][:200], content["nonce"], content["generation"])
    except DECODE_ERRORS:
        return Claim(ascii(data[:80].decode(errors="replace"))[1:-1] or "an unknown process", "", 0)


def check(storage: Storage, claim: Claim) -> None:
    """Raise LockLost if another launch holds the lock, OSError if the lock cannot be read."""
    present = read_claim(storage)
    if present is None or present.nonce != claim.nonce:
        holder = present.holder if present else "a process that removed the lock"
        raise LockLost(f"the run was taken over by {holder}: nothing is written any more")


def beat(storage: Storage, claim: Claim, count: int, *, released: bool = False) -> None:
    """Set the counter, or with `released` release the run. Raises OSError."""
    storage.put(ALIVE + claim.nonce, json.dumps({"beat": count, "released": released}).encode())


def is_released(storage: Storage, claim: Claim) -> bool:
    """Return whether the claim's launch has released the run. Raises OSError."""
    try:
        content = json.loads(storage.find(ALIVE + claim.nonce) or b"{}")
        return bool(content.get("released", False))
    except DECODE_ERRORS:
        return False


def take_over(
    storage: Storage, *, watch: float = WATCH_SECONDS, warn: Callable[[str], None] = lambda _: None
) -> tuple[Claim, Claim | None]:
    """Take a run over from a launch that has released it or shows no sign of life for `watch` seconds.

    Returns the new claim and the previous one. Raises RunDirectoryBusy, which names the holder, if the previous launch
    is alive; OSError if the storage fails.
    """
    before = read_claim(storage)
    if before is not None and not is_released(storage, before):
        warn(f"{before.holder} has not released {storage.url}; watching for {watch:.0f} s to see whether it is alive")
        if is_alive(storage, before, watch):
            raise RunDirectoryBusy(f"run-dir: {storage.url} is in use ({before.holder}); stop it or choose another")
    claim = Claim(f"process {os.getpid()} on {socket.gethostname()}", uuid.uuid4().hex, 0)
    highest = max(before.generation if before else 0, _highest_generation(storage, claim))
    while highest >= claim.generation:
        claim = _claim_generation(storage, claim._replace(generation=highest + 1))
        beat(storage, claim, 0)
        storage.put(LOCK, json.dumps(claim._asdict()).encode())
        time.sleep(SETTLE_SECONDS if watch else 0.0)
        present = read_claim(storage)
        if present is None or present.nonce != claim.nonce:
            raise RunDirectoryBusy(
                f"run-dir: {storage.url} has just been taken over ({present.holder if present else 'unknown'})"
            )
        highest = _highest_generation(storage, claim)  # another launch may have worked until the lock was written
    return claim, before


def _claim_generation(storage: Storage, claim: Claim) -> Claim:
    """Return the claim with the first free generation, starting with its own; no other launch will have the same."""
    while True:
        try:
            storage.create(f"{CLAIM}{claim.generation:06d}", claim.holder.encode())
            return claim
        except FileExistsError:
            claim = claim._replace(generation=claim.generation + 1)


def _highest_generation(storage: Storage, claim: Claim) -> int:
    """Return the highest generation that launches other than `claim` have claimed or written under; 0 for none."""
    own = f"{CLAIM}{claim.generation:06d}"
    names = storage.names()
    stamps = [stamp for name in names if (stamp := parse_stamp(name)) and not stamp.is_of(claim)]
    claims = [int(name.removeprefix(CLAIM)) for name in names if is_generation(name) and name != own]
    return max([0, *claims, *(stamp.generation for stamp in stamps)])


def is_generation(name: str) -> bool:
    """Return whether an object marks a generation as taken."""
    return re.fullmatch(re.escape(CLAIM) + "[0-9]{6}", name) is not None


def is_alive(storage: Storage, claim: Claim | None, seconds: float = STATUS_SECONDS) -> bool:
    """Return whether the counter, the lock or the run's summary changes within `seconds`. Raises OSError."""
    first, deadline = _signs_of_life(storage, claim), time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(1.0, seconds / 4))
        now = _signs_of_life(storage, claim)
        if now != first:  # releasing the run changes the counter too
            return now[0] != first[0] or claim is None or not is_released(storage, claim)
    return False


def _signs_of_life(storage: Storage, claim: Claim | None) -> tuple[bytes | None, ...]:
    names = [LOCK, "summary.json", *([ALIVE + claim.nonce] if claim and claim.nonce else [])]
    return tuple(storage.find(name) for name in names)


class Heartbeat:
    """A thread that shows that a launch is alive until it is stopped or the run is taken over.

    Args:
        storage: where the run is kept.
        claim: the launch's claim.
        alert: called with a line of text when the storage does not answer.
    """

    def __init__(self, storage: Storage, claim: Claim, alert: Callable[[str], None]) -> None:
        self.lost: LockLost | None = None
        """The error to raise if another launch has taken the run over."""
        self._storage = storage
        self._claim = claim
        self._alert = alert
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and wait for it. Idempotent."""
        self._stopped.set()
        self._thread.join()

    def release(self) -> None:
        """Release the run, so that another launch may take it at once. Errors are ignored."""
        with contextlib.suppress(OSError):
            beat(self._storage, self._claim, -1, released=True)

    def _run(self) -> None:
        count = missed = 0
        while not self._stopped.wait(BEAT_SECONDS):
            count += 1
            try:
                beat(self._storage, self._claim, count)
                check(self._storage, self._claim)
                missed = 0
            except LockLost as error:
                self.lost = error
                return
            except OSError as error:
                missed += 1
                if missed == BEATS_MISSED:
                    self._alert(f"{self._storage.url} does not answer ({error.strerror}); retrying")
