"""Statistics of few runs: by hand, by law, and against rliable."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from leap_dist.evaluation import statistics

REFERENCE = json.loads((Path(__file__).parents[1] / "support" / "rliable_reference.json").read_text())
AGGREGATES = {
    "iqm": statistics.iqm,
    "mean": statistics.mean,
    "median": statistics.median,
    "optimality_gap": statistics.optimality_gap,
}
FEW = 200
"""Repetitions where an interval is needed but its ends are not looked at closely."""


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def games(*rows: list[float]) -> list[np.ndarray]:
    return [np.array(row, float) for row in rows]


def of_games(fewest: int = 1, most: int = 6) -> st.SearchStrategy[list[np.ndarray]]:
    """Scores of one to five games with different numbers of runs; sixteenths, so that sums are exact."""
    number = st.integers(-(2**10), 2**10).map(lambda x: x / 16)
    game = st.integers(fewest, most).flatmap(lambda runs: arrays(float, runs, elements=number))
    return st.lists(game, min_size=1, max_size=5)


def point(statistic: statistics.Statistic, scores: statistics.Scores) -> float:
    return float(statistics.estimate(statistic, scores))


# One run ----------------------------------------------------------------------------------------------------------


def test_a_moving_average_is_of_the_last_episodes_that_have_ended():
    ended, returns = np.array([10, 20, 20, 35]), np.array([1.0, 2.0, 6.0, -3.0])
    at = np.array([5, 10, 19, 20, 34, 35, 40])
    found = statistics.moving_average(ended, returns, at, window=2)
    np.testing.assert_array_equal(found, [math.nan, 1, 1, 4, 4, 1.5, 1.5])
    np.testing.assert_array_equal(statistics.moving_average(ended, returns, at)[-3:], [3, 1.5, 1.5])


def test_without_episodes_nothing_is_known():
    nothing = statistics.moving_average(np.array([], int), np.array([]), statistics.grid(100, 4))
    assert np.isnan(nothing).all()
    assert math.isnan(statistics.area(nothing))
    assert statistics.steps_to(nothing, statistics.grid(100, 4), 0.0) == math.inf


@given(st.data())
def test_a_moving_average_is_what_a_naive_one_is(data: st.DataObject):
    ended = np.array(sorted(data.draw(st.lists(st.integers(1, 1000), max_size=40))), int)
    returns = data.draw(arrays(float, len(ended), elements=st.integers(-1000, 1000)))
    at, window = statistics.grid(1000, 7), data.draw(st.integers(1, 12))
    naive = []
    for step in at:
        last = returns[ended <= step][-window:]
        naive.append(sum(last) / len(last) if len(last) else math.nan)
    np.testing.assert_allclose(statistics.moving_average(ended, returns, at, window), naive, rtol=1e-12, atol=1e-12)


def test_the_grid_is_even_and_ends_with_the_budget():
    np.testing.assert_array_equal(statistics.grid(1000, 4), [250, 500, 750, 1000])
    assert len(statistics.grid(1_000_000)) == 100


def test_an_area_is_the_mean_height_from_the_first_known_value_on_backwards():
    assert statistics.area(np.array([1.0, 2.0, 6.0])) == 3
    assert statistics.area(np.array([math.nan, math.nan, 2.0, 6.0])) == 3


def test_steps_to_a_target():
    curve, at = np.array([math.nan, 1.0, 3.0, 2.0, 4.0]), np.array([10, 20, 30, 40, 50])
    assert [statistics.steps_to(curve, at, target) for target in (0.5, 1, 2, 4, 4.1)] == [20, 20, 30, 50, math.inf]


# Aggregates -------------------------------------------------------------------------------------------------------


def test_aggregates_by_hand():
    scores = games([0, 1, 2, 9], [0.5, 0.5, 0.5, 0.5], [-1, 0, 3, 4])
    assert point(statistics.mean, scores) == pytest.approx((3 + 0.5 + 1.5) / 3)
    assert point(statistics.median, scores) == 1.5
    # Sorted: -1 0 0 | .5 .5 .5 .5 1 2 | 3 4 9
    assert point(statistics.iqm, scores) == pytest.approx(5 / 6)
    assert point(statistics.optimality_gap, scores) == pytest.approx(1 - (3 + 2 + 1) / 12)


def test_games_weigh_the_same_whatever_their_numbers_of_runs():
    uneven = games([4, 2], [1, 5, 3])
    even = games([4, 4, 4, 2, 2, 2], [1, 1, 5, 5, 3, 3])
    for statistic in AGGREGATES.values():
        assert point(statistic, uneven) == pytest.approx(point(statistic, even))
    assert point(statistics.mean, uneven) == 3


def test_curves_are_points_side_by_side():
    curves = [rng(1).normal(size=(3, 6)), rng(2).normal(size=(4, 6))]
    for statistic in AGGREGATES.values():
        found = statistics.estimate(statistic, curves)
        assert found.shape == (6,)
        for i in range(6):
            assert found[i] == pytest.approx(point(statistic, [curve[:, i] for curve in curves]))


def test_an_unknown_score_makes_its_point_unknown_and_no_other():
    curves = [rng(1).normal(size=(5, 3)), rng(2).normal(size=(5, 3))]
    curves[1][2, 0] = math.nan
    for statistic in (statistics.mean, statistics.iqm):
        found = statistics.band(statistic, curves, rng(), FEW)
        for values in found:
            np.testing.assert_array_equal(np.isnan(values), [True, False, False])


@given(of_games(), st.randoms(use_true_random=False))
def test_order_of_runs_and_of_games_does_not_matter(scores: list[np.ndarray], random: Any):
    shuffled = [np.array(random.sample(list(score), len(score))) for score in scores]
    random.shuffle(shuffled)
    for statistic in AGGREGATES.values():
        assert point(statistic, shuffled) == pytest.approx(point(statistic, scores), abs=1e-9)


@given(of_games(), st.integers(-50, 50), st.integers(1, 9))
def test_means_medians_and_iqm_follow_shifts_and_scales(scores: list[np.ndarray], shift: int, scale: int):
    moved = [scale * score + shift for score in scores]
    for statistic in (statistics.mean, statistics.median, statistics.iqm):
        assert point(statistic, moved) == pytest.approx(scale * point(statistic, scores) + shift, abs=1e-9)


@given(of_games())
def test_aggregates_lie_within_the_scores(scores: list[np.ndarray]):
    pooled = np.concatenate(scores)
    for statistic in (statistics.mean, statistics.median, statistics.iqm):
        assert pooled.min() - 1e-9 <= point(statistic, scores) <= pooled.max() + 1e-9
    assert point(statistics.optimality_gap, scores) >= 0 or pooled.min() >= 1


@given(of_games(fewest=4))
def test_the_iqm_ignores_what_an_outlier_is(scores: list[np.ndarray]):
    """One of at least four runs of a game is in the upper quarter, however high."""
    high = max(score.max() for score in scores)
    one, other = ([score.copy() for score in scores] for _ in range(2))
    one[0][0], other[0][0] = high + 1, high + 1e6
    assert point(statistics.iqm, one) == pytest.approx(point(statistics.iqm, other), abs=1e-9)


# Intervals --------------------------------------------------------------------------------------------------------


def test_counts_draw_as_many_runs_as_there_are():
    counts = statistics._Side([3, 1, 5], None).draw(rng(), 1000)
    assert [count.shape for count in counts] == [(1000, 3), (1000, 1), (1000, 5)]
    for count, size in zip(counts, (3, 1, 5), strict=True):
        assert (count.sum(axis=1) == size).all()
        # A count is binomial with n = size and p = 1 / size; five standard errors of 1000 draws.
        np.testing.assert_allclose(count.mean(axis=0), 1, atol=5 * math.sqrt((1 - 1 / size) / 1000) + 1e-12)


@pytest.mark.parametrize("statistic", AGGREGATES.values(), ids=AGGREGATES)
def test_counts_stand_for_the_resampled_scores(statistic: statistics.Statistic):
    """The oracle gathers the scores of every resample."""
    scores = [rng(3).normal(size=4), rng(4).normal(size=3)]
    counts = statistics._Side([4, 3], None).draw(rng(), 50)
    for i, value in enumerate(statistic(scores, counts)):
        gathered = [np.repeat(score, count[i].astype(int)) for score, count in zip(scores, counts, strict=True)]
        assert value == pytest.approx(point(statistic, gathered))


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    scores = [rng(i).normal(size=5) for i in range(3)]
    first, same, other = (statistics.interval(statistics.iqm, scores, rng(seed), 500) for seed in (7, 7, 8))
    assert first == same
    assert first.point == other.point
    assert first != other
    assert first.low < first.point < first.high


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch):
    curves = [rng(i).normal(size=(5, 4)) for i in range(3)]
    seen: list[int] = []
    draw = statistics._Side.draw
    monkeypatch.setattr(statistics._Side, "draw", lambda *given: seen.append(given[2]) or draw(*given))
    monkeypatch.setattr(statistics, "_CHUNK", 40 * 15 * 4)
    found = statistics.band(statistics.mean, curves, rng(), 20_003)
    assert sum(seen) == 20_003
    assert set(seen) == {40, 20_003 % 40}
    monkeypatch.undo()
    whole = statistics.band(statistics.mean, curves, rng(), 20_003)
    np.testing.assert_array_equal(found.point, whole.point)
    for a, b in zip(found, whole, strict=True):
        np.testing.assert_allclose(a, b, atol=0.02)  # other draws; an end's standard error is 0.005


def test_clusters_are_drawn_whole_and_games_keep_their_numbers_of_runs():
    clusters = [np.array([4, 4, 7, 7, 9]), np.array([7, 4, 9])]  # the first game lacks a run of 9
    first, second = statistics._Side([5, 3], clusters).draw(rng(), 2000)
    np.testing.assert_allclose(first.sum(axis=1), 5)
    np.testing.assert_allclose(second.sum(axis=1), 3)
    np.testing.assert_array_equal(first[:, 0], first[:, 1])
    np.testing.assert_array_equal(first[:, 2], first[:, 3])
    np.testing.assert_array_equal(second[:, [1, 0, 2]] > 0, first[:, [0, 2, 4]] > 0)
    np.testing.assert_array_equal(
        second, np.round(second)
    )  # it has one run of each, so its counts are those of drawing
    alone = statistics._Side([1, 2], [np.array([1]), np.array([1, 2])]).draw(rng(), 100)
    np.testing.assert_array_equal(alone[0], np.ones((100, 1)))  # also where cluster 1 was not drawn


def test_clusters_of_single_runs_are_runs():
    scores = [rng(i).normal(size=6) for i in range(2)]
    alone = statistics.interval(statistics.mean, scores[:1], rng(), 4000)
    found = statistics.interval(statistics.mean, scores[:1], rng(), 4000, [np.arange(6)])
    np.testing.assert_allclose(found, alone, atol=0.05)
    both = [np.arange(6), np.arange(6)]
    assert statistics.paired_difference(statistics.mean, scores, scores, rng(), FEW, both) == (0, 0, 0)


def test_runs_of_one_initialization_are_not_as_many_independent_ones():
    """Both arms are the same, but each initialization has an effect of its own on its three runs of four games.

    With ten initializations, the interval of the difference excludes 0 in about a tenth of experiments if they are
    drawn whole, and in about half of them if runs are drawn.
    """
    clusters = [np.repeat(np.arange(10), 3)] * 4
    wrong = {"runs": 0, "initializations": 0}
    random = rng(3)
    for _ in range(150):
        x, y = (
            [effects.repeat(3) + random.normal(0, 1, 30) for _ in range(4)] for effects in random.normal(0, 1, (2, 10))
        )
        for how, of in (("runs", None), ("initializations", clusters)):
            found = statistics.paired_difference(statistics.mean, x, y, random, 200, of)
            wrong[how] += not found.low <= 0 <= found.high
    assert wrong["initializations"] < 0.2 * 150 < 0.4 * 150 < wrong["runs"]


def test_one_run_per_game_has_no_spread():
    scores = games([2], [4])
    assert statistics.interval(statistics.mean, scores, rng(), FEW) == (3, 3, 3)


def test_intervals_cover_what_they_are_said_to():
    """Of 400 experiments with normal scores, the 95 % interval of the mean holds the true one about as often.

    Percentile intervals are narrow by √((n − 1)/n) and miss Student's tails: with 2 × 10 runs, 93 % is expected; the
    standard error of 400 experiments is 1.3 %.
    """
    random, held = rng(5), 0
    for _ in range(400):
        found = statistics.interval(statistics.mean, [random.normal(1, 2, 10), random.normal(3, 1, 10)], random, 400)
        held += found.low <= 2 <= found.high
    assert 0.89 <= held / 400 <= 0.97


def test_the_mean_s_interval_is_the_normal_one_where_there_are_many_runs():
    scores = [rng(6).normal(size=400), rng(7).normal(size=100)]
    found = statistics.interval(statistics.mean, scores, rng(), 20_000)
    error = math.sqrt(sum(score.var() / len(score) for score in scores)) / 2
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.03)


# Profiles, improvement, pairs -------------------------------------------------------------------------------------


def test_a_profile_by_hand():
    found = statistics.performance_profile(games([0, 1], [1, 2, 3, 4]), np.array([-1.0, 0, 1, 2.5, 4]), rng(), FEW)
    np.testing.assert_allclose(found.point, [1, 3 / 4, 3 / 8, 1 / 4, 0])
    assert (found.low <= found.point).all()
    assert (found.point <= found.high).all()
    np.testing.assert_array_equal(found.high - found.low > 0, [False, True, True, True, False])


@given(of_games())
def test_profiles_fall(scores: list[np.ndarray]):
    found = statistics.performance_profile(scores, np.linspace(-65, 65, 40), rng(), FEW)
    assert found.point[0] == pytest.approx(1)
    assert found.point[-1] == 0
    for values in found:
        assert (np.diff(values) <= 1e-12).all()


def test_probability_of_improvement_by_hand():
    x, y = games([1, 3], [5]), games([2, 3, 0], [7, 5])
    # 1 beats 0; 3 beats 2 and 0 and ties with 3: 3.5 of 6. In the second game one tie of two pairs.
    assert statistics.probability_of_improvement(x, y, rng(), FEW).point == pytest.approx((3.5 / 6 + 0.5 / 2) / 2)


@given(of_games(), st.data())
def test_probabilities_of_improvement_add_up_to_one(x: list[np.ndarray], data: st.DataObject):
    y = [data.draw(arrays(float, len(score) + 1, elements=st.integers(-3, 3))) for score in x]
    there = statistics.probability_of_improvement(x, y, rng(), FEW)
    back = statistics.probability_of_improvement(y, x, rng(), FEW)
    assert there.point + back.point == pytest.approx(1)
    assert 0 <= there.low <= there.high <= 1
    assert statistics.probability_of_improvement(x, x, rng(), FEW).point == pytest.approx(0.5)


def test_what_always_wins_improves_for_certain():
    x, y = games([5, 6], [7, 8, 9]), games([1, 2, 3], [0])
    assert statistics.probability_of_improvement(x, y, rng(), FEW) == pytest.approx((1, 1, 1))


def test_pairs_that_share_their_luck_differ_for_certain():
    luck = [rng(8).normal(size=6), rng(9).normal(size=6)]
    better = [score + 0.25 for score in luck]
    assert statistics.paired_difference(statistics.mean, better, luck, rng(), FEW) == pytest.approx((0.25,) * 3)


def test_pairs_are_narrower_the_more_they_share():
    random = rng(10)
    luck, mine, yours = ([random.normal(size=8) for _ in range(4)] for _ in range(3))
    widths = []
    for share in (0.0, 0.7, 0.95):
        x, y = (
            [share * a + math.sqrt(1 - share**2) * b for a, b in zip(luck, own, strict=True)] for own in (mine, yours)
        )
        found = statistics.paired_difference(statistics.mean, x, y, rng(), 4000)
        assert found.point == pytest.approx(point(statistics.mean, x) - point(statistics.mean, y))
        widths.append(found.high - found.low)
    assert widths[0] > 1.2 * widths[1] > 1.4 * widths[2]


def test_a_ratio_of_pairs_by_hand():
    """A seed's effect on both sides cancels in a ratio, too."""
    luck = [rng(8).uniform(1, 9, size=6), rng(9).uniform(1, 9, size=6)]
    better = [1.5 * score for score in luck]
    assert statistics.paired_ratio(statistics.iqm, better, luck, rng(), FEW) == pytest.approx((1.5,) * 3)
    x, y = games([3, 5], [1, 1]), games([2, 2], [1, 3])
    found = statistics.paired_ratio(statistics.mean, x, y, rng(), FEW)
    assert found is not None
    assert found.point == pytest.approx((4 + 1) / (2 + 2))
    assert found.low == pytest.approx((3 + 1) / (2 + 3)), "of the nine resamples, one in sixteen is this"
    assert found.high == pytest.approx((5 + 1) / (2 + 1))


@pytest.mark.parametrize("below", [games([0, 0]), games([-1, 1, 1, 1]), games([-3, -2])])
def test_a_ratio_to_what_may_be_zero_means_nothing(below: list[np.ndarray]):
    above = [np.ones(len(score)) for score in below]
    assert statistics.paired_ratio(statistics.mean, above, below, rng(), FEW) is None


def test_pairs_have_two_sides():
    with pytest.raises(AssertionError, match="equally many runs"):
        statistics.paired_difference(statistics.mean, games([1, 2]), games([1]), rng())


# rliable ----------------------------------------------------------------------------------------------------------


def of_reference(name: str) -> list[np.ndarray]:
    return list(np.array(REFERENCE["arms"][name]["scores"]).T)


def assert_same_interval(found: statistics.Interval, wanted: list[float], step: float = 0.0) -> None:
    """The same point; ends up to the noise of two bootstraps of B draws each.

    For about normal estimates with deviation s, a 2.5 % quantile's standard error is √(0.025 · 0.975 / B) / 0.0584 · s,
    or 0.019 s at B = 20,000; s is a quarter of the width. Five times √2 of those are 0.033 of the width. A statistic
    that takes few values has steps between them.
    """
    assert found.point == pytest.approx(wanted[0], rel=1e-12, abs=1e-12)
    tolerance = 0.033 * (wanted[2] - wanted[1]) + step
    np.testing.assert_allclose(found[1:], wanted[1:], atol=tolerance)


@pytest.mark.parametrize("label", AGGREGATES)
@pytest.mark.parametrize("name", REFERENCE["arms"])
def test_aggregates_are_rliable_s(name: str, label: str):
    repetitions = REFERENCE["repetitions"]
    found = statistics.interval(AGGREGATES[label], of_reference(name), rng(), repetitions)
    # The median jumps where another game becomes the middle one; a mean over runs moves in tenths over their number.
    step = 0.1 / len(REFERENCE["arms"][name]["scores"]) if label == "median" else 0.0
    assert_same_interval(found, REFERENCE["arms"][name]["aggregates"][label], step)


@pytest.mark.parametrize("name", REFERENCE["arms"])
def test_profiles_are_rliable_s(name: str):
    repetitions = REFERENCE["repetitions"]
    scores = of_reference(name)
    found = statistics.performance_profile(scores, np.array(REFERENCE["thresholds"]), rng(), repetitions)
    wanted = np.array(REFERENCE["arms"][name]["profile"])
    np.testing.assert_allclose(found.point, wanted[0], rtol=0, atol=1e-12)
    # A fraction of N runs moves in steps of 1/N; the quantiles of two bootstraps may be a step apart.
    step = 1 / sum(len(score) for score in scores)
    np.testing.assert_allclose(np.stack(found[1:]), wanted[1:], rtol=0, atol=step + 1e-12)


@pytest.mark.parametrize("case", REFERENCE["probability of improvement"], ids=lambda case: case["x"])
def test_probabilities_of_improvement_are_rliable_s(case: dict[str, Any]):
    x, y = of_reference(case["x"]), of_reference(case["y"])
    repetitions = REFERENCE["repetitions"]
    found = statistics.probability_of_improvement(x, y, rng(), repetitions)
    step = 0.5 / (len(x[0]) * len(y[0]) * len(x))  # of a tie in one game
    assert_same_interval(found, case["interval"], step)
