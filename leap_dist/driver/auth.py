"""Finding the cluster that the user means, and authentication: its token, and the interfaces a local one listens on.

Whoever may talk to a Ray cluster can run code on all of its nodes. Therefore a cluster is never started without a
token, and one that asks for none is joined only with `--insecure`. See docs/security.md.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import secrets
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import grpc
import ray
from ray._common.usage.usage_lib import get_cluster_metadata
from ray._common.utils import get_default_ray_temp_dir
from ray._private import ray_constants
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import AuthenticationTokenLoader, GcsClient  # type: ignore[attr-defined]
from ray._raylet import Config as RayConfig  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from leap_dist.config.loading import ConfigError
from leap_dist.storage import auth_token

_ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER
"""Whether this system can be part of a cluster, as Ray found it."""
PROBE_SECONDS = 10.0
"""Time limit for a cluster's answer."""


_CHANGED = ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE", ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR)
_before: dict[str, str | None] = {}
"""Original values of the environment variables that a local cluster changes; empty while there is none."""


def prepare_local() -> None:
    """Make the next `ray.init("local")` require a new token and listen on loopback only.

    Only the cluster's own processes need that token, so it is made for this one cluster. `restore` must follow.
    """
    _before.update({name: os.environ.get(name) for name in _CHANGED})
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    _set_mode("token")
    # Ray listens on every interface, whatever address it is given, unless this system cannot be part of a cluster. The
    # environment variable is for the processes that Ray starts; this process has read it already.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


def restore() -> None:
    """Forget the token of a local cluster that has ended, and let this process join another cluster."""
    for name, value in _before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _before.clear()
    _read_mode()
    ray_constants.ENABLE_RAY_CLUSTER = _ENABLE_RAY_CLUSTER


def prepare_to_join(address: str, *, insecure: bool) -> str:
    """Check that the cluster asks for a token and accepts ours. Returns the address for `ray.init`.

    Raises ConfigError if nothing answers there, the cluster runs without authentication and `insecure` is not set,
    there is no token, another user would get it, the cluster refuses it, or it runs another version of Ray or Python.
    """
    found = find_cluster(address)
    _set_mode("disabled")
    if _lets_in(found, address):
        if not insecure:
            raise ConfigError(
                f"address: the cluster at {found!r} runs without token authentication, so whoever reaches it can run "
                "code here; start it with RAY_AUTH_MODE=token, or give --insecure"
            )
        _require_versions(found)
        return found
    token = auth_token.find()
    if token is None:
        raise ConfigError(
            f"address: the cluster at {found!r} asks for a token, but there is none here; copy the file "
            f"{auth_token.default_path()} from where it was started, or set RAY_AUTH_TOKEN_PATH"
        )
    require_trusted_listener(found, address)
    _set_mode("token")
    if not _lets_in(found, address):
        raise ConfigError(
            f"address: the cluster at {found!r} refused the token of {token.source}; copy the token that it uses"
        )
    _require_versions(found)
    return found


def _require_versions(found: str) -> None:
    """Raise ConfigError if the cluster runs another version of Ray or Python, which cannot talk to this one."""
    try:
        there = get_cluster_metadata(GcsClient(address=found))
        theirs = {"Ray": str(there["ray_version"]), "Python": str(there["python_version"])}
    except Exception:  # the interface is not public; joining fails with a longer message
        return
    ours = {"Ray": ray.__version__, "Python": platform.python_version()}
    if theirs != ours:
        raise ConfigError(
            f"address: the cluster at {found!r} runs {_listed(theirs)}, but this program runs {_listed(ours)}; install "
            "the cluster's versions here, or start the program on one of its nodes"
        )


def _listed(versions: dict[str, str]) -> str:
    return " and ".join(f"{name} {version[:40]}" for name, version in versions.items())


def _set_mode(mode: str) -> None:
    """Set the authentication mode of this process and its children, even if Ray has read another one before."""
    os.environ["RAY_AUTH_MODE"] = mode
    _read_mode()


def _read_mode() -> None:
    """Let Ray's native code read the environment again."""
    RayConfig.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _lets_in(found: str, address: str) -> bool:
    """Return whether the cluster at `found` answers a call made in the current mode.

    Raises ConfigError, which names the `address` that the user gave, if nothing answers.
    """
    with init_grpc_channel(found, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=PROBE_SECONDS)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return False
            raise ConfigError(
                f"address: no Ray cluster answers at {address!r} ({error.code().name.lower().replace('_', ' ')}); "
                "start one, or use local"
            ) from None
    return True


_LISTENING = "0A"  # as /proc/net/tcp writes it
_TRUSTED = frozenset({0})
"""Users whose processes may get our token; root can read it anyway."""


def find_cluster(address: str) -> str:
    """Return HOST:PORT of the cluster that the user means. Raises ConfigError.

    `auto` is RAY_ADDRESS, or else a cluster that this user runs on this machine: the newest one according to the file
    that `ray start` writes, or the only one that has processes. Ray itself would also trust a file in /tmp or a
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
    """Return the address in the file that `ray start` writes, or None if it is not a file of this user."""
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
    """Raise ConfigError if another user of this machine listens at HOST:PORT `found`.

    The token is sent in plain text, so whoever listens there could use it. On another machine, the owner of a port
    cannot be determined; only TLS (RAY_USE_TLS) proves who answers there.
    """
    host, _, port = found.rpartition(":")
    try:
        owners = _listeners(host.strip("[]"), int(port))
    except (OSError, ValueError):  # without /proc, the owner is unknown
        return
    if owners and not owners & {*_TRUSTED, os.geteuid()}:
        raise ConfigError(
            f"address: the process at {address!r} belongs to another user (uid {min(owners)}), who would get your "
            "token; start a cluster of your own, or use local"
        )


def _listeners(host: str, port: int) -> set[int]:
    """Return the users whose processes listen at an address; empty if the address is not of this machine."""
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
