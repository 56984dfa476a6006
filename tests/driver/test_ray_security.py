"""Real clusters with and without a token: who is let in, who is refused in one line, and where ours listens."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import ray
from ray._private import ray_constants

from leap_dist.cli import main as launch
from leap_dist.config.loading import resolve
from leap_dist.driver import auth, cluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]

ROOT = Path(__file__).parents[2]
HOSTS = {
    "ours": "from leap_dist.config.loading import resolve; from leap_dist.driver import cluster; "
    "cluster.connect(resolve('smoke'))",
    "open": "import ray; ray.init('local', include_dashboard=False, num_cpus=1, object_store_memory=100 * 2**20)",
}
"""What starts a cluster: as a run does, and without authentication."""


class Host(NamedTuple):
    """A process that keeps a cluster."""

    address: str
    token: str
    """That its cluster asks for; empty for none."""
    process: subprocess.Popen[str]
    home: Path


@pytest.fixture(scope="module")
def hosts() -> Iterator[dict[str, Host]]:
    """Both, told by their environment to ask for no token."""
    with tempfile.TemporaryDirectory(prefix="ld", ignore_cleanup_errors=True) as folder:  # short: Ray puts sockets here
        started = {}
        for name, start in HOSTS.items():
            home = Path(folder, name)
            home.mkdir()
            script = (
                f"import os, ray; {start}; token = os.environ.get('RAY_AUTH_TOKEN', ''); "
                "print(ray.get_runtime_context().gcs_address, token, sep=',', flush=True); input()"
            )
            loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} if name == "open" else {}
            environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
            environment |= {"HOME": str(home), "RAY_TMPDIR": str(home), "RAY_AUTH_MODE": "disabled", **loopback}
            started[name] = home, subprocess.Popen(
                [sys.executable, "-c", script], cwd=ROOT, env=environment, text=True, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        try:
            yield {name: Host(*process.stdout.readline().strip().split(","), process, home)  # type: ignore[union-attr]
                   for name, (home, process) in started.items()}  # fmt: skip
        finally:
            for _, process in started.values():
                process.stdin.close()  # type: ignore[union-attr]
            for _, process in started.values():
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()  # and Ray's reaper ends the others
                    process.wait()


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path) -> Iterator[Path]:
    """A user without a token, on the machine of the clusters, which listen on loopback."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
    yield tmp_path
    ray.shutdown()


def refused(capfd, tmp_path: Path, address: str, *more: str) -> str:
    """The one line that `launch.py train` ends with, after its plan. It says so at once."""
    started = time.monotonic()
    with pytest.raises(SystemExit) as caught:
        launch.main(["train", "--preset", "smoke", "--run-dir", str(tmp_path / "run"), "--address", address, *more])
    assert time.monotonic() - started < 10
    captured = capfd.readouterr()
    assert (caught.value.code, captured.err.count("\n")) == (2, 1), captured.err
    assert not ray.is_initialized()
    return captured.err.removeprefix("leap-dist: error: address: ").rstrip()


def join(address: str, **settings: object) -> None:
    """Joins, and runs something there."""
    cluster.connect(resolve("smoke", {"address": address, **settings}))
    assert ray.get(ray.remote(num_cpus=0)(lambda: os.getpid()).remote(), timeout=30) != os.getpid()


def descendants(pid: int) -> list[int]:
    children = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            children.setdefault(int(status.read_text().rpartition(")")[2].split()[1]), []).append(
                int(status.parent.name)
            )
        except OSError:
            continue
    found, waiting = [], [pid]
    while waiting:
        found += (own := children.get(waiting.pop(), []))
        waiting += own
    return found


def listeners(pids: list[int]) -> list[str]:
    """The addresses that processes listen on, as the kernel writes them."""
    sockets = {}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            local, state, inode = (line.split()[i] for i in (1, 3, 9))
            if state == "0A":
                sockets[f"socket:[{inode}]"] = local.partition(":")[0]
    found = []
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                found += [sockets[target]] if (target := os.readlink(handle)) in sockets else []
            except OSError:
                continue
    return found


def test_without_a_token_nobody_is_let_in(hosts, capfd, tmp_path):
    line = refused(capfd, tmp_path, hosts["ours"].address)
    assert line == (
        f"the cluster at {hosts['ours'].address!r} asks for a token, but there is none here; copy the file "
        f"{tmp_path}/.ray/auth_token from where it was started, or set RAY_AUTH_TOKEN_PATH"
    )
    assert "asks for a token" in refused(capfd, tmp_path / "2", hosts["ours"].address, "--insecure")


def test_with_a_wrong_token_nobody_is_let_in(hosts, capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef")
    line = refused(capfd, tmp_path, hosts["ours"].address)
    assert (
        line
        == f"the cluster at {hosts['ours'].address!r} refused the token of RAY_AUTH_TOKEN; copy the token that it uses"
    )


def test_with_the_token_one_is_let_in(hosts, monkeypatch):
    assert not list(hosts["ours"].home.rglob("auth_token")), "nobody else needs it, so it is written nowhere"
    monkeypatch.setenv("RAY_AUTH_TOKEN", hosts["ours"].token)
    join(hosts["ours"].address)


def test_a_cluster_without_authentication_is_refused(hosts, capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef")
    line = refused(capfd, tmp_path, hosts["open"].address)
    assert line == (
        f"the cluster at {hosts['open'].address!r} runs without token authentication, so whoever reaches it can run "
        "code here; start it with RAY_AUTH_MODE=token, or give --insecure"
    )


def test_a_cluster_without_authentication_is_joined_where_that_was_said(hosts):
    join(hosts["open"].address, insecure=True)


def test_a_cluster_of_ours_listens_on_loopback_only(hosts):
    pid = hosts["ours"].process.pid
    found = listeners([pid, *descendants(pid)])
    assert len(found) >= 5, "the head, the node, the driver and their agents"
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert set(found) <= loopback


def test_where_nothing_answers_that_is_said_in_seconds(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(auth, "PROBE_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        line = refused(capfd, tmp_path, address)
        assert line == f"no Ray cluster answers at {address!r} (deadline exceeded); start one, or use local"
    line = refused(capfd, tmp_path / "2", address)
    assert line == f"no Ray cluster answers at {address!r} (unavailable); start one, or use local"
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert (
        refused(capfd, tmp_path / "3", "auto") == "auto follows RAY_ADDRESS, which says local; unset it, or use local"
    )
