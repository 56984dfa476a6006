"""Advantage actor-critic (A2C) on many copies of one Atari game: the host's side, environments and bookkeeping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from leap_dist.config.settings import AgentSettings, AtariSettings, WorkerSettings
from leap_dist.envs import atari_vector
from leap_dist.leap.learner import Progress
from leap_dist.leap.optimizers import RMSProp
from leap_dist.nn.actor_critic import ALL_ACTIONS, ActorCritic, Encoder, initialize
from leap_dist.nn.device import graph_for, resolve_device, resolve_precision
from leap_dist.nn.flat_vector import add_vector, load_vector
from leap_dist.nn.profiling import Stopwatch
from leap_dist.tasks.atari.rollout import Rollout

REWARD_BOUND = 5.0  # appendix E: "clip the absolute value of the rewards to maximum 5.0"


def clip_rewards(rewards: np.ndarray, kind: str) -> np.ndarray:
    """Training rewards from raw ones, float32: within ±5 ("bound", the paper), their sign, or as they are ("none")."""
    raw = rewards.astype(np.float32)
    if kind == "bound":
        return np.clip(raw, -REWARD_BOUND, REWARD_BOUND)
    return np.sign(raw) if kind == "sign" else raw


class A2C:
    """One agent learning one game, from a given encoder. Implements `leap_dist.leap.learner.Learner`.

    The forward passes that choose the actions are the ones that the loss needs, since within an unroll the parameters
    do not change: a `Recorder` keeps them.

    Args:
        game: the game's ROM name.
        vector: flat float32 vector φ that the shared parameters start from.
        seed: determines heads, actions and environments: on a CPU the same seed gives the same run, bit for bit.
        scope: which parameters are shared: "convolutions", "encoder" or "model", with one 18-way head for all games.
        head_seed: determines the task's own parameters instead of `seed`, where they are the game's, not the task's.
        head_change: flat float32 vector, what earlier tasks added to the parameters that `head_seed` gives.
        stopwatch: to be told what the time goes to.
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
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.stopwatch = stopwatch or Stopwatch()
        self._agent = agent
        self._life_loss = settings.life_loss
        colours, _ = atari_vector.STACKS[settings.frames]
        self._newest = slice(colours.start - colours.stop, None)  # of an observation's channels
        self._see: Callable[[np.ndarray], None] | None = None
        self._env = atari_vector.make(
            game,
            agent.envs,
            frames=settings.frames,
            frame_skip=settings.frame_skip,
            noop_max=settings.noop_max,
            fire_on_reset=settings.fire_on_reset,
            sticky_actions=settings.sticky_actions,
            max_episode_frames=settings.max_episode_frames,
            full_actions=settings.full_actions,
        )
        heads, actions, environments = (int(s) for s in np.random.SeedSequence(seed).generate_state(3))
        self._model = _model(
            atari_vector.channels(settings.frames), self._env.actions, scope, heads if head_seed is None else head_seed
        )
        device = torch.device(resolve_device(worker.device))
        self._model.to(device)
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
        self.descent: float | None = None  # RMSProp, and clipped
        self.steps_per_update = agent.envs * agent.unroll
        self._rollout = Rollout(
            self._model,
            agent,
            actions=len(self._env.actions),
            dtype=resolve_precision(worker.precision, device.type),
            generator=torch.Generator(device).manual_seed(actions),
            graph=graph_for(device),
        )
        self._rollout.see(self._env.reset(environments))
        self._lives = self._env.lives
        self._episode_returns = np.zeros(agent.envs)
        self._steps = 0
        self._reset_progress()

    def backward(self) -> Tensor:
        """Plays one unroll and leaves the gradient of its loss, a mean over T × N steps. Returns the loss, ()."""
        self._play()
        with self.stopwatch("update"):
            parts, gradients = self._rollout.gradients()
            for parameter, gradient in zip(self._model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            return self._note(parts)

    def step(self) -> None:
        """Clips to the global norm and applies RMSProp; the gradients are dropped, not overwritten."""
        with self.stopwatch("update"):
            self._optimizer.step()

    @property
    def done(self) -> bool:
        """Never: there is always more to play."""
        return False

    def measure(self) -> Tensor:
        """Every unroll is new: the same as `backward`."""
        return self.backward()

    def evaluate(self) -> Tensor:
        """The loss of one more unroll, without a gradient, shape ()."""
        self._play()
        return self._note(self._rollout.loss())

    def progress(self) -> Progress:
        """Raw returns of the episodes that ended since the last call, and mean losses and entropy."""
        means: dict[str, float] = {}
        if self._parts is not None:
            names = ("loss", "policy_loss", "value_loss", "entropy")
            means = dict(zip(names, (self._parts / self._rollouts).tolist(), strict=True))
        report = Progress(tuple(self._finished), means, tuple(self._ended))
        self._reset_progress()
        return report

    def conclude(self, beat: Callable[[], None]) -> dict[str, float]:
        """Nothing: episodes tell all there is."""
        return {}

    def show(self, see: Callable[[np.ndarray], None]) -> None:
        """Shows the first environment's newest frame after every step, (1, 84, 84) in gray or (3, 84, 84) in colour."""
        self._see = see

    def close(self) -> None:
        """Gives the emulators back."""
        self._env.close()

    def _reset_progress(self) -> None:
        self._finished: list[float] = []
        self._ended: list[int] = []
        self._parts: Tensor | None = None
        self._rollouts = 0

    def _note(self, parts: Tensor) -> Tensor:
        """Takes a rollout into what `progress` reports. Returns its loss."""
        self._parts = parts if self._parts is None else self._parts + parts
        self._rollouts += 1
        return parts[0]

    def _play(self) -> None:
        """Plays T steps."""
        acting, emulator = self.stopwatch("acting"), self.stopwatch("emulator")
        with acting:
            self._rollout.start()
        for t in range(self._agent.unroll):
            with acting:
                actions = self._rollout.act(t)
            with emulator:
                step = self._env.step(actions)
            with acting:
                self._rollout.see(step.observations)
                self._take(t, step)
            if self._see is not None:
                self._see(step.observations[0, self._newest])

    def _take(self, t: int, step: atari_vector.Step) -> None:
        """Training rewards and discounts of one step, and the episodes that it ended."""
        rewards = clip_rewards(step.rewards, self._agent.reward_clip)
        done = step.terminated | step.truncated
        ended = done | (step.lives < self._lives) if self._life_loss else done
        if len(step.final):
            # Cut off, not over: what would have followed is worth the value of the last observation.
            rewards[step.truncated] += self._agent.discount * self._rollout.value(step.final)
        self._rollout.rewards[t] = rewards
        self._rollout.discounts[t] = np.where(ended, 0.0, self._agent.discount)
        self._lives = step.lives
        self._episode_returns += step.rewards
        self._steps += len(done)
        if done.any():
            self._finished.extend(self._episode_returns[done].tolist())
            self._ended.extend([self._steps] * int(done.sum()))
            self._episode_returns[done] = 0.0


def _model(channels: int, actions: Sequence[int], scope: str, seed: int) -> ActorCritic:
    """A fresh network for a game with these actions of the controller."""
    encoder = Encoder(channels)
    if scope == "model":
        model = ActorCritic(encoder, ALL_ACTIONS, legal=actions)
    else:
        model = ActorCritic(encoder, len(actions))
    initialize(model, torch.Generator().manual_seed(seed))
    return model
