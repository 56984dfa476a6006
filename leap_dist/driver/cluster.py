"""Starting Ray on this machine, joining a cluster, and leaving either without leaving processes behind."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import parameter, services, utils
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.driver.auth import prepare_local, prepare_to_join, restore
from leap_dist.driver.errors import ClusterError
from leap_dist.driver.memory import prepare_monitor
from leap_dist.driver.signals import SIGNALS
from leap_dist.driver.waiting import last_line

CODE = Path(__file__).parents[1]
"""The package directory, which Ray ships to nodes that have no checkout."""

LOCAL_OBJECT_STORE = 512 * 2**20
"""Size in bytes. Snapshots are a few megabytes each; by default, Ray would reserve a third of the memory."""

END_SECONDS = 3.0
"""How long Ray's processes may take to end by themselves after the shutdown."""

_MARK = "LEAP_DIST_CLUSTER"
"""Environment variable that identifies the processes of a local Ray."""

LONGEST_TEMP_DIR = 107 - len("/session_2026-01-31_12-00-00_000000_4194304/sockets/plasma_store")
"""Length in bytes of the longest directory in which Ray can make its sockets: their paths are limited to 107 bytes."""

log = logging.getLogger(__name__)

AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
"""Ports of the agents of a node, by the names of Ray's parameters."""

PORTS = range(20_000, 32_000)
"""Range of these ports: above those of Ray's workers, and below those that Linux assigns to connections."""

_at_disconnect = contextlib.ExitStack()
_abandoned = False


def connect(config: Config) -> None:
    """Start Ray on this machine, or join the running cluster at `config.address`. `disconnect` must follow.

    Raises ConfigError if no cluster answers, or if it refuses us; see auth.py.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    common: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if config.address == "local":
        _start_local(common)
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


def _start_local(common: dict[str, Any]) -> None:
    """Start Ray on this machine, with a second attempt if the first takes too long.

    Raises ConfigError if Ray cannot write its files, or ClusterError.
    """
    try:
        _try_to_start_local(common)
    except ClusterError as error:
        if "timed out" not in str(error):
            raise
        log.warning("Ray did not start in time, probably because this machine is busy; trying once more")
        _try_to_start_local(common)


def _try_to_start_local(common: dict[str, Any]) -> None:
    prepare_local()
    _at_disconnect.callback(restore)
    try:
        prepare_monitor()
        temp_dir = _temp_dir()
        with _marked(), _signals_stay_ours(), _agents_with_ports(), _without_services():
            ray.init(
                "local",
                num_cpus=_processors(),
                include_dashboard=False,
                object_store_memory=LOCAL_OBJECT_STORE,
                _temp_dir=temp_dir,
                **common,
            )
    except BaseException as error:
        disconnect()
        if isinstance(error, OSError):
            raise ConfigError(
                f"address: Ray cannot write its files ({error.strerror or error}); set RAY_TMPDIR to another directory"
            ) from None
        if isinstance(error, Exception):
            raise ClusterError(f"Ray cannot be started on this machine: {last_line(error)}") from None
        raise


def _processors() -> int | None:
    """Return the number of processors that this process may use if Ray would count more, or else None.

    Ray considers a container's limit, but neither the CPU affinity nor the set of processors that a batch system such
    as Slurm gives to a job. RAY_OVERRIDE_RESOURCES still takes precedence.
    """
    usable = len(os.sched_getaffinity(0))
    return usable if usable < utils.get_num_cpus(override_docker_cpu_warning=True) else None


@contextlib.contextmanager
def _agents_with_ports() -> Iterator[None]:
    """Assign ports to the agents of a node that is started in this context.

    If Ray chooses the ports itself, the node waits until its agents have written them to files, and dies if that takes
    15 s, as it does on a busy machine (ray-project/ray#65983).
    """
    ports = dict(zip(AGENT_PORTS, _free_ports(len(AGENT_PORTS)), strict=True))
    make_parameters, start_process = parameter.RayParams, services.start_ray_process

    def with_ports(**arguments: Any) -> Any:
        return make_parameters(**{**arguments, **ports})

    def start(command: list[str], process_type: str, *arguments: Any, **more: Any) -> Any:
        if process_type == PROCESS_TYPE_RAYLET:  # Ray passes this port to the agent, but not to the node
            command = [*command, f"--dashboard_agent_listen_port={ports['dashboard_agent_listen_port']}"]
        return start_process(command, process_type, *arguments, **more)

    parameter.RayParams, services.start_ray_process = with_ports, start  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        parameter.RayParams, services.start_ray_process = make_parameters, start_process  # type: ignore[misc]


@contextlib.contextmanager
def _without_services() -> Iterator[None]:
    """Start Ray in this context without the services that a run on one machine does not need.

    These are the monitor of the autoscaler, the monitor of logs, and the server of the dashboard, which Ray starts and
    waits for even if no dashboard is wanted. Each is a Python process whose imports take seconds. The agents of the
    node are kept; one of them offers the metrics.
    """
    make_parameters, start_dashboard = parameter.RayParams, services.start_api_server

    def bare(**arguments: Any) -> Any:
        return make_parameters(**{**arguments, "no_monitor": True, "include_log_monitor": False})

    parameter.RayParams = bare  # type: ignore[assignment, misc]
    services.start_api_server = lambda *arguments, **more: (None, None)  # what it returns without a server
    try:
        yield
    finally:
        parameter.RayParams, services.start_api_server = make_parameters, start_dashboard  # type: ignore[misc]


def _free_ports(count: int) -> list[int]:
    """Return unused ports, drawn from PORTS.

    Other runs may start at the same time, so the ports are drawn at random. The system itself assigns none of PORTS.
    """
    candidates = random.SystemRandom().sample(PORTS, len(PORTS))
    found = (port for port in candidates if _is_free(port))
    return list(itertools.islice(found, count))


def _is_free(port: int) -> bool:
    with socket.socket() as trial, contextlib.suppress(OSError):
        trial.bind(("", port))
        return True
    return False


def _temp_dir() -> str | None:
    """Return a directory for Ray's files if its default is too long for the paths of sockets, else None."""
    if len(os.fsencode(get_default_ray_temp_dir())) <= LONGEST_TEMP_DIR:
        return None
    short = tempfile.mkdtemp(prefix="leap-ray-", dir="/tmp")
    _at_disconnect.callback(shutil.rmtree, short, ignore_errors=True)
    return short


def disconnect() -> None:
    """Shut Ray down, and end all processes of a local Ray, even those that Ray forgets when it is shut down early."""
    if not _abandoned:
        ray.shutdown()
        _at_disconnect.close()


@contextlib.contextmanager
def _marked() -> Iterator[None]:
    """Mark the processes that start in this context, and their descendants: `disconnect` ends them."""
    os.environ[_MARK] = mark = uuid.uuid4().hex
    _at_disconnect.callback(_end_processes, mark)
    try:
        yield
    finally:
        del os.environ[_MARK]


def _end_processes(mark: str) -> None:
    """Give the processes with this mark time to end by themselves, then kill those that are left."""
    deadline = time.monotonic() + END_SECONDS
    while (left := _processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def abandon(*, exit_code: int) -> None:
    """Leave a cluster whose head node is gone. Ray's own shutdown would wait for the head for a minute.

    `disconnect` does nothing from now on, and the process will end with this exit code.
    """
    global _abandoned
    _abandoned = True
    atexit.register(_exit_at_once, exit_code)


def _exit_at_once(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _processes(mark: str) -> list[int]:
    """Return the processes with this mark; none if the system has no /proc."""
    wanted, found = f"{_MARK}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


@contextlib.contextmanager
def _signals_stay_ours() -> Iterator[None]:
    """Keep Ray, while it starts, from catching our signals and from sharing our process group.

    Its Python handler would end this process in the middle of the start, and its C++ handler prints a stack. Its
    processes run in their own sessions, so that they get no signal that is sent to the whole group, as when a terminal
    is closed: only this process ends them, in order.
    """
    set_handler, die_with_parent = utils.set_sigterm_handler, utils.set_kill_on_parent_death_linux
    core_worker = ray._raylet.CoreWorker  # type: ignore[attr-defined]

    def start_session() -> None:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        die_with_parent()  # type: ignore[no-untyped-call]

    utils.set_sigterm_handler = lambda handler: None
    utils.set_kill_on_parent_death_linux = start_session
    ray._raylet.CoreWorker = lambda *arguments: _keeping_handlers(core_worker, *arguments)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        utils.set_sigterm_handler, utils.set_kill_on_parent_death_linux = set_handler, die_with_parent
        ray._raylet.CoreWorker = core_worker  # type: ignore[attr-defined]


def _keeping_handlers(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call Ray's C++ code, which replaces signal handlers, and put ours back.

    A signal that arrives in the meantime still reaches our handlers. But Ray's handler also prints a stack, and it sets
    an alarm that would end the process after three seconds; leap_dist/cli/entry.py blocks that alarm.
    """
    if threading.current_thread() is not threading.main_thread():
        return call(*arguments)
    handlers = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)}
    timer_is_off = signal.getitimer(signal.ITIMER_REAL)[0] == 0
    try:
        with _discarded_stderr():
            return call(*arguments)
    finally:
        if timer_is_off:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, signal.SIG_IGN)  # forgets an alarm that is blocked
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _discarded_stderr() -> Iterator[None]:
    """Discard what native code prints to standard error."""
    before, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
