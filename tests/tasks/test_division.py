"""Which images of an alphabet are trained on and which are held out, and how they are rotated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from leap_dist.config.image_settings import SupervisedSettings
from leap_dist.config.loading import resolve
from leap_dist.config.settings import ALL_GAMES
from leap_dist.datasets import omniglot
from leap_dist.nn.profiling import Stopwatch
from leap_dist.protocol.messages import Lease, Task
from leap_dist.protocol.seeds import derived_seed
from leap_dist.tasks.images import family
from leap_dist.tasks.images.classifier import Classifier
from leap_dist.tasks.images.division import MAX_VALIDATION_IMAGES, divided
from leap_dist.tasks.starting_point import StartingPoint
from leap_dist.worker.heartbeat import no_heartbeat

SIDE = 28
ROTATED = SupervisedSettings(rotations=4)
PATIENT = replace(ROTATED, patience_steps=10)


def numbered_alphabet() -> omniglot.Omniglot:
    """Twenty characters of twenty drawings: disks, which look the same however they are turned, of two shades each."""
    down, right = np.indices((SIDE, SIDE)) - (SIDE - 1) / 2
    high, low = np.divmod(np.arange(400), 40)
    drawings = np.zeros((400, SIDE, SIDE), np.uint8)
    drawings[:, down**2 + right**2 < 150] = 55 + 5 * low[:, None]
    drawings[:, down**2 + right**2 < 16] = 5 + 5 * high[:, None]
    return omniglot.Omniglot({"Greek": drawings.reshape(20, 20, SIDE, SIDE)})


def numbers(images: np.ndarray) -> list[tuple[int, int]]:
    """Which drawing each image is of, whichever way it is turned."""
    rings, centers = images[:, 13, 6, 0] / 5, images[:, 13, 13, 0] / 5
    return [(round(ring), round(center)) for ring, center in zip(rings, centers, strict=True)]


DATA = numbered_alphabet().task("Greek", 0)


def test_whole_drawings_are_held_out_with_all_their_rotations():
    found = divided(DATA, ROTATED, 0)
    assert found.train.images.shape == (20 * 15 * 4, SIDE, SIDE, 1)
    assert found.test.images.shape == (20 * 5 * 4, SIDE, SIDE, 1)
    assert found.validation is None
    assert np.array_equal(np.bincount(found.test.labels), [20] * 20)
    trained, tested = set(numbers(found.train.images)), set(numbers(found.test.images))
    assert (len(trained), len(tested)) == (300, 100)
    assert not trained & tested


def test_validation_drawings_are_apart_from_those_of_training_and_test():
    found = divided(DATA, PATIENT, 0)
    assert found.validation is not None
    parts = [set(numbers(part.images)) for part in (found.train, found.validation, found.test)]
    assert [len(part) for part in parts] == [260, 40, 100], "two of 15, which is 0.15 of them"
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]
    many = divided(DATA, replace(PATIENT, rotations=36), 0)
    assert many.validation is not None
    assert len(many.validation.labels) == MAX_VALIDATION_IMAGES
    assert np.array_equal(np.bincount(many.validation.labels), [20] * 20)
    assert len(many.train.labels) == 260 * 36, "what is left over is not trained on"


def test_a_split_by_image_trains_on_other_rotations_of_what_it_tests():
    found = divided(DATA, replace(ROTATED, split="image"), 0)
    assert (len(found.train.labels), len(found.test.labels)) == (1200, 400)
    assert np.array_equal(np.bincount(found.test.labels), [20] * 20)
    trained, tested = set(numbers(found.train.images)), set(numbers(found.test.images))
    assert len(trained & tested) > 250, "three quarters of the drawings' rotations are on both sides"


def test_the_training_images_may_be_the_test_images():
    found = divided(DATA, replace(ROTATED, split="training"), 0)
    assert np.array_equal(found.test.images, found.train.images)
    assert np.array_equal(found.test.labels, found.train.labels)
    assert len(found.test.labels) == 300 * 4
    upright = divided(DATA, replace(ROTATED, split="training", rotations=0), 0)
    assert np.array_equal(upright.test.images, DATA.train.images)


def test_held_out_images_may_be_upright():
    found = divided(DATA, replace(PATIENT, held_out_images="upright"), 0)
    assert np.array_equal(found.test.images, DATA.test.images)
    assert found.validation is not None
    assert len(found.validation.labels) == 40
    assert len(found.train.labels) == 260 * 4


def test_rotations_are_made_by_the_seed_and_other_alphabets_have_other_ones():
    letter = np.zeros((20, 20, SIDE, SIDE), np.uint8)
    letter[..., 4:24, 10:13] = 255
    data = omniglot.Omniglot({"Greek": letter, "Latin": letter})
    greek = divided(data.task("Greek", 0), ROTATED, 0).train.images
    assert np.array_equal(greek, divided(data.task("Greek", 0), ROTATED, 0).train.images)
    assert not np.array_equal(greek, divided(data.task("Greek", 0), ROTATED, 1).train.images)
    assert not np.array_equal(greek, divided(data.task("Latin", 0), ROTATED, 0).train.images)
    assert len({image.tobytes() for image in greek[:8]}) == 8, "each image has angles of its own"


@pytest.mark.parametrize("rotations", [0, 4])
def test_black_ink_is_white_ink_inverted(rotations):
    white = divided(DATA, replace(ROTATED, rotations=rotations), 0)
    black = divided(DATA, replace(ROTATED, rotations=rotations, polarity="black-ink"), 0)
    for one, other in ((white.train, black.train), (white.test, black.test)):
        assert np.array_equal(other.images, 255 - one.images)
        assert np.array_equal(other.labels, one.labels)


def test_without_new_settings_images_are_what_they_were():
    found = divided(DATA, SupervisedSettings(), 0)
    assert np.array_equal(found.train.images, DATA.train.images)
    assert np.array_equal(found.test.images, DATA.test.images)


def test_the_first_drawings_may_be_held_out():
    drawings = numbered_alphabet()
    found = drawings.task("Greek", 3, first=True)
    for label in range(20):
        tested = found.test.images[found.test.labels == label]
        (character,) = {c for c in range(20) if np.array_equal(drawings.drawings["Greek"][c, :5], tested[..., 0])}
        trained = found.train.images[found.train.labels == label]
        assert np.array_equal(drawings.drawings["Greek"][character, 5:], trained[..., 0])


def test_a_process_rotates_an_alphabet_once_and_draws_labels_at_every_visit(monkeypatch):
    monkeypatch.setattr(family, "_omniglot", lambda *_: numbered_alphabet())
    given = {"tasks": "omniglot", "games": ("greek",), "supervised.rotations": 3}
    omniglots = family.Omniglot()
    leases = [Lease("l", Task(0, "greek", 0, seed, 200), "w0", "i0", 0, 60.0) for seed in (1, 2)]
    one, other = (omniglots.dataset(resolve("smoke", given), lease) for lease in leases)
    assert one is other
    drawn = resolve("smoke", {**given, "supervised.labels": "drawn"})
    first, second = (omniglots.dataset(drawn, lease) for lease in leases)
    assert first.train.images is second.train.images
    assert not np.array_equal(first.train.labels, second.train.labels)
    for label in range(20):
        (before,) = set(one.train.labels[first.train.labels == label])
        assert set(one.test.labels[first.test.labels == label]) == {before}
    assert not np.array_equal(
        omniglots.dataset(replace(resolve("smoke", given), seed=1), leases[0]).train.images, one.train.images
    )


def losses(learner: Classifier, updates: int = 2) -> list[float]:
    found = []
    for _ in range(updates):
        found.append(learner.backward().item())
        learner.step()
    return found


@pytest.mark.parametrize("meta_learner", ["leap", "multitask"])
def test_a_learner_knows_the_length_of_the_task_in_whose_order_it_draws(monkeypatch, meta_learner):
    """A joint learner's batches are shared equally by its data sets: here, each of two gets 30 of 60."""
    drawings = numbered_alphabet().drawings["Greek"]
    both = omniglot.Omniglot({"Greek": drawings, "Latin": drawings[::-1]})
    monkeypatch.setattr(family, "_omniglot", lambda *_: both)
    joint = meta_learner == "multitask"
    given = {
        "tasks": "omniglot",
        "games": ("greek", "latin"),
        "meta_learner": meta_learner,
        "supervised.polarity": "white-ink",
    }
    config = resolve("authors", given, {"worker.device": "cpu", "worker.precision": "float32"})
    omniglots = family.Omniglot()
    _, vector = omniglots.initialization(config, 0, "encoder")
    start = StartingPoint(vector, "encoder", None, None)
    lease = Lease(
        "l", Task(0, ALL_GAMES if joint else "greek", 0, 1, 60 * 20 if joint else 30 * 20), "w0", "i0", 0, 60.0
    )
    learner = omniglots.learner(config, lease, start, Stopwatch(), no_heartbeat)

    def alone(updates: int) -> list[float]:
        seed = derived_seed(1, 0) if joint else 1
        data = divided(both.task("Greek", 0, first=True), config.supervised, 0)
        head = start.of_part("greek").head_seed if joint else None
        given = {"settings": config.supervised, "worker": config.worker, "head_seed": head}
        return losses(Classifier(data, vector, seed=seed, updates=updates, **given))

    found = losses(learner._classifiers["greek"] if joint else learner)
    assert found == alone(30)
    assert found != alone(29)
