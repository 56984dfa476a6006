"""A cluster whose nodes die and come, and lose their head: the run goes on, and its result is the same."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from service import SYNC, Launch, playing, same_result

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]


def elsewhere(before: set[int]) -> Callable[[dict[str, Any]], set[int]]:
    """Two workers that play, in processes that are not those of `before`."""

    def condition(summary: dict[str, Any]) -> set[int]:
        pids = {worker["pid"] for worker in summary["workers"] if worker["pid"]}
        return pids if playing(summary) and len(pids) == 2 and not pids & before else set()

    return condition


@pytest.mark.slow
def test_nodes_that_die_and_come_and_a_head_that_dies_change_nothing(
    cluster: Cluster, launch: Callable[..., Launch], undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each worker finishes one task and stays in the middle of the next, so the run cannot end before its head is gone.
    monkeypatch.setenv("LEAP_FAILPOINTS", "task.update=slow@1-1000000,task.update=hang@41-1000000")
    first = cluster.add_node(num_cpus=1)
    more = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"]}
    run = launch("cluster", *SYNC, "--workers", "2", "--address", cluster.address, **more)
    pids = run.wait_for(elsewhere(set()))

    cluster.remove_node(first, allow_graceful=False)  # SIGKILL
    second = cluster.add_node(num_cpus=1)
    pids = run.wait_for(elsewhere(pids))
    assert run.summary()["restarts"] >= 2
    assert second in cluster.worker_nodes

    run.wait_for(playing)
    cluster.remove_node(cluster.head_node, allow_graceful=False)
    assert run.end(60) == 1, run.log.read_text()
    said = run.log.read_text()
    assert "the cluster's head node is gone; what was accepted is kept; continue on another cluster" in said
    assert "Traceback" not in said
    assert json.loads((run.run_dir / "summary.json").read_text())["state"] == "failed"

    monkeypatch.delenv("LEAP_FAILPOINTS")
    resumed = launch("cluster", "--resume", "--address", "local")
    assert resumed.end() == 0, resumed.log.read_text()
    same_result(run.run_dir, undisturbed)
