"""A2C learners on the real emulator, and what tests look at or force in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from leap_dist.config.settings import AgentSettings, AtariSettings, WorkerSettings
from leap_dist.envs import atari_vector
from leap_dist.nn.actor_critic import initialization
from leap_dist.nn.flat_vector import flatten
from leap_dist.tasks.atari.a2c import A2C

GAMMA = 0.9
AGENT = AgentSettings(
    envs=2, unroll=5, learning_rate=1e-3, epsilon=1e-5, epsilon_form="outside", discount=GAMMA, reward_clip="none"
)
ALONE = replace(AGENT, envs=1)  # starting an environment takes a quarter of a second
ATARI = AtariSettings(frames="gray4", max_episode_frames=100)  # truncates every 25 steps
WORKER = WorkerSettings(device="cpu", precision="float32")


@contextmanager
def playing(
    game: str = "carnival",
    *,
    seed: int = 0,
    agent: AgentSettings = AGENT,
    settings: AtariSettings = ATARI,
    worker: WorkerSettings = WORKER,
    scope: str = "encoder",
    **heads: Any,
) -> Iterator[A2C]:
    """A learner that starts from the initialization of seed 0; `heads`: head_seed and head_change."""
    vector = initialization(atari_vector.channels(settings.frames), 0, scope)[1]
    learner = A2C(game, vector, seed=seed, agent=agent, settings=settings, worker=worker, scope=scope, **heads)
    try:
        yield learner
    finally:
        learner.close()


class Step(NamedTuple):
    """What went into and came out of one step of the environments."""

    observations: np.ndarray
    """That the actions were chosen on."""
    actions: np.ndarray
    rewards: np.ndarray
    """Raw."""
    terminated: np.ndarray
    truncated: np.ndarray
    lost_life: np.ndarray
    """In the midst of an episode."""
    bootstrap: np.ndarray
    """V(last observation of the episode), with the parameters of that moment, where truncated; 0 elsewhere."""
    bootstrap_after_reset: np.ndarray
    """The mistake: V(first observation of the next episode) in its place."""


def frames_to_network(observations: np.ndarray) -> Tensor:
    return torch.from_numpy(observations).float() / 255


def seen(learner: A2C) -> np.ndarray:
    """The observations that the learner will act on next."""
    return learner._rollout._frames.numpy().copy()


def record_steps(learner: A2C) -> list[Step]:
    """Wraps the environment; the list that it returns grows as the learner plays."""
    steps: list[Step] = []
    real, lives = learner._env.step, learner._lives.copy()

    def step(actions: np.ndarray) -> atari_vector.Step:
        nonlocal lives
        before = seen(learner)
        result = real(actions)
        values = np.zeros((2, len(actions)))
        if result.truncated.any():
            with torch.no_grad():
                values[0, result.truncated] = learner._model(frames_to_network(result.final))[1]
                values[1] = learner._model(frames_to_network(result.observations))[1]
        lost = (result.lives < lives) & ~result.terminated & ~result.truncated
        lives = result.lives.copy()
        masked = np.where(result.truncated, values, 0.0)
        parts = (before, actions, result.rewards, result.terminated, result.truncated, lost)
        steps.append(Step(*(np.array(part) for part in parts), *masked))
        return result

    learner._env.step = step
    return steps


def parameters(learner: A2C) -> np.ndarray:
    return flatten(learner._model.parameters()).numpy()


def gradients(learner: A2C) -> Tensor:
    return flatten(p.grad for p in learner._model.parameters())


def force_actions(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Replace sampling by the actions 0, 1, 2, … in turn, so that another arithmetic cannot choose others."""
    drawn = iter(range(10**9))

    def draw(scores: Tensor, *, dim: int, out: Tensor) -> Tensor:
        assert dim == -1
        return out.copy_(torch.tensor([next(drawn) % count for _ in range(len(scores))]))

    monkeypatch.setattr(torch, "argmax", draw)
