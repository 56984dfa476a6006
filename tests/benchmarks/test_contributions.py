"""The comparison of contributions: do they carry a signal?"""

from __future__ import annotations

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
    assert np.mean(contributions.cosines(vectors, same_game=True)) == pytest.approx(0.5, abs=0.03)
    assert np.mean(contributions.cosines(vectors, same_game=False)) == pytest.approx(0.0, abs=0.03)


def test_what_was_recorded_can_be_read_and_compared(tmp_path: Path, recorded: dict[str, np.ndarray]) -> None:
    for game in ("freeway", "pong"):
        (tmp_path / game).mkdir()
        for seed in (0, 1):
            np.savez(tmp_path / game / f"{seed}.npz", allow_pickle=False, **recorded)
    rows = contributions.compare(contributions.load(tmp_path), "all", "all")
    assert [row["form"] for row in rows][:2] == [contributions.REPTILE, "energy, λ = 1"]
    expected = {row["form"]: 1.0 if row["largest norm"] else 0.0 for row in rows}
    assert {row["form"]: row["same game"] for row in rows} == pytest.approx(expected)
    assert contributions.table(rows).count("\n") == len(rows) + 1
    lines = contributions.moved(contributions.load(tmp_path), [contributions.REPTILE])
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "nothing",
        contributions.REPTILE,
    ]
    assert lines[2].split("|")[2:] != lines[3].split("|")[2:]
