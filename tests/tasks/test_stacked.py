"""Tasks in lockstep against the same tasks one after the other, as a worker trains them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from toy_images import CLASSES, SETTINGS, SIDE, WORKER, classifier, dataset

from leap_dist.config.settings import LeapSettings
from leap_dist.leap.pull_forward import PullForward
from leap_dist.nn.convnet import initialization
from leap_dist.nn.flat_vector import flatten
from leap_dist.tasks.images.stacked import Outcome, Stack, StackedPullForward

SEEDS = (3, 4, 5)
TASKS = [dataset(seed, each=each) for seed, each in zip(SEEDS, (5, 6, 7), strict=True)]
UPDATES = 3
ENERGY = LeapSettings()


def stack_of(order=(0, 1, 2), *, scope="model", leap=ENERGY, augmentation="none", shuffle="epoch") -> Stack:
    return Stack(
        [TASKS[i] for i in order],
        initialization(1, SIDE, CLASSES, 0, scope)[1],
        seeds=[SEEDS[i] for i in order],
        settings=replace(SETTINGS, augmentation=augmentation, shuffle=shuffle),
        worker=WORKER,
        leap=leap,
        scope=scope,
    )


def stacked(*arguments, **settings) -> list[Outcome]:
    return stack_of(*arguments, **settings).train(UPDATES)


def near(found: np.ndarray, expected: np.ndarray) -> bool:
    """Return whether two vectors differ by less than 3 % of their norm.

    Rounding may decide which of four pixels is the largest, or on which side of a ReLU a value lies. Then some 1e-3 of
    a gradient goes another way, and ten times as much of the path after it: in one task of ten, within three updates.
    """
    return bool(np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("scope", "augmentation", "shuffle", "leap"),
    [
        ("model", "none", "epoch", ENERGY),
        ("encoder", "none", "task", LeapSettings(metric="length", loss_weight=0.3, stabilize=False)),
        ("model", "affine", "epoch", LeapSettings(metric="length")),
        ("encoder", "turned", "epoch", ENERGY),
    ],
)
def test_each_task_goes_as_it_would_alone(scope, augmentation, shuffle, leap):
    outcomes = stacked(scope=scope, leap=leap, augmentation=augmentation, shuffle=shuffle)
    for outcome, data, seed in zip(outcomes, TASKS, SEEDS, strict=True):
        vector = initialization(1, SIDE, CLASSES, 0, scope)[1]
        settings = replace(SETTINGS, augmentation=augmentation, shuffle=shuffle)
        learner = classifier(data, vector, seed=seed, settings=settings, scope=scope, updates=UPDATES)
        pull = PullForward(
            learner.shared.values(), metric=leap.metric, loss_weight=leap.loss_weight, stabilize=leap.stabilize
        )
        for _ in range(UPDATES):
            pull.observe(learner.backward())
            learner.step()
        pull.close()
        assert near(outcome.gradient, pull.gradient().numpy())
        assert near(outcome.moved, vector - flatten(learner.shared.values()).numpy())
        assert (outcome.path.energy, outcome.path.length) == pytest.approx((pull.energy, pull.length), rel=0.03)
        norms = tuple(term.norm().item() for term in pull.terms())
        assert (outcome.path.loss_term_norm, outcome.path.path_term_norm) == pytest.approx(norms, rel=0.03)
        np.testing.assert_allclose(outcome.curve.losses, learner.curve().losses, rtol=0.01)
        assert outcome.curve.losses[0] == pytest.approx(learner.curve().losses[0], rel=1e-5)
        np.testing.assert_array_equal(outcome.curve.errors, learner.curve().errors)
        assert tuple(outcome.score) == pytest.approx(tuple(learner.test()), rel=0.03)


@pytest.mark.parametrize("metric", ["energy", "length"])
@pytest.mark.parametrize("stabilize", [True, False])
def test_the_accumulator_is_leaps_row_by_row(metric, stabilize):
    settings = LeapSettings(metric=metric, loss_weight=0.7, stabilize=stabilize)
    generator = torch.Generator().manual_seed(0)
    points, gradients = torch.randn(2, 6, 3, 10, generator=generator)  # observations, tasks, parameters
    losses = torch.rand(6, 3, generator=generator)
    points[4, 1], losses[4, 1] = points[3, 1], losses[3, 1]  # a segment of no length
    together = StackedPullForward(points[0], settings)
    alone = [nn.Parameter(row.clone()) for row in points[0]]
    pulls = [PullForward([one], metric=metric, loss_weight=0.7, stabilize=stabilize) for one in alone]
    for k in range(6):
        together.observe(losses[k], points[k], gradients[k])
        for task, (one, pull) in enumerate(zip(alone, pulls, strict=True)):
            one.data.copy_(points[k, task])
            one.grad = gradients[k, task].clone()
            pull.observe(losses[k, task])
    for (gradient, path), pull in zip(together.report(), pulls, strict=True):
        np.testing.assert_allclose(gradient, pull.gradient().numpy(), rtol=1e-5, atol=1e-5)
        assert (path.energy, path.length) == pytest.approx((pull.energy, pull.length), rel=1e-6)
        loss_term, path_term = pull.terms()
        assert path.cosine == pytest.approx(torch.cosine_similarity(loss_term, path_term, dim=0).item(), abs=1e-5)


@pytest.mark.parametrize("augmentation", ["none", "affine", "turned"])
def test_each_task_is_tested_as_it_would_be_alone(augmentation):
    """With parameters and averages that nobody would mistake for another task's."""
    stack = stack_of(augmentation=augmentation)
    generator = torch.Generator().manual_seed(0)
    stack._theta += 0.05 * torch.randn(stack._theta.shape, generator=generator)
    for name, part in stack._buffers.items():
        if part.is_floating_point():
            part.copy_(0.02 + 0.2 * torch.rand(part.shape, generator=generator) * ("var" in name))
    scores = []
    for row, (data, seed) in enumerate(zip(TASKS, SEEDS, strict=True)):
        settings = replace(SETTINGS, augmentation=augmentation)
        learner = classifier(data, stack._theta[row].numpy(), seed=seed, settings=settings, scope="model")
        learner._model.load_state_dict({name: part[row] for name, part in stack._buffers.items()}, strict=False)
        scores.append(stack._test(row))
        assert tuple(scores[-1]) == pytest.approx(tuple(learner.test()), rel=1e-4)
    assert len({score.loss for score in scores}) == 3


def test_the_order_of_the_tasks_does_not_matter():
    straight, other = stacked(), stacked((2, 0, 1))
    for found, expected in zip(other, (straight[2], straight[0], straight[1]), strict=True):
        assert near(found.gradient, expected.gradient)
        np.testing.assert_allclose(found.curve.losses, expected.curve.losses, rtol=0.01)
    assert not near(straight[0].gradient, straight[1].gradient), "tasks differ"


def test_tasks_of_different_shapes_are_refused():
    tasks = [dataset(0), dataset(0, channels=3)]
    with pytest.raises(ValueError, match="several kinds"):
        Stack(tasks, np.zeros(1, np.float32), seeds=[0, 1], settings=SETTINGS, worker=WORKER, leap=ENERGY)
