"""The plan of a study of Atari games, as far as it differs from that of images: training sets, tests and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from leap_dist.config.loading import ConfigError, check_game_steps
from leap_dist.config.settings import Config
from leap_dist.config.validation import did_you_mean
from leap_dist.envs.games import SETS, available

FIGURE_4 = {
    "space_invaders": 30_000_000,
    "krull": 30_000_000,
    "kung_fu_master": 30_000_000,
    "road_runner": 20_000_000,
    "breakout": 20_000_000,
    "pong": 8_000_000,
}
"""The games of the paper's figure 4 and the ends of its axes, in agent steps. Only Pong is trained on."""
GROUPS: tuple[str, ...] = ("seed24",)
"""The training games of the paper's first version."""
PRESET = "figure4"
"""Name of the preset with which a study of games has the settings of `paper` and the lengths of FIGURE_4."""
PRESETS = (PRESET, "paper", "paper-5m")
"""Presets with which games are tested for as long as in figure 4; with others, for as long as a training task."""
MACHINE_STEPS_PER_SECOND = 27_900
"""Agent steps per second of one machine with 16 virtual cores and an H100, measured (docs/performance.md)."""
DAY = 86_400.0
"""Duration in seconds above which a study has to be confirmed."""


class Tests(NamedTuple):
    """The games, lengths and number of agents with which the initializations of a study are tested."""

    games: tuple[str, ...]
    game_steps: dict[str, int]
    """Agent steps of individual games; those of all others are the study's `test_steps`."""
    seeds: int
    """Number of agents for each initialization and game."""


def check_groups(groups: Sequence[str]) -> None:
    """Raise ConfigError for a group that is neither a set of games nor a game."""
    for group in groups:
        if group not in SETS and group not in available():
            raise ConfigError(
                f"groups: {group[:40]!r} is neither one of the sets {', '.join(SETS)} nor a game"
                f"{did_you_mean(group[:40], (*SETS, *available()))}"
            )


class Asked(NamedTuple):
    """The user's settings for the tests of a study. Settings that were not given are empty or None."""

    games: tuple[str, ...]
    """Games to test on."""
    game_steps: Mapping[str, int]
    """Lengths of individual games."""
    test_steps: int | None
    """Length of all others."""
    seeds: int | None
    """Number of agents for each initialization and game."""


def tests(preset: str, config: Config, asked: Asked, before: Mapping[str, Any]) -> Tests:
    """Return how a study is tested: as asked, or else as before, or else as in figure 4 with one agent each.

    Args:
        preset: the study's preset.
        config: settings of the study.
        asked: what the user has asked for.
        before: `Study.test` of the study that is continued; empty for a new one.
    """
    named = asked.games or tuple(before.get("games", FIGURE_4))
    usual = before.get("game_steps", FIGURE_4 if preset in PRESETS and asked.test_steps is None else {})
    steps = {game: asked.game_steps.get(game, usual.get(game)) for game in named}
    found = {game: length for game, length in steps.items() if length is not None}
    check_game_steps({**found, **asked.game_steps}, named, config.steps_per_update)
    return Tests(named, found, asked.seeds or before.get("seeds", 1))


class Cost(NamedTuple):
    """The work of a whole study, including what is already done."""

    trainings: int
    """Number of initializations to train."""
    training: int
    """Agent steps of all trainings."""
    agents: int
    """Number of agents to test them with."""
    testing: int
    """Agent steps of all agents."""

    @property
    def steps(self) -> int:
        """Agent steps in all."""
        return self.training + self.testing
