"""Playing episodes with a trained agent, without learning, for people to watch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from leap_dist.config.settings import AtariSettings
from leap_dist.envs import atari_vector
from leap_dist.nn.actor_critic import network_for_game
from leap_dist.nn.flat_vector import load_vector
from leap_dist.tasks.atari.environments import make_atari

See = Callable[[np.ndarray], None]
"""Called with the screen, uint8 (210, 160, 3) or of the game's own height, after every agent step."""


class Played(NamedTuple):
    """An episode that was played to its end."""

    score: float
    """Raw return."""
    steps: int
    """Agent steps."""


class Player:
    """One environment of a game, played by a network that does not change.

    Actions are drawn from the policy, as in training. The same seed gives the same episodes.

    Args:
        game: ROM name of the game.
        vector: the agent's parameters, flat float32: those of `scope`, followed by the others.
        scope: name of the set of parameters at the start of `vector`; see `ActorCritic.parameters_of`.
        settings: how the agent sees the game. A lost life never ends an episode here.
        seed: determines actions and environment.

    Raises ValueError if the vector does not have the length that the game's network needs.
    """

    def __init__(self, game: str, vector: np.ndarray, scope: str, settings: AtariSettings, seed: int) -> None:
        self._env = make_atari(game, 1, settings)
        self._model = network_for_game(atari_vector.channels(settings.frames), self._env.actions, scope, seed=0)
        shared, local = self._model.parameters_of(scope)
        load_vector({**shared, **local}, vector)
        actions, environment = (int(number) for number in np.random.SeedSequence(seed).generate_state(2))
        self._generator = torch.Generator().manual_seed(actions)
        self._observations = self._env.reset(environment)

    def episode(self, see: See | None = None) -> Played:
        """Play one episode to its end, and pass every screen to `see`."""
        score, steps = 0.0, 0
        while True:
            step = self._env.step(self._act())
            self._observations = step.observations
            score += float(step.rewards[0])
            steps += 1
            if see is not None:
                see(self._env.screen())
            if step.terminated[0] or step.truncated[0]:
                return Played(score, steps)

    @torch.no_grad()
    def _act(self) -> np.ndarray:
        logits, _ = self._model(torch.from_numpy(self._observations).float() / 255)
        actions: np.ndarray = torch.multinomial(logits.softmax(-1), 1, generator=self._generator)[:, 0].numpy()
        return actions

    def close(self) -> None:
        """Return the emulator to its pool."""
        self._env.close()
