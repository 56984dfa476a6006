"""What fits where: labels, resources, and what an autoscaler says that it may bring."""

from __future__ import annotations

from pathlib import Path

import pytest

from leap_dist.config import labels
from leap_dist.config.loading import resolve
from leap_dist.driver.nodes import Node
from leap_dist.driver.placement import (
    UNLIMITED,
    Group,
    Need,
    _ray_up_groups,
    autoscaler_groups,
    explain_lack,
    fit_resources,
    max_workers,
    total_with_autoscaler,
)


def test_selectors_in_rays_form():
    assert labels.parse(["pool=spot", "ray.io/accelerator-type!=A100"]) == {
        "pool": "spot",
        "ray.io/accelerator-type": "!A100",
    }
    assert labels.parse([]) == {}


@pytest.mark.parametrize(
    "wrong", ["spot", "pool==spot", "=spot", "pool=", "pool=-spot", "pool=a b", "pool=in(a)", "a/b/c=d", ""]
)
def test_what_is_no_selector_is_refused(wrong):
    with pytest.raises(ValueError, match="is neither LABEL=VALUE nor LABEL!=VALUE"):
        labels.parse([wrong])


def test_a_node_has_to_meet_every_condition():
    wanted = labels.parse(["pool=spot", "zone!=b"])
    assert labels.match(wanted, {"pool": "spot", "zone": "a"})
    assert labels.match(wanted, {"pool": "spot"}), "a label that is missing is unlike any value"
    assert not labels.match(wanted, {"pool": "spot", "zone": "b"})
    assert not labels.match(wanted, {"pool": "stable"})
    assert not labels.match(wanted, {})
    assert labels.match({}, {"anything": "goes"})


@pytest.mark.parametrize(
    ("cpus", "gpus", "resources", "fit"),
    [
        (1.0, 0.0, {"CPU": 4.0}, 4),
        (1.0, 0.25, {"CPU": 16.0, "GPU": 2.0}, 8),
        (4.0, 0.25, {"CPU": 16.0, "GPU": 2.0}, 4),
        (0.1, 0.0, {"CPU": 0.3}, 3),  # 0.3 / 0.1 is a little less than 3
        (1.0, 1.0, {"CPU": 4.0}, 0),
        (1.0, 0.0, {}, 0),
    ],
)
def test_workers_on_a_node(cpus, gpus, resources, fit):
    assert Need(cpus, gpus, {}).fits(resources, {}) == fit


SPOT = Need(1.0, 0.5, {"pool": "spot"})


def test_what_an_autoscaler_may_bring():
    gpus, cpus = Group({"CPU": 8.0, "GPU": 1.0}, {"pool": "spot"}, 3), Group({"CPU": 64.0}, {"pool": "spot"}, 10)
    assert max_workers(SPOT, [gpus, cpus]) == 6
    assert max_workers(SPOT, [gpus._replace(labels={"pool": "stable"})]) == 0
    assert max_workers(SPOT, [gpus._replace(labels=None)]) == 6, "labels that nobody told of may be the right ones"
    assert max_workers(SPOT, [gpus._replace(max_count=UNLIMITED)] * 2) == UNLIMITED
    assert max_workers(SPOT, []) == 0


def test_the_configuration_that_ray_up_leaves_on_the_head(tmp_path: Path):
    path = tmp_path / "ray_bootstrap_config.yaml"
    assert _ray_up_groups(path) is None
    path.write_text(
        "available_node_types:\n"
        "  head: {resources: {CPU: 4}, max_workers: 0, node_config: {}}\n"
        "  gpu: {resources: {CPU: 8, GPU: 1}, labels: {pool: spot}, max_workers: 5}\n"
    )
    assert _ray_up_groups(path) == [Group({"CPU": 4.0}, {}, 0), Group({"CPU": 8.0, "GPU": 1.0}, {"pool": "spot"}, 5)]
    for damaged in (
        "",
        "[]",
        "available_node_types: 3",
        "available_node_types: {gpu: 1}",
        "a: [",
        "available_node_types: {}",
    ):
        path.write_text(damaged)
        assert _ray_up_groups(path) is None, damaged


STABLE = Node({"CPU": 4.0}, {"pool": "stable"}, "10.0.0.1")


@pytest.mark.parametrize(
    ("need", "least", "fit", "nodes", "autoscaled", "said"),
    [
        (
            SPOT, 1, 0, [STABLE], False,
            "worker.labels: pool=spot asked for, but the nodes have pool=stable; choose one of those, or give "
            "--wait-for-nodes where nodes will join",
        ),
        (
            Need(1.0, 0.0, {"zone": "!b"}), 4, 3, [STABLE], False,
            "min_workers: 4 asked for, but 3 fit on the 1 nodes there are; use --min-workers 3, or give "
            "--wait-for-nodes where nodes will join",
        ),
        (
            Need(8.0, 0.0, {}), 1, 0, [STABLE], True,
            "worker.cpus: no room for a worker with 8 CPUs, 0 GPUs on the 1 nodes there are and those that the "
            "autoscaler may bring, which have up to 4 CPUs and 0 GPUs; ask for less",
        ),
        (
            Need(1.0, 1.0, {}), 1, 0, [STABLE], True,
            "worker.gpus: no room for a worker with 1 CPUs, 1 GPUs on the 1 nodes there are and those that the "
            "autoscaler may bring, which have up to 4 CPUs and 0 GPUs; ask for less",
        ),
    ],
)  # fmt: skip
def test_what_is_said_where_too_few_fit(need, least, fit, nodes, autoscaled, said):
    assert explain_lack(need, least, fit, nodes, autoscaled) == said


def test_a_run_on_the_head_alone_has_nothing_of_the_clusters_autoscaler(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ray_bootstrap_config.yaml").write_text(
        "available_node_types: {gpu: {resources: {CPU: 8, GPU: 1}, max_workers: 5}}\n"
    )
    assert autoscaler_groups("auto") == [Group({"CPU": 8.0, "GPU": 1.0}, {}, 5)]
    assert autoscaler_groups("local") is None
    assert total_with_autoscaler("GPU", [STABLE], "local") == 0


def test_workers_get_a_share_of_the_gpus_there_are():
    config = resolve("smoke", {"workers": 4})
    with_gpus, alerts = fit_resources(config, [Node({"CPU": 8.0, "GPU": 2.0}, {}, "10.0.0.1")])
    assert (with_gpus.worker.device, with_gpus.worker.gpus, alerts) == ("cuda", 0.5, [])
    without, _ = fit_resources(config, [STABLE])
    assert (without.worker.device, without.worker.gpus) == ("cpu", 0.0)
