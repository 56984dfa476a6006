"""What several runs ask an autoscaler for together, and what becomes of it when one of them dies."""

from __future__ import annotations

import pytest

from leap_dist.driver.resource_requests import Request, RequestBook

CPUS = Request([{"CPU": 1.0}] * 2, [{"pool": "spot"}] * 2)
GPUS = Request([{"CPU": 1.0, "GPU": 0.5}], [{}])
NOTHING = Request([], [])


class Cluster:
    """An autoscaler that remembers what it was asked for, and a clock."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.now = 0.0
        self.answers = True
        self.book = RequestBook(self._ask, lambda: self.now)

    def _ask(self, request: Request) -> None:
        if not self.answers:
            raise ConnectionError
        self.asked.append(request)


def test_the_requests_of_all_runs_are_added_up() -> None:
    cluster = Cluster()
    cluster.book.renew("one", CPUS, 60)
    cluster.book.renew("two", GPUS, 60)
    both = Request([*CPUS.bundles, *GPUS.bundles], [*CPUS.selectors, *GPUS.selectors])
    assert cluster.asked == [CPUS, both]
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
