"""The states of an evaluation's running agents: what is stopped continues, and ends as if it had not been stopped."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from protocol import Clock

from leap_dist.config.loading import resolve
from leap_dist.config.settings import Config
from leap_dist.envs import atari_vector
from leap_dist.evaluation.initializations import Arm
from leap_dist.evaluation.runs import plan
from leap_dist.evaluation.server import EvaluationServer
from leap_dist.protocol.messages import Ack, Idle, Lease, Task
from leap_dist.storage.atomic import CorruptFile
from leap_dist.tasks.atari.a2c import A2C
from leap_dist.tasks.task import family_of
from leap_dist.testing import failpoints
from leap_dist.worker.preemption import PreemptionNotice
from leap_dist.worker.run_task import run_task
from leap_dist.worker.start import Start, make_learner
from leap_dist.worker.task_state import TaskState

SCRATCH = Arm("scratch", "scratch", "encoder")
STEPS = 400

pytestmark = pytest.mark.emulator


def config(**settings: Any) -> Config:
    quiet = {"worker__heartbeat_seconds": 1000.0, "server__lease_seconds": 5000.0, "worker__state_seconds": 1e-9}
    chosen = {"meta_learner": "none", "task_steps": STEPS, "games": ("ms_pacman",), **quiet, **settings}
    return resolve("smoke", {name.replace("__", "."): value for name, value in chosen.items()})


def serve(out: Path, run: Config, session: str = "") -> EvaluationServer:
    out.mkdir(exist_ok=True)
    return EvaluationServer(run, plan([SCRATCH], run, 1), {}, out, session=session, clock=Clock())


class Stopped(Exception):
    """The worker's process has died."""


class Worker:
    """Calls a server as a worker does, and dies once the server has kept so many states."""

    def __init__(self, server: EvaluationServer, *, dies_after: int = 10**9, stops_after: int = 10**9) -> None:
        self._server = server
        self._dies_after = dies_after
        self._stops_after = stops_after
        self.saved = 0

    def save_state(self, lease_id: str, incarnation: str, state: bytes, steps: int) -> Ack:
        ack = self._server.save_state(lease_id, incarnation, state, steps)
        self.saved += 1
        if self.saved == self._dies_after:
            raise Stopped
        return ack

    def push(self, contribution: Any) -> Ack:
        ack = self._server.push(contribution)
        return replace(ack, proceed=ack.proceed and contribution.seq < self._stops_after)

    def renew(self, lease_id: str, incarnation: str, steps: int) -> Ack:
        return self._server.renew(lease_id, incarnation, steps)

    def snapshot(self) -> tuple[int, np.ndarray]:
        raise AssertionError("an evaluation has no snapshots")


def work(
    server: EvaluationServer,
    run: Config,
    incarnation: str = "i0",
    *,
    notice: PreemptionNotice | None = None,
    given_after: int = 0,
    **limits: int,
) -> Worker:
    """Lease the next run and train it, from its state if there is one. The notice is given after so many updates."""
    lease = server.lease("w0", incarnation)
    assert isinstance(lease, Lease)
    vector, scope, _ = server.start(lease)
    worker = Worker(server, **limits)
    start = Start(vector, scope=scope, evaluation=True, state=server.state_of(lease))
    with pytest.MonkeyPatch.context() as patch:
        step, made = A2C.step, itertools.count(1)

        def step_and_notice(learner: A2C) -> None:
            step(learner)
            if next(made) == given_after and notice is not None:
                notice.give(0.0)

        patch.setattr(A2C, "step", step_and_notice)
        run_task(lease, start, run, worker, notice=notice)
    return worker


def die(out: Path, run: Config) -> None:
    """Let a launch die after it has saved three states of the first run."""
    server = serve(out, run)
    with pytest.raises(Stopped):
        work(server, run, dies_after=3)
    server.close()


def result(out: Path) -> dict[str, Any]:
    (path,) = out.glob("runs/*/*/*.json")
    content: dict[str, Any] = json.loads(path.read_text())
    del content["seconds"], content["sha256"]
    return content


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, run = tmp_path_factory.mktemp("whole") / "out", config(worker__state_seconds=1e9)
    assert work(serve(out, run), run).saved == 0
    assert not (out / "states").exists()
    return out


def agent(out: Path) -> bytes:
    (path,) = out.glob("agents/*/*/*.safetensors")
    return path.read_bytes()


def test_a_run_that_dies_twice_ends_bit_for_bit_as_one_that_did_not(tmp_path: Path, whole: Path) -> None:
    run, out = config(), tmp_path / "out"
    for session, dies_after in (("a", 4), ("b", 7)):  # of 20 updates, in two launches
        server = serve(out, run, session)
        with pytest.raises(Stopped):
            work(server, run, session, dies_after=dies_after)
        server.close()
    server = serve(out, run, "c")
    left = work(server, run, "c").saved
    assert left < 20 - 4 - 7 + 2
    assert isinstance(server.lease("w0", "c"), Idle)
    assert result(out) == result(whole)
    assert agent(out) == agent(whole)
    assert not (out / "states").exists()


def test_a_worker_that_is_told_to_stop_saves_its_state(tmp_path: Path, whole: Path) -> None:
    run, out = config(worker__state_seconds=1e9), tmp_path / "out"
    server = serve(out, run)
    assert work(server, run, stops_after=2).saved == 1
    server.close()
    server = serve(out, run, "again")
    lease = server.lease("w0", "i1")
    state = server.state_of(lease)
    assert TaskState.unpack(state).steps == 200
    (shown,) = server.status()["leases"]
    assert (shown["steps"], server.status()["agent_steps"]) == (200, 0), (
        "steps of earlier launches are not counted again"
    )
    assert server.renew(lease.id, "i1", 260).proceed
    assert server.status()["agent_steps"] == 60
    server.close()
    restarted = serve(out, run, "again")
    assert restarted.renew(lease.id, "i1", 280).proceed
    assert restarted.status()["agent_steps"] == 80, "what was made since the state, though some of it before a crash"
    restarted.close()
    server = serve(out, run, "third")
    work(server, run)
    assert result(out) == result(whole)


@pytest.mark.parametrize("stage", ["write", "renamed"])
def test_a_disk_that_is_full_costs_the_state_and_not_the_run(tmp_path: Path, whole: Path, stage: str) -> None:
    run, out = config(), tmp_path / "out"
    server = serve(out, run)
    try:
        failpoints.arm(f"transfer-state.{stage}=full@2-4")
        work(server, run)
    finally:
        failpoints.arm("")
    assert any("the state of scratch on ms_pacman with seed 0 could not be stored" in alert for alert in server.alerts)
    assert result(out) == result(whole)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize("harm", [damage, cut_off])
def test_a_damaged_state_is_not_used_and_said(tmp_path: Path, whole: Path, harm: Callable[[Path], None]) -> None:
    run, out = config(), tmp_path / "out"
    die(out, run)
    (path,) = out.glob("states/*/*/*.safetensors")
    harm(path)
    server = serve(out, run, "again")
    work(server, run)
    assert any("starts from the beginning" in alert for alert in server.alerts)
    assert result(out) == result(whole)


def test_a_state_of_other_settings_is_not_used(tmp_path: Path) -> None:
    run, out = config(), tmp_path / "out"
    die(out, run)
    other = config(agent__learning_rate=1e-3)
    server = serve(out, other, "again")
    assert server.state_of(server.lease("w0", "i1")) is None


@pytest.mark.parametrize("progress", [False, True])
def test_a_state_from_which_the_run_fails_twice_without_progress_is_dropped(tmp_path: Path, progress: bool) -> None:
    """One failure may have another cause, such as a lack of memory."""
    run, out = config(), tmp_path / "out"
    die(out, run)
    server = serve(out, run, "again")
    for _ in range(2):
        lease = server.lease("w0", "i1")
        assert server.state_of(lease) is not None
        if progress:
            server.renew(lease.id, "i1", 380)
        server.fail(lease.id, "i1", "ValueError: the state is that of another learner")
    assert (server.state_of(server.lease("w0", "i1")) is not None) is progress


def test_a_state_from_another_kind_of_device_is_not_used_and_counts_as_no_failure(tmp_path: Path, whole: Path) -> None:
    """The generator of a GPU has a state of 16 bytes."""
    run, out = config(), tmp_path / "out"
    die(out, run)
    server = serve(out, run, "again")
    lease = server.lease("w0", "i1")
    assert isinstance(lease, Lease)
    state = TaskState.unpack(server.state_of(lease) or b"")
    arrays = {**state.learner.arrays, "generator": np.zeros(16, np.uint8)}
    server.save_state(lease.id, "i1", replace(state, learner=replace(state.learner, arrays=arrays)).pack(), state.steps)
    server.fail(lease.id, "i1", "its worker was stopped")
    failures = list(server.alerts)
    work(server, run, "i2")
    assert server.finished
    assert list(server.alerts) == failures, "no failure, so neither the game nor the worker is blamed"
    assert result(out) == result(whole)


def test_the_state_of_a_run_that_has_its_result_goes_with_the_next_launch(tmp_path: Path) -> None:
    """A kill between the result and the removal of the state leaves both."""
    run, out = config(), tmp_path / "out"
    die(out, run)
    (state,) = out.glob("states/*/*/*.safetensors")
    left = state.read_bytes()
    server = serve(out, run)
    work(server, run)
    server.close()
    state.parent.mkdir(parents=True)
    state.write_bytes(left)
    serve(out, run, "again")
    assert not (out / "states").exists()


@pytest.mark.parametrize("update", [3, 4, 6])
def test_a_worker_whose_node_goes_away_hands_its_run_over(tmp_path: Path, update: int) -> None:
    """At updates 3 and 6, a report is due as well: it is made before the state is saved, or it would never be."""
    run = config(worker__state_seconds=1e9, worker__push_interval=60)
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    work(serve(undisturbed, run), run)
    server = serve(out, run)
    notice = PreemptionNotice()
    worker = work(server, run, notice=notice, given_after=update)
    assert worker.saved == 1
    server.close()
    server = serve(out, run, "again")
    state = server.state_of(server.lease("w0", "i1"))
    assert TaskState.unpack(state).rollouts == update
    server.release("i1")
    work(server, run, "i2")
    assert result(out) == result(undisturbed)


def test_the_time_of_earlier_launches_counts(tmp_path: Path) -> None:
    run, out = config(), tmp_path / "out"
    die(out, run)
    server = serve(out, run, "again")
    lease = server.lease("w0", "i1")
    state = replace(TaskState.unpack(server.state_of(lease)), seconds=1000.0)
    vector, scope, _ = server.start(lease)
    run_task(lease, Start(vector, scope=scope, evaluation=True, state=state.pack()), run, Worker(server))
    (path,) = out.glob("runs/*/*/*.json")
    assert 1000 < json.loads(path.read_text())["seconds"] < 1100


def test_only_the_holder_of_the_lease_may_store_a_state(tmp_path: Path) -> None:
    run, out = config(), tmp_path / "out"
    server = serve(out, run)
    lease = server.lease("w0", "i0")
    refused = server.save_state(lease.id, "i1", b"state", 20)
    assert (refused.accepted, refused.proceed) == (False, False)
    assert server.state_of(lease) is None
    assert server.save_state(lease.id, "i0", b"state", 20).durable
    assert server.state_of(lease) == b"state"
    server.release("i0")
    assert not server.save_state(lease.id, "i0", b"late", 40).accepted
    assert server.state_of(server.lease("w0", "i1")) == b"state"


def test_a_state_that_is_none_is_refused_in_one_line() -> None:
    for data in (b"", b"nonsense", b"\x00" * 100):
        with pytest.raises(
            CorruptFile, match=r"^the state of the task is not a leap-dist file, or is damaged: [^\n]*$"
        ):
            TaskState.unpack(data)


# The learner and its environments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["inside", "outside"])
def test_an_agent_continues_bit_for_bit_in_another_learner(form: str) -> None:
    run = config(agent__epsilon_form=form)
    _, vector = family_of(run).initialization(run, 0, run.scope)
    first, second = (make(run, vector) for _ in range(2))
    try:
        for _ in range(7):
            first.backward()
            first.step()
        state = first.state()
        assert state is not None
        second._lives = second._lives + 7  # or nobody would notice that they are those of the start
        second.load_state(
            type(state)(
                {name: array.copy() for name, array in state.arrays.items()}, json.loads(json.dumps(state.values))
            )
        )
        assert np.array_equal(first._lives, second._lives)
        for _ in range(7):
            assert float(first.backward()) == float(second.backward())
            first.step()
            second.step()
        assert first.progress() == second.progress()
        ours, theirs = first.state(), second.state()
        assert ours.values == theirs.values
        assert all(np.array_equal(ours.arrays[name], theirs.arrays[name]) for name in ours.arrays)
    finally:
        first.close()
        second.close()


def make(run: Config, vector: np.ndarray) -> Any:
    lease = Lease("l", Task(0, run.games[0], 0, seed=5, steps=run.task_steps), "w", "i", 0, 60.0)
    return make_learner(run, lease, Start(vector, evaluation=True))


@pytest.mark.parametrize("game", ["breakout", "qbert", "up_n_down", "tutankham"])
def test_environments_continue_as_if_nothing_had_happened(game: str) -> None:
    rng = np.random.default_rng(0)
    one, other = (atari_vector.make(game, 2, sticky_actions=0.25, max_episode_frames=1200) for _ in range(2))
    try:
        one.reset(3)
        other.reset(4)
        for _ in range(40):
            one.step(rng.integers(0, len(one.actions), 2))
            other.step(rng.integers(0, len(one.actions), 2))
        arrays, values = one.state()
        observations = other.load_state(arrays, json.loads(json.dumps(values)))
        assert np.array_equal(observations, np.concatenate(one._history, axis=1))
        assert np.array_equal(other.lives, one.lives)
        for _ in range(310):  # beyond the end of the episode
            actions = rng.integers(0, len(one.actions), 2)
            for ours, theirs in zip(one.step(actions), other.step(actions), strict=True):
                assert np.array_equal(ours, theirs)
    finally:
        one.close()
        other.close()


@pytest.mark.parametrize("settings", [{"frame_skip": 1}, {"frame_skip": 2}, {"max_episode_frames": 1001}])
def test_where_single_frames_are_played_there_is_no_state(settings: dict[str, int]) -> None:
    env = atari_vector.make("pong", 1, **settings)
    try:
        env.reset(0)
        assert env.state() is None
    finally:
        env.close()
