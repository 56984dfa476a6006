"""One A2C agent that learns several games at once: a shared encoder, and a separate head for each game.

It is what multi-task learning does instead of meta-learning, and so the baseline to beat (`--meta-learner multitask`).
An update plays an unroll of every game. The gradient of each game is clipped to the limit of single agents, so that no
game drowns out the others by the size of its returns; the encoder descends along the mean of the gradients, and each
head along its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from leap_dist.config.settings import AgentSettings
from leap_dist.leap.learner import EndlessLearner, Progress
from leap_dist.leap.optimizers import RMSProp, clip_factor
from leap_dist.nn.flat_vector import load_vector
from leap_dist.protocol.messages import RETURN_OF
from leap_dist.tasks.atari.a2c import A2C


class JointA2C(EndlessLearner):
    """Learns several games with one encoder. Implements `leap_dist.leap.learner.Learner`.

    Args:
        agents: an agent that has not trained yet for each game, by name, all with the same shared parameters.
        agent: settings of A2C.
        state: values of `local`, flat float32, from which training continues; None to begin anew.
    """

    def __init__(self, agents: Mapping[str, A2C], agent: AgentSettings, state: np.ndarray | None) -> None:
        self._agents = dict(agents)
        self._limit = agent.max_grad_norm
        first, *others = self._agents.values()
        for other in others:
            other.share(first.shared)
        self.shared = first.shared
        heads = {f"{game}.{name}": tensor for game, one in self._agents.items() for name, tensor in one.local.items()}
        self._optimizer = RMSProp(
            [*self.shared.values(), *heads.values()],
            learning_rate=agent.learning_rate,
            decay=agent.decay,
            epsilon=agent.epsilon,
            epsilon_inside=agent.epsilon_form == "inside",
            fused=False,  # its state is passed on to the next task
        )
        squares = {f"mean_square.{i}": square for i, square in enumerate(self._optimizer.mean_square)}
        self.local: Mapping[str, Tensor] = {**heads, **squares}
        if state is not None:
            load_vector(self.local, state)
        self.descent: float | None = None
        self.steps_per_update = sum(one.steps_per_update for one in self._agents.values())

    def backward(self) -> Tensor:
        """Play one unroll of each game, and return the mean of their losses, shape ().

        Each game's gradient is clipped; that of the shared parameters is the mean over games.
        """
        losses, totals = [], [torch.zeros_like(parameter) for parameter in self.shared.values()]
        for one in self._agents.values():
            losses.append(one.backward())
            shared, local = [*one.shared.values()], [*one.local.values()]
            gradients = [parameter.grad for parameter in (*shared, *local) if parameter.grad is not None]
            torch._foreach_mul_(gradients, clip_factor(gradients, self._limit)[0])
            torch._foreach_add_(totals, gradients[: len(shared)], alpha=1.0 / len(self._agents))
            for parameter in shared:
                parameter.grad = None
        for parameter, total in zip(self.shared.values(), totals, strict=True):
            parameter.grad = total
        return torch.stack(losses).mean()

    def step(self) -> None:
        """Apply RMSProp to the encoder and all heads. Gradients are dropped, not overwritten."""
        self._optimizer.step()

    def evaluate(self) -> Tensor:
        """Play one more unroll of each game, and return the mean of their losses, shape (), without a gradient."""
        return torch.stack([one.evaluate() for one in self._agents.values()]).mean()

    def progress(self) -> Progress:
        """Return mean losses and entropy over all games, and under `return/GAME` the mean return of each game.

        There are no scores, because returns of different games cannot be averaged.
        """
        found = {game: one.progress() for game, one in self._agents.items()}
        names = dict.fromkeys(name for progress in found.values() for name in progress.means)
        means = {name: float(np.mean([progress.means[name] for progress in found.values()])) for name in names}
        returns = {game: float(np.mean(progress.scores)) for game, progress in found.items() if progress.scores}
        return Progress((), means | {RETURN_OF + game: value for game, value in returns.items()})

    def show(self, see: Callable[[np.ndarray], None]) -> None:
        """Do nothing: a picture belongs to one game, but a task covers all of them."""

    def close(self) -> None:
        """Return the emulators of all games to their pools."""
        for one in self._agents.values():
            one.close()
