"""The classifier that learns all data sets: its batches, its steps, and that it goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

import in_process_driver
import numpy as np
import pytest
from toy_data_sets import write_part
from toy_images import CLASSES, SETTINGS, SIDE, classifier, dataset

import leap_dist
from leap_dist.config.image_settings import SupervisedSettings
from leap_dist.config.loading import ConfigError, resolve
from leap_dist.nn.convnet import initialization
from leap_dist.nn.flat_vector import flatten, load_vector
from leap_dist.storage.checkpoint import CheckpointStore
from leap_dist.storage.ledger import Ledger
from leap_dist.tasks.images.classifier import Classifier
from leap_dist.tasks.images.joint import JointClassifier

PHI = initialization(1, SIDE, CLASSES, 0)[1]
NAMES = ("greek", "latin", "tagalog")


def alone(names: tuple[str, ...] = NAMES, settings: SupervisedSettings = SETTINGS) -> dict[str, Classifier]:
    """A classifier of each data set, each with parameters of its own."""
    return {name: classifier(dataset(number), PHI, seed=number, settings=settings) for number, name in enumerate(names)}


def joint(names: tuple[str, ...] = NAMES, settings: SupervisedSettings = SETTINGS, **more: object) -> JointClassifier:
    return JointClassifier(alone(names, settings), **{"seed": 5, "state": None, **more})


def shared(learner: Classifier | JointClassifier) -> np.ndarray:
    return flatten(tensor.detach() for tensor in learner.shared.values()).numpy().copy()


def local(learner: Classifier | JointClassifier) -> np.ndarray:
    return flatten(tensor.detach() for tensor in learner.local.values()).numpy().copy()


def update(learner: Classifier | JointClassifier) -> float:
    loss = learner.backward().item()
    learner.step()
    return loss


def order(learner: JointClassifier, batches: int) -> list[str]:
    """The data sets of the next batches."""
    found = []
    for _ in range(batches):
        update(learner)
        found.append(learner._current)
    return found


def test_every_batch_moves_the_shared_parameters_and_the_head_of_its_data_set_as_a_classifier_alone_would():
    learner, single = joint(), alone()
    theta = PHI
    for _ in range(12):
        loss = learner.backward().item()
        gradient = flatten(parameter.grad for parameter in learner.shared.values()).numpy().copy()
        learner.step()
        one = single[learner._current]
        load_vector(one.shared, theta)
        assert update(one) == loss
        moved = shared(one)
        np.testing.assert_allclose(moved, theta - SETTINGS.learning_rate * gradient, atol=1e-6)
        assert np.array_equal(shared(learner), moved)
        theta = moved
    assert np.array_equal(local(learner), np.concatenate([local(one) for one in single.values()]))
    assert np.abs(theta - PHI).max() > 1e-3
    for one in learner._classifiers.values():
        assert np.array_equal(shared(one), theta), "all of them have the same shared parameters"


def test_with_a_single_data_set_it_is_the_single_classifier_bit_for_bit():
    learner, single = joint(NAMES[:1]), alone(NAMES[:1])["greek"]
    assert [update(learner) for _ in range(6)] == [update(single) for _ in range(6)]
    assert np.array_equal(shared(learner), shared(single))
    assert np.array_equal(local(learner), local(single))
    assert learner.progress() == single.progress()


def test_each_data_set_comes_once_before_any_comes_again_in_an_order_that_the_seed_determines():
    batches = order(joint(), 30)
    rounds = [tuple(batches[start : start + 3]) for start in range(0, 30, 3)]
    assert all(sorted(one) == sorted(NAMES) for one in rounds)
    assert len(set(rounds)) > 2, "the order changes from round to round"
    assert order(joint(), 30) == batches
    assert order(joint(seed=6), 30) != batches


def test_a_data_set_without_epochs_left_comes_no_more_and_the_task_ends_with_the_last_of_them():
    classifiers = alone(settings=SupervisedSettings(batch=8, epochs=1))  # 24 images, so three batches
    classifiers["greek"] = classifier(dataset(0), PHI, settings=SupervisedSettings(batch=8, epochs=2))
    learner = JointClassifier(classifiers, seed=5, state=None)
    found: list[str] = []
    while not learner.done:
        found += order(learner, 1)
    assert {name: found.count(name) for name in NAMES} == {"greek": 6, "latin": 3, "tagalog": 3}
    assert found[-3:] == ["greek"] * 3


def test_progress_has_the_errors_in_the_order_of_the_batches():
    learner = joint()
    assert learner.progress().scores == ()
    first = order(learner, 7)
    told = learner.progress()
    assert told.ended == tuple(8 * batch for batch in range(1, 8))
    for name, one in learner._classifiers.items():
        assert [
            score for score, of in zip(told.scores, first, strict=True) if of == name
        ] == one.curve().errors.tolist()
    assert told.means["error"] == pytest.approx(np.mean(told.scores))
    every_loss = np.concatenate([one.curve().losses for one in learner._classifiers.values()])
    assert told.means["loss"] == pytest.approx(every_loss.mean())
    order(learner, 2)
    assert learner.progress().ended == (64, 72)


def test_the_heads_of_an_earlier_task_are_taken_over():
    learner = joint()
    order(learner, 6)
    state = local(learner)
    assert np.array_equal(local(joint(state=state)), state)
    assert not np.array_equal(local(joint()), state)


def test_a_step_needs_a_gradient_and_the_loss_alone_changes_nothing():
    learner = joint()
    with pytest.raises(RuntimeError, match="backward"):
        learner.step()
    learner.evaluate()
    assert np.array_equal(shared(learner), PHI)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, object]:
    """A run of two meta-updates, each of two tasks of 40 images, on small parts of two data sets."""
    for name in ("mnist", "notmnist"):
        write_part(tmp_path / "data", name)
    return {
        "preset": "smoke", "tasks": "multi-cv", "games": ("mnist", "notmnist"), "data_dir": str(tmp_path / "data"),
        "meta_learner": "multitask", "meta_updates": 2, "meta.batch_size": 2, "task_steps": 40, "supervised.batch": 10,
        "worker.device": "cpu", "worker.precision": "float32", "supervised.epochs": 0, "supervised.patience": 0,
    }  # fmt: skip


def phi(run: leap_dist.Run) -> np.ndarray:
    return np.concatenate([tensor.ravel() for tensor in run.initialization.tensors.values()])


def test_a_run_that_was_stopped_ends_like_one_that_was_not_bit_for_bit(tmp_path, monkeypatch, settings):
    in_process_driver.install(monkeypatch)
    whole = leap_dist.train(settings, run_dir=tmp_path / "whole", progress=False)
    half = leap_dist.train({**settings, "meta_updates": 1}, run_dir=tmp_path / "half", progress=False)
    stopped = phi(half)
    resumed = leap_dist.train({"meta_updates": 2}, run_dir=tmp_path / "half", resume=True, progress=False)
    learned = [phi(run) for run in (whole, resumed)]
    assert np.array_equal(*learned)
    assert not np.array_equal(stopped, learned[0])
    states = [CheckpointStore(tmp_path / name / "checkpoints", 3).load_newest()[0] for name in ("whole", "half")]
    heads = [state.heads["all_games"] for state in states if state is not None]
    assert np.array_equal(*heads)
    assert len(heads[0]) == 2 * (256 + 1) * 10, "a head for each data set"
    lines = Ledger(tmp_path / "whole" / "ledger.jsonl").lines()
    assert [(line["game"], line["steps"], line["updates"]) for line in lines] == [("all_games", 80, 8)] * 2


def test_images_need_fixed_labels_and_all_else_that_joint_learning_needs():
    for given, message in {
        "supervised.labels=drawn": "changes the classes for which multitask keeps heads",
        "mode=buffered": "mode: buffered does not go with meta_learner multitask",
    }.items():
        name, _, value = given.partition("=")
        with pytest.raises(ConfigError, match=message):
            resolve("smoke", {"tasks": "omniglot", "meta_learner": "multitask", name: value})
