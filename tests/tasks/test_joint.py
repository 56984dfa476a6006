"""The agent that learns all games: its gradient, its steps, and that it goes on where it stopped, bit for bit."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from a2c_learners import ALONE, ATARI, WORKER, playing
from in_process import train
from protocol import Clock, config, grant

from leap_dist.cli.main import main
from leap_dist.config.settings import Config
from leap_dist.envs import emulator
from leap_dist.nn.actor_critic import initialization
from leap_dist.nn.flat_vector import flatten
from leap_dist.protocol.messages import Idle
from leap_dist.server.meta_server import MetaServer
from leap_dist.tasks.atari.a2c import A2C
from leap_dist.tasks.atari.joint import JointA2C
from leap_dist.tasks.task import family_of
from leap_dist.weights.initialization import read_initialization
from leap_dist.worker.run_task import run_task
from leap_dist.worker.start import Start

pytestmark = pytest.mark.emulator
GAMES = ("carnival", "pong")
PHI = initialization(4, 0)[1]


@contextlib.contextmanager
def joint(games: tuple[str, ...], state: np.ndarray | None = None) -> Iterator[JointA2C]:
    """One environment of each game, with the seeds of `a2c_learners.playing`."""
    agents = {game: A2C(game, PHI, seed=0, agent=ALONE, settings=ATARI, worker=WORKER) for game in games}
    learner = JointA2C(agents, ALONE, state)
    try:
        yield learner
    finally:
        learner.close()


def gradient_of(learner) -> np.ndarray:
    return flatten(p.grad for p in learner.shared.values()).numpy().astype(np.float64)


def test_the_encoder_descends_along_the_mean_of_the_games_clipped_gradients_and_each_head_along_its_own():
    clipped, losses, heads = [], [], []
    for game in GAMES:
        with playing(game, agent=ALONE) as single:
            losses.append(single.backward().item())
            whole = flatten(p.grad for p in single._model.parameters()).double().norm().item()
            scale = min(1.0, ALONE.max_grad_norm / whole)
            clipped.append(scale * gradient_of(single))
            heads.append({name: scale * p.grad for name, p in single.local.items()})
    with joint(GAMES) as learner:
        loss = learner.backward()
        assert loss.item() == pytest.approx(np.mean(losses))
        np.testing.assert_allclose(gradient_of(learner), np.mean(clipped, axis=0), rtol=1e-4, atol=1e-7)
        for game, head in zip(GAMES, heads, strict=True):
            for name, expected in head.items():
                torch.testing.assert_close(learner.local[f"{game}.{name}"].grad, expected)
        assert learner.steps_per_update == 2 * ALONE.unroll


def test_with_a_single_game_it_is_the_single_agent():
    """RMSProp is computed in another order, so the last bits may differ."""
    with playing(GAMES[0], agent=ALONE) as single, joint(GAMES[:1]) as learner:
        for _ in range(3):
            assert learner.backward().item() == pytest.approx(single.backward().item(), rel=1e-4)
            learner.step()
            single.step()
        np.testing.assert_allclose(
            flatten(learner.shared.values()), flatten(single.shared.values()), rtol=1e-3, atol=1e-6
        )
        assert np.abs(flatten(learner.shared.values()).numpy() - PHI).max() > 1e-4, "it has learned"


def test_all_games_learn_with_the_same_encoder_from_the_state_that_an_earlier_task_left():
    with joint(GAMES) as learner:
        learner.backward()
        learner.step()
        first, second = learner._agents.values()
        assert all(torch.equal(a, b) for a, b in zip(first.shared.values(), second.shared.values(), strict=True))
        state = flatten(tensor.detach() for tensor in learner.local.values()).numpy()
        progress = learner.progress()
        assert progress.scores == ()
        assert progress.means.keys() >= {"loss", "entropy"}
    with joint(GAMES, state) as following:
        assert np.array_equal(flatten(t.detach() for t in following.local.values()).numpy(), state)
        assert all(float(square.max()) > 0 for square in following._optimizer.mean_square), "the optimizer's state too"


def setting(**more: object) -> Config:
    return config(
        meta_learner="multitask", games="pong,freeway", meta_updates=2, meta__batch_size=2, task_steps=50,
        agent__unroll=5, worker__push_interval=20, worker__device="cpu", **{"agent__envs": 1, **more},
    )  # fmt: skip


def test_a_run_that_was_stopped_ends_like_one_that_was_not_bit_for_bit(tmp_path, monkeypatch):
    whole = train(setting(), tmp_path / "whole")
    lease = MetaServer.lease

    def one_task(server: MetaServer, worker: str, incarnation: str) -> object:
        return Idle(finished=True) if server.version == 1 else lease(server, worker, incarnation)

    with monkeypatch.context() as stopping:
        stopping.setattr(MetaServer, "lease", one_task)
        stopped = train(setting(), tmp_path / "stopped")
    assert stopped.version == 1
    resumed = train(setting(), tmp_path / "stopped")
    assert resumed.version == whole.version == 2
    assert np.array_equal(resumed.snapshot()[1], whole.snapshot()[1])
    assert np.array_equal(resumed.head("all_games"), whole.head("all_games"))
    assert not np.array_equal(stopped.snapshot()[1], whole.snapshot()[1])
    lines = whole.ledger(0)[0]
    assert [(line["game"], line["steps"], line["final"]) for line in lines] == [("all_games", 100, True)] * 2
    found = read_initialization(tmp_path / "whole" / "init.safetensors")
    assert found.metadata["meta_learner"] == "multitask"
    assert found.metadata["games"] == ["pong", "freeway"]
    assert (
        main(["export", str(tmp_path / "whole" / "init.safetensors"), "--to", "torch", "--out", str(tmp_path / "x")])
        == 0
    )


def test_an_agent_that_starts_more_slowly_than_its_lease_keeps_the_lease(tmp_path, monkeypatch):
    """Four emulators of 2 s each, with a lease of 6 s; the next task finds them in the pool."""
    run = setting(agent__envs=2, server__lease_seconds=6.0, worker__heartbeat_seconds=2.0)
    manifest, initial = family_of(run).initialization(run, 0, run.scope)
    clock, made = Clock(), []
    server = MetaServer(run, tmp_path, manifest=manifest, initial=initial, session="s", clock=clock)

    class SlowEmulator(emulator.Emulator):
        def __init__(self, game: str) -> None:
            clock.advance(2.0, server)
            made.append(game)
            super().__init__(game)

    monkeypatch.setattr(emulator, "POOL_SIZE", 1)
    monkeypatch.setattr(emulator, "Emulator", SlowEmulator)
    emulator.clear()
    for task in range(2):
        lease = grant(server)
        start = Start(server.snapshot()[1], server.head(lease.task.game))
        ack = run_task(lease, start, run, server, clock=clock)
        assert ack is not None, list(server.alerts)
        assert ack.durable
        assert made == ["pong", "pong", "freeway", "freeway"], f"by the end of task {task}"
    assert server.status()["leases_lost"] == 0
    server.close()


def test_a_closed_learner_of_all_games_leaves_no_cycle_in_memory():
    gc.collect()
    gc.disable()
    try:
        with joint(GAMES) as learner:
            learner.backward()
            learner.step()
            kept = [weakref.ref(one._rollout) for one in learner._agents.values()]
        del learner
        assert [rollout() for rollout in kept] == [None, None]
    finally:
        gc.enable()
