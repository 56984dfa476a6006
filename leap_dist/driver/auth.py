"""Who may use a Ray cluster: the token for one that is started or joined, and where a started one listens.

Whoever may talk to a Ray cluster runs code on all of it, so a cluster is never started without a token, and one that
asks for none is joined only where that was said. See docs/security.md.
"""

from __future__ import annotations

import os
import platform

import grpc
import ray
from ray._common.usage.usage_lib import get_cluster_metadata
from ray._private import ray_constants, services
from ray._private.grpc_utils import init_grpc_channel
from ray._raylet import AuthenticationTokenLoader, GcsClient  # type: ignore[attr-defined]
from ray._raylet import Config as RayConfig  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from leap_dist.config.loading import ConfigError
from leap_dist.storage import auth_token

PROBE_SECONDS = 10.0  # that a cluster may take to answer


def prepare_local() -> None:
    """What `ray.init("local")` starts will ask for a token and listen on loopback only. Raises ConfigError."""
    auth_token.find_or_create()
    _set_mode("token")
    # Ray listens on every interface, whatever address it is given, unless it is told that this system cannot be part
    # of a cluster. The variable is for the processes that it starts; this one has read it already.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


def prepare_to_join(address: str, *, insecure: bool) -> str:
    """Makes sure that `ray.init` of the address that is returned will be let in, by a cluster that asks for a token.

    Raises ConfigError where nothing answers there, the cluster runs without authentication and `insecure` is not set,
    there is no token, the cluster refuses it, or was started with another version of Ray or Python.
    """
    try:
        found = services.canonicalize_bootstrap_address(address)
    except (OSError, ValueError) as error:
        raise ConfigError(f"address: no Ray cluster at {address!r} ({error}); start one, or use local") from None
    if found is None:
        raise ConfigError(f"address: {address} follows RAY_ADDRESS, which says local; unset it, or use local")
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
    _set_mode("token")
    if not _lets_in(found, address):
        raise ConfigError(f"address: the cluster at {found!r} refused the token of {token.source}; get the one it has")
    _require_versions(found)
    return found


def _require_versions(found: str) -> None:
    """Raises ConfigError where the cluster runs another Ray or Python: neither talks to the other."""
    try:
        there = get_cluster_metadata(GcsClient(address=found))
        theirs = {"Ray": str(there["ray_version"]), "Python": str(there["python_version"])}
    except Exception:  # not a public interface: joining says so too, in more words
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
    """Of this process and of those that it starts, whatever Ray has read before."""
    os.environ["RAY_AUTH_MODE"] = mode
    RayConfig.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _lets_in(found: str, address: str) -> bool:
    """Whether the cluster at `found` answers a call made in the present mode.

    Raises ConfigError, which names the `address` that was given, where nothing answers.
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
