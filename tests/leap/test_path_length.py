"""Law 12: on quadratic tasks the measured path length falls meta-step by meta-step; and the study that shows it."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import path_length
from benchmarks.toy import FAMILIES, Family, Point, Quadratic, Sinusoid, configuration, measure, meta_step, shortest
from leap_dist.leap import meta_learners
from leap_dist.server.meta_optimizer import MetaOptimizer

UPDATES = 20
RATES = {("energy", 1.0): 0.01, ("energy", 0.0): 0.02, ("length", 1.0): 0.002, ("length", 0.0): 0.002}
"""Meta learning rates that move φ by a few per cent of its way, by metric and λ."""
ROUNDING = 1e-5  # φ is float32; everything behind it is float64


def descend(
    family: Family, arm: dict, rate: float, *, tasks: range, steps: int, loss_weight: float = 1.0, start: int = 0
) -> list[Point]:
    """Algorithm 1 on the same batch in every meta-step, measured on that batch: before the first, after each."""
    config = configuration({"leap.final_loss": True, "leap.loss_weight": loss_weight, **arm}, UPDATES + 1, rate)
    initialization = MetaOptimizer(config.mode, config.meta, family.start(start))
    points = [measure(family.learners(initialization.vector, tasks), UPDATES, loss_weight)]
    for _ in range(steps):
        assert meta_step(config, family.learners(initialization.vector, tasks), initialization)
        points.append(measure(family.learners(initialization.vector, tasks), UPDATES, loss_weight))
    return points


def relative_changes(values: list[float]) -> np.ndarray:
    """From each meta-step to the next."""
    return np.diff(values) / values[:-1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("metric", "loss_weight"), RATES)
def test_law_12_the_measured_path_gets_shorter_with_every_meta_step(metric, loss_weight, seed):
    """With inner updates so small that none overshoots (α‖A‖ ≤ 0.2), as J = I supposes.

    For a single task it then holds wherever φ is: G and the gradients of length and energy are each the sum of
    positive definite functions of A, times φ − c, so that their products are positive. For several tasks it holds
    while φ is far from the centres compared with their spread, as here; at the very end it need not: see below.
    """
    tasks = range(100 * seed, 100 * seed + 4)
    arm = {"meta_learner": "leap", "leap.metric": metric}
    points = descend(
        FAMILIES["quadratics"],
        arm,
        RATES[metric, loss_weight],
        tasks=tasks,
        steps=10,
        loss_weight=loss_weight,
        start=seed,
    )
    assert (relative_changes([point.length for point in points]) < -ROUNDING).all()
    assert (relative_changes([point.energy for point in points]) < -ROUNDING).all()
    assert points[-1].length < 0.95 * points[0].length


@pytest.mark.parametrize(("metric", "loss_weight"), RATES)
def test_law_12_does_not_hold_for_the_opposite_of_the_gradient(metric, loss_weight, monkeypatch):
    monkeypatch.setattr(meta_learners.Leap, "_vector", lambda self, loss_term, path_term: -(loss_term + path_term))
    arm = {"meta_learner": "leap", "leap.metric": metric}
    rate = RATES[metric, loss_weight]
    points = descend(FAMILIES["quadratics"], arm, rate, tasks=range(4), steps=3, loss_weight=loss_weight)
    assert (relative_changes([point.length for point in points]) > ROUNDING).all()


def test_law_12_needs_a_meta_learner():
    points = descend(FAMILIES["quadratics"], {"meta_learner": "none"}, 1.0, tasks=range(4), steps=2)
    assert points[0] == points[1] == points[2]


def test_the_descent_ends_near_the_shortest_paths_but_not_at_them():
    """G is not the gradient of the measured length: segments' far ends are held fixed, and J = I.

    So from the initialization with the very shortest paths, a meta-step leads to longer ones.
    """
    family, tasks = FAMILIES["quadratics, steep apart"], range(6)
    arm = {"meta_learner": "leap", "leap.metric": "energy"}
    best = shortest([family.make(family.start(0), seed) for seed in tasks], UPDATES)
    least = measure(family.learners(best, tasks), UPDATES).length
    random = np.random.default_rng(0)
    for size in (0.01, 0.1, 1.0):
        direction = random.normal(size=best.shape).astype(np.float32)
        elsewhere = best + size * direction / np.linalg.norm(direction)
        assert measure(family.learners(elsewhere, tasks), UPDATES).length > least

    *_, last = descend(family, arm, 0.05, tasks=tasks, steps=40)
    assert least < last.length < 1.05 * least
    at_best = Family(family.make, lambda seed: best, {})
    before, after = descend(at_best, arm, 0.01, tasks=tasks, steps=1)
    assert before.length == least < after.length


@pytest.mark.parametrize("apart", [0.0, 1.5])
def test_the_gradient_of_a_quadratic(apart):
    theta = np.random.default_rng(0).normal(size=Quadratic.dimension)
    learner = Quadratic(theta.astype(np.float32), 3, apart=apart)
    loss = learner.backward()
    assert loss == learner.evaluate() == pytest.approx(learner.expected_loss() + learner.offset)
    gradient = learner.shared["theta"].grad
    for i, h in enumerate(1e-5 * np.eye(Quadratic.dimension)):
        ahead, behind = (Quadratic(np.float32(0) * h, 3, apart=apart) for _ in range(2))
        for other, sign in ((ahead, 1), (behind, -1)):
            other.shared["theta"].data += learner.shared["theta"].data + sign * torch.from_numpy(h)
        difference = (ahead.evaluate() - behind.evaluate()) / 2e-5
        assert gradient[i].item() == pytest.approx(difference.item(), rel=1e-6, abs=1e-8)


def test_a_sinusoid_is_learned_and_its_seed_determines_everything():
    def trained(seed: int) -> tuple[float, float]:
        learner = Sinusoid(FAMILIES["sinusoids"].start(0), seed)
        before = learner.expected_loss()
        for _ in range(200):
            learner.backward()
            learner.step()
        return before, learner.expected_loss()

    before, after = trained(1)
    assert after < 0.5 * before
    assert trained(1) == (before, after)
    assert trained(2)[0] != before


@pytest.mark.parametrize("arm", path_length.ARMS)
def test_every_arm_has_the_same_number_of_rollouts(arm, monkeypatch):
    calls = []
    for name in ("backward", "evaluate"):
        method = getattr(Sinusoid, name)
        monkeypatch.setattr(Sinusoid, name, lambda self, method=method: (calls.append(1), method(self))[1])
    family = FAMILIES["sinusoids"]
    config = configuration(path_length.ARMS[arm], 8)
    initialization = MetaOptimizer(config.mode, config.meta, family.start(0))
    meta_step(config, family.learners(initialization.vector, range(3)), initialization)
    assert len(calls) == 3 * 8


def test_the_command(tmp_path, monkeypatch, capsys):
    picture = tmp_path / "picture.png"
    sizes = ["--meta-steps", "1", "--seeds", "2", "--tasks", "1", "--rollouts", "6", "--processes", "1"]
    monkeypatch.setattr(sys, "argv", ["path_length", *sizes, "--out", str(picture), "--json"])
    path_length.main()
    families = json.loads(capsys.readouterr().out)["families"]
    assert set(families) == set(FAMILIES)
    for family in families.values():
        assert set(family["arms"]) == set(path_length.ARMS)
        starts = {tuple(length[0] for length in arm["length"]) for arm in family["arms"].values()}
        assert len(starts) == 1, "all arms start from the same initializations and are measured on the same tasks"
        for name, arm in family["arms"].items():
            assert np.shape(arm["length"]) == np.shape(arm["loss"]) == (2, 2)
            assert (arm["rate"] is None) == (name == "none")
            assert name == "none" or f"{arm['rate']:g}" in arm["tuning"]
            assert name != "none" or arm["falls"] == [0, 0]
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
