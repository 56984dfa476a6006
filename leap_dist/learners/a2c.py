"""Advantage actor-critic (A2C) on many copies of one Atari game.

T is the unroll length, N the number of environments, A the number of actions; time runs along the first axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from envs import atari
from leap_dist.learners import Progress
from leap_dist.models import ALL_ACTIONS, ActorCritic, Encoder, add_vector, initialize, load_vector
from leap_dist.optimizers import RMSProp
from leap_dist.settings import AgentSettings, AtariSettings, WorkerSettings

REWARD_BOUND = 5.0  # appendix E: "clip the absolute value of the rewards to maximum 5.0"


def n_step_returns(rewards: Tensor, discounts: Tensor, bootstrap: Tensor) -> Tensor:
    """R_t = r_t + d_t R_{t+1}, R_T = bootstrap (Sutton & Barto, section 7.1).

    Args:
        rewards: (T, N). Where an episode was truncated, with γ V(last observation) already added.
        discounts: (T, N), γ, or 0 where the return ends.
        bootstrap: (N,), V(s_T).

    Returns:
        (T, N).
    """
    assert rewards.shape == discounts.shape, (rewards.shape, discounts.shape)
    assert bootstrap.shape == rewards.shape[1:], (bootstrap.shape, rewards.shape)
    returns = torch.empty_like(rewards)
    following = bootstrap
    for t in reversed(range(len(rewards))):
        following = rewards[t] + discounts[t] * following
        returns[t] = following
    return returns


def clip_rewards(rewards: np.ndarray, kind: str) -> np.ndarray:
    """Training rewards from raw ones, float32: within ±5 ("bound", the paper), their sign, or as they are ("none")."""
    raw = rewards.astype(np.float32)
    if kind == "bound":
        return np.clip(raw, -REWARD_BOUND, REWARD_BOUND)
    return np.sign(raw) if kind == "sign" else raw


class A2C:
    """One agent learning one game, from a given encoder. Implements `leap_dist.learners.Learner`.

    The rollout's own graph is used for the update: within an unroll the parameters do not change, so the forward
    passes that chose the actions are the ones that the loss needs.

    Args:
        game: the game's ROM name.
        vector: flat float32 vector φ that the shared parameters start from.
        seed: determines heads, actions and environments: on a CPU the same seed gives the same run, bit for bit.
        scope: which parameters are shared: "convolutions", "encoder" or "model", with one 18-way head for all games.
        head_seed: determines the task's own parameters instead of `seed`, where they are the game's, not the task's.
        head_change: flat float32 vector, what earlier tasks added to the parameters that `head_seed` gives.
    """

    def __init__(
        self,
        game: str,
        vector: np.ndarray,
        *,
        seed: int,
        agent: AgentSettings,
        settings: AtariSettings,
        worker: WorkerSettings,
        scope: str = "encoder",
        head_seed: int | None = None,
        head_change: np.ndarray | None = None,
    ) -> None:
        self._agent = agent
        self._life_loss = settings.life_loss
        self._device = torch.device(resolve_device(worker.device))
        self._dtype = resolve_precision(worker.precision, self._device.type)
        self._env = atari.make(
            game,
            agent.envs,
            frames=settings.frames,
            frame_skip=settings.frame_skip,
            noop_max=settings.noop_max,
            fire_on_reset=settings.fire_on_reset,
            sticky_actions=settings.sticky_actions,
            max_episode_frames=settings.max_episode_frames,
            full_actions=settings.full_actions,
            threads=worker.emulator_threads,
        )
        heads, actions, environments = np.random.SeedSequence(seed).generate_state(3)
        self._generator = torch.Generator(self._device).manual_seed(int(actions))
        legal = atari.actions(self._env)
        encoder = Encoder(atari.channels(settings.frames))
        if scope == "model":
            model = ActorCritic(encoder, ALL_ACTIONS, legal=legal)
        else:
            model = ActorCritic(encoder, len(legal))
        initialize(model, torch.Generator().manual_seed(int(heads) if head_seed is None else head_seed))
        self._model = model.to(self._device)
        self.shared: Mapping[str, Tensor]
        self.local: Mapping[str, Tensor]
        self.shared, self.local = self._model.parameters_of(scope)
        load_vector(self.shared, vector)
        if head_change is not None:
            add_vector(self.local, head_change)
        self._optimizer = RMSProp(
            self._model.parameters(),
            learning_rate=agent.learning_rate,
            decay=agent.decay,
            epsilon=agent.epsilon,
            epsilon_inside=agent.epsilon_form == "inside",
            max_grad_norm=agent.max_grad_norm,
        )
        self.steps_per_update = agent.envs * agent.unroll
        seeds = np.random.default_rng(int(environments)).integers(0, 2**31 - 1, agent.envs)
        self._observations, info = self._env.reset(seed=seeds)
        self._lives = info["lives"].copy()
        self._episode_returns = np.zeros(agent.envs)
        self._reset_progress()

    def backward(self) -> Tensor:
        """Plays one unroll and leaves the gradient of its loss, a mean over T × N steps. Returns the loss, ()."""
        loss = self._rollout_loss()
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        """Clips to the global norm and applies RMSProp; the gradients are dropped, not overwritten."""
        self._optimizer.step()

    def evaluate(self) -> Tensor:
        """The loss of one more unroll, without a gradient, shape ()."""
        with torch.no_grad():
            return self._rollout_loss()

    def progress(self) -> Progress:
        """Raw returns of the episodes that ended since the last call, and mean losses and entropy."""
        names = ("loss", "policy_loss", "value_loss", "entropy") if self._rollouts else ()
        means = dict(zip(names, (self._parts / max(1, self._rollouts)).tolist(), strict=False))
        report = Progress(tuple(self._finished), means)
        self._reset_progress()
        return report

    def close(self) -> None:
        """Closes the emulator."""
        self._env.close()

    def _reset_progress(self) -> None:
        self._finished: list[float] = []
        self._parts = torch.zeros(4, device=self._device)
        self._rollouts = 0

    def _rollout_loss(self) -> Tensor:
        """Plays T steps, and takes them into what `progress` reports. Returns their loss, ()."""
        agent = self._agent
        shape = (agent.unroll, agent.envs)
        rewards = np.empty(shape, np.float32)
        discounts = np.empty(shape, np.float32)
        log_probabilities, values, entropies = [], [], []
        # One context per unroll: autocast caches its low-precision weights for as long as it is open, which is a
        # gain while the parameters stand still and would freeze them if it stayed open across updates.
        with self._autocast():
            for t in range(agent.unroll):
                logits, value = self._model(self._to_device(self._observations))
                log_policy = torch.log_softmax(logits, dim=-1)
                policy = log_policy.exp()
                action = torch.multinomial(policy.detach(), 1, generator=self._generator)
                rewards[t], discounts[t] = self._act(action.squeeze(1).cpu().numpy())
                log_probabilities.append(log_policy.gather(1, action).squeeze(1))
                entropies.append(-(policy * log_policy).sum(-1))
                values.append(value)
            bootstrap = self._value(self._observations)
        returns = n_step_returns(
            torch.from_numpy(rewards).to(self._device), torch.from_numpy(discounts).to(self._device), bootstrap
        )
        value = torch.stack(values)
        advantages = returns - value.detach()
        policy_loss = -(advantages * torch.stack(log_probabilities)).mean()
        value_loss = (returns - value).square().mean()
        entropy = torch.stack(entropies).mean()
        loss = policy_loss + agent.value_cost * value_loss - agent.entropy_cost * entropy
        self._parts += torch.stack([loss, policy_loss, value_loss, entropy]).detach()
        self._rollouts += 1
        return loss

    def _act(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Steps every environment. Returns training rewards and discounts, each (N,), and does the bookkeeping."""
        observations, raw_rewards, terminated, truncated, info = self._env.step(actions)
        rewards = clip_rewards(raw_rewards, self._agent.reward_clip)
        done = terminated | truncated
        ended = done.copy()
        if self._life_loss:
            ended |= info["lives"] < self._lives
        if truncated.any():
            # Cut off, not over: what would have followed is worth the value of the last observation.
            last = self._value(info["final_obs"][truncated]).cpu().numpy()
            rewards[truncated] += self._agent.discount * last
        discounts = np.where(ended, 0.0, self._agent.discount).astype(np.float32)
        self._lives = info["lives"].copy()
        self._episode_returns += raw_rewards
        if done.any():
            self._finished.extend(self._episode_returns[done].tolist())
            self._episode_returns[done] = 0.0
        self._observations = observations
        return rewards, discounts

    def _value(self, observations: np.ndarray) -> Tensor:
        """V(s), (N,), outside the graph."""
        with torch.no_grad(), self._autocast():
            value: Tensor = self._model(self._to_device(observations))[1]
        return value

    def _to_device(self, observations: np.ndarray) -> Tensor:
        """uint8 frames → (N, C, 84, 84) in [0, 1] on the device, in the precision of the network.

        The memory format stays what the emulator gives: converting it here costs more than the convolution gains.
        """
        frames = torch.from_numpy(atari.as_channels(observations)).to(self._device, non_blocking=True)
        return frames.to(self._dtype).mul_(1.0 / 255.0)

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)


def resolve_device(name: str) -> str:
    """ "auto" → "cuda" where there is one, else "cpu". Raises RuntimeError where cuda is asked for and missing."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("worker.device is cuda, but torch finds no GPU here")
    return name


def resolve_precision(name: str, device: str) -> torch.dtype:
    """ "auto" → bfloat16 where the hardware multiplies it natively, else float32."""
    if name == "auto":
        native = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32
