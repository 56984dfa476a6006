"""Advantage actor-critic (A2C; Mnih et al. 2016) on many copies of one Atari game, or of another environment.

This is the host's side: environments, rewards and episodes. `Rollout` is the device's side: actions, loss, gradient.
T is the length of an unroll and N the number of environments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from leap_dist.config.settings import AgentSettings, AtariSettings, WorkerSettings
from leap_dist.envs import atari_vector
from leap_dist.leap.learner import EndlessLearner, LearnerState, Progress
from leap_dist.leap.optimizers import RMSProp
from leap_dist.nn.actor_critic import network_for_game
from leap_dist.nn.device import graph_for, resolve_device, resolve_precision
from leap_dist.nn.features import StartReport
from leap_dist.nn.flat_vector import add_vector, load_vector
from leap_dist.nn.profiling import Stopwatch
from leap_dist.protocol.messages import AT_START
from leap_dist.tasks.atari import agent_state
from leap_dist.tasks.atari.environments import Environments, make_atari
from leap_dist.tasks.atari.rollout import EpisodeTracker, Rollout, clip_rewards


class A2C(EndlessLearner):
    """An agent that learns one game from a given encoder. Implements `leap_dist.leap.learner.Learner`.

    The loss reuses the forward passes that chose the actions, since the parameters do not change within an unroll.

    Args:
        game: ROM name of the game.
        vector: flat float32 vector φ that the shared parameters start from.
        seed: determines heads, actions and environments. On a CPU the same seed gives the same run, bit for bit.
        scope: the shared parameters: "convolutions", "encoder", or "model" with one 18-way head for all games.
        head_seed: seed of the task's own parameters if they persist from task to task; None to use `seed`.
        head_change: flat float32 vector that earlier tasks added to the task's own parameters.
        stopwatch: measures how long each part of the work takes.
        environments: N environments to play instead of the Atari game.
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
        environments: Environments | None = None,
    ) -> None:
        self.stopwatch = stopwatch or Stopwatch()
        self._agent = agent
        self._life_loss = settings.life_loss
        colors, _ = atari_vector.STACKS[settings.frames]
        self._newest_frame = slice(colors.start - colors.stop, None)  # an observation's last channels
        self._on_frame: Callable[[np.ndarray], None] | None = None
        self._env: Environments = environments or make_atari(game, agent.envs, settings)
        heads, actions, resets = (int(s) for s in np.random.SeedSequence(seed).generate_state(3))
        self._model = network_for_game(
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
        self.descent: float | None = None  # a step of RMSProp, with clipping, is not a plain gradient step
        self.steps_per_update = agent.envs * agent.unroll
        self._rollout = Rollout(
            self._model,
            agent,
            actions=len(self._env.actions),
            dtype=resolve_precision(worker.precision, device.type),
            generator=torch.Generator(device).manual_seed(actions),
            graph=graph_for(device),
        )
        self._rollout.set_frames(self._env.reset(resets))
        self._lives = self._env.lives
        self._episodes = EpisodeTracker(agent.envs)
        self._parts: Tensor | None = None
        self._rollouts = 0
        self._start = StartReport(AT_START)

    def backward(self) -> Tensor:
        """Play one unroll, set the gradient of its loss (a mean over T × N steps), and return the loss, shape ()."""
        self._play()
        with self.stopwatch("update"):
            parts, gradients = self._rollout.gradients()
            for parameter, gradient in zip(self._model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            self._start.observe(self._model.encoder, self._rollout.features, parts[3], gradients)
            return self._add_losses(parts)

    def share(self, shared: Mapping[str, Tensor]) -> None:
        """Use another agent's shared parameters from now on. The caller then makes the steps, instead of `step`.

        To be called before the first `backward`.
        """
        for name, parameter in self.shared.items():
            parameter.data = shared[name].data
        del self._optimizer

    def step(self) -> None:
        """Clip the gradient to its global norm and apply RMSProp. Gradients are dropped, not overwritten."""
        with self.stopwatch("update"):
            self._optimizer.step()

    def evaluate(self) -> Tensor:
        """Play one more unroll and return its loss, shape (), without a gradient."""
        self._play()
        return self._add_losses(self._rollout.loss())

    def progress(self) -> Progress:
        """Return raw returns of the episodes that ended since the last call, and mean losses and entropy.

        They also include what `leap_dist.nn.features.StartReport` has to report.
        """
        means: dict[str, float] = {}
        if self._parts is not None:
            names = ("loss", "policy_loss", "value_loss", "entropy")
            means = dict(zip(names, (self._parts / self._rollouts).tolist(), strict=True)) | self._start.take()
        self._parts, self._rollouts = None, 0
        returns, ends = self._episodes.take()
        return Progress(returns, means, ends)

    def state(self) -> LearnerState | None:
        """See `Learner.state`. None if the state of the environments cannot be read."""
        own = {
            "episodes": self._episodes.state(),
            "parts": None if self._parts is None else self._parts.tolist(),
            "rollouts": self._rollouts,
            **self._start.state(),
        }
        return agent_state.read(self._model, self._optimizer, self._rollout.generator, self._env, own)

    def load_state(self, state: LearnerState) -> None:
        """See `Learner.load_state`."""
        self._rollout.set_frames(
            agent_state.load(state, self._model, self._optimizer, self._rollout.generator, self._env)
        )
        self._lives = self._env.lives
        own = state.values["own"]
        self._episodes.load_state(own["episodes"])
        device = next(self._model.parameters()).device
        self._parts = None if own["parts"] is None else torch.tensor(own["parts"], device=device)
        self._rollouts = int(own["rollouts"])
        self._start.load_state(own)

    def show(self, see: Callable[[np.ndarray], None]) -> None:
        """Call `see` with the first environment's newest frame after every step, (1 or 3, 84, 84)."""
        self._on_frame = see

    def close(self) -> None:
        """Give up the device's graphs, and return the emulators to their pool."""
        self._rollout.close()
        self._env.close()

    def _add_losses(self, parts: Tensor) -> Tensor:
        """Add the losses of a rollout, (4,), to the means that `progress` reports, and return the total loss."""
        self._parts = parts if self._parts is None else self._parts + parts
        self._rollouts += 1
        return parts[0]

    def _play(self) -> None:
        """Play an unroll of T steps."""
        acting, emulator = self.stopwatch("acting"), self.stopwatch("emulator")
        with acting:
            self._rollout.start()
        for t in range(self._agent.unroll):
            with acting:
                actions = self._rollout.act(t)
            with emulator:
                step = self._env.step(actions)
            with acting:
                self._rollout.set_frames(step.observations)
                self._record(t, step)
            if self._on_frame is not None:
                self._on_frame(step.observations[0, self._newest_frame])

    def _record(self, t: int, step: atari_vector.Step) -> None:
        """Store the training rewards and discounts of step t, and the returns of the episodes that it ended."""
        rewards = clip_rewards(step.rewards, self._agent.reward_clip)
        done = step.terminated | step.truncated
        ended = done | (step.lives < self._lives) if self._life_loss else done
        if len(step.final):
            # The episode was cut off, not over: the value of its last observation stands for what would have followed.
            rewards[step.truncated] += self._agent.discount * self._rollout.value(step.final)
        self._rollout.rewards[t] = rewards
        self._rollout.discounts[t] = np.where(ended, 0.0, self._agent.discount)
        self._lives = step.lives
        self._episodes.add(step.rewards, done)
