"""Joining and starting clusters: what Ray ships, whose address is believed, who gets a token. None is started here."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from ray._private import parameter, ray_constants, services
from ray._private.parameter import RayParams
from ray._private.runtime_env.packaging import create_package

from leap_dist.config.loading import ConfigError, resolve
from leap_dist.driver import auth, cluster
from leap_dist.driver.errors import ClusterError


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive that Ray makes of `py_modules`, in the way that upload_package_if_needed makes it."""
    archive = tmp_path_factory.mktemp("shipped") / "code.zip"
    create_package(str(cluster.CODE), archive, include_gitignore=True, include_parent_dir=True)
    return archive


def test_the_environments_are_shipped_as_files_of_the_package(shipped: Path) -> None:
    with zipfile.ZipFile(shipped) as archive:
        names = set(archive.namelist())
        assert {name.partition("/")[0] for name in names} == {"leap_dist"}
        assert archive.read("leap_dist/envs/games.py") == (cluster.CODE.parent / "envs" / "games.py").read_bytes()
    for path in (cluster.CODE.parent / "envs").iterdir():
        assert path.name == "__pycache__" or f"leap_dist/envs/{path.name}" in names


def test_the_shipped_code_works_without_a_checkout(shipped: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(shipped) as archive:
        archive.extractall(tmp_path)
    script = (
        "from leap_dist.driver import actors; from leap_dist.envs import games; print(actors.__file__, *games.SETS)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    file, *sets = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    assert sets == ["seed24", "camera25", "moving4"]


# The address and who listens there --------------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that `ray start` writes; no cluster runs, and RAY_ADDRESS is not set."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(auth, "_running_clusters", list)
    path = tmp_path / "ray" / "ray_current_cluster"
    path.parent.mkdir()
    path.write_text("10.0.0.7:6379")
    return path


def test_auto_follows_the_file_of_ones_own_cluster(recorded: Path) -> None:
    assert auth.find_cluster("auto") == "10.0.0.7:6379"


def test_auto_does_not_follow_a_file_of_another_user_nor_a_link(recorded: Path, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with pytest.raises(ConfigError, match="you run no Ray cluster on this machine"):
            auth.find_cluster("auto")
    own = recorded.rename(recorded.with_name("own"))
    recorded.symlink_to(own)
    with pytest.raises(ConfigError, match="give HOST:PORT, or use local"):
        auth.find_cluster("auto")


def test_auto_takes_no_address_from_the_command_line_of_another_user(tmp_path: Path, monkeypatch: Any) -> None:
    """A process that looks like Ray's to whoever believes command lines."""
    script = tmp_path / "raylet"
    script.symlink_to(sys.executable)
    command = [str(script), "-c", "import time; print(flush=True); time.sleep(60)", "--gcs-address=10.6.6.6:1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()  # type: ignore[union-attr]
        assert "10.6.6.6:1" in auth._running_clusters()
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert "10.6.6.6:1" not in auth._running_clusters()
        process.kill()


@pytest.mark.parametrize(("family", "host"), [("AF_INET", "127.0.0.1"), ("AF_INET6", "::1"), ("AF_INET6", "::")])
def test_no_token_is_sent_to_another_users_process(family: str, host: str, monkeypatch: Any) -> None:
    with socket.create_server((host, 0), family=getattr(socket, family)) as listener:
        port = listener.getsockname()[1]
        reached = "[::1]" if family == "AF_INET6" else host
        auth.require_trusted_listener(f"{reached}:{port}", "auto")
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 4711)
        monkeypatch.setattr(auth, "_TRUSTED", frozenset())
        with pytest.raises(
            ConfigError, match=rf"belongs to another user \(uid {os.getuid()}\), who would get your token"
        ):
            auth.require_trusted_listener(f"{reached}:{port}", "auto")
    auth.require_trusted_listener("192.0.2.1:6379", "auto")  # of another machine nothing is known


# A local cluster --------------------------------------------------------------------------------------------------


def test_every_local_cluster_has_a_token_of_its_own_and_leaves_the_users_alone(monkeypatch: Any) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the-users-own")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
    seen = set()
    for _ in range(2):
        auth.prepare_local()
        seen.add(os.environ["RAY_AUTH_TOKEN"])
        auth.restore()
        assert os.environ["RAY_AUTH_TOKEN"] == "the-users-own"
        assert os.environ["RAY_AUTH_MODE"] == "disabled"
        assert ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR not in os.environ
        assert ray_constants.ENABLE_RAY_CLUSTER, "this process may join a cluster afterwards"
    assert len(seen) == 2
    assert all(len(bytes.fromhex(token)) == 32 for token in seen)


def test_the_agents_of_a_local_node_have_ports_that_the_node_knows(monkeypatch: Any) -> None:
    """The raylet waits for the ports of agents that it does not know, and dies when that takes too long."""
    started = []
    monkeypatch.setattr(parameter, "RayParams", dict)
    monkeypatch.setattr(services, "start_ray_process", lambda *arguments: started.append(arguments))
    with cluster._agents_with_ports():
        made = parameter.RayParams(num_cpus=1, metrics_export_port=None)
        services.start_ray_process(["raylet", "--node"], ray_constants.PROCESS_TYPE_RAYLET, False)
        services.start_ray_process(["gcs"], ray_constants.PROCESS_TYPE_GCS_SERVER, False)
    assert (parameter.RayParams, made.pop("num_cpus")) == (dict, 1)
    assert made.keys() == set(cluster.AGENT_PORTS)
    assert len(set(made.values())) == 4
    assert set(made.values()) <= set(cluster.PORTS)
    flag = f"--dashboard_agent_listen_port={made['dashboard_agent_listen_port']}"
    assert [arguments[0] for arguments in started] == [["raylet", "--node", flag], ["gcs"]]
    RayParams(**made)  # the names are Ray's


def test_a_local_ray_leaves_out_what_a_run_has_no_use_for(monkeypatch: Any) -> None:
    own = services.start_api_server
    monkeypatch.setattr(parameter, "RayParams", dict)
    with cluster._agents_with_ports(), cluster._without_services():
        made = parameter.RayParams(num_cpus=1)
        assert services.start_api_server(False, False, port=None) == (None, None), "as where the server does not start"
    assert (made["no_monitor"], made["include_log_monitor"], made["num_cpus"]) == (True, False, 1)
    assert set(cluster.AGENT_PORTS) < made.keys()
    assert (services.start_api_server, parameter.RayParams) == (own, dict)
    RayParams(**made)  # the names are Ray's


@pytest.mark.parametrize(
    ("usable", "counted", "given"), [(8, 128, 8), (128, 128, None), (128, 4, None), (2, 4, 2)], ids=str
)
def test_a_local_ray_has_no_more_processors_than_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch, usable: int, counted: int, given: int | None
) -> None:
    """`srun --cpus-per-task=8` on a node of 128; Ray itself considers only limits of containers."""
    started: dict[str, Any] = {}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(usable)))
    monkeypatch.setattr(cluster.utils, "get_num_cpus", lambda **_: counted)
    monkeypatch.setattr(cluster.ray, "init", lambda address, **arguments: started.update(arguments))
    monkeypatch.setattr(cluster, "_at_disconnect", contextlib.ExitStack())
    for name in ("prepare_local", "prepare_monitor"):
        monkeypatch.setattr(cluster, name, lambda: None)
    cluster._try_to_start_local({})
    assert started["num_cpus"] == given


def test_a_port_on_which_somebody_listens_is_left_alone(monkeypatch: Any) -> None:
    with socket.create_server(("", 0)) as taken, socket.socket() as other:
        other.bind(("", 0))
        free = other.getsockname()[1]
        other.close()
        monkeypatch.setattr(cluster, "PORTS", [taken.getsockname()[1], free])
        assert cluster._free_ports(2) == [free]


SLOW = """
import sys, time
if any(argument.endswith("dashboard/agent.py") for argument in sys.orig_argv):
    time.sleep(25)
"""


@pytest.mark.slow
@pytest.mark.ray
def test_a_machine_on_which_agents_start_slowly_starts_all_the_same(launch: Any, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    run = launch("slow", "--preset", "smoke", "--workers", "1", PYTHONPATH=str(tmp_path))
    assert run.end() == 0, run.log.read_text()


def test_a_directory_that_is_too_long_for_sockets_is_replaced_and_cleaned_up(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/short")
    assert cluster._temp_dir() is None
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "a" * 80)
    chosen = cluster._temp_dir()
    assert chosen is not None
    assert Path(chosen).stat().st_mode & 0o077 == 0, "private"
    sockets = f"{chosen}/session_2026-01-31_12-00-00_000000_4194304/sockets/plasma_store"
    assert len(sockets) <= 107
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    cluster.disconnect()
    assert not Path(chosen).exists()


@pytest.mark.parametrize(
    ("error", "expected", "line"),
    [
        (
            PermissionError(13, "Permission denied", "/x"),
            ConfigError,
            r"address: Ray cannot write its files \(Permission",
        ),
        (
            RuntimeError("a traceback\nThe node died."),
            ClusterError,
            "Ray cannot be started on this machine: The node died.",
        ),
    ],
)
def test_a_local_ray_that_cannot_start_is_one_line(
    monkeypatch: Any, error: Exception, expected: Any, line: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(cluster.ray, "init", fail)
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
    with pytest.raises(expected, match=line) as caught:
        cluster.connect(resolve("smoke"))
    assert "\n" not in str(caught.value)
    assert cluster._MARK not in os.environ


def test_a_local_ray_that_was_too_slow_is_started_once_more(monkeypatch: Any) -> None:
    outcomes: list[Exception | None] = [RuntimeError("The current node timed out during startup."), None]
    started: list[Exception | None] = []

    def start(*_: Any, **__: Any) -> None:
        assert os.environ[cluster._MARK], "what is left of a start can be ended"
        started.append(outcomes.pop(0))
        if started[-1] is not None:
            raise started[-1]

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(cluster.ray, "init", start)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
    cluster.connect(resolve("smoke"))
    cluster.disconnect()
    assert len(started) == 2
    outcomes += started[:1] * 2
    with pytest.raises(ClusterError, match="timed out during startup"):
        cluster.connect(resolve("smoke"))
    assert not outcomes, "twice at most"
