"""Too little memory: fewer workers, with a word; and whom Ray kills first when it runs out."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray.core.generated.common_pb2 import WorkerExitType
from ray.core.generated.gcs_pb2 import WorkerTableData
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from leap_dist.config.loading import resolve
from leap_dist.driver import cluster, memory
from leap_dist.driver import pool as pool_module
from leap_dist.driver.actors import SERVER, WORKER
from leap_dist.driver.nodes import Nodes, View
from leap_dist.driver.placement import Room
from leap_dist.driver.pool import Pool
from leap_dist.driver.reservation import Reservation
from leap_dist.driver.worker_slot import WorkerSlot


def test_no_more_workers_start_than_there_is_memory_for() -> None:
    config = resolve("smoke", {"workers": 8, "min_workers": 4})
    fewer, (line,) = memory.fit(config, 3.5 * memory.WORKER_BYTES)
    assert (fewer.workers, fewer.min_workers) == (3, 3)
    assert line == (
        "8 workers requested, only 3 started: each takes about 500 MB, and 1.7 GB are free; "
        "lower --workers or --agent.envs"
    )
    assert memory.fit(config, 0.0)[0].workers == 1, "one is tried all the same"
    assert memory.fit(resolve("paper"), 0.0)[1] == [], "what follows the resources needs no correction"
    on_gpus, (line,) = memory.fit(config, 3.5 * memory.CUDA_WORKER_BYTES, on_gpus=True)
    assert (on_gpus.workers, "each takes about 1500 MB" in line) == (3, True), "the context of CUDA comes on top"
    assert memory.fit(config, 100.0 * memory.WORKER_BYTES) == (config, [])
    assert memory.fit(resolve("smoke", {"workers": 8, "address": "auto"}), 0.0)[1] == [], "nodes are not judged"


def test_the_memory_that_is_free_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < memory._available_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    files = {"/proc/meminfo": "MemTotal: 4000 kB\nMemAvailable:    3000 kB\n", "/sys/fs/cgroup/memory.max": "2048000",
             "/sys/fs/cgroup/memory.current": "1024000"}  # fmt: skip

    def read(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    assert memory._available_bytes() == 1024000
    files["/sys/fs/cgroup/memory.max"] = "max"
    assert memory._available_bytes() == 3000 * 1024


NODE, OTHER = 28 * "ab", 28 * "cd"
"""Ray's IDs of two nodes."""


def in_table(pid: int, node: str, exit_type: str, started: int = 1) -> bytes:
    """A process in Ray's table."""
    found = WorkerTableData(pid=pid, exit_type=WorkerExitType.Value(exit_type), start_time_ms=started)
    found.worker_address.node_id = bytes.fromhex(node)
    return bytes(found.SerializeToString())


def test_a_head_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's call blocks for a minute if the head node is gone, in which the driver must be able to end."""
    gone, asked = threading.Event(), []

    class Accessor:
        def get_worker_table(self) -> list[bytes]:
            asked.append(1)
            gone.wait()
            return [in_table(7, NODE, "NODE_OUT_OF_MEMORY")]

    monkeypatch.setattr(ray._private.state.state, "_global_state_accessor", Accessor())
    monkeypatch.setattr(memory, "ANSWER_SECONDS", 0.01)
    try:
        assert not memory.was_killed(None, NODE)
        assert not memory.was_killed(7, None)
        assert not memory.was_killed(7, NODE)
        assert not memory.was_killed(7, NODE)
        assert len(asked) == 1, "the first question is still open"
    finally:
        gone.set()
    memory._asking[0].join()
    monkeypatch.setattr(memory, "ANSWER_SECONDS", 60.0)
    assert memory.was_killed(7, NODE)
    assert not memory.was_killed(8, NODE)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("pid", [7, 8])
@pytest.mark.parametrize("node", [NODE, OTHER])
def test_a_process_with_the_pid_of_one_that_was_killed_elsewhere_or_before_was_not(
    monkeypatch: pytest.MonkeyPatch, pid: int, node: str, order: int
) -> None:
    """In containers, the workers of all nodes have the same small PIDs."""
    table = [
        in_table(7, NODE, "NODE_OUT_OF_MEMORY", started=3),
        in_table(7, OTHER, "SYSTEM_ERROR", started=1),
        in_table(8, NODE, "NODE_OUT_OF_MEMORY", started=2),
        in_table(8, NODE, "SYSTEM_ERROR", started=4),
        in_table(8, OTHER, "SYSTEM_ERROR", started=5),
        in_table(8, OTHER, "NODE_OUT_OF_MEMORY", started=6),
    ][::order]
    accessor = SimpleNamespace(get_worker_table=lambda: table)
    monkeypatch.setattr(ray._private.state.state, "_global_state_accessor", accessor)
    assert memory.was_killed(pid, node) == ((pid, node) in {(7, NODE), (8, OTHER)})


class Nobody(Nodes):
    """No nodes, and no thread that reads them."""

    own = None

    def __init__(self) -> None:
        self.view, self.reservation = View({}, {}), Reservation(None, {}, "")


def test_a_local_ray_may_restart_workers_and_kills_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that may be restarted, as the server may be, Ray kills the youngest first."""
    for name in memory.MONITOR:
        monkeypatch.delenv(name, raising=False)
    memory.prepare_monitor()
    assert {name: os.environ[name] for name in memory.MONITOR} == {"RAY_worker_killing_policy_by_group": "true"}
    asked: list[dict[str, Any]] = []

    class Options:
        def __getattr__(self, _: str) -> Any:
            return self

        def __call__(self, *_: Any, **options: Any) -> Any:
            asked.append(options)
            return self

    monkeypatch.setattr(pool_module, "WORKER", Options())
    for address in ("local", "auto"):
        pool = Pool(resolve("smoke", {"address": address}), Nobody())
        pool._start(WorkerSlot("w0"), 56 * "a", Room(1, "cpu", 0.0, "processors"))
    assert [options["max_restarts"] for options in asked if "max_restarts" in options] == [-1, 0]


def test_the_alert_says_who_took_how_much_and_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(resolve("smoke"), Nobody())
    slots = [
        WorkerSlot(f"w{number}", started=time.monotonic(), memory_bytes=(number + 4) * 100 * 2**20)
        for number in range(2)
    ]
    pool._slots = slots
    reference: Any = "run"
    monkeypatch.setattr(ray, "wait", lambda references, timeout: (references, []))
    monkeypatch.setattr(ray, "kill", lambda _: None)

    def get(_: Any) -> None:
        raise OutOfMemoryError("2 workers were killed\nRefer to the documentation")

    monkeypatch.setattr(ray, "get", get)
    pool._check(slots[1], reference)
    assert list(pool.alerts) == [
        "w1 was killed because the memory of its node was full; it used 500 MB, all workers together 900 MB; "
        "lower --workers or --agent.envs; it is restarted in 1 s"
    ]
    assert [worker.crashed for worker in pool.ended] == [False], "no task is blamed"


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "died: torch.OutOfMemoryError: CUDA out of memory.; lower --agent.envs, or give each worker more of a GPU "
            "with --worker.gpus; it is restarted in 1 s",
        ),
        (torch.AcceleratorError("CUDA error"), "died: torch.AcceleratorError: CUDA error; it is restarted in 1 s"),
    ],
)
def test_who_has_too_little_memory_on_a_gpu_is_told_what_to_set(
    monkeypatch: pytest.MonkeyPatch, cause: Exception, said: str
) -> None:
    """The error arrives as Ray's, which is one of the cause's type as well."""
    text = f"Traceback\ntorch.{type(cause).__name__}: {cause}\n"

    def get(_: Any) -> None:
        raise RayTaskError("run", text, cause).as_instanceof_cause()

    pool = Pool(resolve("smoke"), Nobody())
    pool._slots = [WorkerSlot("w0", started=time.monotonic())]
    monkeypatch.setattr(ray, "wait", lambda references, timeout: (references, []))
    monkeypatch.setattr(ray, "kill", lambda _: None)
    monkeypatch.setattr(ray, "get", get)
    pool._check(pool._slots[0], "run")  # type: ignore[arg-type]
    assert list(pool.alerts) == [f"w0 {said}"]
    assert [worker.crashed for worker in pool.ended] == [False], "no task is blamed"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_ray_kills_a_worker_before_the_server(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real memory monitor, with a threshold a little above what is used; then this process takes more.

    It gives everything back as soon as the worker is gone, because Ray kills the next process if that did not help, and
    then only the server is left. The monitor observes the whole machine: another program that takes a gigabyte
    meanwhile makes it strike too early.
    """
    for name in ("HOME", "RAY_TMPDIR"):
        monkeypatch.setenv(name, environment[name])
    headroom = 1.5 * 2**30
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    threshold = 1 - (memory._available_bytes() - headroom) / total
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{threshold:.4f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "200")
    config = resolve("smoke", {"worker.cpus": 0.5, "meta_updates": 1000})
    cluster.connect(config)
    taken: list[bytes] = []
    try:
        server = SERVER.remote(config, tmp_path, "session")
        assert ray.get(server.problem.remote(), timeout=60) is None
        server_pid = ray.get(server.advance.remote(0, []), timeout=60)[0]["server_pid"]
        worker = WORKER.options(num_cpus=0.5, max_restarts=-1).remote("w0", "i0", config, False)
        worker_pid = ray.get(worker.health.remote(), timeout=60).pid
        node = ray.get_runtime_context().get_node_id()
        run, deadline = worker.run.remote(server, {}), time.monotonic() + 60
        while _lives(worker_pid):
            assert time.monotonic() < deadline
            if 1 - memory._available_bytes() / total < threshold + 0.005:
                taken.append(b"x" * (50 * 2**20))
            time.sleep(0.01)
        taken.clear()
        with pytest.raises(RayError):
            ray.get(run)
        assert memory.was_killed(worker_pid, node)
        assert not memory.was_killed(server_pid, node)
        assert ray.get(server.advance.remote(0, []), timeout=60)[0]["server_pid"] == server_pid
    finally:
        taken.clear()
        cluster.disconnect()


def _lives(pid: int) -> bool:
    """Return whether a process has memory, which one that has ended does not, even if nobody has waited for it."""
    try:
        return Path(f"/proc/{pid}/statm").read_text().split()[0] != "0"
    except OSError:
        return False
