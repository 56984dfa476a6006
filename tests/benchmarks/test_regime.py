"""Choosing games and task length from scratch curves."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import regime
from leap_dist.envs.games import SETS
from leap_dist.evaluation.runs import RunResult, save

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


@pytest.mark.parametrize(
    ("training", "held_out", "task_steps"), [(10, 2, 100_000), (9, 2, 500_000), (10, 1, 500_000), (9, 3, 500_000)]
)
def test_ten_training_games_and_two_held_out_ones_must_move(training: int, held_out: int, task_steps: int) -> None:
    games = (*SETS["seed24"][:training], *regime.SEED_HELD_OUT[:held_out])
    assert regime.choose(runs(**dict.fromkeys(games, FAST))).task_steps == task_steps


def of_two_parts(first: Sequence[float], last: Sequence[float], game: str = "pong") -> RunResult:
    """Return a run whose episodes end before 50,000 and after 400,000 steps."""
    ended = np.array([*np.linspace(1_000, 50_000, len(first)), *np.linspace(400_000, 500_000, len(last))], int)
    return RunResult("scratch", game, 0, 500_000, 1.0, ended, np.array([*first, *last], float), ())


def test_the_effect_by_hand() -> None:
    """Variances 1 and 3: the difference of the means, 2, is divided by the root of their mean."""
    first, last = np.array([-1.0, 1.0] * 5), np.array([-1.0, 1.0] * 20)
    first, last = first / first.std(ddof=1), 2 + math.sqrt(3) * last / last.std(ddof=1)
    assert regime.effect(of_two_parts(first, last), 500_000) == pytest.approx(2 / math.sqrt(2))


@pytest.mark.parametrize(("first", "last", "known"), [(10, 10, True), (9, 10, False), (10, 9, False)])
def test_either_part_needs_ten_episodes(first: int, last: int, known: bool) -> None:
    found = regime.effect(of_two_parts(np.arange(first), 5 + np.arange(last)), 500_000)
    assert math.isfinite(found) is known


def test_episodes_count_up_to_the_boundaries() -> None:
    """The first part includes an end at 50,000 steps; the last begins after three quarters and includes the end."""
    ended = np.array([*range(41_000, 50_001, 1_000), 75_000, *range(91_000, 100_001, 1_000), 100_001])
    returns = np.array([*np.arange(10.0), 1e6, *np.arange(10.0) + 9, -1e6])
    run = RunResult("scratch", "pong", 0, 500_000, 1.0, ended, returns, ())
    assert regime.effect(run, 100_000) == pytest.approx(9 / np.arange(10.0).std(ddof=1))


def test_only_whole_runs_from_a_random_initialization_on_the_papers_games_count() -> None:
    pong = run("pong", FAST)
    others = [replace(pong, arm="leap"), replace(pong, game="venture"), replace(pong, budget=400_000)]
    assert regime.usable([*others, pong]) == [pong]


def test_the_rule_waits_for_every_run_that_may_change_the_choice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = [one for one in runs(pong=FAST, amidar=FAST) if (one.game, one.seed) not in {("pong", 1), ("bowling", 1)}]
    assert regime.undecided(found) == ["pong"], "bowling has not moved with its only seed"
    assert regime.undecided([one for one in found if one.game != "skiing"]) == ["pong", "skiing"]
    assert regime.undecided(runs(pong=FAST)) == []
    for one in found:
        save(tmp_path, one, {})
    monkeypatch.setattr(sys, "argv", ["regime", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        regime.main()
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert "2 runs are needed of pong" in said.err
    assert "task length" not in said.out


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
