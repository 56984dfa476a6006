"""A program in a placement group: its workers get what the group holds, and nothing of what other programs have."""

from __future__ import annotations

from typing import Any

import pytest
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from leap_dist.config.loading import resolve
from leap_dist.driver import nodes, reservation
from leap_dist.driver.placement import Need, Room, fit_resources
from leap_dist.driver.pool import Pool
from leap_dist.driver.reservation import Reservation

GROUP: Any = "a group"
A, B, C = (letter * 56 for letter in "abc")
CLUSTER = [
    {"NodeID": name, "Alive": True, "Labels": {}, "NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 4.0, "GPU": 1}}
    for name in (A, B, C)
]


class Context:
    """What Ray tells a program about itself."""

    def __init__(self, own: dict[str, float]) -> None:
        self.get_assigned_resources = lambda: own
        self.get_node_id = lambda: A


@pytest.fixture
def found(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Reservation:
    """The reservation of a program on node A; the parameters are its bundles, their nodes, and its own resources."""
    bundles, places, own = request.param
    table = {"bundles": dict(enumerate(bundles)), "bundles_to_node_id": dict(enumerate(places))}
    monkeypatch.setattr(reservation, "get_current_placement_group", lambda: GROUP if bundles else None)
    monkeypatch.setattr(reservation, "placement_group_table", lambda group: table)
    monkeypatch.setattr(reservation.ray, "get_runtime_context", lambda: Context(own))
    monkeypatch.setattr(nodes.ray, "nodes", lambda: CLUSTER)
    monkeypatch.setattr(nodes, "_draining", dict)
    return Reservation.of_this_program()


TUNE = ([{"CPU": 0.0}, {"CPU": 1.0}, {"CPU": 1.0, "GPU": 0.5}], [A, A, B], {})
"""A trial that mostly waits, and a bundle for each of two workers."""
HOLDS_ONE = ([{"CPU": 2.0}], [A], {"CPU": 1.0})
"""A trial that occupies one of the two processors of its bundle."""
FULL = ([{"CPU": 1.0}], [A], {"CPU": 1.0})
"""A trial for which nothing is reserved but its own processor, as by default."""
NONE: Any = ([], [], {})


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param(TUNE, {A: {"CPU": 1.0}, B: {"CPU": 1.0, "GPU": 0.5}}, id="tune"),
        pytest.param(HOLDS_ONE, {A: {"CPU": 1.0}}, id="holds one"),
    ],
    indirect=["found"],
)
def test_workers_get_what_the_group_holds(found: Reservation, expected: dict[str, dict[str, float]]) -> None:
    view = nodes._read({}, found)
    assert {name: node.resources for name, node in view.staying.items()} == expected
    strategy = found.strategy(A)
    assert isinstance(strategy, PlacementGroupSchedulingStrategy)
    assert strategy.placement_group == GROUP


@pytest.mark.parametrize(
    ("found", "settings", "expected"),
    [
        (TUNE, {}, {A: Room(1, "cpu", 0.0, "processors"), B: Room(1, "cuda", 0.5, "processors")}),
        (TUNE, {"workers": 2}, {A: Room(1, "cpu", 0.0, "processors"), B: Room(1, "cuda", 0.25, "processors")}),
        (([{"CPU": 4.0, "GPU": 0.5}], [B], {}), {"worker.gpus": 0.2}, {B: Room(2, "cuda", 0.2, "worker.gpus")}),
        (([{"CPU": 4.0, "GPU": 0.5}], [B], {}), {}, {B: Room(4, "cuda", 0.125, "processors")}),
        (([{"CPU": 3.0, "GPU": 0.5}] * 2, [B, B], {}), {"worker.gpus": 0.3}, {B: Room(2, "cuda", 0.3, "worker.gpus")}),
        (([{"CPU": 2.0, "GPU": 1.5}], [B], {}), {"worker.cpus": 0.5}, {B: Room(4, "cuda", 0.25, "processors")}),
        (([{"CPU": 0.5}] * 2, [A, A], {}), {}, {A: Room(0, "cpu", 0.0, "processors")}),
        (
            ([{"CPU": 2.0, "GPU": 0.5}, {"CPU": 1.0, "GPU": 0.5}], [A, A], {"CPU": 2.0, "GPU": 0.5}),
            {},
            {A: Room(1, "cuda", 0.5, "processors")},
        ),
        (([{"CPU": 1.0}, {"CPU": 1.0, "GPU": 2.0}], [A, A], {}), {"worker.gpus": 2}, {A: Room(1, "cuda", 2.0, "")}),
    ],
    indirect=["found"],
)
def test_a_part_of_a_gpu_that_is_reserved_holds_workers(
    found: Reservation, settings: dict[str, Any], expected: dict[str, Room]
) -> None:
    view = nodes._read({}, found)
    config, _ = fit_resources(resolve("paper", settings), list(view.staying.values()))
    rooms = {name: Need.of(config).on(node) for name, node in view.staying.items()}
    assert {name: room[:3] for name, room in rooms.items()} == {name: room[:3] for name, room in expected.items()}
    for name, room in rooms.items():
        bundles = view.staying[name].bundles
        held = sum(_packed(bundle, config.worker.cpus, room.gpus) for bundle in bundles)
        assert held >= room.workers, "so many find room as Ray places them"


def _packed(bundle: dict[str, float], cpus: float, gpus: float) -> int:
    """How many workers Ray places in a bundle: it counts in steps of 1/10,000, and takes a share from one device."""
    steps = 10_000
    by_cpu = round(bundle.get("CPU", 0.0) * steps) // round(cpus * steps)
    if not gpus:
        return by_cpu
    left, share = round(bundle.get("GPU", 0.0) * steps), round(gpus * steps)
    if gpus > 1:
        return min(by_cpu, left // share)
    devices = [steps] * (left // steps) + [left % steps]
    return min(by_cpu, sum(device // share for device in devices))


@pytest.mark.parametrize("found", [pytest.param(FULL, id="full"), pytest.param(NONE, id="none")], indirect=True)
def test_a_program_for_whose_workers_nothing_is_reserved_uses_what_is_free(found: Reservation) -> None:
    view = nodes._read({}, found)
    assert {name: node.resources["CPU"] for name, node in view.staying.items()} == {A: 4.0, B: 4.0, C: 4.0}
    strategy = found.strategy(B)
    assert isinstance(strategy, NodeAffinitySchedulingStrategy)
    assert (strategy.node_id, strategy.soft) == (B, False)


@pytest.mark.parametrize("found", [pytest.param(TUNE, id="tune")], indirect=True)
def test_auto_fills_the_group_and_not_the_cluster(found: Reservation, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class There(nodes.Nodes):
        own = None

        def __init__(self) -> None:
            self.reservation, self.view = found, nodes._read({}, found)

    monkeypatch.setattr(Pool, "_start", lambda self, slot, host, room: started.append(host))
    pool = Pool(resolve("paper", {"worker.device": "cpu"}), There())
    pool.reconcile()
    assert (pool.wanted, pool.capacity()) == (2, 2)
    assert set(started) <= {A, B}
