"""Cosines between the games' pulls, against those of the whole vectors; dead units; and durations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from protocol import Worker, config, contribution, drive, grant, serve

from leap_dist.nn.actor_critic import initialization
from leap_dist.protocol.messages import CurvePoint
from leap_dist.server.monitoring import (
    DIMENSIONS,
    KEPT,
    MOST_DEAD,
    TASKS_OF_DEAD,
    WINDOW_SIZE,
    Agreement,
    LatencyWindow,
)

RNG = np.random.default_rng


def norm(vector: np.ndarray) -> float:
    return float(np.linalg.norm(vector.astype(np.float64)))


def cosines(vectors: dict[str, np.ndarray]) -> np.ndarray:
    """Of the vectors themselves, in the order of the names."""
    unit = np.array([vectors[name].astype(np.float64) / norm(vectors[name]) for name in sorted(vectors)])
    return unit @ unit.T


def layered(seed: int) -> np.ndarray:
    """As large as an encoder's, its layers of sizes far apart, and a tenth of all numbers with most of the norm."""
    rng = RNG(seed)
    manifest, _ = initialization(4, 0)
    parts = [rng.normal(size=shape).ravel() * 10.0 ** rng.uniform(-2, 2) for shape in manifest.shapes]
    vector = np.concatenate(parts)
    return (vector * np.where(rng.random(vector.size) < 0.1, 10, 1)).astype(np.float32)


def test_cosines_are_those_of_the_vectors_give_or_take_their_error() -> None:
    common = [layered(seed) for seed in (100, 101)]
    vectors = {f"g{k}": layered(k) + np.float32(k / 4 - 1) * common[k % 2] for k in range(10)}
    agreement = Agreement(common[0].size)
    for game, vector in vectors.items():
        agreement.add(game, vector, norm(vector))
    found = agreement.cosines()
    assert found["games"] == sorted(vectors)
    errors = (np.array(found["cosines"]) - cosines(vectors))[np.triu_indices(10, 1)]
    assert np.sqrt((errors**2).mean()) < 2 / np.sqrt(DIMENSIONS)
    assert np.abs(errors).max() < 5 / np.sqrt(DIMENSIONS)
    assert np.abs(np.diag(found["cosines"]) - 1).max() < 1e-3
    assert np.array_equal(found["cosines"], np.transpose(found["cosines"]))


def test_the_same_direction_is_one_and_the_opposite_minus_one_whatever_the_norm() -> None:
    pull = RNG(0).normal(size=10_000).astype(np.float32)
    agreement = Agreement(pull.size)
    for game, factor in {"a": 1.0, "b": 1e-9, "c": -1e9}.items():
        scaled = pull * np.float32(factor)
        agreement.add(game, scaled, norm(scaled))
    assert np.array(agreement.cosines()["cosines"]) == pytest.approx(
        np.array([[1, 1, -1], [1, 1, -1], [-1, -1, 1]]), abs=1e-4
    )


def test_pulls_of_different_layers_have_nothing_in_common_though_all_their_numbers_are_positive() -> None:
    agreement, pull = Agreement(100_000), np.zeros((2, 100_000), np.float32)
    pull[0, :50_000] = pull[1, 50_000:] = 1
    agreement.add("first", pull[0], norm(pull[0]))
    agreement.add("second", pull[1], norm(pull[1]))
    assert abs(agreement.cosines()["cosines"][0][1]) < 5 / np.sqrt(DIMENSIONS)


def test_every_visit_counts_by_its_direction_and_old_ones_fade() -> None:
    first, second = RNG(0).normal(size=(2, 100)).astype(np.float32)  # fewer than the projection has: it is exact
    agreement = Agreement(100)
    agreement.add("mixed", first * 1000, norm(first * 1000))
    agreement.add("mixed", second, norm(second))
    agreement.add("first", first, norm(first))
    mixed = KEPT * first / norm(first) + (1 - KEPT) * second / norm(second)
    assert agreement.cosines()["cosines"][0][1] == pytest.approx(cosines({"a": mixed, "b": first})[0, 1], abs=1e-4)


@pytest.mark.parametrize("size", [1, DIMENSIONS - 1, DIMENSIONS, DIMENSIONS + 1])
def test_any_size_will_do(size: int) -> None:
    agreement = Agreement(size)
    pull = np.ones(size, np.float32)
    agreement.add("a", pull, norm(pull))
    agreement.add("b", -pull, norm(pull))
    assert agreement.cosines() == {"games": ["a", "b"], "cosines": [[1.0, -1.0], [-1.0, 1.0]]}


def test_what_has_no_direction_is_left_out() -> None:
    agreement = Agreement(3)
    assert agreement.cosines() == {"games": [], "cosines": []}
    pull = np.ones(3, np.float32)
    for vector, size in (
        (np.zeros(3, np.float32), 0.0),
        (pull, np.inf),
        (pull, np.nan),
        (pull[:0], 0.0),
        (pull[:2], 1),
    ):
        agreement.add("none", vector, size)
    agreement.add("some", pull, norm(pull))
    assert agreement.cosines()["games"] == ["some"]


def test_two_processes_project_alike() -> None:
    pull = RNG(1).normal(size=5000).astype(np.float32)
    one, other = Agreement(5000), Agreement(5000)
    one.add("a", pull, norm(pull))
    other.add("a", pull, norm(pull))
    assert one._means["a"].tobytes() == other._means["a"].tobytes()


@pytest.mark.parametrize("mode", ["sync", "async", "stream"])
def test_a_server_tells_times_and_cosines_and_after_a_restart_only_what_it_has_heard_since(tmp_path, mode) -> None:
    run = config(mode=mode, meta_updates=4, games=("pong", "freeway", "asterix"), meta__batch_size=3)
    server = serve(tmp_path, run)
    assert server.status()["agreement_between_games"] == {"games": [], "cosines": []}
    assert (server.status()["pushes"], server.status()["push_ms"], server.status()["update_ms"]) == (0, {}, {})
    drive(server, [Worker(run)])
    status = server.status()
    assert status["agreement_between_games"]["games"] == ["asterix", "freeway", "pong"]
    assert status["pushes"] == 12
    assert 0 < status["push_ms"]["p50"] <= status["push_ms"]["p99"]
    assert 0 < status["update_ms"]["p50"] <= status["update_ms"]["p99"]
    server.close()
    again = serve(tmp_path, run)
    assert again.status()["agreement_between_games"]["games"] == []
    again.close()


def test_percentiles_are_of_the_newest_durations_in_milliseconds() -> None:
    now = iter(np.cumsum([0.0, *(x for k in range(WINDOW_SIZE + 100) for x in ((9.0 if k < 100 else k * 1e-3), 0.0))]))
    durations = LatencyWindow(lambda: float(next(now)))
    assert durations.milliseconds() == {}
    for _ in range(WINDOW_SIZE + 100):
        with durations:
            pass
    newest = np.arange(100, WINDOW_SIZE + 100)
    expected = {"p50": np.percentile(newest, 50), "p99": np.percentile(newest, 99)}
    assert durations.milliseconds() == pytest.approx(expected)
    assert durations.count == WINDOW_SIZE + 100


def test_what_raises_took_time_as_well() -> None:
    durations = LatencyWindow()
    with pytest.raises(OSError, match="full"), durations:
        raise OSError("full")
    assert durations.count == 1


def test_there_is_one_alert_when_most_units_are_dead_and_another_when_they_die_again(tmp_path: Path) -> None:
    server = serve(tmp_path / "run", config(mode="sync", meta__batch_size=1, meta_updates=100))
    ones = np.ones_like(server.snapshot()[1])

    def task(dead: float | None) -> list[str]:
        """The alerts after a task whose encoder has this share of dead units; it is not known for images."""
        lease = grant(server)
        means = {"loss": 0.5} | ({} if dead is None else {"start/dead_units": dead})
        done = contribution(lease, ones, seq=2)
        assert server.push(replace(done, curve=(CurvePoint(200, 1, 3.0, means),))).durable
        server.tick()
        return [alert for alert in server.alerts if "dead" in alert]

    assert not any(task(None) for _ in range(TASKS_OF_DEAD))
    assert not any(task(1.0) for _ in range(TASKS_OF_DEAD // 2 - 1)), "too few to tell"
    (alert,) = task(1.0)
    assert alert == (
        "100% of the units of φ are dead at the start of a task, so agents may learn less; try "
        "--meta.shared convolutions or a lower --meta.learning-rate, and watch meta/features in TensorBoard"
    )
    assert task(0.9) == [alert], "once"
    for _ in range(TASKS_OF_DEAD):
        assert task(MOST_DEAD - 0.01) == [alert]
    for _ in range(TASKS_OF_DEAD):
        found = task(MOST_DEAD + 0.2)
    assert len(found) == 2
    assert found[1].startswith("6")
    server.close()
