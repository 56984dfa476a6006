"""The pool follows the cluster: it waits for room, grows from one node to four and shrinks to one, in one run."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from service import SYNC, Launch, same_result

from leap_dist.config.loading import resolve
from leap_dist.driver.actors import SERVER
from leap_dist.driver.cluster import connect
from leap_dist.driver.nodes import Nodes
from leap_dist.driver.pool import Pool

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(480)]

PREEMPTION = 2  # autoscaler.proto: DrainNodeReason


def running(count: int) -> Callable[[dict[str, Any]], bool]:
    """So many workers have a process, and no more."""
    return lambda summary: summary["workers_alive"] == count and summary["state"] == "running"


def drain(cluster: Cluster, node: Any, seconds: float) -> None:
    deadline = int(1000 * (time.time() + seconds))
    assert GcsClient(cluster.address).drain_node(node.node_id, PREEMPTION, "spot", deadline)[0]


def left(node: Any) -> Callable[[dict[str, Any]], bool]:
    """No worker is on the node any more."""
    return lambda summary: all(worker["node"] != node.node_id for worker in summary["workers"])


def busy(run: Launch, nodes: list[Any]) -> Any:
    """A node whose worker is in the middle of a task; it is taken from `nodes`."""

    def condition(summary: dict[str, Any]) -> Any:
        at_work = {lease["worker"] for lease in summary["leases"] if 0 < lease["steps"] < 300}
        on = {worker["node"] for worker in summary["workers"] if worker["name"] in at_work}
        return next((node for node in nodes if node.node_id in on), None)

    node = run.wait_for(condition)
    nodes.remove(node)
    return node


def test_from_one_node_to_four_and_back_to_one_changes_nothing(
    cluster: Cluster, launch: Callable[..., Launch], undisturbed: Path
) -> None:
    nodes = [cluster.add_node(num_cpus=1, labels={"pool": "spot"})]
    cluster.add_node(num_cpus=4, labels={"pool": "stable"})
    more = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"]}
    settings = ["--workers", "4", "--min-workers", "2", "--worker.labels", "pool=spot"]
    sync = ["1" if before == "--worker.cpus" else word for before, word in zip(["", *SYNC], SYNC, strict=False)]
    run = launch("elastic", *sync, *settings, "--wait-for-nodes", "--address", cluster.address, **more)
    waiting = run.wait_for(lambda summary: summary["state"] == "waiting" and summary)
    assert waiting["workers"] == []
    assert waiting["waiting"] == (
        "waiting for nodes: 3 nodes can hold 1 worker, but at least 2 must fit; each takes 1 CPU and 0 GPUs "
        "on nodes with pool=spot"
    )

    for count in (2, 3, 4):
        nodes.append(cluster.add_node(num_cpus=1, labels={"pool": "spot"}))
        run.wait_for(lambda summary, count=count: len(summary["workers"]) == count)
    run.wait_for(running(4))
    on = {worker["node"] for worker in run.summary()["workers"]}
    assert on == {node.node_id for node in nodes}, "one on each node of the label, and none elsewhere"

    cluster.remove_node(busy(run, nodes), allow_graceful=False)
    run.wait_for(running(3))
    run.wait_for(lambda summary: summary["leases_lost"] == 1)

    in_time = busy(run, nodes)
    drain(cluster, in_time, 60)
    run.wait_for(left(in_time))
    cluster.remove_node(in_time, allow_graceful=True)
    assert run.summary()["leases_lost"] == 1, "there was time to end the task"

    too_soon = busy(run, nodes)
    drain(cluster, too_soon, 8)
    run.wait_for(left(too_soon), 8)  # before it would be ended by force; most of the time it hands its task over
    cluster.remove_node(too_soon, allow_graceful=True)

    assert run.end() == 0, run.log.read_text()
    summary = run.summary()
    assert any(alert == "1 of 4 workers fit now (previously 2)" for alert in summary["alerts"])
    assert summary["restarts"] == 1, "of the node that was killed; a move is no failure"
    same_result(run.run_dir, undisturbed)


def test_fractions_of_gpus_are_filled_node_by_node(cluster: Cluster, tmp_path: Path) -> None:
    """GPUs that are only counted: the workers compute on the processor."""
    there = [cluster.add_node(num_cpus=4, num_gpus=gpus, labels={"pool": "gpu"}) for gpus in (1, 0, 2)]
    settings = {"workers": 7, "address": cluster.address, "worker.labels": "pool=gpu"}
    config = resolve("smoke", settings)
    connect(config)
    nodes = Nodes()
    try:
        config = replace(config, worker=replace(config.worker, device="cpu", cpus=0.1, gpus=0.5))
        pool = Pool(config, nodes)
        pool.require_capacity()
        remedy = "lower worker.gpus to put more of them on a GPU"
        assert list(pool.alerts) == [f"7 workers requested, only 6 fit; {remedy}"]
        pool.open(SERVER.remote(config, tmp_path, "session"))
        deadline = time.monotonic() + 120
        while pool.alive < 6 and time.monotonic() < deadline:
            pool.reconcile()
            time.sleep(0.1)
        placed = Counter(worker["node"] for worker in pool.describe())
        assert placed == {there[0].node_id: 2, there[2].node_id: 4}
    finally:
        nodes.close()
        ray.shutdown()
