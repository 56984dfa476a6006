"""Time limits: what counts as time, and which waits end with a signal. No cluster is started here."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import ActorDiedError, ActorUnavailableError

from leap_dist.driver import nodes, waiting
from leap_dist.driver.clients import ServerClient
from leap_dist.driver.control_loop import ControlLoop, stop_message
from leap_dist.driver.errors import ClusterError, RunDirectoryLost
from leap_dist.driver.signals import Stopped, StopSignal, stop_signal
from leap_dist.driver.waiting import LONGEST_STEP, RunningClock


class Clock:
    """Seconds that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_in_which_the_process_was_stopped_does_not_count() -> None:
    given = Clock()
    clock = RunningClock(given)
    begun = clock()
    for _ in range(10):
        given.now += 1.0
        clock()
    assert clock() - begun == 10.0, "a clock like any other while the process runs"
    given.now += 45.0
    assert clock() - begun == 10.0 + LONGEST_STEP
    given.now += 1.0
    assert clock() - begun == 11.0 + LONGEST_STEP


def test_a_head_counts_as_gone_only_where_the_driver_has_listened(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Clock()
    answers = threading.Event()

    def read(known: Any, reservation: Any) -> nodes.View:
        if answers.is_set():
            raise ConnectionError
        return nodes.View({}, {})

    monkeypatch.setattr(nodes, "_read", read)
    monkeypatch.setattr(nodes.Reservation, "of_this_program", lambda: None)
    monkeypatch.setattr(nodes, "RunningClock", lambda: RunningClock(given))
    watched = nodes.Nodes()
    answers.set()
    given.now += 45.0  # the driver was stopped
    assert not watched.head_is_gone
    for _ in range(20):
        given.now += 1.0
        gone = watched.head_is_gone
    assert gone, "it has listened for long enough"
    watched.close()


class Actor:
    """A server that is starting: answers what it is told, or raises it."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def remote(self) -> str:
        return "reference"

    def get(self, _: str) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "wait", lambda references, **_: (references, []))


PREEMPTED = ActorDiedError(
    ActorDiedErrorContext(
        actor_id=b"a" * 16, node_death_info=NodeDeathInfo(reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)
    )
)
"""What Ray says of an actor whose node has announced that it leaves, even while it starts the actor elsewhere."""


@pytest.mark.parametrize("error", [ActorUnavailableError("it restarts", None), PREEMPTED])
def test_a_server_that_is_killed_while_it_starts_is_waited_for(
    ready: None, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    actor = Actor(error, "answer")
    monkeypatch.setattr(ray, "get", actor.get)
    assert waiting.first_answer(actor, 60.0, StopSignal()) == "answer"


def test_a_worker_waits_for_a_server_whose_node_leaves_and_not_for_one_that_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Actor(PREEMPTED, PREEMPTED, "answer")
    monkeypatch.setattr(ray, "get", server.get)
    assert ServerClient(SimpleNamespace(renew=server)).call("renew") == "answer"
    server.answers = [ActorDiedError()]
    with pytest.raises(ActorDiedError):
        ServerClient(SimpleNamespace(renew=server)).call("renew")


@pytest.mark.parametrize(
    ("error", "line"),
    [(ActorDiedError(), "the server cannot start: "), (ActorUnavailableError("it restarts", None), "within 0 s: ")],
)
def test_a_server_that_does_not_start_is_one_line(
    ready: None, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    actor = Actor(error)
    monkeypatch.setattr(ray, "get", actor.get)
    with pytest.raises(ClusterError, match=line) as caught:
        waiting.first_answer(actor, 0.0, StopSignal())
    assert "\n" not in str(caught.value)


def test_a_wait_for_an_answer_has_a_limit_and_ends_with_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "wait", lambda references, timeout, **_: time.sleep(timeout) or ([], references))
    actor = Actor()
    with pytest.raises(ClusterError, match="the server has not started within 0 s: no answer within 0 s"):
        waiting.first_answer(actor, 0.3, StopSignal())
    with stop_signal() as stop:
        threading.Timer(0.3, signal.raise_signal, [signal.SIGTERM]).start()
        with pytest.raises(Stopped):
            waiting.first_answer(actor, 60.0, stop)


def test_what_is_kept_and_given_up_is_said_with_numbers() -> None:
    training = {"tasks": 27, "tasks_waiting": 1, "tasks_wanted": 120, "leases": [{}, {}, {}]}
    assert stop_message(training) == (
        "stopping: 27 of 120 tasks (1 more waits for the next meta-update) are kept, 3 running tasks will be given up "
        "at the next report. "
        "Press Ctrl-C again to stop without waiting for them"
    )
    evaluation = {"kind": "evaluation", "tasks": 4, "tasks_wanted": 8, "leases": [{}], "saves_states": False}
    assert stop_message(evaluation) == (
        "stopping: 4 of 8 agents are kept, 1 running agent will stop at the next report. "
        "Press Ctrl-C again to stop without waiting for them"
    )
    assert "at the next report and save the state to continue from." in stop_message(
        {**evaluation, "saves_states": True}
    )


def test_a_run_directory_that_is_gone_or_another_ends_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    nothing: Any = None
    loop = ControlLoop(nothing, nothing, nothing, nothing, nothing, folder, StopSignal())
    loop._require_folder()
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(RunDirectoryLost, match=f"^run-dir: {folder} was removed while the run was using it"):
        loop._require_folder()
    folder.mkdir()
    with pytest.raises(RunDirectoryLost):
        loop._require_folder()
