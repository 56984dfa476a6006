"""The family of environments that the user has registered with Gymnasium, learned by A2C."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from leap_dist.config.loading import ConfigError
from leap_dist.config.registry import normalize
from leap_dist.config.settings import AtariSettings, Config
from leap_dist.config.validation import did_you_mean
from leap_dist.envs import atari_vector
from leap_dist.nn import actor_critic
from leap_dist.nn.actor_critic import FRAME_SIZE, SCALE
from leap_dist.nn.flat_vector import Manifest
from leap_dist.tasks.atari.family import Atari
from leap_dist.tasks.gymnasium.vector import GymnasiumVector


class Gymnasium(Atari):
    """Environments with images and discrete actions. Implements `leap_dist.tasks.task.TaskFamily`.

    Network and learner are those of Atari games; only the environments differ.
    """

    sections: tuple[str, ...] = ("agent", "gymnasium")

    def check(self, config: Config) -> None:
        """Make each environment once. Raises ConfigError, in one line, for one that cannot be used."""
        for game in config.games:
            try:
                _environments(config, game, 1).close()
            except ConfigError:
                raise
            except Exception as error:  # the environment is not our code
                raise ConfigError(f"games: {game} cannot be used: {type(error).__name__}: {error}") from None

    def initialization(self, config: Config, seed: int, scope: str) -> tuple[Manifest, np.ndarray]:
        """Return a fresh random φ₀ of the actor-critic network for the configured kind of frames."""
        return actor_critic.initialization(atari_vector.channels(config.gymnasium.frames), seed, scope)

    def identity(self, config: Config, game: str) -> dict[str, Any]:
        """Return the settings of the agent and of the environments, but not where their code is."""
        found = {f"agent.{name}": value for name, value in dataclasses.asdict(config.agent).items()}
        own = dataclasses.asdict(config.gymnasium)
        del own["modules"]
        return found | {f"gymnasium.{name}": value for name, value in own.items()}

    def preprocessing(self, config: Config) -> dict[str, Any]:
        """Return the kind, size and scale of the frames."""
        return {"frames": config.gymnasium.frames, "size": FRAME_SIZE, "frame_skip": 1, "scale": SCALE}

    def _observations(self, config: Config) -> AtariSettings:
        return AtariSettings(frames=config.gymnasium.frames, life_loss=False)

    def _environments(self, config: Config, game: str, beat: Callable[[], None]) -> GymnasiumVector:
        return _environments(config, game, config.agent.envs, beat)


def _environments(config: Config, name: str, count: int, beat: Callable[[], None] = lambda: None) -> GymnasiumVector:
    own = config.gymnasium
    return GymnasiumVector(registered_id(name, own.modules), count, own.frames, own.max_episode_steps, beat)


def registered_id(name: str, modules: tuple[str, ...]) -> str:
    """Return the ID that is spelled `name` in lower case with underscores, after importing the modules.

    Raises ConfigError if a module cannot be imported, or if there is no such ID, or more than one.
    """
    if modules and "" not in sys.path:
        sys.path.append("")  # the current directory, where `leap-dist` and `launch.py` do not look by themselves
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # the module is not our code
            raise ConfigError(
                f"gymnasium.modules: {module} cannot be imported ({type(error).__name__}: {error}); it must be "
                "installed, or lie in the current directory"
            ) from None
    known: dict[str, list[str]] = {}
    for env_id in gymnasium.registry:
        known.setdefault(normalize(env_id), []).append(env_id)
    if name not in known:
        hint = did_you_mean(name, known) or "; name the modules that register it with gymnasium.modules"
        raise ConfigError(f"games: no environment {name} is registered with Gymnasium{hint}")
    if len(known[name]) > 1:
        raise ConfigError(f"games: {name} may be {' or '.join(known[name])}; register yours under another ID")
    return known[name][0]
