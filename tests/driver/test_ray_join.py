"""A cluster as its users make it, by `ray start`: one node has neither our code nor the head's storage.

That node lives in a mount namespace of its own, in which empty directories lie over them.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ray._raylet import GCS_AUTOSCALER_CLUSTER_CONFIG_KEY, GCS_AUTOSCALER_STATE_NAMESPACE, GcsClient
from ray.core.generated.autoscaler_pb2 import ClusterConfig
from service import ROOT, Launch

from leap_dist.driver import auth

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]

RAY = str(Path(sys.executable).with_name("ray"))
SMOKE = ["--preset", "smoke", "--worker.cpus", "0.5"]


class Joined(NamedTuple):
    """The cluster, and how to reach it."""

    address: str
    dashboard: str
    environment: dict[str, str]
    """Of whoever may."""
    hidden: Path
    """A directory that the node with the processors does not share."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def namespace(*hidden: Path) -> list[str]:
    """Starts what follows where these directories are empty."""
    mounts = " && ".join(f"mount -t tmpfs none {shlex.quote(str(path))}" for path in hidden)
    alone = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--user", "--map-root-user"]
    return [*alone, "sh", "-c", f'{mounts} && exec "$@"', "sh"]


@pytest.fixture(scope="module")
def joined() -> Iterator[Joined]:
    """A head without processors, which serves jobs, and a node with two and the label pool=spot."""
    with tempfile.TemporaryDirectory(prefix="ld", ignore_cleanup_errors=True) as folder:  # short: Ray puts sockets here
        (hidden := Path(folder, "hidden")).mkdir()
        (elsewhere := Path(folder, "elsewhere")).mkdir()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
        environment |= {"HOME": folder, "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1",
                        "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0"}  # fmt: skip
        port, dashboard = free_port(), free_port()
        address = f"127.0.0.1:{port}"
        start = [RAY, "start", "--block", "--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
        serve = ["--include-dashboard=true", f"--dashboard-port={dashboard}"]
        commands = [
            [*start, "--head", f"--port={port}", "--num-cpus=0", *serve],
            [*namespace(hidden, ROOT / "leap_dist", ROOT / "envs"), *start, f"--address={address}", "--num-cpus=2",
             "--labels=pool=spot"],
        ]  # fmt: skip
        processes = []
        with Path(folder, "ray.log").open("ab") as log:
            for count, command in enumerate(commands, 1):
                # What takes jobs has a port of its own, which other clusters on this machine would have too.
                command.append(f"--dashboard-agent-listen-port={free_port()}")
                processes.append(
                    subprocess.Popen(
                        command,
                        cwd=elsewhere,
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
                wait_for_nodes(address, environment["RAY_AUTH_TOKEN"], count)
        wait_for_dashboard(f"http://127.0.0.1:{dashboard}", environment["RAY_AUTH_TOKEN"])
        yield Joined(address, f"http://127.0.0.1:{dashboard}", environment, hidden)
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def client(address: str, token: str) -> GcsClient:
    """What this process asks the head with."""
    os.environ["RAY_AUTH_TOKEN"] = token
    auth._set_mode("token")
    return GcsClient(address=address)


def wait_for_nodes(address: str, token: str, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            alive = [node for node in client(address, token).get_all_node_info().values() if node.state == 0]
        except Exception:  # it is not there yet
            alive = []
        if len(alive) >= count:
            return
        time.sleep(0.1)
    raise AssertionError(f"{count} nodes did not start")


def wait_for_dashboard(url: str, token: str) -> None:
    request = urllib.request.Request(f"{url}/api/version", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the dashboard did not start")


@pytest.fixture(autouse=True)
def asked(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> GcsClient:
    """What the head is asked with; this process's own settings are put back afterwards."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", joined.environment["RAY_AUTH_TOKEN"])
    return client(joined.address, joined.environment["RAY_AUTH_TOKEN"])


def start(joined: Joined, launch: Callable[..., Launch], name: str, *arguments: str) -> Launch:
    smoke = SMOKE[:2] if "--worker.cpus" in arguments else SMOKE  # a flag may be given once only
    return launch(name, *smoke, "--address", joined.address, *arguments, **joined.environment)


def refused(run: Launch) -> str:
    """The one line with which a launch ends, with exit code 2 and before anything was trained."""
    assert run.end(120) == 2, run.log.read_text()
    lines = [line for line in run.log.read_text().splitlines() if line.startswith("launch.py: ")]
    assert len(lines) == 1, run.log.read_text()
    return lines[0].removeprefix("launch.py: error: ")


def test_storage_that_a_node_does_not_share_is_refused_and_code_is_shipped_where_it_is_not(
    joined: Joined, launch: Callable[..., Launch], tmp_path: Path
) -> None:
    folder = joined.hidden / "run"
    arguments = [*SMOKE, "--address", joined.address, "--worker.labels", "pool=spot"]
    run = Launch(joined.environment, folder, *arguments)
    assert re.fullmatch(
        f"run-dir: {folder} is not shared with node [0-9.]+; put it on storage that every node has, give a URL, or use "
        "--server.storage node, with which only this node can resume the run",
        refused(run),
    )
    assert not folder.exists(), "a start that fails leaves nothing"
    run = Launch(joined.environment, folder, *arguments, "--server.storage", "node")
    assert run.end() == 0, run.log.read_text()
    assert run.summary()["meta_updates"] == 2


@pytest.mark.slow
def test_a_job_outlives_its_terminal_and_is_watched_from_elsewhere(joined: Joined, tmp_path: Path) -> None:
    run_dir = tmp_path / "job"
    train = [sys.executable, "launch.py", "train", *SMOKE, "--address", "auto", "--run-dir", str(run_dir)]
    submit = [RAY, "job", "submit", "--address", joined.dashboard, "--working-dir", ".", "--no-wait", "--", *train]
    for _ in range(30):  # the head serves jobs a moment later than it answers
        submitted = subprocess.run(submit, cwd=ROOT, env=joined.environment, capture_output=True, text=True, timeout=60)
        if "No available agent" not in submitted.stderr:
            break
        time.sleep(1.0)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr

    status = [sys.executable, "launch.py", "status", "--json", "--run-dir", str(run_dir)]
    deadline, seen = time.monotonic() + 120, set()
    while "done" not in seen and time.monotonic() < deadline:
        answer = subprocess.run(status, cwd=ROOT, env=joined.environment, capture_output=True, text=True)
        if answer.returncode == 0:
            seen.add(json.loads(answer.stdout)["state"])
        time.sleep(0.2)
    logs = [path.read_text()[-2000:] for path in joined.hidden.parent.glob("ray/session_latest/logs/job-driver-*")]
    assert {"running", "done"} <= seen <= {"starting", "waiting", "running", "stopping", "done"}, (
        seen,
        answer.stderr,
        logs,
    )


@pytest.mark.slow
def test_another_version_of_ray_is_named(joined: Joined, launch: Callable[..., Launch], asked: GcsClient) -> None:
    key, space = b"CLUSTER_METADATA", b"cluster"
    before = asked.internal_kv_get(key, namespace=space)
    other = {**json.loads(before), "ray_version": "2.59.1"}
    asked.internal_kv_put(key, json.dumps(other).encode(), True, namespace=space)
    try:
        line = refused(start(joined, launch, "version"))
    finally:
        asked.internal_kv_put(key, before, True, namespace=space)
    python = ".".join(map(str, sys.version_info[:3]))
    assert re.fullmatch(
        f"address: the cluster at '[0-9.:]+' runs Ray 2.59.1 and Python {python}, but this program runs Ray 2.60.0 "
        f"and Python {python}; install the cluster's versions here, or start the program on one of its nodes",
        line,
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--workers", "64", "--min-workers", "8"],
            "min_workers: 8 requested, but only 4 fit on the 2 current nodes; use --min-workers 4, or give "
            "--wait-for-nodes if nodes will join",
        ),
        pytest.param(
            ["--worker.labels", "pool=stable"],
            "worker.labels: no node matches pool=stable; the nodes have pool=spot; choose other labels, or give "
            "--wait-for-nodes if nodes will join",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--worker.cpus", "8"],
            "worker.cpus: a worker that takes 8 CPUs and 0 GPUs does not fit on the 2 current nodes, with at "
            "most 2 CPUs and 0 GPUs each; ask for less, or give --wait-for-nodes if nodes will join",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["too many", "no such label", "too large"],
)
def test_what_cannot_fit_is_said_at_once(
    joined: Joined, launch: Callable[..., Launch], arguments: list[str], line: str
) -> None:
    assert refused(start(joined, launch, "room", *arguments)) == line


def requested(asked: GcsClient) -> Any:
    found = asked.internal_kv_get(b"autoscaler_resource_request", namespace=None)
    return json.loads(found) if found else None


def wait_until_requested(asked: GcsClient, bundles: list[dict[str, float]], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while requested(asked) != bundles:
        assert time.monotonic() < deadline, requested(asked)
        time.sleep(0.1)


ASK = """
import sys, time
from leap_dist.config.loading import resolve
from leap_dist.driver import cluster
from leap_dist.driver.resource_requests import Request, ResourceRequest
cluster.connect(resolve("smoke", {"address": sys.argv[1]}))
request = ResourceRequest(Request([{"CPU": float(sys.argv[2])}], [{}]), lease_seconds=float(sys.argv[3]))
sys.stdin.readline()
request.close()
cluster.disconnect()
"""
"""A driver that asks for one node of so many processors until it gets a line."""


def test_two_runs_share_a_cluster_and_one_that_is_killed_takes_its_request_back(
    joined: Joined, asked: GcsClient
) -> None:
    def start_asking(processors: int, lease_seconds: float) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", ASK, joined.address, str(processors), str(lease_seconds)]
        return subprocess.Popen(command, cwd=ROOT, env=joined.environment, stdin=subprocess.PIPE)

    killed = start_asking(3, 4.0)
    wait_until_requested(asked, [{"CPU": 3.0}])
    other = start_asking(5, 60.0)
    wait_until_requested(asked, [{"CPU": 3.0}, {"CPU": 5.0}])
    killed.kill()
    killed.wait()
    wait_until_requested(asked, [{"CPU": 5.0}])
    other.communicate(b"\n", timeout=60)
    assert other.returncode == 0
    assert requested(asked) == []


@pytest.mark.slow
def test_an_autoscaler_is_asked_and_waited_for_and_released(
    joined: Joined, launch: Callable[..., Launch], asked: GcsClient
) -> None:
    config = ClusterConfig()
    group = config.node_group_configs.add(name="more", max_count=4)
    group.resources["CPU"] = 2
    space = GCS_AUTOSCALER_STATE_NAMESPACE.encode()
    key = GCS_AUTOSCALER_CLUSTER_CONFIG_KEY.encode()
    asked.internal_kv_put(key, config.SerializeToString(), True, namespace=space)

    try:
        line = refused(start(joined, launch, "beyond", "--workers", "99", "--min-workers", "20"))
        assert line == (
            "min_workers: 20 requested, but only 16 fit on the 2 current nodes and those that the autoscaler may add; "
            "use --min-workers 16"
        )
        run = start(joined, launch, "autoscaler", "--workers", "9", "--min-workers", "7")
        summary = run.wait_for(lambda summary: summary["state"] == "waiting" and summary)
        assert summary["waiting"] == (
            "waiting for nodes: 2 nodes can hold 4 workers, but at least 7 must fit; each takes 0.5 CPUs and 0 GPUs"
        )
        wait_until_requested(asked, [{"CPU": 0.5}] * 9)
        run.process.send_signal(signal.SIGINT)
        assert run.end() == 130
        assert "waiting for nodes: 2 nodes can hold 4 workers" in run.log.read_text()
        assert requested(asked) == []
    finally:
        asked.internal_kv_del(key, False, namespace=space)
