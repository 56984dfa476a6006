"""The family of Atari games, learned by A2C."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from leap_dist.config.settings import ALL_GAMES, AtariSettings, Config
from leap_dist.envs import atari_vector, emulator
from leap_dist.nn import actor_critic
from leap_dist.nn.actor_critic import ALL_ACTIONS, FRAME_SIZE, SCALE, ActorCritic, Encoder
from leap_dist.nn.flat_vector import Manifest
from leap_dist.nn.profiling import Stopwatch
from leap_dist.protocol import schema
from leap_dist.protocol.messages import Lease
from leap_dist.protocol.seeds import derived_seed
from leap_dist.tasks.atari.a2c import A2C
from leap_dist.tasks.atari.environments import Environments, make_atari
from leap_dist.tasks.atari.joint import JointA2C
from leap_dist.tasks.starting_point import StartingPoint


class Atari:
    """The family of Atari games, learned by A2C. Implements `leap_dist.tasks.task.TaskFamily`."""

    sections: tuple[str, ...] = ("agent", "atari")

    def check(self, config: Config) -> None:
        """Check nothing: the games are a part of the package ale-py."""

    def initialization(self, config: Config, seed: int, scope: str) -> tuple[Manifest, np.ndarray]:
        """Return a fresh φ₀ of the actor-critic network for the configured kind of frames."""
        return actor_critic.initialization(atari_vector.channels(config.atari.frames), seed, scope)

    def identity(self, config: Config, game: str) -> dict[str, Any]:
        """Return the settings of the agent and of the environments."""
        return {
            f"{section}.{name}": value
            for section in self.sections
            for name, value in dataclasses.asdict(getattr(config, section)).items()
        }

    def preprocessing(self, config: Config) -> dict[str, Any]:
        """Return the kind, size and scale of the frames."""
        return {
            "frames": config.atari.frames,
            "size": FRAME_SIZE,
            "frame_skip": config.atari.frame_skip,
            "scale": SCALE,
        }

    def check_preprocessing(self, given: Any) -> None:
        """Raise ValueError if `given` does not describe observations that this version supports."""
        schema.check(given, {"frames": str, "size": int, "frame_skip": int, "scale": str}, "preprocessing")
        if given["frames"] not in atari_vector.STACKS:
            raise ValueError(
                f"frames is {given['frames'][:40]!r}, which is not one of {', '.join(atari_vector.STACKS)}"
            )
        if (given["size"], given["scale"]) != (FRAME_SIZE, SCALE) or given["frame_skip"] < 1:
            raise ValueError("this version does not support its preprocessing")

    def network(self, given: dict[str, Any]) -> ActorCritic:
        """Return an actor-critic network with heads for all 18 actions."""
        return ActorCritic(Encoder(atari_vector.channels(given["frames"])), ALL_ACTIONS)

    def learner(
        self, config: Config, lease: Lease, start: StartingPoint, stopwatch: Stopwatch, beat: Callable[[], None]
    ) -> A2C | JointA2C:
        """Make an A2C agent for the lease's game, or one for all games, and call `beat` before each environment.

        Raises ConfigError if there is no such game.
        """
        if lease.task.game != ALL_GAMES:
            return self._agent(config, lease.task.game, lease.task.seed, start, stopwatch, beat)
        agents: dict[str, A2C] = {}
        try:
            for number, game in enumerate(config.games):
                seed = derived_seed(lease.task.seed, number)
                agents[game] = self._agent(config, game, seed, start.of_part(game), stopwatch, beat)
            return JointA2C(agents, config.agent, start.head_change)
        except BaseException:
            for agent in agents.values():
                agent.close()
            raise

    def _agent(
        self,
        config: Config,
        game: str,
        seed: int,
        start: StartingPoint,
        stopwatch: Stopwatch,
        beat: Callable[[], None],
    ) -> A2C:
        """Make an A2C agent for one game."""
        return A2C(
            game,
            start.vector,
            seed=seed,
            agent=config.agent,
            settings=self._observations(config),
            worker=config.worker,
            scope=start.scope,
            head_seed=start.head_seed,
            head_change=start.head_change,
            stopwatch=stopwatch,
            environments=self._environments(config, game, beat),
        )

    def _observations(self, config: Config) -> AtariSettings:
        """Return the settings that determine the agent's observations."""
        return config.atari

    def _environments(self, config: Config, game: str, beat: Callable[[], None]) -> Environments:
        """Make the environments of an agent, and call `beat` before each of them."""
        emulator.keep(config.agent.envs * (len(config.games) if config.is_joint else 1))
        return make_atari(game, config.agent.envs, config.atari, beat)
