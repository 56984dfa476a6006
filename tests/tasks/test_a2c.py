"""The A2C learner on the real emulator: its returns, its gradient, ends of episodes, and that it is reproducible."""

from __future__ import annotations

import gc
import inspect
import math
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from a2c_learners import (
    AGENT,
    ALONE,
    ATARI,
    GAMMA,
    WORKER,
    Step,
    force_actions,
    frames_to_network,
    gradients,
    parameters,
    playing,
    record_steps,
    seen,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leap_dist.config.settings import AgentSettings
from leap_dist.leap.learner import Learner
from leap_dist.nn.actor_critic import initialization
from leap_dist.nn.flat_vector import Manifest, flatten
from leap_dist.tasks.atari import rollout
from leap_dist.tasks.atari.a2c import A2C
from leap_dist.tasks.atari.rollout import clip_rewards, n_step_returns


def record_returns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(rewards, discounts, bootstrap, returns) of every unroll."""
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def spy(rewards: Tensor, discounts: Tensor, bootstrap: Tensor) -> Tensor:
        returns = n_step_returns(rewards, discounts, bootstrap)
        calls.append((rewards.clone(), discounts.clone(), bootstrap.clone(), returns))
        return returns

    monkeypatch.setattr(rollout, "n_step_returns", spy)
    return calls


# --- returns -------------------------------------------------------------------------------------------------------


def naive_returns(rewards: np.ndarray, discounts: np.ndarray, bootstrap: np.ndarray) -> np.ndarray:
    """R_t = Σ_k (d_t ⋯ d_{k−1}) r_k, the value of s_T counting as the last reward."""
    T, N = rewards.shape
    returns = np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            weight = 1.0
            for k in range(t, T):
                returns[t, n] += weight * rewards[k, n]
                weight *= discounts[k, n]
            returns[t, n] += weight * bootstrap[n]
    return returns


@given(st.integers(0, 2**31 - 1), st.integers(1, 8), st.integers(1, 4))
def test_n_step_returns_are_the_naive_ones(seed, T, N):
    random = np.random.default_rng(seed)
    rewards, bootstrap = random.normal(size=(T, N)), random.normal(size=N)
    discounts = random.choice([0.0, 0.5, 0.99, 1.0], size=(T, N))
    found = n_step_returns(*map(torch.from_numpy, (rewards, discounts, bootstrap)))
    np.testing.assert_allclose(found.numpy(), naive_returns(rewards, discounts, bootstrap), rtol=1e-12, atol=1e-12)


@given(st.integers(0, 2**31 - 1))
def test_a_constant_reward_is_worth_one_over_one_minus_gamma_wherever_it_is_cut_off(seed):
    """r = 1 forever: V = 1/(1−γ) = r + γV, so neither truncation nor the end of the unroll may change a return."""
    value = 1 / (1 - 0.99)
    truncated = torch.from_numpy(np.random.default_rng(seed).random((12, 3)) < 0.3)
    rewards = torch.where(truncated, 1 + 0.99 * value, 1.0).double()
    discounts = torch.where(truncated, 0.0, 0.99).double()
    returns = n_step_returns(rewards, discounts, torch.full((3,), value, dtype=torch.float64))
    np.testing.assert_allclose(returns.numpy(), value, rtol=1e-6)


def test_nothing_flows_back_over_the_end_of_an_episode():
    rewards = torch.tensor([[1.0], [2.0], [4.0]])
    discounts = torch.tensor([[0.5], [0.0], [0.5]])
    assert n_step_returns(rewards, discounts, torch.tensor([8.0])).tolist() == [[2.0], [2.0], [8.0]]


def test_a_constant_reward_through_the_learner(monkeypatch):
    """The same law with the whole bookkeeping in between: real truncations, a value head that knows the answer."""
    calls = record_returns(monkeypatch)
    with playing(agent=replace(AGENT, unroll=60, discount=0.99), settings=replace(ATARI, life_loss=False)) as learner:
        with torch.no_grad():
            learner._model.value.weight.zero_()
            learner._model.value.bias.fill_(100.0)
        real = learner._env.step
        truncations = []

        def constant_reward(actions: np.ndarray) -> Any:
            step = real(actions)
            truncations.append(step.truncated)
            assert not step.terminated.any()
            return step._replace(rewards=np.ones_like(step.rewards))

        learner._env.step = constant_reward
        learner.evaluate()
    assert np.sum(truncations, axis=0).tolist() == [2, 2]
    np.testing.assert_allclose(calls[0][3].numpy(), 100.0, rtol=1e-5)


# --- ends of episodes ----------------------------------------------------------------------------------------------


def played(steps: list[Step], name: str) -> np.ndarray:
    return np.stack([getattr(step, name) for step in steps])


def episode_returns(steps: list[Step]) -> list[float]:
    """Sums of the emulator's raw rewards per episode, in the order in which the episodes ended."""
    finished = []
    running = np.zeros(len(steps[0].rewards))
    for step in steps:
        for n in range(len(running)):
            running[n] += step.rewards[n]
            if step.terminated[n] or step.truncated[n]:
                finished.append(running[n])
                running[n] = 0.0
    return finished


def test_truncation_bootstraps_from_the_last_observation(monkeypatch):
    calls = record_returns(monkeypatch)
    scores: list[float] = []
    with playing(agent=replace(AGENT, unroll=20)) as learner:
        steps = record_steps(learner)
        for _ in range(6):
            learner.backward()
            learner.step()
            scores.extend(learner.progress().scores)
        assert learner.progress().scores == (), "a report starts afresh"

    rewards = np.concatenate([call[0] for call in calls])
    discounts = np.concatenate([call[1] for call in calls])
    truncated, raw, value = (played(steps, name) for name in ("truncated", "rewards", "bootstrap"))
    assert truncated.sum(axis=0).tolist() == [4, 4]
    assert not played(steps, "terminated").any()
    assert not discounts[truncated].any()
    np.testing.assert_allclose(rewards, raw + GAMMA * value, rtol=1e-5, atol=1e-6)
    assert (discounts[~truncated] == np.float32(GAMMA)).all()
    # The mistakes this guards against would show: no bootstrap, or one from the observation after the reset.
    assert (np.abs(value[truncated]) > 1e-3).all()
    assert (np.abs(value - played(steps, "bootstrap_after_reset"))[truncated] > 1e-3).all()

    assert scores == episode_returns(steps)
    assert len(scores) == 8
    assert max(scores) > 1, "raw returns, or this test would not tell them from clipped ones"


def test_reported_returns_are_raw_where_training_rewards_are_clipped(monkeypatch):
    calls = record_returns(monkeypatch)
    with playing(agent=replace(AGENT, unroll=50, reward_clip="sign")) as learner:
        steps = record_steps(learner)
        learner.evaluate()
        scores = learner.progress().scores
    truncated, raw = played(steps, "truncated"), played(steps, "rewards")
    training = calls[0][0].numpy()
    assert raw.max() > 1
    assert np.array_equal(training[~truncated], np.sign(raw)[~truncated])
    assert list(scores) == episode_returns(steps)
    assert max(scores) > 1


@pytest.mark.parametrize("life_loss", [True, False])
def test_a_lost_life_ends_the_return_but_not_the_episode(monkeypatch, life_loss):
    calls = record_returns(monkeypatch)
    settings = replace(ATARI, max_episode_frames=108_000, life_loss=life_loss)
    with playing("breakout", agent=replace(AGENT, unroll=50), settings=settings) as learner:
        steps = record_steps(learner)
        scores: list[float] = []
        while len(scores) < 2:
            learner.evaluate()
            scores.extend(learner.progress().scores)
            assert len(steps) < 2000
    raw, terminated, lost = (played(steps, name) for name in ("rewards", "terminated", "lost_life"))
    rewards = np.concatenate([call[0] for call in calls])
    discounts = np.concatenate([call[1] for call in calls])
    assert not played(steps, "truncated").any()
    assert lost.sum() >= 4 * terminated.sum() >= 8, "five lives: four are lost before the last one ends the game"

    ended = terminated | lost if life_loss else terminated
    assert np.array_equal(discounts, np.where(ended, np.float32(0.0), np.float32(GAMMA)))
    assert np.array_equal(rewards, raw.astype(np.float32)), "neither kind of end bootstraps"
    assert scores == episode_returns(steps)


# --- the gradient --------------------------------------------------------------------------------------------------


def fresh_loss(learner: A2C, steps: list[Step], agent: AgentSettings, *, life_loss: bool) -> Tensor:
    """The A2C loss from one new forward pass over the recorded rollout, with naive returns."""
    frames = frames_to_network(played(steps, "observations"))
    T, N = frames.shape[:2]
    logits, value = learner._model(frames.flatten(0, 1))
    with torch.no_grad():
        bootstrap = learner._model(frames_to_network(seen(learner)))[1].double().numpy()
    ended = played(steps, "terminated") | played(steps, "truncated")
    if life_loss:
        ended |= played(steps, "lost_life")
    rewards = np.clip(played(steps, "rewards"), -5, 5) + agent.discount * played(steps, "bootstrap")
    returns = naive_returns(rewards, np.where(ended, 0.0, agent.discount), bootstrap)
    returns = torch.from_numpy(returns.reshape(-1)).float()

    policy = torch.distributions.Categorical(logits=logits)
    advantages = (returns - value).detach()
    policy_loss = -(advantages * policy.log_prob(torch.from_numpy(played(steps, "actions")).flatten())).sum()
    value_loss = ((returns - value) ** 2).sum()
    total = policy_loss + agent.value_cost * value_loss - agent.entropy_cost * policy.entropy().sum()
    return total / (T * N)


@pytest.mark.parametrize(("game", "frames"), [("carnival", 100), ("breakout", 108_000)])
def test_the_gradient_of_the_reused_graph_is_that_of_a_fresh_forward_pass(game, frames):
    """Over a rollout with truncations (carnival) or lost lives (breakout) in its midst, and after a few updates."""
    agent = replace(AGENT, unroll=30, reward_clip="bound", value_cost=0.3, entropy_cost=0.05)
    settings = replace(ATARI, max_episode_frames=frames)
    with playing(game, agent=agent, settings=settings) as learner:
        steps = record_steps(learner)
        wanted = "truncated" if game == "carnival" else "lost_life"
        for update in range(20):
            steps.clear()
            loss = learner.backward()
            if update >= 2 and played(steps, wanted)[:-1].any():
                break
            learner.step()
        else:
            pytest.fail(f"no rollout with {wanted} in its midst")
        found = [p.grad for p in learner._model.parameters()]
        fresh = fresh_loss(learner, steps, agent, life_loss=True)
        expected = torch.autograd.grad(fresh, list(learner._model.parameters()))
    assert loss.shape == ()
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(fresh.item(), rel=1e-5, abs=1e-5)
    for a, b in zip(found, expected, strict=True):
        assert b.norm() > 0
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_bfloat16_and_float32_gradients_agree(monkeypatch):
    results = {}
    for precision in ("float32", "bfloat16"):
        force_actions(monkeypatch, 4)
        with playing("breakout", worker=replace(WORKER, precision=precision)) as learner:
            steps = record_steps(learner)
            loss = learner.backward()
            results[precision] = gradients(learner).double(), played(steps, "observations"), loss.item()
            assert all(p.dtype == p.grad.dtype == torch.float32 for p in learner._model.parameters())
    (exact, frames, loss), (rounded, same_frames, rounded_loss) = results["float32"], results["bfloat16"]
    assert np.array_equal(frames, same_frames)
    assert not torch.equal(exact, rounded), "bfloat16 was not used"
    assert rounded_loss == pytest.approx(loss, rel=5e-2)
    assert torch.dot(exact, rounded) > 0.99 * exact.norm() * rounded.norm()
    assert (exact - rounded).norm() <= 0.1 * exact.norm()  # 0.013 to 0.05 over twelve seeds and games


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_changes_what_the_learner_computes_for_the_same_observation(precision):
    """Low-precision copies of the weights that outlive an update would freeze what acts, and nothing would learn."""
    agent = replace(ALONE, learning_rate=1e-2)
    with playing(agent=agent, worker=replace(WORKER, precision=precision)) as learner:
        observations = seen(learner)

        def first_of_the_next_rollout() -> tuple[Tensor, Tensor, Tensor]:
            learner._rollout.set_frames(observations)
            learner.backward()
            features = learner._rollout._recorder.features()[:1]
            logits, value = learner._model.heads(features)
            return features, logits.detach(), value.detach()

        before = first_of_the_next_rollout()
        unmoved = first_of_the_next_rollout()
        learner.step()
        after = first_of_the_next_rollout()
    assert all(torch.equal(a, b) for a, b in zip(before, unmoved, strict=True)), "the control: no step, no change"
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all((a - b).norm() > 0.05 * a.norm() for a, b in zip(before, after, strict=True))


def test_step_leaves_the_gradients_that_leap_holds_as_they_are():
    with playing(agent=replace(ALONE, max_grad_norm=1e-6)) as learner:
        learner.backward()
        held = [p.grad for p in learner._model.parameters()]
        before, versions = [g.clone() for g in held], [g._version for g in held]
        start = parameters(learner)
        learner.step()
        assert all(torch.equal(g, old) for g, old in zip(held, before, strict=True))
        assert [g._version for g in held] == versions
        assert all(p.grad is None for p in learner._model.parameters())
        assert not np.array_equal(parameters(learner), start)


def test_evaluate_is_the_loss_of_the_next_rollout_without_a_gradient():
    with playing(agent=ALONE) as one, playing(agent=ALONE) as other:
        for learner in (one, other):
            learner.backward()
            learner.step()
        before = parameters(other)
        loss = other.evaluate()
        assert loss.shape == ()
        assert not loss.requires_grad
        assert all(p.grad is None for p in other._model.parameters())
        assert np.array_equal(parameters(other), before)
        assert torch.equal(one.backward(), loss)


# --- reproducibility -----------------------------------------------------------------------------------------------


def trained(updates: int, **settings: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encoder at the start, all parameters at the start, all parameters after `updates`."""
    torch.manual_seed(np.random.default_rng().integers(2**31))  # neither global generator may matter
    np.random.seed(np.random.default_rng().integers(2**31))
    with playing(**settings) as learner:
        encoder, start = flatten(learner.shared.values()).numpy(), parameters(learner)
        for _ in range(updates):
            learner.backward()
            learner.step()
        return encoder, start, parameters(learner)


def test_the_same_seed_gives_the_same_run_bit_for_bit_and_another_seed_another():
    encoder, start, end = trained(8, seed=1)
    assert not np.array_equal(start, end)
    again = trained(8, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip((encoder, start, end), again, strict=True))

    other_encoder, other_start, other_end = trained(8, seed=2)
    assert np.array_equal(other_encoder, encoder), "the encoder starts from φ whatever the seed"
    assert np.array_equal(encoder, initialization(4, 0)[1])
    heads = len(encoder)
    assert not np.array_equal(other_start[heads:], start[heads:])
    assert not np.array_equal(other_end[:heads], end[:heads])


def test_a_seed_determines_environments_and_actions_as_well_as_heads():
    """Two seeds with the same heads forced on them still play differently."""
    games = []
    for seed in (1, 2, 1):
        with playing("breakout", seed=seed) as learner:
            with torch.no_grad():
                learner._model.policy.weight.zero_()
            steps = record_steps(learner)
            first = seen(learner)
            for _ in range(4):
                learner.evaluate()
            games.append((played(steps, "actions"), first))
    assert np.array_equal(games[0][0], games[2][0])
    assert np.array_equal(games[0][1], games[2][1])
    assert not np.array_equal(games[0][0], games[1][0])
    assert not np.array_equal(games[0][1], games[1][1])
    assert not np.array_equal(games[0][1][0], games[0][1][1]), "the environments of one learner differ too"


# --- the rest ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("bound", [-5.0, -5.0, -1.0, 0.0, 3.0, 5.0, 5.0]),  # appendix E: |r| ≤ 5
        ("sign", [-1.0, -1.0, -1.0, 0.0, 1.0, 1.0, 1.0]),
        ("none", [-700.0, -5.0, -1.0, 0.0, 3.0, 5.0, 25.0]),
    ],
)
def test_reward_clipping(kind, expected):
    raw = np.array([-700, -5, -1, 0, 3, 5, 25], np.int32)
    clipped = clip_rewards(raw, kind)
    assert clipped.tolist() == expected
    assert clipped.dtype == np.float32
    assert raw.tolist() == [-700, -5, -1, 0, 3, 5, 25], "the raw rewards are still needed"


def test_progress_reports_means_over_the_updates_since_the_last_report():
    with playing(agent=replace(ALONE, learning_rate=1e-6)) as learner:
        assert learner.progress().means == {}
        for updates in (3, 2):
            losses = []
            for _ in range(updates):
                losses.append(learner.backward().item())
                learner.step()
            means = learner.progress().means
            assert {name for name in means if "/" not in name} == {"loss", "policy_loss", "value_loss", "entropy"}
            assert means["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
            parts = (
                means["policy_loss"] + AGENT.value_cost * means["value_loss"] - AGENT.entropy_cost * means["entropy"]
            )
            assert means["loss"] == pytest.approx(parts, rel=1e-4, abs=1e-5)
            assert means["entropy"] == pytest.approx(math.log(6), rel=0.02), "carnival has six actions"
        assert learner.progress().means == {}


def test_progress_reports_a_rollout_that_only_measures_as_well():
    """Without its losses, the worker would drop the returns of the episodes that end in it."""
    with playing(agent=replace(ALONE, unroll=30)) as learner:
        loss = learner.evaluate().item()
        progress = learner.progress()
        assert len(progress.scores) == 1
        assert progress.means["loss"] == pytest.approx(loss)
        assert learner.progress().means == {}


def test_the_learner_implements_the_protocol():
    methods = [name for name, _ in inspect.getmembers(Learner, inspect.isfunction) if not name.startswith("_")]
    assert set(methods) == {
        "backward",
        "step",
        "backward_held_out",
        "evaluate",
        "progress",
        "interim",
        "conclude",
        "show",
        "state",
        "load_state",
        "close",
    }
    for name in methods:
        wanted = inspect.signature(getattr(Learner, name), eval_str=True)
        assert inspect.signature(getattr(A2C, name), eval_str=True) == wanted
    assert set(Learner.__annotations__) == {"shared", "local", "descent", "steps_per_update"}
    with playing() as learner:
        assert learner.steps_per_update == 2 * 5
        assert not learner.done


@pytest.mark.parametrize("scope", ["convolutions", "encoder", "model"])
def test_shared_and_local_parameters_together_are_all_that_train(scope):
    with playing(agent=ALONE, scope=scope) as learner:
        manifest, vector = initialization(4, 0, scope)
        assert Manifest.of(learner.shared) == manifest
        assert np.array_equal(flatten(learner.shared.values()).numpy(), vector), "they start from φ"
        divided = [*learner.shared.values(), *learner.local.values()]
        assert [id(p) for p in divided] == [id(p) for p in learner._model.parameters()]
        before = [p.detach().clone() for p in divided]
        learner.backward()
        assert all(p.grad is not None for p in divided), "of both a meta-learner may want the gradient"
        learner.step()
        assert not any(torch.equal(p, old) for p, old in zip(divided, before, strict=True))


@pytest.mark.parametrize(("frames", "channels"), [("gray4", 4), ("rgb1", 3), ("rgb4", 12)])
def test_every_kind_of_observation_trains(frames, channels):
    with playing("pong", agent=ALONE, settings=replace(ATARI, frames=frames)) as learner:
        assert learner._model.encoder.conv1.weight.shape[1] == channels
        start = parameters(learner)
        assert torch.isfinite(learner.backward())
        learner.step()
        assert np.isfinite(parameters(learner)).all()
        assert not np.array_equal(parameters(learner), start)


def test_all_actions_may_be_offered():
    for full, expected in ((True, 18), (False, 6)):
        with playing("pong", agent=ALONE, settings=replace(ATARI, full_actions=full)) as learner:
            assert learner._model.policy.out_features == expected


def test_an_encoder_of_another_size_is_refused():
    with pytest.raises(ValueError, match="encoder needs"):
        A2C("pong", initialization(3, 0)[1], seed=0, agent=ALONE, settings=ATARI, worker=WORKER)


# --- memory --------------------------------------------------------------------------------------------------------


def test_a_closed_learner_leaves_no_cycle_that_keeps_networks_and_graphs_in_memory() -> None:
    """A full garbage collection may come many tasks later, and buffers and graphs of a GPU stay there until then."""
    gc.collect()
    gc.disable()
    try:
        with playing(agent=ALONE) as learner:
            learner.backward()
            learner.step()
            kept = [weakref.ref(part) for part in (learner, learner._rollout, learner._model)]
        del learner
        assert [part() for part in kept] == [None] * 3
    finally:
        gc.enable()
