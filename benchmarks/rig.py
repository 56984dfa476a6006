"""Run a training run on a local cluster of several nodes and inject faults into both, for chaos.py.

Everything lives in one temporary folder: HOME, Ray's files and the workers' audit. Where mounting is permitted, the run
directory has a small file system of its own, so that the disk can fill up. Every process is marked in its environment;
`close` ends all marked processes, no matter which process started them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parent.parent
PR_SET_CHILD_SUBREAPER = 36
DISK_BYTES = 1 << 30
HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
"""Health-check settings of Ray's head node, which detect a dead node within about a second."""
FAILURES = "RAY_testing_rpc_failure"
LOST = json.dumps(
    {
        "CoreWorkerService.grpc_client.PushTask": {
            "num_failures": 10**6,  # per process
            "req_failure_prob": 3,
            "resp_failure_prob": 3,
            "in_flight_failure_prob": 0,
        }
    }
)
"""Failure rates on the worker nodes: percentage of the workers' calls whose request or reply is lost."""


class Rig:
    """Cluster and training run. As a context manager, it leaves no process or file behind."""

    def __init__(self, *, nodes: int, lossy: bool, disk: bool) -> None:
        """Prepare the rig without starting anything; orphaned descendants become its children from now on.

        Args:
            nodes: Number of worker nodes.
            lossy: Whether part of the workers' calls to the server are lost.
            disk: Whether to mount a separate file system for the run directory, if permitted.
        """
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._wanted_nodes = nodes
        self.lossy = lossy
        self.folder = Path(tempfile.mkdtemp(prefix="lc-"))
        self.run_dir = self.folder / "disk" / "run"
        self.audit_dir = self.folder / "audit"
        self.log = self.folder / "launch.log"
        for path in ("home", "ray", "audit", "disk"):
            (self.folder / path).mkdir()
        self.has_disk = disk and _mount(self.folder / "disk")
        self._cluster: Any = None
        self._driver: subprocess.Popen[bytes] | None = None
        self._audited: dict[Path, int] = {}
        self._durable = 0

    def __enter__(self) -> Rig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Starting and ending -----------------------------------------------------------------------------------------

    def start_cluster(self) -> None:
        """Start the head node, which hosts driver, server and run directory but no workers; then the worker nodes."""
        token = self.folder / "home" / ".ray" / "auth_token"
        token.parent.mkdir()
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", FAILURES):
            os.environ.pop(name, None)
        os.environ |= {
            "HOME": str(self.folder / "home"),
            "RAY_TMPDIR": str(self.folder / "ray"),
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "LEAP_AUDIT": str(self.audit_dir),
        }
        from ray.cluster_utils import Cluster  # reads the environment

        self._cluster = Cluster(shutdown_at_exit=False)  # the exit hook would shield this process from Ctrl-C
        self._cluster.add_node(num_cpus=0, include_dashboard=False, _system_config=HEALTH_CHECKS)
        for _ in range(self._wanted_nodes):
            self.add_node()

    def add_node(self) -> None:
        """Add one worker node with one CPU."""
        if self.lossy:
            os.environ[FAILURES] = LOST
        try:
            self._cluster.add_node(num_cpus=1)
        finally:
            os.environ.pop(FAILURES, None)

    def start_driver(self, arguments: Sequence[str]) -> None:
        """Start `launch.py train` on the head node."""
        command = [sys.executable, "launch.py", "train", "--run-dir", str(self.run_dir), *arguments]
        with self.log.open("ab") as log:
            self._driver = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def close(self) -> None:
        """End every process of the rig and remove the folder. Idempotent."""
        if self._driver is not None:
            self._driver.kill()
            self._driver.wait()
        deadline = time.monotonic() + 20
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                _signal(pid, signal.SIGKILL)
            _reap()
            time.sleep(0.1)
        disk = self.folder / "disk"
        if self.has_disk and subprocess.run(["umount", str(disk)], capture_output=True, check=False).returncode:
            subprocess.run(["umount", "--lazy", str(disk)], check=False)
        self.has_disk = False
        shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def processes() -> set[int]:
        """Return the live processes below this one."""
        children: dict[int, list[int]] = {}
        for path in Path("/proc").iterdir():
            if path.name.isdigit() and (parent := _parent(path)) is not None:
                children.setdefault(parent, []).append(int(path.name))
        found: set[int] = set()
        left = children.get(os.getpid(), [])
        while left:
            found.update(left)
            left = [child for parent in left for child in children.get(parent, [])]
        return found

    def keep(self, folder: Path) -> None:
        """Copy the run directory, audit and logs to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for source, name in (
            (self.run_dir, "run"),
            (self.audit_dir, "audit"),
            *((path / "logs", "ray") for path in (self.folder / "ray").glob("ray/session_2*")),
        ):
            if source.exists():
                shutil.copytree(source, folder / name, dirs_exist_ok=True, ignore_dangling_symlinks=True)
        if self.log.exists():
            shutil.copy(self.log, folder)

    # Observing ---------------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Address of the cluster."""
        return str(self._cluster.address)

    @property
    def driver_pid(self) -> int:
        """Process ID of launch.py."""
        assert self._driver is not None
        return self._driver.pid

    def driver_ended(self) -> int | None:
        """Return the exit code of launch.py, or None while it runs."""
        assert self._driver is not None
        return self._driver.poll()

    def wait_driver(self, seconds: float) -> int | None:
        """Return the exit code of launch.py, or None if it does not exit in time."""
        assert self._driver is not None
        try:
            return self._driver.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def summary(self) -> dict[str, Any]:
        """Return the contents of summary.json, or an empty dict if there is none."""
        try:
            found: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found

    def leases(self) -> set[str]:
        """Return the names of all open leases, from the journal."""
        return {path.stem.removeprefix("lease-") for path in (self.run_dir / "journal").glob("lease-*.json")}

    def durable(self) -> int:
        """Return how many times workers have been told that a contribution is durable."""
        for path in self.audit_dir.glob("*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._audited.get(path, 0))
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._audited[path] = self._audited.get(path, 0) + len(whole)
            self._durable += whole.count(b'"event": "durable"')
        return self._durable

    def lost_messages(self) -> tuple[int, int]:
        """Return the numbers of requests and replies that Ray logged as dropped."""
        logs = [
            path.read_bytes() for path in (self.folder / "ray").glob("ray/session_2*/logs/python-core-worker-*.log")
        ]
        requests = sum(log.count(b"Inject RPC request failure") for log in logs)
        return requests, sum(log.count(b"Inject RPC response failure") for log in logs)

    def nodes(self) -> list[Any]:
        """Return the worker nodes in the order in which they joined."""
        return sorted(self._cluster.worker_nodes, key=lambda node: _raylet(node))

    def workers_on(self, node: Any) -> set[int]:
        """Return the processes that a node's raylet has started."""
        children = Path(f"/proc/{_raylet(node)}/task/{_raylet(node)}/children")
        try:
            return {int(pid) for pid in children.read_text().split()}
        except OSError:
            return set()

    # Breaking ----------------------------------------------------------------------------------------------------

    def send(self, pid: int, number: signal.Signals) -> bool:
        """Send a signal to a process of the rig. Return False if there is no such process."""
        return pid in self.processes() and _signal(pid, number)

    def kill_driver(self) -> None:
        """Send SIGKILL to the driver."""
        assert self._driver is not None
        self._driver.kill()
        self._driver.wait()

    def kill_node(self, node: Any) -> None:
        """Send SIGKILL to a node's raylet and all of its processes, as if the machine had died."""
        self._cluster.remove_node(node, allow_graceful=False)

    def fill_disk(self) -> None:
        """Fill the remaining disk space. Call it repeatedly, because space may be freed meanwhile."""
        block = bytes(1 << 20)
        with contextlib.suppress(OSError), (self.folder / "disk" / "ballast").open("ab", buffering=0) as file:
            while True:
                if file.write(block) < len(block):
                    block = block[: len(block) // 2] or block

    def free_disk(self) -> None:
        """Free the space that `fill_disk` took."""
        (self.folder / "disk" / "ballast").unlink(missing_ok=True)


def resident(pid: int) -> int | None:
    """Return a process's resident memory in bytes, or None if there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return None


def _parent(process: Path) -> int | None:
    """Return the parent of a process, or None if the process is dead."""
    try:
        state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state == "Z" else int(parent)


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _mount(folder: Path) -> bool:
    """Mount a file system in memory. Return False if that is not permitted."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700", "leap-chaos", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
