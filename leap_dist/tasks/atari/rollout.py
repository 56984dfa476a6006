"""The device's side of A2C: the actions of an unroll, then its loss and gradient.

T is the length of the unroll, N the number of environments, A the number of actions; time runs along the first axis.
All tensors keep their memory from unroll to unroll, so that a GPU can run both halves as captured graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leap_dist.config.settings import AgentSettings
from leap_dist.nn.actor_critic import FRAME_SIZE, ActorCritic
from leap_dist.nn.device import CapturedGraph, Graph
from leap_dist.nn.recorder import Recorder


class EpisodeTracker:
    """Adds up the raw rewards of N parallel environments and collects the returns of finished episodes."""

    def __init__(self, envs: int) -> None:
        self._running = np.zeros(envs)
        self._steps = 0
        self._returns: list[float] = []
        self._ends: list[int] = []

    def add(self, rewards: np.ndarray, done: np.ndarray) -> None:
        """Add one step: raw rewards (N,), and which episodes it ended, bool (N,)."""
        self._running += rewards
        self._steps += len(done)
        if done.any():
            self._returns.extend(self._running[done].tolist())
            self._ends.extend([self._steps] * int(done.sum()))
            self._running[done] = 0.0

    def take(self) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Return the returns collected since the last call, and the agent steps of the task at which they ended."""
        returns, ends = tuple(self._returns), tuple(self._ends)
        self._returns, self._ends = [], []
        return returns, ends

    def state(self) -> dict[str, Any]:
        """Return everything as JSON-compatible values."""
        return {
            "running": self._running.tolist(),
            "steps": self._steps,
            "returns": list(self._returns),
            "ends": list(self._ends),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._running[:] = state["running"]
        self._steps = int(state["steps"])
        self._returns, self._ends = list(state["returns"]), list(state["ends"])


REWARD_BOUND = 5.0
"""The Leap paper, appendix E: "clip the absolute value of the rewards to maximum 5.0"."""


def clip_rewards(rewards: np.ndarray, kind: str) -> np.ndarray:
    """Return training rewards, float32: clipped to ±5 ("bound"), their sign ("sign"), or unchanged ("none")."""
    raw = rewards.astype(np.float32)
    if kind == "bound":
        return np.clip(raw, -REWARD_BOUND, REWARD_BOUND)
    return np.sign(raw) if kind == "sign" else raw


LONGEST_CAPTURED = 64
"""Longest unroll whose steps are captured. Each step is a separate graph, which costs memory."""


def n_step_returns(rewards: Tensor, discounts: Tensor, bootstrap: Tensor) -> Tensor:
    """Return n-step returns R_t = r_t + d_t R_{t+1} with R_T = bootstrap (Sutton and Barto, section 7.1).

    Args:
        rewards: (T, N). Where an episode was truncated, γ V(last observation) has been added.
        discounts: (T, N), γ, or 0 where the return ends.
        bootstrap: (N,), the values V(s_T).

    Returns:
        Returns R, (T, N).
    """
    assert rewards.shape == discounts.shape, (rewards.shape, discounts.shape)
    assert bootstrap.shape == rewards.shape[1:], (bootstrap.shape, rewards.shape)
    returns = torch.empty_like(rewards)
    following = bootstrap
    for t in reversed(range(len(rewards))):
        following = torch.addcmul(rewards[t], discounts[t], following, out=returns[t])
    return returns


def a2c_loss(logits: Tensor, values: Tensor, returns: Tensor, actions: Tensor, agent: AgentSettings) -> Tensor:
    """Return the A2C loss (Mnih et al. 2016), a mean over n steps, and its three parts: (4,).

    Args:
        logits: (n, A).
        values: (n,).
        returns: n-step returns, (n,).
        actions: the actions taken, int64 (n, 1).
        agent: weights of the parts.
    """
    log_policy = torch.log_softmax(logits, dim=-1)
    chosen = log_policy.gather(1, actions).squeeze(1)
    policy_loss = -((returns - values.detach()) * chosen).mean()
    value_loss = (returns - values).square().mean()
    entropy = -(log_policy.exp() * log_policy).sum(-1).mean()
    loss = policy_loss + agent.value_cost * value_loss - agent.entropy_cost * entropy
    return torch.stack([loss, policy_loss, value_loss, entropy])


class Rollout:
    """Computes one unroll after another: call `start`, then `act` T times, then `gradients` or `loss`.

    Call `close` at the end, because the graphs refer to the object that holds them.

    Args:
        model: the network, already on its device.
        agent: settings of A2C; they determine T and N.
        actions: number of actions A.
        dtype: precision of the encoder; heads and loss are float32.
        generator: draws the actions; it is on the model's device.
        graph: kind of graph to capture the work as; None to run it step by step.
    """

    def __init__(
        self,
        model: ActorCritic,
        agent: AgentSettings,
        *,
        actions: int,
        dtype: torch.dtype,
        generator: torch.Generator,
        graph: type[Graph] | None,
    ) -> None:
        steps, envs = agent.unroll, agent.envs
        self._model = model
        self._agent = agent
        self.generator = generator
        """Draws the actions."""
        self._recorder = Recorder(model.encoder, steps, envs, dtype)
        weight = model.encoder.conv1.weight
        device, channels = weight.device, weight.shape[1]

        pinned = device.type == "cuda"  # copies from page-locked memory are asynchronous
        frames = torch.zeros(envs, channels, FRAME_SIZE, FRAME_SIZE, dtype=torch.uint8, pin_memory=pinned)
        outcome = torch.zeros(2, steps, envs, pin_memory=pinned)
        self.rewards: np.ndarray
        self.discounts: np.ndarray
        self.rewards, self.discounts = outcome.numpy()
        """(T, N) each. The caller fills them in before it asks for the loss."""
        # What the host fills in is copied if the device cannot read it, or if a graph refers to fixed addresses.
        self._staged = (frames, outcome) if graph or device.type != "cpu" else None
        self._frames = torch.zeros_like(frames, device=device)
        self._outcome = outcome if self._staged is None else torch.zeros_like(outcome, device=device)
        self._noise = torch.zeros(steps, envs, actions, device=device)
        self._actions = torch.zeros(steps, envs, dtype=torch.int64, device=device)
        self._last_value = torch.zeros(envs, device=device)

        if steps > LONGEST_CAPTURED:
            graph = None
        self._act = [CapturedGraph(partial(self._choose, t), graph) for t in range(steps)]
        self._bootstrap = CapturedGraph(self._value_last, graph)
        self._gradients = CapturedGraph(self._differentiate, graph)

    def close(self) -> None:
        """Give up the graphs, so that the memory of all tensors is freed with the last reference to this object.

        Without it, network, buffers and graphs would stay on the device until Python's next full garbage collection.
        """
        self._act.clear()
        self._bootstrap = self._gradients = CapturedGraph(tuple, None)

    def start(self) -> None:
        """Begin an unroll with the current parameters. Its first frames are those set last."""
        # Gumbel-max trick: argmax of logits − log E, with E exponential, is a sample of the softmax.
        self._noise.exponential_(generator=self.generator).log_().neg_()

    def set_frames(self, observations: np.ndarray) -> None:
        """Set the observations of the next step, uint8 (N, C, 84, 84)."""
        frames = torch.from_numpy(observations)
        if self._staged is None:
            self._frames = frames
        else:
            self._frames.copy_(self._staged[0].copy_(frames), non_blocking=True)

    def act(self, step: int) -> np.ndarray:
        """Return actions (N,) for the current frames, drawn as step number `step` of the unroll."""
        self._act[step]()
        return self._actions[step].cpu().numpy()

    @torch.no_grad()
    def value(self, observations: np.ndarray) -> np.ndarray:
        """Return V(s), (n,) with n ≤ N, using the parameters that the unroll began with."""
        frames = torch.from_numpy(observations).to(self._frames.device)
        value: np.ndarray = self._model.values(self._recorder.encode(self._agent.unroll, frames)).cpu().numpy()
        return value

    def gradients(self) -> tuple[Tensor, list[Tensor]]:
        """Return (loss, policy loss, value loss, entropy), (4,), and the loss's gradients, all as new tensors."""
        self._finish()
        parts, *gradients = self._gradients()
        return parts, gradients

    def features(self) -> Tensor:
        """Return the encoder's features of the last unroll's observations, float32 (T · N, 256), without a gradient."""
        return self._recorder.features()

    @torch.no_grad()
    def loss(self) -> Tensor:
        """Return (loss, policy loss, value loss, entropy), (4,), without a gradient."""
        self._finish()
        return self._loss(self._recorder.features())

    def _finish(self) -> None:
        """Copy rewards and discounts to the device, and compute the value of the last observation."""
        if self._staged is not None:
            self._outcome.copy_(self._staged[1], non_blocking=True)
        self._bootstrap()

    @torch.no_grad()
    def _choose(self, step: int) -> Sequence[Tensor]:
        if step == 0:
            self._recorder.begin()
        logits = self._model.logits(self._recorder.encode(step, self._frames))
        torch.argmax(logits + self._noise[step], dim=-1, out=self._actions[step])
        return ()

    @torch.no_grad()
    def _value_last(self) -> Sequence[Tensor]:
        self._last_value.copy_(self._model.values(self._recorder.encode(self._agent.unroll, self._frames)))
        return ()

    def _differentiate(self) -> Sequence[Tensor]:
        parts = self._loss(self._recorder.replay())
        return parts.detach(), *torch.autograd.grad(parts[0], [*self._model.parameters()])

    def _loss(self, features: Tensor) -> Tensor:
        """Return the A2C loss (Mnih et al. 2016), a mean over T × N steps, and its three parts: (4,)."""
        rewards, discounts = self._outcome
        returns = n_step_returns(rewards, discounts, self._last_value).view(-1)
        return a2c_loss(*self._model.heads(features), returns, self._actions.view(-1, 1), self._agent)
