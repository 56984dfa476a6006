"""Authentication: the token of a cluster that is started or joined, and the interfaces that a local one listens on.

Whoever may talk to a Ray cluster can run code on all of its nodes. Therefore a cluster is never started without a
token, and one that asks for none is joined only with `--insecure`. See docs/security.md.
"""

from __future__ import annotations

import os
import platform
import secrets

import grpc
import ray
from ray._common.usage.usage_lib import get_cluster_metadata
from ray._private import ray_constants
from ray._private.grpc_utils import init_grpc_channel
from ray._raylet import AuthenticationTokenLoader, GcsClient  # type: ignore[attr-defined]
from ray._raylet import Config as RayConfig  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from leap_dist.config.loading import ConfigError
from leap_dist.driver.address import find_cluster, require_trusted_listener
from leap_dist.storage import auth_token

PROBE_SECONDS = 10.0
"""Time limit for a cluster's answer."""


_token_before: str | None = None


def prepare_local() -> None:
    """Make the next `ray.init("local")` ask for a token of its own and listen on loopback only.

    Nobody but its own processes needs that token, so it is made for this one cluster. `restore` must follow.
    """
    global _token_before
    _token_before = os.environ.get("RAY_AUTH_TOKEN")
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    _set_mode("token")
    # Ray listens on every interface, whatever address it is given, unless this system cannot be part of a cluster. The
    # environment variable is for the processes that Ray starts; this process has read it already.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


def restore() -> None:
    """Forget the token of a local cluster that has ended."""
    if _token_before is None:
        os.environ.pop("RAY_AUTH_TOKEN", None)
    else:
        os.environ["RAY_AUTH_TOKEN"] = _token_before


def prepare_to_join(address: str, *, insecure: bool) -> str:
    """Check that the cluster asks for a token and accepts ours. Returns the address for `ray.init`.

    Raises ConfigError where nothing answers there, the cluster runs without authentication and `insecure` is not set,
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
            f"address: the cluster at {found!r} asks for a token, and there is none here; copy the file "
            f"{auth_token.default_path()} from where it was started, or set RAY_AUTH_TOKEN_PATH"
        )
    require_trusted_listener(found, address)
    _set_mode("token")
    if not _lets_in(found, address):
        raise ConfigError(f"address: the cluster at {found!r} refused the token of {token.source}; get the one it has")
    _require_versions(found)
    return found


def _require_versions(found: str) -> None:
    """Raise ConfigError where the cluster runs another version of Ray or Python, which cannot talk to this one."""
    try:
        there = get_cluster_metadata(GcsClient(address=found))
        theirs = {"Ray": str(there["ray_version"]), "Python": str(there["python_version"])}
    except Exception:  # the interface is not public; joining fails with a longer message
        return
    ours = {"Ray": ray.__version__, "Python": platform.python_version()}
    if theirs != ours:
        raise ConfigError(
            f"address: the cluster at {found!r} runs {_listed(theirs)}, this is {_listed(ours)}; install the same "
            "here, or start this on one of its nodes"
        )


def _listed(versions: dict[str, str]) -> str:
    return " and ".join(f"{name} {version[:40]}" for name, version in versions.items())


def _set_mode(mode: str) -> None:
    """Set the authentication mode of this process and its children, even if Ray has read another one before."""
    os.environ["RAY_AUTH_MODE"] = mode
    RayConfig.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _lets_in(found: str, address: str) -> bool:
    """Return whether the cluster at `found` answers a call made in the current mode.

    Raises ConfigError, which names the `address` that the user gave, where nothing answers.
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
