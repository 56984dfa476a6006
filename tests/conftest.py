"""Fixtures that the tests of several packages share, and what makes results the same on every machine."""

import fcntl
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Temporary directories go into memory, where fsync costs nothing, if there is room for them.
if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 4 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from service import SYNC, Launch

pytest_plugins = ["kinds", "slow_tests"]

torch.set_num_threads(1)
for profile in ("default", "full"):  # kinds.py divides the examples of the first
    settings.register_profile(profile, deadline=None, max_examples=50)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def subnormal_numbers() -> Iterator[None]:
    """Undo what a worker in this process does to the processor's arithmetic: hypothesis refuses to work with it."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def environment() -> Iterator[dict[str, str]]:
    """Environment of a launched process, with a home of its own, which also holds Ray's files."""
    with tempfile.TemporaryDirectory(prefix="ld") as home:  # short: Ray puts sockets below it
        yield {**os.environ, "HOME": home, "RAY_TMPDIR": home, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def launch(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    """Function that starts `launch.py train` in `tmp_path / name`; whatever still runs at the end is killed."""
    launched: list[Launch] = []

    def start(name: str, *arguments: str, **more: str) -> Launch:
        launched.append(Launch({**environment, **more}, tmp_path / name, *arguments))
        return launched[-1]

    yield start
    for one in launched:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


@pytest.fixture(scope="session")
def undisturbed(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Directory of the run that others are compared with: one worker, nothing killed.

    The processes of pytest-xdist share it: the first one that needs it makes it, and the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    run_dir = (base if worker_id == "master" else base.parent) / "undisturbed" / "run"
    run_dir.parent.mkdir(exist_ok=True)
    with run_dir.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not run_dir.exists():
            one = Launch(environment, run_dir, *SYNC, "--workers", "1", "--profile")
            try:
                code = one.end()
            except subprocess.TimeoutExpired:
                one.process.kill()
                code = one.end()
            if code != 0:
                shutil.rmtree(run_dir, ignore_errors=True)
                pytest.fail(one.log.read_text())
    return run_dir


@pytest.fixture
def cluster(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs, which soon notices that a node is dead; workers started on its nodes are slowed down."""
    from ray.cluster_utils import Cluster  # slow to import, and only some tests need Ray

    from leap_dist.driver import auth
    from leap_dist.driver.cluster import _agents_with_ports, _without_services

    class PatientCluster(Cluster):
        """Its nodes start on a busy machine, too."""

        def add_node(self, **settings: Any) -> Any:
            with _agents_with_ports(), _without_services():
                return super().add_node(**settings)

    for name in ("HOME", "RAY_TMPDIR"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # put back afterwards
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
    auth._set_mode("token")
    monkeypatch.setenv("LEAP_FAILPOINTS", "task.update=slow@1-1000000")
    started = PatientCluster(shutdown_at_exit=False)
    started.add_node(num_cpus=0, include_dashboard=False, _system_config=NOTICED_SOON)
    yield started
    started.shutdown()


NOTICED_SOON = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 1000,
    # Checks of a dead node fail at once, one every 0.3 s. A node that is alive on a busy machine may be silent for ten
    # timeouts: with three, a head that was silent for six seconds was taken for dead, and the server with it.
    "health_check_failure_threshold": 10,
}
