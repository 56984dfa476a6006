"""What fits where: labels, resources, and what an autoscaler says that it may bring."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from leap_dist.config import labels
from leap_dist.config.loading import resolve
from leap_dist.driver.memory import CUDA_WORKER_BYTES, WORKER_BYTES, WORKER_GPU_BYTES
from leap_dist.driver.nodes import Node
from leap_dist.driver.placement import (
    GROUP_LABEL,
    UNLIMITED,
    Group,
    Need,
    Room,
    _ray_up_groups,
    autoscaler_groups,
    bundles,
    explain_lack,
    fit_resources,
    max_workers,
    share_of,
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


@pytest.mark.parametrize(
    ("gpus", "devices", "fit"),
    [
        (0.3, 2, 6),  # three on each: no worker gets 0.1 of one device and 0.2 of another
        (0.6, 4, 4),
        (0.51, 1, 1),
        (1 / 3, 1, 3),
        (0.0001, 1, 64),  # the processors are fewer
        (2.0, 4, 2),
        (2.0, 3, 1),
        (3.0, 2, 0),
    ],
)
def test_a_gpu_holds_a_whole_number_of_workers(gpus, devices, fit):
    assert Need(1.0, gpus, {}).fits({"CPU": 64.0, "GPU": devices}, {}) == fit


GB = 2.0**30


@pytest.mark.parametrize(
    ("settings", "resources", "gpu_gb", "expected"),
    [
        ({}, {"CPU": 2.0}, 0, Room(2, "cpu", 0.0, "processors")),
        ({}, {"CPU": 64.0}, 0, Room(63, "cpu", 0.0, "processors")),  # one for server and driver
        ({"worker.cpus": 0.5}, {"CPU": 4.0}, 0, Room(8, "cpu", 0.0, "processors")),
        ({}, {"CPU": 64.0, "memory": 3.5 * WORKER_BYTES}, 0, Room(3, "cpu", 0.0, "memory")),
        ({}, {"CPU": 64.0, "GPU": 1.0, "memory": 3.5 * CUDA_WORKER_BYTES}, 80, Room(3, "cuda", 0.3333, "memory")),
        ({"worker.device": "cpu"}, {"CPU": 64.0, "memory": 2.0 * WORKER_BYTES}, 80, Room(2, "cpu", 0.0, "memory")),
        ({}, {"CPU": 4.0, "memory": 1.0}, 0, Room(1, "cpu", 0.0, "memory")),
        ({}, {"CPU": 17.0, "GPU": 1.0}, 80, Room(16, "cuda", 0.0625, "processors")),
        ({}, {"CPU": 65.0, "GPU": 8.0}, 80, Room(64, "cuda", 0.125, "processors")),
        ({}, {"CPU": 17.0, "GPU": 3.0}, 80, Room(16, "cuda", 0.1666, "processors")),
        ({}, {"CPU": 65.0, "GPU": 1.0}, 16, Room(10, "cuda", 0.1, "GPU memory")),
        ({"worker.gpus": 0.25}, {"CPU": 65.0, "GPU": 2.0}, 80, Room(8, "cuda", 0.25, "worker.gpus")),
        ({"worker.device": "cpu"}, {"CPU": 17.0, "GPU": 2.0}, 80, Room(16, "cpu", 0.0, "processors")),
        ({"worker.device": "cuda"}, {"CPU": 17.0}, 80, Room(0, "cuda", 0.0, "GPUs")),
        ({"worker.gpus": 2}, {"CPU": 17.0, "GPU": 1.0}, 80, Room(16, "cpu", 0.0, "processors")),
    ],
)
def test_as_many_workers_as_a_node_has_room_for(settings, resources, gpu_gb, expected):
    need = Need.of(resolve("paper", settings))
    assert need.room(resources, {}, gpu_bytes=gpu_gb * GB, hosts_server=True) == expected


@pytest.mark.parametrize(
    ("processors", "devices", "gpu_gb", "mps", "each"),
    [
        (72, 1, 94, "auto", 48),  # a GH200; by its memory, it could hold 62
        (128, 1, 94, "auto", 48),
        (128, 2, 141, "auto", 48),
        (128, 1, 94, "no", 62),
        (17, 1, 94, "auto", 16),
    ],
)
def test_no_gpu_gets_more_workers_than_mps_admits(processors, devices, gpu_gb, mps, each):
    """48 clients for each device; the next one could not start its CUDA context."""
    need = Need.of(resolve("paper", {"worker.mps": mps}))
    room = need.room({"CPU": processors, "GPU": devices}, {}, gpu_bytes=gpu_gb * GB, hosts_server=True)
    assert (room.workers, room.gpus) == (devices * each, share_of(each))
    assert (room.limit == "MPS clients") == (each == 48)


@pytest.mark.parametrize(("mps", "fit"), [("auto", 48), ("no", 100)])
def test_what_the_user_asked_for_is_no_more_than_mps_admits_either(mps, fit):
    need = Need.of(resolve("paper", {"worker.gpus": 0.01, "worker.mps": mps}))
    assert need.fits({"CPU": 128.0, "GPU": 1.0}, {}) == fit


def devices_in_use(workers, share, devices):
    """How many devices Ray uses: it gives each worker the device with the least free share that suffices."""
    free = [10_000] * devices  # Ray counts in these steps
    for _ in range(workers):
        fitting = [n for n, left in enumerate(free) if left >= round(share * 10_000)]
        free[min(fitting, key=free.__getitem__)] -= round(share * 10_000)
    return sum(left < 10_000 for left in free)


@pytest.mark.parametrize(
    ("settings", "most", "share", "used"),
    [
        ({"mode": "sync", "meta.batch_size": 16}, 16, 0.5, 8),
        ({}, 3, 1.0, 3),
        ({}, 12, 0.5, 6),
        ({"workers": 16}, UNLIMITED, 0.5, 8),  # their GPUs come later; otherwise fit_resources gives them a share
        ({"min_workers": 32}, 16, 0.25, 8),
        ({}, UNLIMITED, share_of(24), 8),
    ],
    ids=str,
)
def test_fewer_workers_than_fit_on_a_node_share_all_of_its_gpus(settings, most, share, used):
    need = Need.of(resolve("paper", settings), most)
    room = need.room({"CPU": 193.0, "GPU": 8.0}, {}, gpu_bytes=80 * GB, hosts_server=True)
    run = min(room.workers, max(most, settings.get("min_workers", 0)), settings.get("workers", UNLIMITED))
    assert (room.gpus, devices_in_use(run, room.gpus, 8)) == (share, used)


def test_where_a_number_was_asked_for_no_processor_is_kept():
    need = Need.of(resolve("paper", {"workers": 64}))
    assert need.room({"CPU": 64.0}, {}, hosts_server=True).workers == 64


@pytest.mark.parametrize("workers", [1, 2, 3, 6, 7, 16, 60, 99, 128])
def test_shares_of_a_gpu_for_so_many_workers_are_what_ray_can_count(workers):
    share = share_of(workers)
    assert workers * share <= 1
    assert Need(0.001, share, {}).fits({"CPU": 1.0, "GPU": 1.0}, {}) == workers
    assert round(share * 10_000) == pytest.approx(share * 10_000, abs=1e-9)


def test_what_an_autoscaler_is_asked_for():
    """GPUs first, then processors; what fits nowhere as what one worker needs at least."""
    need = Need.of(resolve("paper", {"worker.labels": "pool=spot"}))
    groups = [Group({"CPU": 2.0}, None, 1), Group({"CPU": 4.0, "GPU": 2.0}, None, 1)]
    resources, selectors = bundles(need, 9, [Room(1, "cpu", 0.0, "processors")], groups)
    assert resources == [{"CPU": 1.0, "GPU": 0.5}] * 4 + [{"CPU": 1.0}] * 5
    assert selectors == [{"pool": "spot"}] * 9
    assert bundles(need, 0, [], []) == ([], [])
    on_gpus = Need.of(resolve("paper", {"worker.device": "cuda", "worker.gpus": 0.5}))
    assert bundles(on_gpus, 2, [], [])[0] == [{"CPU": 1.0, "GPU": 0.5}] * 2


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
    assert _ray_up_groups(path) == [
        Group({"CPU": 4.0}, {}, 0, "head"),
        Group({"CPU": 8.0, "GPU": 1.0}, {"pool": "spot"}, 5, "gpu"),
    ]
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
            "worker.labels: no node matches pool=spot; the nodes have pool=stable; choose other labels, or give "
            "--wait-for-nodes if nodes will join",
        ),
        (
            Need(1.0, 0.0, {}), 1, 0, [], False,
            "address: no node of the cluster is alive; start Ray again, and give the same command, or give "
            "--wait-for-nodes if nodes will join",
        ),
        (
            Need(1.0, 0.0, {"zone": "!b"}), 4, 3, [STABLE], False,
            "min_workers: 4 requested, but only 3 fit on the current node; use --min-workers 3, or give "
            "--wait-for-nodes if nodes will join",
        ),
        (
            Need(8.0, 0.0, {}), 1, 0, [STABLE], True,
            "worker.cpus: a worker that takes 8 CPUs and 0 GPUs does not fit on the current node and those that the "
            "autoscaler may add, with at most 4 CPUs and 0 GPUs each; ask for less",
        ),
        (
            Need(1.0, 1.0, {}), 1, 0, [STABLE], True,
            "worker.gpus: a worker that takes 1 CPU and 1 GPU does not fit on the current node and those that the "
            "autoscaler may add, with at most 4 CPUs and 0 GPUs each; ask for less",
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
    assert autoscaler_groups("auto") == [Group({"CPU": 8.0, "GPU": 1.0}, {}, 5, "gpu")]
    assert autoscaler_groups("local") is None
    assert total_with_autoscaler("GPU", [STABLE], "local") == 0


def test_a_node_of_a_group_counts_once_whether_or_not_it_is_up(tmp_path: Path, monkeypatch):
    """64 workers on 16 GPUs get a quarter each, also where a run before has left all 16 nodes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ray_bootstrap_config.yaml").write_text(
        "available_node_types: {gpu: {resources: {CPU: 8, GPU: 1}, max_workers: 16}}\n"
    )
    by_hand = Node({"CPU": 8.0, "GPU": 2.0}, {}, "10.0.0.1")
    up = Node({"CPU": 8.0, "GPU": 1.0}, {GROUP_LABEL: "gpu"}, "10.0.0.2")
    config = resolve("paper", {"workers": 64, "address": "auto"})
    for nodes in ([], [up] * 3, [up] * 16):
        assert fit_resources(config, nodes)[0].worker.gpus == 0.25
    assert total_with_autoscaler("GPU", [by_hand, up], "auto") == 2 + 16


def test_workers_get_a_share_of_the_gpus_there_are():
    config = resolve("smoke", {"workers": 4})
    nodes = [Node({"CPU": 8.0, "GPU": 2.0}, {}, "10.0.0.1"), STABLE]
    with_gpus, alerts = fit_resources(config, nodes)
    assert (with_gpus.worker.device, with_gpus.worker.gpus, alerts) == ("auto", 0.5, [])
    assert [Need.of(with_gpus).on(node)[:3] for node in nodes] == [(4, "cuda", 0.5), (4, "cpu", 0.0)]
    three, _ = fit_resources(replace(config, workers=3), nodes)
    assert Need.of(three).on(nodes[0]).workers >= 3, "a share of 2/3 of a GPU would be one worker each"
    without, _ = fit_resources(config, [STABLE])
    assert Need.of(without).on(STABLE)[:3] == (4, "cpu", 0.0)


@pytest.mark.parametrize(
    ("settings", "free_gb", "gpus", "workers"),
    [
        ({"workers": 16}, 80, 1 / 16, 16),
        ({"workers": 16}, 15, 0.1, 10),
        ({"workers": 16}, 1, 1.0, 1),  # one is tried
        ({"workers": 16, "worker.gpus": 0.05}, 15, 0.05, 16),  # the user's will
    ],
    ids=str,
)
def test_a_fixed_number_of_workers_does_not_overfill_the_memory_of_a_gpu(settings, free_gb, gpus, workers, monkeypatch):
    monkeypatch.setattr("leap_dist.driver.memory._available_bytes", lambda: 1000 * GB)
    node = Node({"CPU": 32.0, "GPU": 1.0}, {}, "10.0.0.1", gpu_bytes=free_gb * GB)
    config, alerts = fit_resources(resolve("paper", settings), [node, STABLE])
    assert config.worker.gpus == pytest.approx(gpus)
    assert min(16, Need.of(config).on(node).workers) == workers
    if workers == 16:
        assert alerts == []
        return
    assert workers == 1 or workers * WORKER_GPU_BYTES <= node.gpu_bytes
    each = "1 worker" if workers == 1 else f"{workers} workers"
    assert alerts == [
        f"at most {each} share a GPU: each takes about 1.5 GB of its memory, and {free_gb:.1f} GB are free; give "
        "--worker.gpus to decide it yourself"
    ]


def test_where_a_task_runs_makes_no_difference_if_all_workers_use_the_same_kind_of_device():
    config, gpu = resolve("paper"), Node({"CPU": 8.0, "GPU": 2.0}, {}, "10.0.0.1")
    for nodes, device in (([gpu, STABLE], "cuda"), ([STABLE], "cpu")):
        one, _ = fit_resources(config, nodes, one_kind=True)
        assert one.worker.device == device
        rooms = [Need.of(one).on(node) for node in (gpu, STABLE)]
        assert {room.device for room in rooms if room.workers} == {device}


def test_before_there_is_a_node_for_workers_their_kind_of_device_is_left_open():
    config, head = resolve("paper"), Node({"CPU": 0.0}, {"pool": "stable"}, "10.0.0.1")
    for nodes in ([], [head]):
        assert fit_resources(config, nodes, one_kind=True)[0].worker.device == "auto"
    spot = resolve("paper", {"worker.labels": "pool=spot"})
    assert fit_resources(spot, [STABLE], one_kind=True)[0].worker.device == "auto", "it is not for workers"
