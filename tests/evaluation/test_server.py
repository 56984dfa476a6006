"""Evaluation: what is compared, the server's side, and that nothing but the start differs between arms."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import no_ray, refused  # noqa: F401
from initialization_files import written
from protocol import Clock

from leap_dist.cli.commands import game_steps
from leap_dist.config.loading import ConfigError, resolve, to_yaml
from leap_dist.config.settings import Config
from leap_dist.driver import driver
from leap_dist.envs.games import HELD_OUT, SETS
from leap_dist.evaluation import initializations
from leap_dist.evaluation import server as evaluation
from leap_dist.evaluation.initializations import Arm, InitFile
from leap_dist.evaluation.run_queue import DEATHS
from leap_dist.evaluation.runs import RunResult, load_all, missing, path_of, plan, save
from leap_dist.evaluation.server import EvaluationServer
from leap_dist.nn.actor_critic import initialization
from leap_dist.protocol.messages import Contribution, CurvePoint, Episode, Idle, Lease, PathStatistics
from leap_dist.storage import run_directory
from leap_dist.storage.atomic import pack, unpack
from leap_dist.tasks.task import family_of
from leap_dist.testing import failpoints
from leap_dist.weights.initialization import Initialization, read_initialization
from leap_dist.worker.run_task import run_task
from leap_dist.worker.start import Start

SCRATCH = Arm("scratch", "scratch", "encoder")
OTHER = Arm("other", "a.safetensors", "encoder", "ab" * 32)
START = initialization(4, 9)[1]
VECTORS = {"other": START, "twin": START}


def config(**settings: Any) -> Config:
    chosen = {"meta_learner": "none", "task_steps": 400, **settings}
    return resolve("smoke", {name.replace("__", "."): value for name, value in chosen.items()})


def serve(
    out: Path, *, seeds: int = 1, session: str = "", clock: Clock | None = None, **settings: Any
) -> EvaluationServer:
    run, clock = config(**settings), clock or Clock()
    return EvaluationServer(run, plan([SCRATCH, OTHER], run, seeds), VECTORS, out, session=session, clock=clock)


def grant(server: EvaluationServer, worker: str = "w0", incarnation: str = "i0") -> Lease:
    lease = server.lease(worker, incarnation)
    assert isinstance(lease, Lease)
    return lease


def contribution(lease: Lease, *, final: bool = True, seq: int = 1) -> Contribution:
    return Contribution(
        lease=lease.id,
        worker=lease.worker,
        incarnation=lease.incarnation,
        manifest="",
        base_version=0,
        seq=seq,
        final=final,
        updates=1,
        steps=400 if final else 100,
        seconds=2.0,
        vector=np.empty(0, np.float32),
        start=None,
        path=PathStatistics(1.0, 1.0, 0.0, 0.0, 0.0),
        curve=(CurvePoint(100, 1, 3.0, {"loss": 0.5}),),
        episodes=(Episode(90, 3.0), Episode(180, float(lease.task.index))) if final else (),
    )


def finish(server: EvaluationServer, worker: str = "w0") -> int:
    """One worker alone, to the end. Returns how many runs it made."""
    count = 0
    while not isinstance(answer := server.lease(worker, "i0"), Idle):
        ack = server.push(contribution(answer))
        assert (ack.accepted, ack.durable, ack.proceed) == (True, True, False)
        count += 1
    assert answer.finished
    return count


# --- the plan ------------------------------------------------------------------------------------------------------


def test_runs_come_seed_by_seed_and_arms_share_seeds(tmp_path):
    server = serve(tmp_path, seeds=2, seed=5)
    leases = [grant(server, f"w{k}") for k in range(8)]
    runs = [(server._runs[lease.task.index].arm.label, lease.task.game, lease.task.visit) for lease in leases]
    assert runs == [(a, g, s) for s in (5, 6) for g in ("pong", "freeway") for a in ("scratch", "other")]
    by_arm = {arm: [x.task.seed for x, run in zip(leases, runs, strict=True) if run[0] == arm] for arm, *_ in runs}
    assert by_arm["scratch"] == by_arm["other"]
    assert len(set(by_arm["other"])) == 4, "games and seeds differ"


def test_single_games_may_have_lengths_of_their_own(tmp_path):
    run = config()
    planned = plan([SCRATCH], run, 1, steps_of={"freeway": 800})
    server = EvaluationServer(run, planned, {}, tmp_path, session="a", clock=Clock())
    assert {lease.task.game: lease.task.steps for lease in (grant(server, f"w{k}") for k in range(2))} == {
        "pong": 400,
        "freeway": 800,
    }
    server.close()
    server = EvaluationServer(run, planned, {}, tmp_path, session="b", clock=Clock())
    finish(server)
    server.close()
    assert missing(planned, run, tmp_path) == ([], [])
    longer = plan([SCRATCH], run, 1, steps_of={"freeway": 1200})
    with pytest.raises(ConfigError, match="has results on freeway with task_steps 800, not 1200"):
        missing(longer, run, tmp_path)
    with pytest.raises(ConfigError, match="has results on freeway with task_steps 800, not 1200"):
        missing([replace_seed(one) for one in longer], run, tmp_path)


def replace_seed(run):
    return run._replace(seed=run.seed + 1)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["pong"], r"game_steps: 'pong' is not GAME=STEPS, as in pong=8000000"),
        (["pong=many"], r"game_steps: 'pong=many' is not GAME=STEPS"),
        (["pnog=800"], r"game_steps: 'pnog' is not one of the games pong, freeway.*pong"),
        (["pong=39"], r"game_steps: pong=39 is less than two updates of 20 steps"),
    ],
)
def test_a_wrong_length_is_refused_in_one_line(texts, message):
    with pytest.raises(ConfigError, match=message):
        plan([SCRATCH], config(), 1, steps_of=game_steps(texts))


def test_an_arm_is_a_start_and_scratch_is_another_one_for_every_seed(tmp_path):
    server = serve(tmp_path, seeds=2, games=("pong",))
    scratch, other, scratch2, other2 = (server.start(grant(server, f"w{k}")) for k in range(4))
    assert np.array_equal(other[0], START)
    assert np.array_equal(other2[0], START)
    assert scratch[0].shape == START.shape
    assert not np.array_equal(scratch[0], scratch2[0])
    assert {one[1] for one in (scratch, other)} == {"encoder"}


# --- the protocol --------------------------------------------------------------------------------------------------


def test_the_steps_of_an_evaluation_are_those_of_all_its_servers_and_launches(tmp_path):
    """A summary is written twice a second, so a later server knows what was counted."""

    def report(server: EvaluationServer) -> None:
        run_directory.write_summary(tmp_path, {"state": "running", **server.status()})

    server = serve(tmp_path, seeds=2, session="a")
    lease = grant(server)
    server.push(contribution(lease, seq=1, final=False))
    report(server)
    server.close()  # a crash, after 100 of 400 steps
    server = serve(tmp_path, seeds=2, session="a")
    assert server.status()["agent_steps"] == 100
    server.push(contribution(lease, seq=2))
    assert server.status()["agent_steps"] == 400, "what the first server counted is not counted again"
    report(server)
    server.close()
    server = serve(tmp_path, seeds=2, session="b")
    assert finish(server) == 7
    assert server.status()["agent_steps"] == 8 * 400
    server.close()
    (tmp_path / "summary.json").write_text('{"state": "done", "tasks_wanted": 8, "agent_steps": "many", "leases": []}')
    assert serve(tmp_path, seeds=2).status()["agent_steps"] == 0, "damaged"


def test_every_run_becomes_a_file_and_an_evaluation_goes_on_where_it_was_left(tmp_path):
    server = serve(tmp_path, seeds=2)
    lease = grant(server)
    assert server.push(contribution(lease, final=False)).proceed
    assert server.status()["agent_steps"] == 100
    assert server.push(contribution(lease, seq=2)).durable
    server.close()
    server = serve(tmp_path, seeds=2)
    assert server.status()["tasks"] == 1
    assert finish(server) == 7
    status = server.status()
    assert (status["tasks"], status["tasks_wanted"], status["complete"], status["finished"]) == (8, 8, True, True)
    server.close()
    runs, warnings = load_all(tmp_path)
    assert warnings == []
    assert len(runs) == 8
    first = next(run for run in runs if (run.arm, run.game, run.seed) == ("scratch", "pong", 0))
    assert (first.budget, first.seconds, first.ended.tolist(), first.returns.tolist()) == (400, 2.0, [90, 180], [3, 0])
    assert first.curve == ({"steps": 100, "loss": 0.5},)
    server = serve(tmp_path, seeds=3)
    assert finish(server) == 4, "more seeds add to what is there"
    server.close()


def test_a_damaged_result_is_run_again_and_said_so(tmp_path):
    server = serve(tmp_path)
    finish(server)
    server.close()
    path = path_of(tmp_path, "other", "freeway", 0)
    path.write_bytes(path.read_bytes().replace(b"180", b"181"))
    server = serve(tmp_path)
    assert [alert for alert in server.alerts if "other on freeway with seed 0 is run again" in alert]
    assert finish(server) == 1


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"agent__envs": 2}, "agent.envs 4, not 2"),
        ({"task_steps": 800}, "steps 400, not 800"),
        ({"atari__sticky_actions": 0.25}, "atari.sticky_actions 0.0, not 0.25"),
    ],
)
def test_results_of_other_settings_are_not_mixed(tmp_path, settings, name):
    server = serve(tmp_path)
    finish(server)
    server.close()
    with pytest.raises(ConfigError, match=re.escape(name)):
        serve(tmp_path, **settings)
    serve(tmp_path).close()  # the lock was given back


def test_another_file_under_the_same_label_is_refused(tmp_path):
    server = serve(tmp_path)
    finish(server)
    server.close()
    run = config()
    line = f"out: {tmp_path} has results of another initialization called other; choose another --out or label"
    with pytest.raises(ConfigError, match=f"^{re.escape(line)}$"):
        EvaluationServer(run, plan([replace(OTHER, sha256="cd" * 32)], run, 1), VECTORS, tmp_path)


def test_two_evaluations_do_not_write_into_one_folder(tmp_path):
    server = serve(tmp_path)
    with pytest.raises(Exception, match=r"in use"):
        serve(tmp_path)
    server.close()


def test_what_a_lost_or_silent_worker_was_at_is_run_again(tmp_path):
    clock = Clock()
    server = serve(tmp_path, clock=clock, games=("pong",))
    lost, silent = grant(server, "lost", "i1"), grant(server, "silent", "i2")
    assert server.lease("w0", "i0") == Idle(finished=False)
    server.release("i1")
    clock.now += 15
    assert server.renew(silent.id, "i2", 100).proceed
    clock.advance(15, server)
    assert server.status()["silent"] == []
    clock.advance(10, server)
    assert server.status()["silent"] == ["i2"]
    for late in (lost, silent):
        ack = server.push(contribution(late))
        assert (ack.accepted, ack.durable, ack.proceed) == (False, False, False)
    assert server.status()["refused"] == {"worker-lost": 1, "expired": 1}
    assert finish(server) == 2
    assert server.status()["complete"]


def test_a_server_that_restarts_lets_running_work_continue_under_its_lease(tmp_path):
    server = serve(tmp_path, session="launch")
    running, done = grant(server, "w0", "i0"), grant(server, "w1", "i1")
    server.push(contribution(running, final=False))
    server.push(contribution(done))
    before = path_of(tmp_path, "other", "pong", 0).read_bytes()
    server.close()

    server = serve(tmp_path, session="launch")
    assert server.renew(running.id, "i0", 200).proceed
    assert [lease["lease"] for lease in server.status()["leases"]] == [running.id]
    assert server.push(contribution(running, seq=2)).durable
    assert finish(server, "w2") == 2, "nothing is made again"
    assert server.status()["leases_lost"] == 0
    assert server.status()["tasks"] == 4
    assert path_of(tmp_path, "other", "pong", 0).read_bytes() == before
    server.close()


def test_a_result_that_was_stored_before_a_restart_is_acknowledged_after_it(tmp_path):
    server = serve(tmp_path, session="launch")
    lease = grant(server)
    failpoints.arm("lease.close=full")  # as if the server had ended between storing and acknowledging
    try:
        server.push(contribution(lease))
    finally:
        failpoints.arm("")
    server.close()
    server = serve(tmp_path, session="launch")
    ack = server.push(contribution(lease))
    assert (ack.accepted, ack.durable, ack.reason) == (True, True, "duplicate")
    assert finish(server) == 3
    server.close()


def test_leases_of_another_launch_end_whatever_their_numbers_mean_now(tmp_path):
    server = serve(tmp_path, session="before", seeds=3)
    leases = [grant(server, f"w{k}") for k in range(12)]
    server.close()
    server = serve(tmp_path, session="after", games=("pong",))
    assert server.status()["leases"] == []
    assert server.renew(leases[0].id, "i0", 100).reason == "worker-lost"
    assert finish(server) == 2
    assert not list(tmp_path.glob("journal/lease-*"))
    server.close()


def test_no_lease_is_granted_while_it_cannot_be_recorded(tmp_path):
    server = serve(tmp_path, games=("pong",))
    failpoints.arm("lease.write=full@1")
    try:
        assert server.lease("w0", "i0") == Idle(finished=False)
    finally:
        failpoints.arm("")
    assert any("no lease can be granted" in alert for alert in server.alerts)
    assert finish(server) == 2
    server.close()


def test_repeated_and_old_messages_change_nothing(tmp_path):
    server = serve(tmp_path, games=("pong",))
    lease = grant(server)
    end = contribution(lease, seq=2)
    server.push(end)
    before = path_of(tmp_path, "scratch", "pong", 0).read_bytes()
    ack = server.push(end)
    assert (ack.accepted, ack.durable, ack.reason) == (True, True, "duplicate")
    assert server.push(replace(end, episodes=(), seconds=9.0)).reason == "duplicate"
    assert path_of(tmp_path, "scratch", "pong", 0).read_bytes() == before
    other = grant(server)
    assert server.push(replace(contribution(other), incarnation="old")).reason == "incarnation"


def test_a_full_disk_delays_a_result_and_loses_none(tmp_path):
    server = serve(tmp_path, games=("pong",))
    lease = grant(server)
    failpoints.arm("transfer-run.write=full@1-2")
    try:
        for _ in range(2):
            ack = server.push(contribution(lease))
            assert (ack.durable, ack.reason, ack.proceed) == (False, "storage", True)
            assert ack.wait > 0
        assert server.push(contribution(lease)).durable
    finally:
        failpoints.arm("")
    assert any("could not be stored" in alert for alert in server.alerts)


def test_a_run_that_keeps_failing_is_given_up_and_the_others_are_made(tmp_path):
    server = serve(tmp_path, games=("pong", "freeway", "breakout"))
    for attempt in range(3):
        lease = grant(server, f"w{attempt}")
        assert lease.task.index == 0
        assert not server.fail(lease.id, lease.incarnation, "broken").proceed
        if attempt < 2:
            other = grant(server, f"other{attempt}", "i1")  # the one on which it failed plays something else
            assert other.task.index == 0
            server.release("i1")
    status = server.status()
    assert "scratch on pong with seed 0" in status["given_up"]
    finish(server, "well")
    status = server.status()
    assert status["finished"]
    assert not status["complete"]
    assert status["tasks"] == 6 - len(status["given_up"])


def test_a_worker_on_which_everything_fails_is_stopped_before_any_game_is_given_up(tmp_path):
    server = serve(tmp_path, seeds=2, games=("pong", "freeway", "breakout"))
    failed = []
    while isinstance(lease := server.lease("broken", "i0"), Lease):
        failed.append(lease.task.game)
        server.fail(lease.id, "i0", "broken")
    assert failed == ["pong", "freeway", "breakout"]
    status = server.status()
    assert (status["quarantined_workers"], status["quarantined"], status["given_up"]) == (["broken"], [], [])
    assert finish(server, "well") == 12


@pytest.mark.parametrize(
    ("steps", "deaths"),
    [
        (lambda death: death, 39),  # it comes farther each time
        (lambda death: death // 9, 39),
        (lambda death: 0, DEATHS),
        (lambda death: 7, 1 + DEATHS),
        (lambda death: min(death, 20), 20 + DEATHS),
    ],
)
def test_only_deaths_without_progress_count_against_a_run(tmp_path, steps, deaths):
    """On spot machines, a run of several hours may lose many more processes than make it hopeless."""
    server, count = serve(tmp_path, games=("pong",)), 0
    while count < 39 and isinstance(lease := server.lease("w0", f"i{count}"), Lease) and lease.task.index == 0:
        count += 1
        server.save_state(lease.id, lease.incarnation, b"state", steps(count))
        server.release(lease.incarnation, crashed=True)
    status = server.status()
    assert count == deaths
    assert bool(status["given_up"]) == bool(status["quarantined"]) == (deaths < 39)


# --- the learners --------------------------------------------------------------------------------------------------


class Inbox:
    """A server that takes everything."""

    def __init__(self) -> None:
        self.pushed: list[Contribution] = []

    def renew(self, *_: Any) -> Any:
        raise AssertionError("no heartbeat is due")

    def snapshot(self) -> Any:
        raise AssertionError("an evaluation does not follow φ")

    def push(self, one: Contribution) -> Any:
        self.pushed.append(one)
        return evaluation._ack(True)


def trained(server: EvaluationServer, run: Config) -> Contribution:
    lease = grant(server)
    vector, scope, _ = server.start(lease)
    inbox = Inbox()
    run_task(lease, Start(vector, scope=scope, evaluation=True), run, inbox)
    assert all(one.episodes == () for one in inbox.pushed[:-1])
    server.push(inbox.pushed[-1])
    return inbox.pushed[-1]


@pytest.mark.emulator
def test_nothing_but_the_start_differs_between_arms(tmp_path):
    """Arms with the same start have the same runs, bit for bit; so has the same run twice; another start has not."""
    run = config(task_steps=2000, games=("pong",), worker__heartbeat_seconds=1000.0, server__lease_seconds=5000.0)
    twin = replace(OTHER, label="twin")
    runs = plan([OTHER, twin, SCRATCH], run, 1)
    server = EvaluationServer(run, runs, VECTORS, tmp_path, clock=Clock())
    one, same, scratch = (trained(server, run) for _ in range(3))
    server.close()
    (tmp_path / "again").mkdir()
    server = EvaluationServer(run, runs, VECTORS, tmp_path / "again", clock=Clock())
    again = trained(server, run)
    server.close()
    assert one.curve == same.curve == again.curve
    assert one.curve != scratch.curve
    assert one.episodes == same.episodes == again.episodes
    assert one.vector.size, "the trained agent, to be watched"
    assert np.array_equal(one.vector, same.vector)
    assert not np.array_equal(one.vector, scratch.vector)


@pytest.mark.emulator
def test_episodes_are_told_with_the_step_at_which_they_ended(tmp_path):
    run = config(task_steps=4000, games=("ms_pacman",), atari__max_episode_frames=400, atari__noop_max=0,
                 worker__heartbeat_seconds=1000.0, server__lease_seconds=5000.0)  # fmt: skip
    server = EvaluationServer(run, plan([SCRATCH], run, 1), VECTORS, tmp_path, clock=Clock())
    done = trained(server, run)
    # Every one of four episodes at once is cut off after a hundred agent steps.
    assert [episode.steps for episode in done.episodes] == [400 * (k // 4 + 1) for k in range(40)]
    assert sum(point.episodes for point in done.curve) == 40
    scores = [episode.score for episode in done.episodes]
    means = sum(point.score * point.episodes for point in done.curve if point.score is not None)
    assert sum(scores) == pytest.approx(means)


@pytest.mark.emulator
@pytest.mark.parametrize(("learner", "scope"), [("finetune-single", "model"), ("leap", "encoder")])
def test_a_head_that_was_learned_with_the_encoder_is_reused(tmp_path, learner, scope):
    path = written(tmp_path, meta_learner=learner)
    labels, files = initializations.read([f"x={path}"])
    run = config(games=("pong",), worker__heartbeat_seconds=1000.0, server__lease_seconds=5000.0)
    (arm,) = initializations.arms(labels, files, run)
    assert arm.scope == scope
    (tmp_path / "out").mkdir()
    server = EvaluationServer(run, plan([arm], run, 1), initializations.vectors([arm]), tmp_path / "out", clock=Clock())
    assert trained(server, run).final


# --- what is compared ----------------------------------------------------------------------------------------------


def trained_run(folder: Path, **settings: Any) -> Path:
    """A run directory, as far as an evaluation reads it."""
    folder.mkdir()
    written(folder, **settings)
    chosen = resolve("smoke", {name.replace("__", "."): value for name, value in settings.items()})
    (folder / "config.yaml").write_text(to_yaml(chosen))
    return folder


def test_labels_come_from_the_command_or_from_where_a_file_lies(tmp_path):
    run = trained_run(tmp_path / "mine")
    labels, files = initializations.read([str(run), f"best={run / 'init.safetensors'}", "scratch", "fresh=scratch"])
    assert labels == ["mine", "best", "scratch", "fresh"]
    assert [file.label for file in files] == ["mine", "best"]


def test_what_a_live_run_had_learned_is_evaluated_although_it_goes_on(tmp_path):
    """The run replaces its file after the evaluation's plan, before Ray has started, and again before a resumption."""
    run, out = trained_run(tmp_path / "mine"), tmp_path / "out"
    chosen = config(games=("pong",))

    def arm() -> initializations.Arm:
        return initializations.arms(*initializations.read([str(run)], out), chosen)[0]

    first = arm()
    expected = initializations.vectors([first])["mine"]
    written_later(run / "init.safetensors", expected + 1)
    np.testing.assert_array_equal(initializations.vectors([first])["mine"], expected)
    run_directory.prepare(out, chosen)
    initializations.write(out, [first])
    newer = arm()
    np.testing.assert_array_equal(initializations.vectors([newer])["mine"], expected + 1)
    assert not newer.replaced, "no agent has been trained from the first one"

    (planned,) = plan([first], chosen, 1)
    save(out, RunResult("mine", "pong", 0, 500, 1.0, np.array([9]), np.array([0.0]), ()), planned.identity(chosen))
    resumed = arm()
    assert resumed == first
    np.testing.assert_array_equal(initializations.vectors([resumed])["mine"], expected)
    (note, *_) = initializations.notes([resumed], chosen)
    assert f"{first.source} has changed since this evaluation began" in note

    path_of_copy = out / "initializations" / "mine.safetensors"
    path_of_copy.write_bytes(path_of_copy.read_bytes()[:-9])
    assert arm() == newer, "without its copy, the results are refused as those of another initialization"


def written_later(path: Path, vector: np.ndarray) -> None:
    """Replace an initialization's parameters, as a later meta-update of its run does."""
    tensors, header = unpack(path.read_bytes(), path.name)
    moved = read_initialization(path).manifest.split(vector)
    assert sorted(moved) == sorted(tensors)
    path.write_bytes(pack(moved, header))


def test_by_default_agents_play_what_the_set_of_the_training_games_holds_out(tmp_path):
    for name, games in SETS.items():
        run = trained_run(tmp_path / name, games=games)
        _, files = initializations.read([str(run)])
        assert initializations.settings(files, {}, None)["games"] == HELD_OUT[name]


def test_agents_are_set_up_as_the_first_ones_own_run_was(tmp_path):
    run = trained_run(tmp_path / "mine", **{"agent.envs": 3, "task_steps": 900, "agent.unroll": 7})
    _, files = initializations.read([str(run), "scratch"])
    found = initializations.resolve(
        {"agent.unroll": "6"}, {}, initializations.settings(files, {"agent.unroll": "6"}, None)
    )
    assert (found.agent.envs, found.agent.unroll, found.task_steps, found.preset) == (3, 6, 900, "smoke")
    assert found.games == ("breakout", "qbert", "space_invaders")
    assert (found.meta_learner, found.atari.frames) == ("none", "gray4")
    preset = initializations.resolve({}, {}, initializations.settings(files, {}, "fast"))
    assert (preset.agent.envs, preset.preset) == (16, "fast")


def test_an_evaluation_trains_for_as_many_epochs_as_tests_may_have():
    """Appendix D caps training at ten epochs and tests at 100."""
    base = initializations.settings([], {"tasks": "multi-cv"}, "paper")
    config = initializations.resolve({}, {}, base)
    assert (config.supervised.epochs, config.task_steps) == (100, 7_400_000)
    config = initializations.resolve({"task_steps": 320, "supervised.test_epochs": 0}, {}, base)
    assert (config.supervised.epochs, config.task_steps) == (10, 320)


def test_arms_that_were_trained_otherwise_need_a_word(tmp_path):
    one = trained_run(tmp_path / "one", **{"agent.envs": 3})
    two = trained_run(tmp_path / "two", **{"agent.envs": 4})
    _, files = initializations.read([str(one), str(two)])
    with pytest.raises(ConfigError, match=r"agent\.envs: one was trained with 3, two with 4; .* --agent.envs"):
        initializations.settings(files, {}, None)
    assert initializations.settings(files, {"agent.envs": "4"}, None)["preset"] == "smoke"


def classifiers(folder: Path, seed: int, **more: Any) -> InitFile:
    """The file of a run that was trained on alphabets."""
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(resolve("smoke", {"tasks": "omniglot", "seed": seed, **more})))
    content = Initialization({}, {"tasks": "omniglot", "shared": "encoder", "games": ["greek"]}, "")
    return InitFile(folder.name, folder / "init.safetensors", content, str(folder))


@pytest.mark.parametrize("preset", [None, "smoke"])
def test_the_seed_of_an_evaluation_numbers_runs_and_draws_no_other_alphabets(tmp_path, preset):
    file = classifiers(tmp_path / "mine", seed=7)
    trained = resolve("smoke", {"tasks": "omniglot", "seed": 7, "games": "held_out"})
    for given in ({}, {"seed": "3"}):
        found = initializations.resolve(given, {}, initializations.settings([file], given, preset))
        assert found.games == trained.games
        assert family_of(found).identity(found, "greek") == family_of(trained).identity(trained, "greek")
        numbers = [run.seed for run in plan([SCRATCH], found, 2, initializations.first_seed(given, found))]
        assert numbers == [int(given.get("seed", 7)) + k for k in range(2) for _ in found.games]


def arms_at(given: dict[str, Any], file: InitFile) -> tuple[Config, list[Arm]]:
    found = initializations.resolve(given, {}, initializations.settings([file], given, None))
    return found, initializations.arms([file.label, "scratch"], [file], found)


def test_all_arms_are_tested_with_the_test_rate_unless_it_is_0(tmp_path, monkeypatch):
    monkeypatch.setattr(Initialization, "other_setting", lambda *_: None)  # this file holds nothing
    file = classifiers(tmp_path / "mine", seed=0)
    for given, rate in (
        ({}, None),
        ({"supervised.test_learning_rate": "0"}, None),
        ({"supervised.test_learning_rate": "0.1"}, None),  # what they are trained with anyway
        ({"supervised.test_learning_rate": "0.03"}, 0.03),
        ({"supervised.test_learning_rate": "0.03", "supervised.learning_rate": "0.2"}, 0.03),
    ):
        found, arms = arms_at(given, file)
        assert [arm.learning_rate for arm in arms] == [rate, rate]
        (out := tmp_path / f"out {given}").mkdir()
        server = EvaluationServer(found, plan(arms, found, 1), {"mine": START}, out, clock=Clock())
        assert server.start(grant(server))[2] == rate
        server.close()


def test_a_rate_that_is_given_is_not_undone_by_the_test_rate_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(Initialization, "other_setting", lambda *_: None)
    file = classifiers(tmp_path / "mine", seed=0, **{"supervised.test_learning_rate": 0.03})
    assert [arm.learning_rate for arm in arms_at({}, file)[1]] == [0.03, 0.03]
    found, arms = arms_at({"supervised.learning_rate": "0.2"}, file)
    assert found.supervised.learning_rate == 0.2
    assert [arm.learning_rate for arm in arms] == [None, None]


def test_results_that_are_older_than_the_use_of_the_test_rate_stay_valid_if_it_changed_nothing(tmp_path):
    """Until then, no arm of `evaluate` had a rate of its own, and the identity of its runs did not name one."""
    game = {"tasks": "omniglot", "games": "greek"}
    for rate, valid in ((0.0, True), (0.1, True), (0.03, False)):
        run = resolve("smoke", {**game, "supervised.test_learning_rate": rate})
        before, now = [SCRATCH], initializations.arms(["scratch"], [], run)
        same = plan(before, run, 1)[0].identity(run) == plan(now, run, 1)[0].identity(run)
        assert same == valid


def test_arms_with_other_held_out_alphabets_are_not_compared_on_them(tmp_path):
    files = [classifiers(tmp_path / "one", seed=1), classifiers(tmp_path / "two", seed=2)]
    for given in ({}, {"seed": "1"}):
        with pytest.raises(ConfigError, match=r"seed: one was trained with 1, two with 2.* --games"):
            initializations.settings(files, given, None)
    assert initializations.settings(files, {"games": "latin"}, None)["seed"] == 1


def test_what_only_training_uses_is_not_taken_from_a_file(tmp_path, capsys, monkeypatch):
    """A run's own config.yaml is of use: its meta-learner, mode and what goes with them are left out."""
    run = trained_run(tmp_path / "run", meta_learner="fomaml")
    seen = {}

    def stop(config, *_, **__):
        seen["config"] = config
        raise ConfigError("enough")

    monkeypatch.setattr(driver, "check_prerequisites", stop)
    arguments = ["--init", "scratch", "--config", str(run / "config.yaml"), "--out", str(tmp_path / "out")]
    assert refused(capsys, "evaluate", *arguments) == "enough"
    assert (seen["config"].meta_learner, seen["config"].held_back, seen["config"].preset) == ("none", 0, "smoke")
    streamed = tmp_path / "stream.yaml"
    streamed.write_text("preset: smoke\nmode: stream\nmeta:\n  shift: true\n")
    assert (
        refused(capsys, "evaluate", "--init", "scratch", "--config", str(streamed), "--out", str(tmp_path / "o"))
        == "enough"
    )
    streamed.write_text("preset: smoke\nagent:\n  env: 3\n")
    for text, line in (
        ("gamez: [pong]", "gamez: no such setting; did you mean games?"),
        ("worker-device: cpu", "worker_device: no such setting"),
        ("task-steps: 3", "task_steps: 3 is less than 2 rollouts"),
        ("task-steps: 40000\ntask_steps: 50000", "task_steps: given twice"),
    ):
        streamed.write_text(f"preset: smoke\n{text}\n")
        assert line in refused(capsys, "evaluate", "--init", "scratch", "--config", str(streamed))
    streamed.write_text("preset: smoke\nagent:\n  env: 3\n")
    assert "agent.env: no such setting" in refused(capsys, "evaluate", "--init", "scratch", "--config", str(streamed))


def test_a_run_directory_with_a_foreign_config_is_no_traceback(tmp_path):
    run = trained_run(tmp_path / "mine")
    (run / "config.yaml").write_text("some: thing\n")
    _, files = initializations.read([str(run)])
    assert initializations.settings(files, {}, None) == {
        "preset": "paper",
        "tasks": "atari",
        "games": ("breakout", "qbert", "space_invaders"),
    }


def test_games_that_an_arm_was_trained_on_are_named():
    known = replace(OTHER, metadata={"games": ["pong", "breakout"]})
    assert initializations.notes([known, SCRATCH], config(games=("pong", "freeway"))) == [
        "other was meta-trained on pong, which is therefore not held out for it"
    ]


def test_arms_of_earlier_commands_stay_noted(tmp_path):
    initializations.write(tmp_path, [SCRATCH, OTHER])
    initializations.write(tmp_path, [replace(OTHER, source="b"), replace(OTHER, label="third")])
    noted = json.loads((tmp_path / "arms.json").read_text())["arms"]
    assert [(arm["label"], arm["source"]) for arm in noted] == [
        ("other", "b"), ("third", "a.safetensors"), ("scratch", "scratch")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ([], r"init: name what to compare; for example, evaluate --init runs/mine --init scratch"),
        (
            ["--init", "nowhere.safetensors"],
            r"init: nowhere.safetensors cannot be read \(No such file or directory\).*",
        ),
        (["--init", "=x"], r"init: x cannot be read .*"),
        (
            ["--init", "../../etc=scratch"],
            r"init: arm '../../etc' is not valid: a letter or digit, .*; give LABEL=PATH",
        ),
        (["--init", "scratch", "--init", "scratch"], r"init: two initializations have the label 'scratch'; .*"),
        (["--init", "scratch", "--games", "breakot"], r"games: no game 'breakot'; the nearest are breakout, .*"),
        (["--init", "scratch", "--seeds", "0"], r"seeds: 0 is not between 1 and 1,000"),
        (["--init", "scratch", "--seeds", "x"], r"--seeds: 'x' is not a whole number"),
        (["--init", "scratch", "--steps", "10"], r"task_steps: 10 is less than 2 rollouts .*"),
        (["--init", "scratch", "--seed", "x"], r"seed: 'x' is not a whole number"),
        (["--init", "scratch", "--mode", "sync"], r"--mode: no such flag.*"),
        (["--init", "scratch", "--preset", "quik"], r"preset: no preset 'quik'; did you mean quick\?"),
    ],
)
def test_bad_flags(capsys, no_ray, arguments, pattern):  # noqa: F811
    line = refused(capsys, "evaluate", *arguments)
    assert re.fullmatch(pattern, line), line


def test_a_file_that_does_not_fit_is_refused(capsys, no_ray, tmp_path):  # noqa: F811
    path = written(tmp_path, "rgb1")
    line = refused(capsys, "evaluate", "--init", f"x={path}", "--preset", "smoke")
    assert line == "atari.frames: gray4 is not what x was trained with; use --atari.frames rgb1"
    path.write_bytes(path.read_bytes()[:-9])
    assert refused(capsys, "evaluate", "--init", f"x={path}").startswith(f"init: {path} is not a leap-dist")


def test_runs_and_evaluations_do_not_share_a_folder(capsys, no_ray, tmp_path):  # noqa: F811
    run = trained_run(tmp_path / "run")
    line = refused(capsys, "evaluate", "--init", "scratch", "--preset", "smoke", "--out", str(run))
    assert line == f"out: {run} holds a training run; choose another"
    initializations.write(run, [SCRATCH])
    line = refused(capsys, "train", "--resume", "--run-dir", str(run))
    assert line.endswith("holds an evaluation; continue it with the same evaluate command")
    assert run_directory.holds_evaluation(run)
