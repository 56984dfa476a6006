"""What an evaluation says first: its conclusion in words, or that there are too few seeds for one."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest

from leap_dist.evaluation import results as comparison
from leap_dist.evaluation.report.conclusion import conclusion
from leap_dist.evaluation.report.document import markdown
from leap_dist.evaluation.report.text import blocks
from leap_dist.evaluation.runs import RunResult
from leap_dist.evaluation.scoring import ERRORS, RETURNS

FEW = 200
"""Bootstrap samples."""


def play(arm: str, game: str, seed: int, level: float, noise: float = 0.5, budget: int = 200_000) -> RunResult:
    """Episodes with returns around `level`; the noise differs between arms and seeds."""
    random = np.random.default_rng([seed, *arm.encode(), *game.encode()])
    ended = np.linspace(1000, budget, 100).astype(np.int64)
    return RunResult(arm, game, seed, budget, 2.0, ended, np.full(100, level + random.normal(0, noise)), ())


def classify(arm: str, seed: int, error: float) -> RunResult:
    ended, curve = np.arange(20, 2001, 20), ({"steps": 2000, "test_error": error + seed / 1000, "train_error": 0.0},)
    return RunResult(arm, "greek", seed, 2000, 2.0, ended, np.full(100, 0.5), curve)


def of_levels(
    levels: dict[str, float], seeds: int, games: tuple[str, ...] = ("breakout", "pong"), **more: float
) -> str:
    runs = [
        play(arm, game, seed, level, **more) for arm, level in levels.items() for game in games for seed in range(seeds)
    ]
    return conclusion(comparison.compute(RETURNS.score_all(runs)[0], RETURNS, repetitions=FEW))


INTERVAL = r"-?\d\.\d\d \[-?\d\.\d\d, -?\d\.\d\d\]"


def test_arms_whose_difference_may_be_zero_are_not_told_apart():
    text = of_levels({"leap": 10.0, "scratch": 10.0}, 5, noise=3.0)
    assert re.fullmatch(
        "Over 200,000 agent steps, the probability that a run has a larger area under the curve than one of scratch on "
        rf"the same game is {INTERVAL} for leap: not told apart\. The IQM of human-normalized areas is {INTERVAL} for "
        rf"leap and {INTERVAL} for scratch\.",
        text,
    ), text


HELD_OUT = Path(__file__).parents[2] / "reference" / "atari" / "long" / "held-out.csv"


def agents_from_scratch(arm: str, shift: int, factors: dict[str, float]) -> list[RunResult]:
    """The 25 agents of the held-out test that began from random encoders, with the seeds shifted, as another arm."""
    with HELD_OUT.open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["arm"] == "scratch"]
    assert len(found) == 25
    ended = np.linspace(5000, 500_000, 100).astype(np.int64)
    return [
        RunResult(
            arm, row["game"], (int(row["seed"]) + shift) % 5, 500_000, 2.0, ended,
            np.full(100, float(row["auc"]) * factors.get(row["game"], 1.0)), (),
        )
        for row in found
    ]  # fmt: skip


def test_three_of_five_games_decide_although_one_game_outweighs_them_in_the_iqm():
    doubled = dict.fromkeys(("breakout", "qbert", "space_invaders"), 2.0)
    runs = agents_from_scratch("leap", 1, doubled) + agents_from_scratch("scratch", 0, {})
    results = comparison.compute(RETURNS.score_all(runs)[0], RETURNS, repetitions=2000)
    against = results.against["leap"]
    assert against.improvement["auc"].point == pytest.approx((3 + 0.5 + 0.5) / 5)
    assert against.improvement["auc"].low > 0.5
    assert against.intervals["auc"].low < 0 < against.intervals["auc"].high
    text = conclusion(results)
    assert " 0.80 [0.70, 0.90] for leap: leap is better than scratch. The IQM of human-normalized areas is " in text
    assert text.endswith(
        " The paired difference in IQM, in which games with high scores weigh most, disagrees: by it, leap and scratch "
        "are not told apart."
    )


def test_the_area_decides_and_not_the_end():
    """Both arms end at the same level, but one of them reaches it at once."""
    late = np.concatenate([np.zeros(50), np.full(50, 10.0)])
    runs = [
        RunResult(
            arm, game, seed, 200_000, 2.0, np.linspace(1000, 200_000, 1000).astype(np.int64),
            np.repeat(np.full(100, 10.0) if arm == "leap" else late, 10), (),
        )
        for arm in ("leap", "scratch") for game in ("breakout", "pong") for seed in range(5)
    ]  # fmt: skip
    text = conclusion(comparison.compute(RETURNS.score_all(runs)[0], RETURNS, repetitions=FEW))
    assert " is 1.00 for leap: leap is better than scratch." in text, text


@pytest.mark.parametrize("first", [4, 5])
def test_arms_with_hardly_any_seed_in_common_are_not_compared(first):
    runs = [
        play(arm, game, seed + first * (arm == "scratch"), level)
        for arm, level in {"leap": 14.0, "reptile": 14.0, "scratch": 8.0}.items()
        for game in ("breakout", "pong")
        for seed in range(first + 5 if arm == "reptile" else 5)
    ]
    results = comparison.compute(RETURNS.score_all(runs)[0], RETURNS, repetitions=FEW)
    assert results.against["leap"].seeds_in_common == 5 - first
    assert results.against["reptile"].seeds_in_common == 5
    assert (
        ": leap and scratch are not compared, because fewer than 5 of their seeds are the same; reptile is better than "
        "scratch. The IQM"
    ) in conclusion(results)
    assert "disagrees" not in conclusion(results)


@pytest.mark.parametrize(
    ("levels", "verdict"),
    [
        ({"leap": 14.0, "scratch": 8.0}, ": leap is better than scratch."),
        ({"leap": 8.0, "scratch": 14.0}, ": leap is worse than scratch."),
        ({"leap": 14.0, "fomaml": 13.0, "scratch": 8.0}, ": leap and fomaml are better than scratch."),
        (
            {"leap": 14.0, "fomaml": 2.0, "scratch": 8.0},
            ": leap is better than scratch; fomaml is worse than scratch.",
        ),
        (
            {"leap": 14.0, "fomaml": 14.0, "reptile": 14.0, "scratch": 8.0},
            ": leap, fomaml and reptile are better than scratch.",
        ),
        (
            {"leap": 14.0, "fomaml": 8.0, "reptile": 8.0, "scratch": 8.0},
            ": leap is better than scratch; fomaml, reptile and scratch are not told apart.",
        ),
        ({"leap": 14.0}, " for leap. There is nothing to compare it with."),
    ],
)
def test_the_verdict_names_the_better_one(levels, verdict):
    text = of_levels(levels, 5)
    assert f"{verdict} The IQM of human-normalized areas is " in text or text.endswith(verdict), text
    assert "disagrees" not in text


@pytest.mark.parametrize(
    ("seeds", "start"), [(1, "One seed is too few"), (2, "2 seeds are too few"), (4, "4 seeds are")]
)
def test_under_five_seeds_the_first_words_say_so_and_there_is_no_verdict(seeds, start):
    text = of_levels({"leap": 14.0, "scratch": 8.0}, seeds)
    assert text.startswith(start)
    assert (
        "run at least 5 (--seeds 5). So far, over 200,000 agent steps, the probability that a run has a larger " in text
    )
    assert not re.search("better|worse|told apart", text)


def test_one_game_with_few_seeds_is_enough_for_the_warning():
    games = [("pong", seed) for seed in range(5)] + [("breakout", 0)]
    runs = [play(arm, game, seed, 10.0) for arm in ("leap", "scratch") for game, seed in games]
    assert conclusion(comparison.compute(RETURNS.score_all(runs)[0], RETURNS, repetitions=FEW)).startswith(
        "One seed is"
    )


RANKED = (
    "No game with runs of every arm has a published human score, so returns are compared game by game. Over 200,000 "
    "agent steps, the probability that a run has a larger area under the curve than one of scratch on the same game is "
)


@pytest.mark.parametrize(
    ("levels", "verdict"),
    [
        ({"leap": 14.0, "scratch": 8.0}, "1.00 for leap: leap is better than scratch."),
        ({"leap": 8.0, "scratch": 14.0}, "0.00 for leap: leap is worse than scratch."),
        (
            {"leap": 14.0, "fomaml": 2.0, "scratch": 8.0},
            "1.00 for leap and 0.00 for fomaml: leap is better than scratch; fomaml is worse than scratch.",
        ),
    ],
)
def test_where_no_game_has_a_human_score_wins_are_counted(levels, verdict):
    assert of_levels(levels, 5, games=("air_raid", "carnival")) == f"{RANKED}{verdict}"


def test_wins_that_may_be_luck_are_no_verdict():
    text = of_levels({"leap": 10.0, "scratch": 10.0}, 5, games=("air_raid",), noise=3.0)
    assert re.search(r" is 0\.\d\d \[0\.\d\d, \d\.\d\d\] for leap: not told apart\.$", text), text


def test_wins_of_few_seeds_come_after_the_warning():
    text = of_levels({"leap": 14.0, "scratch": 8.0}, 2, games=("air_raid",))
    assert text.startswith(
        "2 seeds are too few to conclude anything; run at least 5 (--seeds 5). So far, no game with "
    )
    assert text.endswith(" is 1.00 for leap.")
    assert not re.search("better|worse|told apart", text)


def test_one_arm_without_human_scores_has_nothing_to_beat():
    assert of_levels({"leap": 14.0}, 5, games=("air_raid",)) == "There is nothing to compare the returns with."


def test_where_no_game_has_runs_of_all_arms_nothing_is_concluded():
    runs = [play("leap", "pong", seed, 1.0) for seed in range(5)]
    runs += [play("scratch", "breakout", seed, 1.0) for seed in range(5)]
    found = comparison.compute(RETURNS.score_all(runs)[0], RETURNS, repetitions=FEW)
    assert conclusion(found).startswith("Nothing can be concluded")


@pytest.mark.parametrize(
    ("errors", "verdict"), [((0.1, 0.3), "leap is better than scratch."), ((0.3, 0.1), "leap is worse than scratch.")]
)
def test_of_errors_less_is_better(errors, verdict):
    runs = [
        classify(arm, seed, error) for arm, error in zip(("leap", "scratch"), errors, strict=True) for seed in range(5)
    ]
    text = conclusion(comparison.compute(ERRORS.score_all(runs)[0], ERRORS, repetitions=FEW))
    assert text.startswith("After 2,000 examples the mean test error of leap is ")
    assert text.endswith(verdict)
    assert " %" in text


@pytest.mark.parametrize(
    ("budget", "shown"), [(1_000_000, "1,000,000"), (50_000, "50,000"), (2_000, "2,000"), (1234, "1,234")]
)
def test_budgets_have_all_their_digits(budget, shown):
    assert f"ver {shown} agent steps" in of_levels({"leap": 1.0, "scratch": 1.0}, 5, budget=budget)


def test_the_report_begins_with_it():
    runs = [play(arm, "pong", seed, 10.0) for arm in ("leap", "scratch") for seed in range(2)]
    results = comparison.compute(RETURNS.score_all(runs)[0], RETURNS, repetitions=FEW)
    pictures = dict.fromkeys(("curves.png", "profiles.png", "aggregates.png", "improvement.png"), b"")
    _, first, *_ = markdown(blocks(results, [], [], pictures, [], FEW)).split("\n\n")
    assert first.startswith("2 seeds are too few to conclude anything")


def test_arms_near_random_play_have_three_digits_and_a_warning():
    """Random play of breakout has a return of 1.7, humans have 30.5."""
    text = of_levels({"leap": 1.8, "scratch": 1.7}, 5, ("breakout",), noise=0.01)
    assert re.search(r"areas is 0\.00\d \[[^]]*\] for leap", text), text
    assert text.endswith(
        "for scratch. None of them plays better than random play (0), so this says little about longer training."
    ), text
    alone = of_levels({"leap": 1.8}, 5, ("breakout",), noise=0.01)
    assert alone.endswith(" It plays no better than random play (0), so this says little about longer training."), alone
    far = of_levels({"leap": 14.0, "scratch": 8.0}, 5, ("breakout",))
    assert "random" not in far
    assert re.search(r"areas is 0\.\d\d \[", far), far
