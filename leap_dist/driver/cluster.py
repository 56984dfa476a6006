"""Starting Ray on this machine, joining a cluster, and leaving one whose head node is gone."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from pathlib import Path
from typing import Any

import ray
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.driver.auth import prepare_local, prepare_to_join

CODE = Path(__file__).parents[1]
"""The package directory, which Ray ships to nodes that have no checkout."""

LOCAL_OBJECT_STORE = 512 * 2**20
"""Bytes. Snapshots are a few megabytes each; by default Ray would reserve a third of the memory."""


class HeadLost(RuntimeError):
    """The cluster's head node went away during a session. The process must end without calling ray.shutdown."""


def connect(config: Config) -> None:
    """Start Ray on this machine, or join the running cluster at `config.address`.

    Raises ConfigError where no cluster answers or it does not let us in; see auth.py.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    common: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if config.address == "local":
        prepare_local()
        ray.init("local", include_dashboard=False, object_store_memory=LOCAL_OBJECT_STORE, **common)
        return
    address = prepare_to_join(config.address, insecure=config.insecure)
    if RAY_JOB_CONFIG_JSON_ENV_VAR not in os.environ:  # `ray job submit` ships its working directory itself
        common["runtime_env"] = {"py_modules": [str(CODE)]}
    try:
        ray.init(address, **common)
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(
            f"address: the cluster at {address!r} answers, but cannot be joined from here ({error}); "
            "run this on one of its nodes, with the same versions of Python and Ray"
        ) from None


def skip_shutdown_at_exit() -> None:
    """Make this process end without Ray's own shutdown, which waits a minute for a head node that is gone."""
    atexit.register(_exit_at_once)


def _exit_at_once() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
