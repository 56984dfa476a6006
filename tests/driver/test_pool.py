"""The pool without Ray: how many workers, on which nodes, with which devices, while nodes come and go."""

from __future__ import annotations

import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from daemon_actors import Actors
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, ActorUnavailableError, ActorUnschedulableError, RayTaskError
from ray_autoscaler import RayAutoscaler

from leap_dist.config.loading import ConfigError, resolve
from leap_dist.driver import pool as pool_module
from leap_dist.driver.actors import ServerProcess
from leap_dist.driver.deaths import Deaths
from leap_dist.driver.failures import RETRY_SECONDS
from leap_dist.driver.nodes import Node, Nodes, View
from leap_dist.driver.placement import GROUP_LABEL, Group, fit_resources
from leap_dist.driver.plan import with_speed
from leap_dist.driver.pool import Pool
from leap_dist.driver.worker_slot import WorkerSlot
from leap_dist.protocol.messages import Idle
from leap_dist.storage.locks import RunDirectoryBusy

BIG = Node({"CPU": 8.0}, {}, "10.0.0.3")
CPU, GPU = Node({"CPU": 4.0}, {}, "10.0.0.1"), Node({"CPU": 16.0, "GPU": 1.0}, {}, "10.0.0.2")


class FixedNodes(Nodes):
    """The nodes that a test names, and no thread that reads them."""

    own = None

    def __init__(self, **nodes: Node) -> None:
        self.view = View(nodes, {})


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, str, float]]:
    """Node, device and GPUs by worker, as the pool starts them; no actor runs, and none ends by itself."""
    found: dict[str, tuple[str, str, float]] = {}

    def start(self: Pool, slot: Any, host: str, room: Any) -> None:
        found[slot.name] = host, room.device, room.gpus
        slot.host, slot.device, slot.run, slot.started = host, room.device, "run", time.monotonic()

    monkeypatch.setattr(Pool, "_start", start)
    monkeypatch.setattr(Pool, "_check", lambda self, slot, run: None)
    monkeypatch.setattr(pool_module.ray, "kill", lambda actor: None)
    return found


def lose(pool: Pool, node: str) -> None:
    """The node is gone, and Ray has told of its workers."""
    pool._nodes.view = View({name: n for name, n in pool._nodes.view.staying.items() if name != node}, {})
    for slot in pool._slots:
        if slot.host == node:
            slot.clear()


def hosts(placed: dict[str, tuple[str, str, float]]) -> Counter[tuple[str, str, float]]:
    return Counter(placed.values())


def test_auto_fills_the_nodes_with_processors_and_gpus_and_follows_them(
    placed: dict[str, tuple[str, str, float]],
) -> None:
    pool = Pool(resolve("paper", {"worker.mps": "no"}), FixedNodes(a=CPU))
    pool.reconcile()
    assert hosts(placed) == {("a", "cpu", 0.0): 4}
    pool._nodes.view = View({"a": CPU, "b": GPU}, {})
    pool.reconcile()
    assert hosts(placed) == {("a", "cpu", 0.0): 4, ("b", "cuda", 0.0625): 16}
    assert (pool.wanted, len(pool.describe())) == (20, 20)
    assert Counter(worker["device"] for worker in pool.describe()) == {"cpu": 4, "cuda": 16}

    lose(pool, "b")
    pool.reconcile()
    assert (pool.wanted, len(pool.describe())) == (4, 4), "nobody waits for room that is gone"
    assert list(pool.alerts) == ["20 workers fit now (previously 4)", "4 workers fit now (previously 20)"]


@pytest.mark.parametrize(
    ("settings", "workers"),
    [
        ({}, 16),
        ({"min_workers": 40}, 40),
        ({"meta.batch_size": 2}, 8),
        ({"workers": 64}, 64),
        ({"mode": "sync", "meta.batch_size": 30}, 30),
    ],
    ids=str,
)
def test_where_the_autoscaler_is_not_known_a_batch_is_asked_for(settings: dict[str, Any], workers: int) -> None:
    """KubeRay tells nobody what it may add. With one bundle, it would add a single pod, whatever it may hold."""
    given = {"address": "auto", "wait_for_nodes": True, "worker.labels": "pool=spot", **settings}
    pods = {name: Node({"CPU": 4.0}, {"pool": "spot"}, "10.0.0.2") for name in ("a", "b")}
    pool = Pool(resolve("fast", given), FixedNodes(head=Node({}, {"pool": "stable"}, "10.0.0.1"), **pods))
    request = pool._bundles(None)
    assert request.bundles == [{"CPU": 1.0}] * workers
    assert request.selectors == [{"pool": "spot"}] * workers


RAY_UP = [
    Group({"CPU": 0.0}, {"pool": "stable"}, 0, "head"),
    Group({"CPU": 16.0}, {"pool": "spot"}, 16, "cpu-spot"),
    Group({"CPU": 8.0, "GPU": 1.0}, {"pool": "spot"}, 0, "gpu-spot"),
]
"""The groups of cluster/aws.yaml."""


@pytest.mark.parametrize("up", [0, 3, 16])
@pytest.mark.parametrize(
    ("settings", "asked"),
    [({}, 256), ({"workers": 300}, 256), ({"workers": 20}, 20), ({"mode": "sync", "meta.batch_size": 30}, 30)],
    ids=str,
)
def test_the_request_to_an_autoscaler_with_known_limits_always_fits(
    settings: dict[str, Any], asked: int, up: int
) -> None:
    """Ray ignores one that does not, and starts no node."""
    head = Node({}, {"pool": "stable", GROUP_LABEL: "head"}, "10.0.0.1")
    spot = Node({"CPU": 16.0, "memory": 2.0**36}, {"pool": "spot", GROUP_LABEL: "cpu-spot"}, "10.0.0.2")
    config = resolve("fast", {"address": "auto", "worker.labels": "pool=spot", **settings})
    most = {"most_workers": 30} if config.mode == "sync" else {}
    pool = Pool(config, FixedNodes(head=head, **{f"s{n}": spot for n in range(up)}), **most)
    autoscaler = RayAutoscaler(RAY_UP, {"cpu-spot": up})
    autoscaler.ask(pool._bundles(RAY_UP))
    assert len(autoscaler.requests[-1].bundles) == asked
    assert autoscaler.accepts()
    assert autoscaler.live["cpu-spot"] == max(up, -(-asked // 16))


def test_room_on_nodes_of_no_group_is_asked_for_besides_that_of_the_groups() -> None:
    config = resolve("fast", {"address": "auto", "workers": 300})
    pool = Pool(config, FixedNodes(byhand=CPU))
    assert len(pool._bundles(RAY_UP).bundles) == 4 + 16 * 16


def test_nobody_is_told_to_wait_for_nodes_that_cannot_join() -> None:
    pool = Pool(resolve("fast", {"min_workers": 500}), FixedNodes(a=CPU))
    with pytest.raises(ConfigError, match=r"only 4 fit on the current node; use --min-workers 4$"):
        pool.require_capacity()


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"b": GPU}, {("b", "cuda", 0.0625): 16}),
        ({"a": CPU, "b": GPU}, {("b", "cuda", 0.0625): 16}),
        ({"a": CPU}, {("a", "cpu", 0.0): 4, ("b", "cpu", 0.0): 16}),
    ],
)
def test_where_all_workers_compute_on_one_kind_of_device_the_first_nodes_decide_which(
    placed: dict[str, tuple[str, str, float]], first: dict[str, Node], then: dict[tuple[str, str, float], int]
) -> None:
    """An evaluation may start before the autoscaler has brought a node."""
    config, _ = fit_resources(resolve("paper", {"worker.mps": "no"}), [], one_kind=True)
    pool = Pool(config, FixedNodes(head=Node({"CPU": 0.0}, {}, "10.0.0.9")), one_kind=True)
    pool.reconcile()
    assert placed == {}
    for nodes in (first, {"a": CPU, "b": GPU}):
        pool._nodes.view = View(nodes, {})
        pool.reconcile()
    assert hosts(placed) == then


def test_the_first_node_goes_and_its_workers_move_to_the_others(placed: dict[str, tuple[str, str, float]]) -> None:
    pool = Pool(resolve("paper", {"workers": 4}), FixedNodes(a=CPU, b=CPU))
    pool.reconcile()
    assert hosts(placed) == {("a", "cpu", 0.0): 2, ("b", "cpu", 0.0): 2}, "where there is most room"
    lose(pool, "a")
    pool.reconcile()
    assert hosts(placed) == {("b", "cpu", 0.0): 4}


def test_a_fixed_number_fills_gpus_first(placed: dict[str, tuple[str, str, float]]) -> None:
    pool = Pool(resolve("paper", {"workers": 6, "worker.gpus": 0.25, "worker.mps": "no"}), FixedNodes(a=CPU, b=GPU))
    pool.reconcile()
    assert hosts(placed) == {("b", "cuda", 0.25): 4, ("a", "cpu", 0.0): 2}
    assert pool.wanted == 6


def test_a_batch_that_is_smaller_than_the_node_has_room_for_uses_all_of_its_gpus(
    placed: dict[str, tuple[str, str, float]],
) -> None:
    large = Node({"CPU": 192.0, "GPU": 8.0}, {}, "10.0.0.1")
    pool = Pool(resolve("paper", {"worker.mps": "no"}), FixedNodes(a=large), most_workers=16)
    pool.reconcile()
    assert hosts(placed) == {("a", "cuda", 0.5): 16}


def test_who_asks_for_more_than_mps_admits_is_told_how_to_get_it() -> None:
    pool = Pool(
        resolve("paper", {"workers": 60, "worker.gpus": 0.01}),
        FixedNodes(b=GPU._replace(resources={"CPU": 64.0, "GPU": 1.0})),
    )
    pool.require_capacity()
    assert list(pool.alerts) == ["60 workers requested, only 48 fit; give --mps no, which admits more to a GPU"]


def test_who_asks_for_more_than_share_a_gpu_is_told_how_to_get_it() -> None:
    settings = {"workers": 6, "worker.gpus": 0.25, "worker.device": "cuda"}
    pool = Pool(resolve("paper", settings), FixedNodes(b=GPU))
    pool.require_capacity()
    assert list(pool.alerts) == ["6 workers requested, only 4 fit; lower worker.gpus to put more of them on a GPU"]


@pytest.mark.parametrize(("most", "wanted"), [(3, 3), (100, 20)])
def test_auto_starts_no_more_workers_than_ever_have_a_task(
    placed: dict[str, tuple[str, str, float]], most: int, wanted: int
) -> None:
    pool = Pool(resolve("paper", {"worker.mps": "no"}), FixedNodes(a=CPU, b=GPU), most_workers=most)
    pool.reconcile()
    assert (pool.wanted, len(placed)) == (wanted, wanted)


def test_workers_of_a_gpu_wait_until_its_mps_daemon_has_started_or_not(
    placed: dict[str, tuple[str, str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool(resolve("paper"), FixedNodes(a=CPU, b=GPU))
    undecided = {"b"}
    monkeypatch.setattr(pool._daemons, "follow", lambda hosts, occupied: None)
    monkeypatch.setattr(pool._daemons, "is_undecided", undecided.__contains__)
    pool.reconcile()
    assert hosts(placed) == {("a", "cpu", 0.0): 4}
    undecided.clear()
    pool.reconcile()
    assert hosts(placed) == {("a", "cpu", 0.0): 4, ("b", "cuda", 0.0625): 16}


def test_the_mps_daemon_of_a_node_that_is_about_to_go_stays_as_long_as_workers_need_it(
    placed: dict[str, tuple[str, str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They use the notice to finish their tasks; without the daemon, their CUDA contexts would fail at once."""
    actors = Actors(monkeypatch)
    pool = Pool(resolve("paper"), FixedNodes(b=GPU))
    pool.reconcile()
    assert placed == {}, "the daemon is starting"
    actors.answers["b.start"] = "/tmp/leap-mps-1", ""
    pool.reconcile()
    pool.reconcile()
    assert hosts(placed) == {("b", "cuda", 0.0625): 16}
    pool._nodes.view = View({}, {"b": time.monotonic() + 60})
    pool.reconcile()
    assert (actors.ended, pool.mps) == ([], {"b": "running"})
    for slot in pool._slots[1:]:
        slot.clear()
    pool.reconcile()
    assert actors.ended == [], "one worker is still there"
    pool._slots[0].clear()
    pool.reconcile()
    assert (actors.ended, pool.mps) == (["b"], {})


def test_nothing_starts_before_min_workers_fit(placed: dict[str, tuple[str, str, float]]) -> None:
    pool = Pool(resolve("paper", {"min_workers": 5}), FixedNodes(a=CPU))
    pool.reconcile()
    assert placed == {}
    assert pool.waiting == (
        "waiting for nodes: 1 node can hold 4 workers, but at least 5 must fit; each takes 1 CPU and 0 GPUs"
    )
    pool._nodes.view = View({"a": CPU, "b": CPU}, {})
    pool.reconcile()
    assert len(placed) == 8


def test_workers_start_beside_the_server_and_one_that_cannot_work_sends_them_home(
    placed: dict[str, tuple[str, str, float]],
) -> None:
    pool = Pool(resolve("paper"), FixedNodes(a=CPU))
    pool.open("a server that is still starting")
    assert len(placed) == 4

    class Unable(ServerProcess):
        def _make(self, *arguments: Any) -> Any:
            raise RunDirectoryBusy("another server works here")

    server = Unable()
    assert server.lease("w0", "an incarnation") == Idle(finished=True), "the driver says why, and no worker fails"


@pytest.mark.parametrize(
    "error",
    [
        ActorUnschedulableError("the node is gone"),
        ActorDiedError(ActorDiedErrorContext(actor_id=b"a" * 16, never_started=True)),
    ],
)
def test_a_worker_whose_node_was_gone_before_it_started_has_not_failed(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def get(reference: Any) -> None:
        raise error

    monkeypatch.setattr(pool_module, "ray", SimpleNamespace(get=get, wait=lambda refs, timeout: (refs, []), kill=print))
    pool = Pool(resolve("paper"), FixedNodes(a=CPU))
    slot = WorkerSlot("w0", run="run", started=time.monotonic())  # type: ignore[arg-type]
    pool._check(slot, "run")  # type: ignore[arg-type]
    assert (pool.restarts, slot.failures, list(pool.alerts)) == (0, 0, [])
    assert slot.run is None
    assert slot.not_before > time.monotonic(), "the next reading of the nodes comes first"


def died(message: str) -> ActorDiedError:
    return ActorDiedError(ActorDiedErrorContext(actor_id=b"a" * 16, error_message=message))


REPORTED = died("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR")
WITH_ITS_NODE = died("The actor died because its node has died.")
UNEXPLAINED = ActorDiedError()
UNREACHABLE = ActorUnavailableError("The actor is temporarily unavailable: RpcError: Socket closed rpc_code: 14", None)
SERVER_AWAY = RayTaskError("run", "traceback", ActorUnavailableError("server", None)).as_instanceof_cause()
CHECK = Pool._check


@pytest.mark.parametrize(
    ("error", "gone_after", "seconds", "crashed"),
    [
        (REPORTED, None, 5, True),
        (REPORTED, 3, 3, False),
        (UNREACHABLE, None, 20, True),
        (UNREACHABLE, 12, 12, False),
        (UNEXPLAINED, None, 20, True),
        (UNEXPLAINED, 12, 12, False),
        (WITH_ITS_NODE, None, 0, False),
        (SERVER_AWAY, None, 0, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("drains", [False, True])
def test_a_worker_has_crashed_only_if_its_node_outlives_it(
    placed: dict[str, tuple[str, str, float]],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    gone_after: int | None,
    seconds: int,
    crashed: bool,
    drains: bool,
) -> None:
    """With Ray's default settings, a node counts as alive for ten seconds after its workers have failed.

    The worker starts again when the server has been told: its next lease would end the one that is to be judged.
    """
    clock = failing_at_1000(monkeypatch, error)
    pool = Pool(resolve("paper", {"workers": 1}), FixedNodes(a=BIG, b=CPU))
    fail_by_itself(pool)
    placed.clear()
    told: dict[int, list[bool]] = {}
    for second in range(25):
        clock[0] = 1000.0 + second
        here = {"b": CPU} if gone_after is not None and second >= gone_after else {"a": BIG, "b": CPU}
        leaving = {"a": clock[0] + 30} if drains and "a" not in here else {}
        pool._nodes.view = View(here, leaving, read_at=clock[0])
        pool.reconcile()
        if pool.ended:
            told[second] = [worker.crashed for worker in pool.ended]
            pool.ended.clear()
        assert bool(placed) == (second >= max(seconds, 1)), second
    assert told == {seconds: [crashed]}


def failing_at_1000(monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[float]:
    """Every `run` ends with this error. Return the clock, which is at 1,000 s."""

    def get(reference: Any) -> None:
        raise error

    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(pool_module, "ray", SimpleNamespace(get=get, wait=lambda refs, timeout: (refs, []), kill=id))
    return clock


def fail_by_itself(pool: Pool) -> None:
    """The first worker starts, and its process ends."""
    pool.reconcile()
    (slot, *_) = pool._slots
    slot.node, slot.incarnation = slot.host, "i0"
    CHECK(pool, slot, "run")  # type: ignore[arg-type]


def test_a_view_of_the_nodes_that_is_out_of_date_proves_nothing(
    placed: dict[str, tuple[str, str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = failing_at_1000(monkeypatch, UNREACHABLE)
    pool = Pool(resolve("paper", {"workers": 1}), FixedNodes(a=CPU))
    fail_by_itself(pool)
    pool._nodes.view = View({"a": CPU}, {}, read_at=1019.0)
    clock[0] = 1040.0
    pool.reconcile()
    assert (pool.ended, [worker["state"] for worker in pool.describe()]) == ([], ["restarting"])
    pool._nodes.view = View({}, {}, read_at=1040.0)
    pool.reconcile()
    assert [worker.crashed for worker in pool.ended] == [False]


@pytest.mark.parametrize("error", [REPORTED, UNREACHABLE, UNEXPLAINED], ids=str)
def test_the_node_of_the_driver_lives(
    placed: dict[str, tuple[str, str, float]], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """On one machine, no worker waits for a verdict."""
    failing_at_1000(monkeypatch, error)
    nodes = FixedNodes(a=CPU)
    nodes.own = "a"  # type: ignore[assignment]
    pool = Pool(resolve("paper", {"workers": 1}), nodes)
    fail_by_itself(pool)
    assert [worker.crashed for worker in pool.ended] == [True]
    assert pool.alerts[-1].endswith("it is restarted in 1 s")


@pytest.mark.parametrize("lease_seconds", [6.0, 20.0, 60.0, 300.0])
@pytest.mark.parametrize("error", [REPORTED, UNREACHABLE], ids=str)
def test_a_verdict_takes_less_time_than_a_lease(error: Any, lease_seconds: float) -> None:
    """A lease that expires counts as a failure."""
    deaths = Deaths(FixedNodes(a=CPU), lease_seconds)
    seconds = deaths.seconds("a", error)
    assert seconds is not None
    assert 0 < seconds <= lease_seconds / 3
    assert deaths.seconds(None, error) is None, "the worker has not answered, and had no lease"


class Unsure(pool_module.NoChecks):
    """Checks that only some nodes have passed."""

    def __init__(self) -> None:
        self.alerts = ["b has no ROMs"]
        self.good = {"a"}

    def passed(self, nodes: Any) -> dict[str, Node]:
        return {name: node for name, node in nodes.items() if name in self.good}


def test_a_node_gets_no_workers_before_it_was_checked(placed: dict[str, tuple[str, str, float]]) -> None:
    checks = Unsure()
    pool = Pool(resolve("paper"), FixedNodes(a=CPU, b=CPU), checks=checks)
    pool.reconcile()
    assert hosts(placed) == {("a", "cpu", 0.0): 4}
    assert list(pool.alerts) == ["b has no ROMs"]
    checks.good.add("b")
    pool.reconcile()
    assert hosts(placed) == {("a", "cpu", 0.0): 4, ("b", "cpu", 0.0): 4}


class Doubting(pool_module.NoChecks):
    """Checks that every node has passed, and that ask again about those that are doubted."""

    def __init__(self) -> None:
        self.alerts = []
        self.asked: list[tuple[str, bool]] = []
        self.open: set[str] = set()

    def doubt(self, name: str, *, occupied: bool) -> None:
        self.asked.append((name, occupied))
        self.open.add(name)

    def is_doubted(self, name: str) -> bool:
        return name in self.open


def fail(pool: Pool, name: str) -> None:
    """The worker with this name fails, and its pause is over."""
    (slot,) = [slot for slot in pool._slots if slot.name == name]
    pool._restart(slot, "died")
    slot.not_before = 0.0


def test_a_node_on_which_workers_keep_failing_is_checked_again_and_others_are_preferred(
    placed: dict[str, tuple[str, str, float]],
) -> None:
    checks = Doubting()
    pool = Pool(resolve("paper", {"workers": 1}), FixedNodes(bad=BIG, good=CPU), checks=checks)
    places = []
    for _ in range(4):
        pool.reconcile()
        places.append(placed.pop("w0")[0])
        fail(pool, "w0")
    assert places == ["bad", "bad", "bad", "good"]
    assert checks.asked == [("bad", False)]
    checks.open.clear()  # it has passed
    pool.reconcile()
    assert placed.pop("w0")[0] == "good", "it has most room, but the other one works"


def test_a_node_whose_workers_live_is_no_longer_the_last_choice(
    placed: dict[str, tuple[str, str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pool = Pool(resolve("paper", {"workers": 2, "min_workers": 1}), FixedNodes(bad=BIG), checks=Doubting())
    pool._checks.open = set()  # type: ignore[attr-defined]
    pool.reconcile()
    for _ in range(2):
        fail(pool, "w0")
        now[0] += 1.0
        pool.reconcile()
    (w0, w1) = pool._slots
    w1.pid, now[0] = 2, 1060.5
    pool.reconcile()
    fail(pool, "w0")
    pool.reconcile()
    assert pool._failures.rounds("bad") == 1, "a worker from before the failures proves nothing"
    pool._checks.open.clear()  # type: ignore[attr-defined]
    pool.reconcile()
    w0.pid, now[0] = 3, now[0] + 60.0
    pool.reconcile()
    assert pool._failures.rounds("bad") == 0


@pytest.mark.parametrize(("alive", "occupied"), [(13, True), (0, False)])
def test_the_checks_are_told_whether_workers_hold_memory_of_the_gpus(
    placed: dict[str, tuple[str, str, float]], alive: int, occupied: bool
) -> None:
    """One fault may end all clients of an MPS server; the node is asked once."""
    checks = Doubting()
    pool = Pool(resolve("paper", {"worker.mps": "no"}), FixedNodes(b=GPU), checks=checks)
    pool.reconcile()
    for number in range(alive, 16):
        pool._restart(pool._slots[number], "died")
    pool.reconcile()
    assert checks.asked == [("b", occupied)]
    placed.clear()
    for slot in pool._slots:
        slot.not_before = 0.0
    pool.reconcile()
    assert placed == {}, "nobody starts there before it was asked"


def quarantine(pool: Pool, node: str, most: int = 99) -> None:
    """Everything fails on a node: the server puts up to `most` of its workers into quarantine, besides those before."""
    new = [slot.name for slot in pool._slots if slot.host == node and slot.run is not None][:most]
    known = [slot.name for slot in pool._slots if slot.quarantined]
    pool.handle_status({"quarantined_workers": known + new, "silent": []})


def running(pool: Pool) -> Counter[str | None]:
    return Counter(slot.host for slot in pool._slots if slot.run is not None)


def test_a_node_on_which_everything_fails_does_not_get_the_workers_of_the_others(
    placed: dict[str, tuple[str, str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers end in quarantine, which makes it the node with most room."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    checks = Doubting()
    pool = Pool(resolve("paper-async"), FixedNodes(a=CPU, b=CPU, bad=BIG), checks=checks)
    pool.reconcile()
    assert running(pool) == {"a": 4, "b": 4, "bad": 8}
    quarantine(pool, "bad")
    pool.reconcile()
    assert checks.asked == [("bad", False)]
    checks.open.clear()  # it has passed: nothing can be seen from outside
    for _ in range(8):
        fail(pool, next(slot.name for slot in pool._slots if slot.run is not None))
        now[0] += 1.0
        pool.reconcile()
        quarantine(pool, "bad")
        checks.open.clear()
        assert running(pool) == {"a": 4, "b": 4}
    assert [alert for alert in pool.alerts if "in quarantine" in alert] == [
        "most workers on node 10.0.0.3 are in quarantine; it gets one worker every 10 minutes"
    ]

    lose(pool, "b")
    pool.reconcile()
    assert running(pool) == {"a": 4}, "there is room on the bad node only"
    for rounds in (1, 2):
        now[0] += RETRY_SECONDS
        pool.reconcile()
        assert running(pool) == {"a": 4, "bad": 1}, "one worker tries"
        quarantine(pool, "bad")
        assert sum(slot.quarantined for slot in pool._slots) == 8 + rounds


def test_where_there_is_no_better_node_workers_stay_on_the_one_there_is(
    placed: dict[str, tuple[str, str, float]],
) -> None:
    """Several broken games may put workers into quarantine, wherever these are."""
    pool = Pool(resolve("paper"), FixedNodes(a=CPU))
    pool.reconcile()
    quarantine(pool, "a", most=3)
    fail(pool, "w3")
    pool.reconcile()
    assert running(pool) == {"a": 1}
    assert not any("in quarantine" in alert for alert in pool.alerts)


def test_a_node_on_which_most_workers_work_is_not_excluded(placed: dict[str, tuple[str, str, float]]) -> None:
    pool = Pool(resolve("paper"), FixedNodes(a=CPU, b=BIG))
    pool.reconcile()
    quarantine(pool, "b", most=3)
    fail(pool, next(slot.name for slot in pool._slots if slot.host == "b" and slot.run is not None))
    pool.reconcile()
    assert running(pool) == {"a": 4, "b": 5}


def test_a_worker_that_is_put_into_quarantine_while_it_restarts_does_not_start(
    placed: dict[str, tuple[str, str, float]],
) -> None:
    pool = Pool(resolve("paper", {"workers": 1}), FixedNodes(bad=BIG, good=CPU))
    pool.reconcile()
    fail(pool, "w0")
    placed.clear()
    pool.handle_status({"quarantined_workers": ["w0"], "silent": []})
    pool.reconcile()
    assert (placed, pool.exhausted, pool._slots[0].host) == ({}, True, "bad")


class Leaving:
    """An actor that is told to leave."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.leave = SimpleNamespace(remote=self.seconds.append)


def test_workers_on_processors_give_way_once_the_gpus_of_their_node_can_be_used(
    placed: dict[str, tuple[str, str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(pool_module.NoChecks):
        gpus = 0.0

        def passed(self, nodes: Any) -> dict[str, Node]:
            return {
                name: node._replace(resources={**node.resources, "GPU": self.gpus * (name == "b")})
                for name, node in nodes.items()
            }

    checks = Late()
    pool = Pool(resolve("paper", {"worker.mps": "no"}), FixedNodes(a=CPU, b=GPU), checks=checks)
    pool.reconcile()
    assert hosts(placed) == {("a", "cpu", 0.0): 4, ("b", "cpu", 0.0): 16}
    actors = {slot.name: Leaving() for slot in pool._slots}
    for slot in pool._slots:
        slot.actor = actors[slot.name]
    on_b = [slot for slot in pool._slots if slot.host == "b"]
    checks.gpus = 1.0
    for _ in range(2):
        pool.reconcile()
    told = {name for name, actor in actors.items() if actor.seconds == [float("inf")]}
    assert told == {slot.name for slot in on_b}, "once, and with as much time as a task takes"
    assert [slot.state for slot in on_b] == ["leaving"] * 16
    assert list(pool.alerts) == ["node 10.0.0.2 has GPUs now; its 16 workers on processors leave after their tasks"]

    monkeypatch.undo()
    monkeypatch.setattr(pool_module, "ray", SimpleNamespace(get=lambda _: [], wait=lambda r, timeout: (r, []), kill=id))
    slot = on_b[0]
    pool._check(slot, "run")  # type: ignore[arg-type]  # its task is done
    assert (slot.run, slot.done, pool.restarts) == (None, False, 0)
    assert (pool._host(pool._hosts()), pool._hosts()["b"].device) == ("b", "cuda")


def test_a_worker_that_gives_way_leaves_at_once_if_its_node_goes(placed: dict[str, tuple[str, str, float]]) -> None:
    pool = Pool(resolve("paper", {"workers": 1}), FixedNodes(a=CPU))
    pool.reconcile()
    (slot,) = pool._slots
    slot.actor, slot.node, slot.gone_by = Leaving(), "a", float("inf")
    pool._vacate({"a": time.monotonic() + 25.0})
    (left,) = slot.actor.seconds
    assert 15 < left <= 20
    pool._vacate({"a": slot.gone_by})
    assert len(slot.actor.seconds) == 1


STATUS = {"tasks_wanted": 20, "tasks": 3, "tasks_waiting": 1}


@pytest.mark.parametrize(
    ("settings", "nodes", "most", "plan"),
    [
        (
            {"task_steps": 96_000},
            {"a": CPU},
            99,
            "plan: 1 node, 4 workers, limited by processors",
        ),
        (
            {"task_steps": 336_000},
            {"a": CPU, "b": GPU},
            99,
            "plan: 2 nodes, 20 workers (16 on GPUs, 4 on processors), limited by processors",
        ),
        (
            {"worker.gpus": 0.25, "worker.device": "cuda", "task_steps": 68_000},
            {"a": CPU, "b": GPU},
            99,
            "plan: 1 node, 4 workers (4 on GPUs, 0 on processors), limited by worker.gpus",
        ),
        (
            {"worker.cpus": 0.5, "workers": 6, "task_steps": 72_000},
            {"a": CPU},
            99,
            "plan: 1 node, 6 workers, limited by --workers",
        ),
        ({"workers": 1, "task_steps": 1_000}, {"a": CPU}, 99, "plan: 1 node, 1 worker, limited by --workers"),
        ({}, {"a": CPU}, 3, "plan: 1 node, 3 workers, limited by the tasks left"),
        ({}, {"b": GPU}, 3, "plan: 1 node, 3 workers (3 on GPUs, 0 on processors), limited by the tasks left"),
        (
            {"mode": "sync"},
            {"a": CPU},
            2,
            "plan: 1 node, 2 workers, limited by meta.batch_size, because mode sync waits for each batch",
        ),
        ({"min_workers": 9}, {}, 99, "plan: 0 nodes, 0 workers, limited by nodes"),
    ],
)
def test_the_plan_in_one_line(settings: dict[str, Any], nodes: dict[str, Node], most: int, plan: str) -> None:
    pool = Pool(resolve("paper-async", settings), FixedNodes(**nodes), most_workers=most)
    assert pool.plan() == plan


@pytest.mark.parametrize(
    ("preset", "settings", "source"),
    [
        ("quick", {}, "workers of preset quick"),
        ("quick", {"workers": 3}, "--workers"),
        ("fast", {"meta_learner": "multitask"}, "workers of multitask"),
        ("quick", {"tasks": "omniglot"}, "workers of preset quick"),
        ("fast", {"workers": 2}, "--workers"),
    ],
    ids=str,
)
def test_the_plan_says_who_limited_the_workers(preset: str, settings: dict[str, Any], source: str) -> None:
    pool = Pool(resolve(preset, settings), FixedNodes(a=CPU), most_workers=99)
    assert pool.plan().endswith(f"limited by {source}")


TYPICAL = "plan: x; about {} agent steps/s, as fast as on other machines, {} to the end"
ON_PROCESSORS = [{"device": "cpu"}, {"device": "cpu"}]


@pytest.mark.parametrize(
    ("rate", "more", "expected"),
    [
        (350.0, {}, "plan: x; about 350 agent steps/s, 0:07:37 to the end"),  # 16 tasks of 10,000 steps
        (1234.0, {}, "plan: x; about 1,200 agent steps/s, 0:02:10 to the end"),
        (1000.0, {"tasks": 29}, "plan: x; about 1,000 agent steps/s, 0:00:00 to the end"),
        (None, {}, "plan: x"),
        (350.0, {"workers_wanted": 0}, "plan: x"),
        (350.0, {"plan": ""}, ""),
        (None, {"workers": [{"device": "cuda"}, {"device": ""}]}, TYPICAL.format("1,700", "0:01:34")),
        (350.0, {"workers": [{"device": "cuda"}]}, "plan: x; about 350 agent steps/s, 0:07:37 to the end"),
    ],
)
def test_the_plan_states_the_speed_that_was_measured_here_or_else_that_of_other_machines(
    rate: float | None, more: dict[str, Any], expected: str
) -> None:
    summary = {**STATUS, "plan": "plan: x", "workers_wanted": 2, "workers": ON_PROCESSORS, **more}
    assert with_speed(summary, resolve("quick"), rate) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, TYPICAL.format("3,200", "0:00:50")),
        ({"worker.cpus": 0.5}, TYPICAL.format("1,600", "0:01:40")),  # half a processor for each
        ({"tasks": "omniglot"}, "plan: x"),
    ],
)
def test_on_a_cluster_the_plan_states_the_speed_of_other_machines(settings: dict[str, Any], expected: str) -> None:
    summary = {**STATUS, "plan": "plan: x", "workers_wanted": 2, "workers": ON_PROCESSORS}
    assert with_speed(summary, resolve("quick", {"address": "auto", **settings}), None) == expected


@pytest.mark.parametrize(
    ("settings", "nodes", "idle"),
    [
        ({}, {"b": GPU, "a": CPU, "c": CPU, "head": Node({"CPU": 0.0}, {}, "10.0.0.9")}, "2 nodes"),
        ({}, {"b": GPU, "a": CPU}, "1 node"),
        ({}, {"b": GPU}, None),
        ({}, {"a": CPU}, None),
        ({"worker.labels": "pool=spot"}, {"b": GPU._replace(labels={"pool": "spot"}), "a": CPU}, None),
        ({"worker.device": "cuda"}, {"b": GPU, "a": CPU}, None),
        ({"worker.device": "cpu"}, {"b": GPU, "a": CPU}, None),
    ],
    ids=str,
)
def test_the_plan_names_nodes_that_are_idle_because_all_workers_use_gpus(
    settings: dict[str, Any], nodes: dict[str, Node], idle: str | None
) -> None:
    config = resolve("paper", settings)
    one_kind = config.worker.device == "auto"  # as the driver calls it
    fitted, _ = fit_resources(config, list(nodes.values()), one_kind=one_kind)
    pool = Pool(fitted, FixedNodes(**nodes), one_kind=one_kind)
    said = (
        f", {idle} without GPUs left out, because all workers compute on one kind of device (--worker.device cpu uses "
        "the processors of all nodes)"
    )
    assert (said in pool.plan()) == (idle is not None)
    assert ("left out" in pool.plan()) == (idle is not None)
