"""The comparison of contributions: do they carry a signal?"""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest

from benchmarks import contributions
from leap_dist.config.loading import resolve
from leap_dist.protocol.messages import Lease, Task
from leap_dist.tasks.atari.a2c import A2C
from leap_dist.tasks.task import family_of
from leap_dist.worker.start import Start, make_learner

STEPS = 400


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return contributions.record("pong", 0, STEPS, "smoke", contributions.FORMS)


def test_all_forms_are_of_the_same_path(recorded: dict[str, np.ndarray]) -> None:
    reptile = recorded["energy, λ = 1"][:, 1]
    assert np.linalg.norm(reptile) > 0
    for name, form in contributions.FORMS.items():
        if form.metric == "energy":
            assert np.array_equal(recorded[name][:, 1], reptile)
        elif not form.loss_weight:
            assert not recorded[name][:, 0].any()


def test_the_fixed_batch_has_the_loss_of_the_first_rollout_until_a_step_is_taken() -> None:
    config = resolve("smoke", {"games": ["pong"], "worker.precision": "float32"})
    _, vector = family_of(config).initialization(config, 0, config.scope)
    lease = Lease("test", Task(0, "pong", 0, seed=3, steps=STEPS), "test", "test", 0, 60.0)
    learner = make_learner(config, lease, Start(vector))
    assert isinstance(learner, A2C)
    try:
        fixed = contributions.FixedBatch(learner)
        loss = float(learner.backward())
        fixed.freeze()
        assert fixed.loss() == pytest.approx(loss, rel=1e-4)
        learner.step()
        after = fixed.loss()
        assert after != pytest.approx(loss, rel=1e-4)
        learner.backward()
        assert fixed.loss() == after
    finally:
        learner.close()


def test_a_signal_shows_as_likeness_within_a_game_and_noise_does_not() -> None:
    rng = np.random.default_rng(0)
    games = {game: rng.normal(size=10_000) for game in ("pong", "freeway", "assault")}
    vectors = {(game, seed): own + rng.normal(size=10_000) for game, own in games.items() for seed in (0, 1, 2)}
    pairs = contributions.cosines(vectors)
    assert len(pairs) == 36
    same, other = (contributions.mean_of(pairs, same_game=same) for same in (True, False))
    assert same.point == pytest.approx(0.5, abs=0.03)
    assert other.point == pytest.approx(0.0, abs=0.03)
    assert same.low <= same.point <= same.high
    assert other.low <= other.point <= other.high


def test_intervals_come_from_games() -> None:
    """Three games whose pairs agree perfectly within a game, by 0, 0.3 and 0.6: the oracle lists all 27 draws."""
    within = {"a": 0.0, "b": 0.3, "c": 0.6}
    pairs = {((game, 0), (game, 1)): cosine for game, cosine in within.items()}
    pairs |= {
        ((a, i), (b, j)): within[a] - within[b]
        for a, b in itertools.combinations(within, 2)
        for i, j in itertools.product((0, 1), repeat=2)
    }
    draws = list(itertools.product(within, repeat=3))
    same = [np.mean([within[game] for game in draw]) for draw in draws]
    others = [[within[a] - within[b] for a, b in itertools.combinations(sorted(draw), 2) if a != b] for draw in draws]
    other = [np.mean(found) for found in others if found]
    for is_same, values, point in ((True, same, 0.3), (False, other, -0.4)):
        found = contributions.mean_of(pairs, same_game=is_same)
        ends = np.percentile(values, (2.5, 97.5), method="inverted_cdf")
        assert found == pytest.approx((point, *ends))


def test_what_was_recorded_can_be_read_and_compared(tmp_path: Path, recorded: dict[str, np.ndarray]) -> None:
    for game in ("freeway", "pong"):
        (tmp_path / game).mkdir()
        for seed in (0, 1):
            np.savez(tmp_path / game / f"{seed}.npz", allow_pickle=False, **recorded)
    rows = contributions.compare(contributions.load(tmp_path), "all", "all")
    assert [row["form"] for row in rows][:2] == [contributions.REPTILE, "energy, λ = 1"]
    expected = {row["form"]: 1.0 if row["largest norm"] else 0.0 for row in rows}
    assert {row["form"]: row["same game"].point for row in rows} == pytest.approx(expected)
    assert contributions.table(rows).count("\n") == len(rows) + 1
    two = {key: dict(list(forms.items())[:2]) for key, forms in contributions.load(tmp_path).items()}
    contributions.write_pairs(two, tmp_path / "pairs.csv")
    columns, *pairs = list(csv.reader((tmp_path / "pairs.csv").open(encoding="utf-8")))
    assert columns[-1] == "cosine"
    assert len(pairs) == 6 * 3 * 3 * len(contributions.gradients(two, "all", "all"))
    lines = contributions.moved(contributions.load(tmp_path), [contributions.REPTILE], contributions.start_vector(""))
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "nothing",
        contributions.REPTILE,
    ]
    assert lines[2].split("|")[2:] != lines[3].split("|")[2:]
