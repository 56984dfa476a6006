"""Starting Ray on this machine, joining a cluster, and leaving either without leaving processes behind."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray._private import utils
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.driver.auth import prepare_local, prepare_to_join

CODE = Path(__file__).parents[1]
"""The package directory, which Ray ships to nodes that have no checkout."""

LOCAL_OBJECT_STORE = 512 * 2**20
"""Bytes. Snapshots are a few megabytes each; by default Ray would reserve a third of the memory."""

END_SECONDS = 3.0
"""How long Ray's processes may take to end by themselves after the shutdown."""

_MARK = "LEAP_DIST_CLUSTER"
"""Environment variable by which the processes of a local Ray are recognized."""

_mark = ""
_abandoned = False


def connect(config: Config) -> None:
    """Start Ray on this machine, or join the running cluster at `config.address`. `disconnect` must follow.

    Raises ConfigError where no cluster answers or it does not let us in; see auth.py.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    common: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if config.address == "local":
        prepare_local()
        with _marked(), _signals_stay_ours():
            ray.init("local", include_dashboard=False, object_store_memory=LOCAL_OBJECT_STORE, **common)
        return
    address = prepare_to_join(config.address, insecure=config.insecure)
    if RAY_JOB_CONFIG_JSON_ENV_VAR not in os.environ:  # `ray job submit` ships its working directory itself
        common["runtime_env"] = {"py_modules": [str(CODE)]}
    try:
        with _signals_stay_ours():
            ray.init(address, **common)
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(
            f"address: the cluster at {address!r} answers, but cannot be joined from here ({error}); "
            "run this on one of its nodes, with the same versions of Python and Ray"
        ) from None


def disconnect() -> None:
    """Shut Ray down, and end all processes of a local Ray, even those that Ray forgets when it is shut down early."""
    global _mark
    if _abandoned:
        return
    ray.shutdown()
    if not _mark:
        return
    deadline = time.monotonic() + END_SECONDS
    while (left := _processes(_mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _mark = ""


def abandon(*, exit_code: int) -> None:
    """Leave a cluster whose head node is gone: Ray's own shutdown would wait for it for a minute.

    `disconnect` does nothing from now on, and the process will end with this exit code.
    """
    global _abandoned
    _abandoned = True
    atexit.register(_exit_at_once, exit_code)


def _exit_at_once(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def _marked() -> Iterator[None]:
    """Mark the processes that start in this context, and their descendants."""
    global _mark
    os.environ[_MARK] = _mark = uuid.uuid4().hex
    try:
        yield
    except BaseException:
        disconnect()
        raise
    finally:
        del os.environ[_MARK]


def _processes(mark: str) -> list[int]:
    """Return the processes with this mark; none where the system has no /proc."""
    wanted, found = f"{_MARK}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


@contextlib.contextmanager
def _signals_stay_ours() -> Iterator[None]:
    """Keep Ray, while it starts, from catching SIGTERM and from sharing our process group.

    Its handler would end this process in the middle of the start. In sessions of their own, its processes hear no
    signal that goes to the whole group, as when a terminal is closed: this process alone ends them, in order.
    """
    set_handler, die_with_parent = utils.set_sigterm_handler, utils.set_kill_on_parent_death_linux

    def start_session() -> None:
        os.setsid()
        die_with_parent()  # type: ignore[no-untyped-call]

    utils.set_sigterm_handler = lambda handler: None
    utils.set_kill_on_parent_death_linux = start_session
    try:
        yield
    finally:
        utils.set_sigterm_handler, utils.set_kill_on_parent_death_linux = set_handler, die_with_parent
