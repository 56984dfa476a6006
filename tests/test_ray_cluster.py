"""A cluster of several nodes that come and go, and lose their head: the run goes on, and its result is the same."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from service import SYNC, Launch, playing, same_result

from leap_dist.driver import access

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]

PREEMPTION = 2  # autoscaler.proto: DrainNodeReason
NOTICED_SOON = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


@pytest.fixture
def cluster(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without CPUs; workers that are started on its nodes take their time."""
    for name in ("HOME", "RAY_TMPDIR"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # put back afterwards
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
    access._set_mode("token")
    monkeypatch.setenv("LEAP_FAILPOINTS", "task.update=slow@1-1000000")
    started = Cluster(shutdown_at_exit=False)
    started.add_node(num_cpus=0, include_dashboard=False, _system_config=NOTICED_SOON)
    yield started
    started.shutdown()


def elsewhere(before: set[int]) -> Callable[[dict[str, Any]], set[int]]:
    """Two workers that play, in processes that are not those of `before`."""

    def condition(summary: dict[str, Any]) -> set[int]:
        pids = {worker["pid"] for worker in summary["workers"] if worker["pid"]}
        return pids if playing(summary) and len(pids) == 2 and not pids & before else set()

    return condition


def test_nodes_that_die_come_and_are_drained_and_a_head_that_dies_change_nothing(
    cluster: Cluster, launch: Callable[..., Launch], undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cluster.add_node(num_cpus=1)
    more = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"]}
    run = launch("cluster", *SYNC, "--workers", "2", "--address", cluster.address, **more)
    pids = run.wait_for(elsewhere(set()))

    cluster.remove_node(first, allow_graceful=False)  # SIGKILL
    second = cluster.add_node(num_cpus=1)
    pids = run.wait_for(elsewhere(pids))
    restarts = run.summary()["restarts"]
    assert restarts >= 2

    third = cluster.add_node(num_cpus=1)
    deadline = int(1000 * (time.time() + 60))
    assert GcsClient(cluster.address).drain_node(second.node_id, PREEMPTION, "spot", deadline)[0]
    run.wait_for(elsewhere(pids))
    assert any("leaves its node, which is about to go" in alert for alert in run.summary()["alerts"])
    assert run.summary()["restarts"] == restarts, "a move is no failure"
    cluster.remove_node(second, allow_graceful=True)
    assert third in cluster.worker_nodes

    run.wait_for(playing)
    version = run.summary()["meta_updates"]
    cluster.remove_node(cluster.head_node, allow_graceful=False)
    assert run.end(60) == 1, run.log.read_text()
    assert version < 5, "it was in the middle of the run"
    said = run.log.read_text()
    assert "the cluster's head is gone; --resume goes on, on another cluster" in said
    assert "Traceback" not in said
    assert json.loads((run.run_dir / "summary.json").read_text())["state"] == "failed"

    monkeypatch.delenv("LEAP_FAILPOINTS")
    resumed = launch("cluster", "--resume", "--address", "local")
    assert resumed.end() == 0, resumed.log.read_text()
    same_result(run.run_dir, undisturbed)
