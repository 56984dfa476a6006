"""Choosing games and task length from scratch curves."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import regime
from leap_dist.envs.games import SETS
from leap_dist.evaluation.runs import RunResult

GAMES = (*SETS["seed24"], *regime.SEED_HELD_OUT)
SLOW, FAST, STILL = 400_000, 60_000, math.inf


def run(game: str, learns_at: float, seed: int = 0, gain: float = 5.0) -> RunResult:
    """Return a run whose returns rise by `gain` standard deviations at a step, with an episode every 1,000 steps."""
    ended = np.arange(1_000, 500_001, 1_000)
    noise = np.random.default_rng([seed, *game.encode()]).normal(size=len(ended))
    return RunResult("scratch", game, seed, 500_000, 1.0, ended, noise + gain * (ended > learns_at), ())


def runs(**learns_at: float) -> list[RunResult]:
    return [run(game, learns_at.get(game, STILL), seed) for game in GAMES for seed in (0, 1)]


@pytest.mark.parametrize(
    ("learns_at", "task_steps"), [(FAST, 100_000), (140_000, 200_000), (210_000, 300_000), (SLOW, 500_000)]
)
def test_the_task_is_just_long_enough_for_the_games_to_move(learns_at: float, task_steps: int) -> None:
    games = (*SETS["seed24"][:12], "breakout", "qbert")
    assert regime.choose(runs(**dict.fromkeys(games, learns_at))).task_steps == task_steps


def test_a_game_must_move_with_every_seed() -> None:
    lucky = [run("pong", FAST, 0), run("pong", STILL, 1)]
    assert regime.effects(lucky, 500_000)["pong"] < regime.EFFECT


def test_a_game_with_too_few_episodes_does_not_move() -> None:
    few = RunResult("scratch", "skiing", 0, 500_000, 1.0, np.array([40_000, 480_000]), np.array([-9.0, 5.0]), ())
    assert math.isnan(regime.effects([few], 500_000)["skiing"])
    assert "skiing" not in regime.choose([few]).training


def test_the_games_that_move_most_are_chosen_and_none_is_both_held_out_and_trained_on() -> None:
    order = SETS["seed24"][:14]
    found = [run(game, FAST, seed, gain=2.0 ** (16 - rank)) for rank, game in enumerate(order) for seed in (0, 1)]
    choice = regime.choose(found)
    scored = [game for game in order if game not in ("air_raid", "carnival")]
    assert choice.held_out == ("breakout", "qbert", "space_invaders", scored[2], scored[5])
    assert choice.training == tuple(game for game in order if game not in choice.held_out)[: regime.GAMES]


def test_no_variance_at_all_is_an_infinite_effect_and_no_gain_is_none() -> None:
    ended = np.arange(1_000, 500_001, 1_000)
    risen = RunResult("scratch", "freeway", 0, 500_000, 1.0, ended, np.where(ended > FAST, 1.0, 0.0), ())
    assert regime.effect(risen, 500_000) == math.inf
    assert regime.effect(RunResult("scratch", "freeway", 0, 500_000, 1.0, ended, np.zeros(500), ()), 500_000) == 0.0


def test_the_table_and_the_picture_show_every_game(tmp_path: Path) -> None:
    found = runs(pong=FAST)
    lines = regime.table(found).splitlines()
    assert [line.split()[1] for line in lines[2:]] == sorted(GAMES)
    regime.draw(found, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
