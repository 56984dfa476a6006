"""The address of a cluster: what `auto` means, and who listens there. Nothing that another user wrote is believed."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from ray._common.utils import get_default_ray_temp_dir
from ray._private.services import canonicalize_bootstrap_address

from leap_dist.config.loading import ConfigError

_LISTENING = "0A"  # as /proc/net/tcp writes it
_TRUSTED = frozenset({0})
"""Users whose processes may get our token; root can read it anyway."""


def find_cluster(address: str) -> str:
    """Return HOST:PORT of the cluster that the user means. Raises ConfigError.

    `auto` is RAY_ADDRESS, or else a cluster that this user runs on this machine: the newest one according to the file
    that `ray start` writes, or the only one that has processes. Ray itself would also believe a file in /tmp or a
    command line that belongs to somebody else, and send our token and our code there.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or _own_cluster()
        if address == "local":
            raise ConfigError("address: auto follows RAY_ADDRESS, which says local; unset it, or use local")
    try:
        found: str | None = canonicalize_bootstrap_address(address)
    except (OSError, ValueError) as error:
        raise ConfigError(f"address: no Ray cluster at {address!r} ({error}); start one, or use local") from None
    if found is None:  # RAY_ADDRESS says auto
        raise ConfigError(f"address: no Ray cluster at {address!r}; give HOST:PORT, or use local")
    return found


def _own_cluster() -> str:
    running = sorted(set(_running_clusters()))
    recorded = _recorded_cluster(Path(get_default_ray_temp_dir()) / "ray_current_cluster")
    if recorded is not None and len(running) != 1:
        return recorded
    if not running:
        raise ConfigError("address: you run no Ray cluster on this machine; start one, give HOST:PORT, or use local")
    return running[0]


def _recorded_cluster(path: Path) -> str | None:
    """Return the address in the file that `ray start` writes, or None where it is not a file of this user."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(handle, errors="replace") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return None
        return file.read(200).strip() or None


def _running_clusters() -> Iterator[str]:
    """Yield the addresses that this user's raylets on this machine belong to."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.geteuid():
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if Path(words[0]).name == "raylet":
                    yield from (match[1] for word in words if (match := re.fullmatch(r"--gcs-address=(\S+:\d+)", word)))


def require_trusted_listener(found: str, address: str) -> None:
    """Raise ConfigError where another user of this machine listens at HOST:PORT `found`.

    A token is sent as it is, so whoever listens there could use it. For another machine this cannot be told; there,
    only TLS (RAY_USE_TLS) proves who answers.
    """
    host, _, port = found.rpartition(":")
    try:
        owners = _listeners(host.strip("[]"), int(port))
    except (OSError, ValueError):  # a system without /proc does not tell
        return
    if owners and not owners & {*_TRUSTED, os.geteuid()}:
        raise ConfigError(
            f"address: the process at {address!r} belongs to another user (uid {min(owners)}), who would get your "
            "token; start a cluster of your own, or use local"
        )


def _listeners(host: str, port: int) -> set[int]:
    """Return the users whose processes listen at an address of this machine; empty for another machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return set()
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            words = line.split()
            at, _, number = words[1].partition(":")
            if words[3] == _LISTENING and int(number, 16) == port and _covers(at, host):
                found.add(int(words[7]))
    return found


def _covers(at: str, host: str) -> bool:
    """Return whether a socket at an address, as /proc/net writes it, takes connections to `host`."""
    words = struct.pack(f"={len(at) // 8}I", *(int(at[i : i + 8], 16) for i in range(0, len(at), 8)))
    if not any(words):
        return True
    wanted = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    return words in (wanted, b"\0" * 10 + b"\xff\xff" + wanted)
