"""What several runs ask an autoscaler for together, and what becomes of it when one of them dies."""

from __future__ import annotations

import pytest
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray_autoscaler import RayAutoscaler

from leap_dist.driver.placement import Group
from leap_dist.driver.resource_requests import Request, RequestBook, verdict

CPUS = Request([{"CPU": 1.0}] * 2, [{"pool": "spot"}] * 2)
GPUS = Request([{"CPU": 1.0, "GPU": 0.5}], [{}])
NOTHING = Request([], [])


class Cluster:
    """An autoscaler that remembers what it was asked for, and a clock."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.now = 0.0
        self.answers = True
        self.book = RequestBook(self, lambda: self.now)

    def ask(self, request: Request) -> None:
        if not self.answers:
            raise ConnectionError
        self.asked.append(request)

    def accepts(self) -> bool | None:
        return None


def test_the_requests_of_all_runs_are_added_up() -> None:
    cluster = Cluster()
    cluster.book.renew("one", CPUS, 60)
    cluster.book.renew("two", GPUS, 60)
    cpu, gpu, spot = CPUS.bundles[0], GPUS.bundles[0], CPUS.selectors[0]
    both = Request([cpu, gpu, cpu], [spot, {}, spot])
    assert cluster.asked == [CPUS, both], "runs take turns, so that a part of the sum is of all of them"
    cluster.book.renew("one", CPUS, 60)
    assert len(cluster.asked) == 2, "what has not changed is not asked for again"
    cluster.book.withdraw("one")
    assert cluster.asked[-1] == GPUS
    cluster.book.withdraw("two")
    assert cluster.asked[-1] == NOTHING
    assert cluster.book.empty


def test_the_request_of_a_run_that_no_longer_renews_it_is_taken_back() -> None:
    cluster = Cluster()
    cluster.book.renew("killed", CPUS, 60)
    cluster.book.renew("alive", GPUS, 60)
    cluster.now = 59.0
    cluster.book.renew("alive", GPUS, 60)
    cluster.now = 60.0
    cluster.book.tick()
    assert cluster.asked[-1] == GPUS
    cluster.now = 119.0
    cluster.book.tick()
    assert cluster.asked[-1] == NOTHING
    assert cluster.book.empty


def test_what_could_not_be_asked_for_is_asked_for_again() -> None:
    cluster = Cluster()
    cluster.answers = False
    with pytest.raises(ConnectionError):
        cluster.book.renew("one", CPUS, 60)
    assert not cluster.book.empty
    cluster.answers = True
    cluster.book.tick()
    assert cluster.asked == [CPUS]


HEAD, PODS = Group({"CPU": 0.0}, {"pool": "stable"}, 0, "head"), Group({"CPU": 7.0}, {"pool": "spot"}, 16, "pods")


def spot(workers: int) -> Request:
    return Request([{"CPU": 1.0}] * workers, [{"pool": "spot"}] * workers)


def settle(book: RequestBook, autoscaler: RayAutoscaler) -> int:
    """Tick until nothing changes any more; returns how many bundles are asked for."""
    for _ in range(12):  # more than a binary search over 512 needs
        book.tick()
    before = len(autoscaler.requests)
    book.tick()
    assert len(autoscaler.requests) == before, "it asks again and again"
    assert autoscaler.accepts()
    return len(autoscaler.requests[-1].bundles)


@pytest.mark.parametrize("up", [0, 3, 16])
@pytest.mark.parametrize(("asked", "fit"), [(0, 0), (1, 1), (112, 112), (113, 112), (128, 112), (512, 112)])
def test_of_a_request_that_is_refused_as_much_as_fits_is_asked_for(up: int, asked: int, fit: int) -> None:
    """Ray's own scheduler ignores a request entirely if one bundle of it does not fit."""
    autoscaler = RayAutoscaler([HEAD, PODS], {"pods": up})
    book = RequestBook(autoscaler)
    book.renew("one", spot(asked))
    assert settle(book, autoscaler) == fit
    assert autoscaler.live["pods"] == max(up, -(-fit // 7))


def test_two_runs_that_ask_for_all_nodes_get_all_nodes_and_then_one_alone() -> None:
    autoscaler = RayAutoscaler([HEAD, PODS])
    book = RequestBook(autoscaler)
    book.renew("one", spot(112))
    book.renew("two", spot(112))
    assert settle(book, autoscaler) == 112
    assert autoscaler.live["pods"] == 16
    book.withdraw("one")
    assert settle(book, autoscaler) == 112


def test_limits_that_change_are_followed_and_a_bundle_that_fits_nowhere_is_asked_for_again() -> None:
    autoscaler = RayAutoscaler([HEAD, PODS._replace(max_count=0)])
    book = RequestBook(autoscaler)
    book.renew("one", spot(40))
    for _ in range(12):
        book.tick()
    assert autoscaler.requests[-1] == spot(1), "the least that there can be"
    autoscaler.groups["pods"] = PODS
    assert settle(book, autoscaler) == 40
    autoscaler.live["pods"] = 0
    autoscaler.groups["pods"] = PODS._replace(max_count=2)
    assert settle(book, autoscaler) == 14


def test_what_the_autoscaler_says_counts_if_it_has_seen_the_request() -> None:
    status = GetClusterStatusReply()
    assert verdict(status, 7) is None, "the first autoscaler says nothing"
    status.autoscaling_state.last_seen_cluster_resource_state_version = 7
    status.autoscaling_state.infeasible_cluster_resource_constraints.add()
    assert verdict(status, 7) is None, "this is about the request before"
    assert verdict(status, 6) is False
    del status.autoscaling_state.infeasible_cluster_resource_constraints[:]
    assert verdict(status, 6) is True
