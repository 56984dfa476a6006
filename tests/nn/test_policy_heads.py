"""Heads on the real emulator: a task's own, a game's own, and one for all games."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import ale_py
import numpy as np
import pytest
import torch
from a2c_learners import ALONE, ATARI, gradients, playing, record_steps
from ale_py import roms
from protocol import config

from leap_dist.envs import atari_vector
from leap_dist.leap.learner import Learner
from leap_dist.nn.actor_critic import ALL_ACTIONS, initialization
from leap_dist.nn.flat_vector import flatten
from leap_dist.protocol.messages import Lease, Task
from leap_dist.worker.start import Start, make_learner

# --- the task's own, or the game's ---------------------------------------------------------------------------------


@contextmanager
def started(
    meta_learner: str,
    game: str = "pong",
    *,
    run_seed: int = 0,
    task_seed: int = 0,
    shared: str = "encoder",
    head: np.ndarray | None = None,
) -> Iterator[Learner]:
    """The learner that a worker would train."""
    settings = config(meta_learner=meta_learner, seed=run_seed, agent__envs=1, meta__shared=shared)
    lease = Lease("l", Task(0, game, 0, task_seed, settings.task_steps), "w0", "i0", 0, 60.0)
    learner = make_learner(settings, lease, Start(initialization(4, 0, settings.scope)[1], head))
    try:
        yield learner
    finally:
        learner.close()


def own(meta_learner: str, game: str = "pong", **settings: object) -> dict[str, np.ndarray]:
    """What a task starts with besides φ."""
    with started(meta_learner, game, **settings) as learner:
        return {name: parameter.detach().numpy().copy() for name, parameter in learner.local.items()}


def weights_that_differ(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> set[str]:
    assert list(one) == list(other)
    return {name for name in one if not np.array_equal(one[name], other[name])}


HEADS = {"policy.weight", "value.weight"}


def test_a_head_that_persists_is_the_games_and_the_runs_but_not_the_tasks():
    head = own("finetune-multi")
    assert set(head) == {"policy.weight", "policy.bias", "value.weight", "value.bias"}
    assert weights_that_differ(head, own("finetune-multi", task_seed=1)) == set()
    assert weights_that_differ(head, own("finetune-multi", run_seed=1)) == HEADS
    assert weights_that_differ(head, own("finetune-multi", "bowling")) == HEADS, "six actions too"


def test_tasks_of_one_head_still_play_differently():
    first = []
    for task_seed in (0, 1, 0):
        with started("finetune-multi", "breakout", task_seed=task_seed) as learner:
            steps = record_steps(learner)
            for _ in range(4):
                learner.evaluate()
            first.append(([step.actions.item() for step in steps], steps[0].observations))
    assert first[0][0] == first[2][0] != first[1][0]
    assert np.array_equal(first[0][1], first[2][1])
    assert not np.array_equal(first[0][1], first[1][1])


@pytest.mark.parametrize("meta_learner", ["leap", "reptile", "none"])
def test_a_head_that_does_not_persist_is_the_tasks(meta_learner):
    head = own(meta_learner)
    assert weights_that_differ(head, own(meta_learner, task_seed=1)) == HEADS
    assert weights_that_differ(head, own(meta_learner, run_seed=1)) == set(), "the task's seed says it all"


@pytest.mark.parametrize("meta_learner", ["leap", "finetune-multi"])
def test_a_linear_layer_that_is_not_shared_goes_with_the_head(meta_learner):
    layers = own(meta_learner, shared="convolutions")
    assert set(layers) == {"linear.weight", "linear.bias", "policy.weight", "policy.bias", "value.weight", "value.bias"}
    differing = weights_that_differ(layers, own(meta_learner, shared="convolutions", task_seed=1))
    assert differing == (set() if meta_learner == "finetune-multi" else {"linear.weight", *HEADS})
    shared = initialization(4, 0, "encoder")
    of_phi = shared[0].split(shared[1])["linear.weight"]
    assert not np.array_equal(layers["linear.weight"], of_phi), "fresh, not that of the run's seed"


def test_what_earlier_tasks_added_to_a_head_is_added_to_its_beginning():
    with started("finetune-multi") as learner:
        beginning = flatten(learner.local.values()).numpy()
        shared = flatten(learner.shared.values()).numpy()
    change = np.random.default_rng(0).normal(size=len(beginning)).astype(np.float32)
    change.flags.writeable = False  # as Ray hands it out
    with started("finetune-multi", task_seed=1, head=change) as learner:
        assert np.array_equal(flatten(learner.local.values()).numpy(), beginning + change)
        assert np.array_equal(flatten(learner.shared.values()).numpy(), shared)
    with pytest.raises(ValueError, match="shape"), started("finetune-multi", "freeway", head=change):
        pass


# --- one for all games ---------------------------------------------------------------------------------------------

# The buttons of these games, by the names that ale-py gives to the controller's 18 actions.
BUTTONS = {
    "freeway": ["NOOP", "UP", "DOWN"],
    "pong": ["NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE"],
}
GAMES = sorted(BUTTONS)


@cache
def legal(game: str) -> list[int]:
    """By ale-py's own emulator."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    emulator = ale_py.ALEInterface()
    emulator.loadROM(roms.get_rom_path(game))
    return [action.value for action in emulator.getMinimalActionSet()]


@pytest.mark.parametrize("game", GAMES)
def test_an_environments_actions_by_name(game):
    env = atari_vector.make(game, 1)
    found = env.actions
    env.close()
    assert [ale_py.Action(action).name for action in found] == BUTTONS[game]
    assert found == legal(game)


@pytest.mark.parametrize("game", GAMES)
def test_an_environments_action_does_what_that_action_of_the_controller_does(game):
    """The same moves, once numbered by the game and once by the controller, give the same pictures."""
    minimal, full = atari_vector.make(game, 1), atari_vector.make(game, 1, full_actions=True)
    assert full.actions == list(range(ALL_ACTIONS))
    actions = minimal.actions
    pictures = [env.reset(seed=3) for env in (minimal, full)]
    assert np.array_equal(*pictures)
    changed = 0
    for index in np.random.default_rng(0).integers(0, len(actions), 60):
        before = pictures[0]
        pictures = [
            minimal.step(np.array([index])).observations,
            full.step(np.array([actions[index]])).observations,
        ]
        assert np.array_equal(*pictures)
        changed += not np.array_equal(pictures[0], before)
    assert changed > 50
    minimal.close()
    full.close()


@pytest.mark.parametrize("game", GAMES)
def test_illegal_actions_are_never_played_and_get_no_gradient_however_much_the_head_wants_them(game):
    """A trained head of another game may want them very much."""
    illegal = [action for action in range(ALL_ACTIONS) if action not in legal(game)]
    settings = replace(ATARI, max_episode_frames=108_000)
    with playing(game, agent=replace(ALONE, unroll=40), settings=settings, scope="model") as learner:
        assert learner._model.policy.out_features == ALL_ACTIONS
        assert not learner.local
        with torch.no_grad():
            learner.shared["policy.bias"][illegal] = 50.0
        steps = record_steps(learner)
        before = {name: parameter.detach().clone() for name, parameter in learner.shared.items()}
        learner.backward()
        played = {learner._env.actions[step.actions.item()] for step in steps}
        assert played == set(legal(game)), "all of the legal ones, since the head is indifferent among them"
        for name in ("policy.weight", "policy.bias"):
            assert not learner.shared[name].grad[illegal].any()
            assert learner.shared[name].grad[legal(game)].any()
        entropy = learner.progress().means["entropy"]
        assert entropy == pytest.approx(np.log(len(BUTTONS[game])), rel=0.01), "over the legal actions"
        learner.step()
        for name in ("policy.weight", "policy.bias"):
            assert torch.equal(learner.shared[name][illegal], before[name][illegal])
            assert not torch.equal(learner.shared[name][legal(game)], before[name][legal(game)])


@pytest.mark.parametrize(("game", "button"), [("freeway", "UP"), ("pong", "LEFT"), ("pong", "RIGHTFIRE")])
def test_a_head_that_wants_a_button_presses_that_button(game, button):
    with playing(game, agent=ALONE, scope="model") as learner:
        with torch.no_grad():
            learner.shared["policy.bias"][ale_py.Action[button].value] = 50.0
        steps = record_steps(learner)
        learner.evaluate()
    assert {step.actions.item() for step in steps} == {BUTTONS[game].index(button)}


def test_a_head_for_all_games_trains_as_a_plain_head_with_the_legal_rows():
    rows = legal("pong")
    results = []
    for scope in ("model", "encoder"):
        with playing("pong", scope=scope) as learner:
            policy, value = learner._model.policy, learner._model.value
            if scope == "model":
                heads = policy.weight.detach()[rows], policy.bias.detach()[rows], value.weight.detach().clone()
            else:
                with torch.no_grad():
                    policy.weight.copy_(heads[0])
                    policy.bias.copy_(heads[1])
                    value.weight.copy_(heads[2])
            steps = record_steps(learner)
            losses = []
            for _ in range(3):
                losses.append(learner.backward().item())
                found = gradients(learner) if scope == "encoder" else legal_gradients(learner, rows)
                learner.step()
            end = flatten(learner._model.encoder.parameters())
            results.append((losses, found, end, np.stack([step.actions for step in steps])))
    assert np.array_equal(results[0][3], results[1][3])
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    (_, masked, masked_end, _), (_, plain, plain_end, _) = results
    assert (masked - plain).norm() <= 1e-6 * plain.norm()
    assert (masked_end - plain_end).norm() <= 1e-6 * plain_end.norm()


def legal_gradients(learner: Learner, rows: list[int]) -> torch.Tensor:
    """Of all parameters, but of the policy's only the rows of legal actions."""
    return flatten(
        parameter.grad[rows] if name.startswith("policy.") else parameter.grad
        for name, parameter in learner._model.named_parameters()
    )
