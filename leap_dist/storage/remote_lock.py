"""Who owns a run in object storage: a lock that nobody drops when its holder dies, so it is watched, and checked.

    .lock           holder, nonce, generation: written once by each launch, when it takes the run over, and never again
    .alive-NONCE    a counter, which the launch raises every few seconds, and at its end a word that it is released

Stores have no conditional write that all of them share, so two launches may both write `.lock`: the later one has it.
Whoever wrote asks again after every write that it is to answer for: where the lock is still its own, whoever takes the
run over later will see what was written.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
import uuid
from collections.abc import Callable
from typing import NamedTuple

from leap_dist.protocol import schema
from leap_dist.storage.atomic import DAMAGE
from leap_dist.storage.objects import Storage
from leap_dist.storage.run_lock import RunDirectoryBusy

LOCK = ".lock"
ALIVE = ".alive-"
BEAT_SECONDS = 2.0  # between two raises of the counter
WATCH_SECONDS = 10.0  # without one, after which an owner is taken for dead
STATUS_SECONDS = 5.0  # the same, for who only asks
SETTLE_SECONDS = 0.5  # for another launch that takes the run over at the same moment


class Claim(NamedTuple):
    """A launch's hold on a run."""

    holder: str
    nonce: str
    generation: int
    """One more than that of the launch before."""


class LockLost(OSError):
    """Another launch has taken the run over: nothing may be written any more."""


class Stamp(NamedTuple):
    """Part of the name of what may be written twice: later ones are greater, of whatever launch they are."""

    generation: int
    order: int
    """Nanoseconds of a clock that all processes of a launch share: they are on one machine."""
    nonce: str
    """The beginning of the claim's."""

    def __str__(self) -> str:
        return f"{self.generation:06d}-{self.order:020d}-{self.nonce}"

    def is_of_loser(self, owner: Claim | None) -> bool:
        """Whether it was written under a claim that `owner`, of the same generation, has overwritten."""
        if owner is None or self.generation != owner.generation:
            return False
        return not owner.nonce.startswith(self.nonce)


def stamp(claim: Claim) -> Stamp:
    """A new one."""
    return Stamp(claim.generation, time.monotonic_ns(), claim.nonce[:8])


def stamp_of(name: str) -> Stamp | None:
    """The one in a name."""
    match = re.search(r"\.([0-9]{6})-([0-9]{20})-([0-9a-f]{8})\.", name)
    return Stamp(int(match[1]), int(match[2]), match[3]) if match else None


def read_claim(storage: Storage) -> Claim | None:
    """The present one, None for none. What is no lock of ours has an empty nonce. Raises OSError."""
    data = storage.find(LOCK)
    if data is None:
        return None
    try:
        content = json.loads(data)
        schema.check(content, {"holder": str, "nonce": str, "generation": int}, "lock")
        if not re.fullmatch("[0-9a-f]{32}", content["nonce"]) or not 0 <= content["generation"] < 10**6:
            raise ValueError("lock is not ours")
        return Claim(ascii(content["holder"])[1:-1][:200], content["nonce"], content["generation"])
    except DAMAGE:
        return Claim(ascii(data[:80].decode(errors="replace"))[1:-1] or "an unknown process", "", 0)


def check(storage: Storage, claim: Claim) -> None:
    """Raises LockLost where the lock is another launch's, OSError where that cannot be told."""
    present = read_claim(storage)
    if present is None or present.nonce != claim.nonce:
        holder = present.holder if present else "somebody who removed the lock"
        raise LockLost(f"the run was taken over by {holder}: nothing is written any more")


def beat(storage: Storage, claim: Claim, count: int, *, released: bool = False) -> None:
    """Raises the counter, or gives the run back. Raises OSError."""
    storage.put(ALIVE + claim.nonce, json.dumps({"beat": count, "released": released}).encode())


def is_released(storage: Storage, claim: Claim) -> bool:
    """Whether its launch ended by itself. Raises OSError."""
    try:
        content = json.loads(storage.find(ALIVE + claim.nonce) or b"{}")
        return bool(content.get("released", False))
    except DAMAGE:
        return False


def take(
    storage: Storage, *, watch: float = WATCH_SECONDS, say: Callable[[str], None] = lambda _: None
) -> tuple[Claim, Claim | None]:
    """Takes a run over from a launch that is released, or shows no sign of life for `watch` seconds.

    Returns the new claim and the one before. Raises RunDirectoryBusy, naming the holder; OSError.
    """
    before = read_claim(storage)
    if before is not None and not is_released(storage, before):
        say(f"{before.holder} has not given {storage.url} back; watching for {watch:.0f} s whether it is alive")
        if is_alive(storage, before, watch):
            raise RunDirectoryBusy(f"run-dir: {storage.url} is in use ({before.holder}); stop it or choose another")
    known = [found.generation for name in storage.names() if (found := stamp_of(name))]
    generation = 1 + max([before.generation if before else 0, *known])  # somebody may have removed the lock
    claim = Claim(f"process {os.getpid()} on {socket.gethostname()}", uuid.uuid4().hex, generation)
    beat(storage, claim, 0)
    storage.put(LOCK, json.dumps(claim._asdict()).encode())
    time.sleep(SETTLE_SECONDS if watch else 0.0)
    present = read_claim(storage)
    if present is None or present.nonce != claim.nonce:
        raise RunDirectoryBusy(
            f"run-dir: {storage.url} is in use ({present.holder if present else 'unknown'}), since a moment ago"
        )
    return claim, before


def is_alive(storage: Storage, claim: Claim | None, seconds: float = STATUS_SECONDS) -> bool:
    """Whether the holder's counter, the lock or the run's summary changes within so many seconds. Raises OSError."""
    first, deadline = _signs(storage, claim), time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(1.0, seconds / 4))
        now = _signs(storage, claim)
        if now != first:  # whoever gives it back changes something too
            return now[0] != first[0] or claim is None or not is_released(storage, claim)
    return False


def _signs(storage: Storage, claim: Claim | None) -> tuple[bytes | None, ...]:
    names = [LOCK, "summary.json", *([ALIVE + claim.nonce] if claim and claim.nonce else [])]
    return tuple(storage.find(name) for name in names)
