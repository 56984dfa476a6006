"""Division of a task's images into training, validation and test images, and their fixed rotations.

The paper augments its data "with 36 random rotations" (appendix C) and does not say which images of a task are held
out. If whole drawings are, no rotation of a test image is trained on. If rotated images are divided instead, the
network has seen other rotations of every test image, so its test error says less about new drawings. The authors' code
of May 2019 tested on the training images (docs/results-omniglot.md).
"""

from __future__ import annotations

import zlib

import numpy as np

from leap_dist.config.image_settings import SupervisedSettings
from leap_dist.datasets.omniglot import CLASSES, DRAWINGS, HELD_OUT_DRAWINGS, rotated
from leap_dist.datasets.splits import ClassificationProblem, Split, divide, hold_out
from leap_dist.tasks.images.examples import Dataset, Examples

MAX_VALIDATION_IMAGES = 400
"""Maximum number of rotated images in a validation set: it is classified many times during a task."""


def divided(data: ClassificationProblem, settings: SupervisedSettings, seed: int) -> Dataset:
    """Return the images that a learner trains, validates and is tested on: a pure function of the arguments.

    Validation images are taken from the training images, and there are none unless the settings have a patience. With
    rotations, the set of them is limited to MAX_VALIDATION_IMAGES.
    """
    train, test, validation = data.train, data.test, None
    patient = bool(settings.patience or settings.patience_steps)
    by_image = settings.split == "image" and settings.rotations > 0
    own = (seed, zlib.crc32(data.name.encode()))  # other alphabets are rotated by other angles
    if by_image:
        both = Split(np.concatenate([test.images, train.images]), np.concatenate([test.labels, train.labels]))
        train, test = hold_out(_rotated(both, settings, own, 0), HELD_OUT_DRAWINGS / DRAWINGS, seed)
    if patient:
        train, validation = hold_out(train, settings.validation, seed)
    if settings.rotations and not by_image:
        train = _rotated(train, settings, own, 0)
        if settings.held_out_images == "rotated":
            test = _rotated(test, settings, own, 1)
            validation = None if validation is None else _rotated(validation, settings, own, 2)
    if settings.split == "training":
        test = train
    if settings.rotations and validation is not None and len(validation) > MAX_VALIDATION_IMAGES:
        fraction = MAX_VALIDATION_IMAGES / CLASSES / (len(validation) / data.classes)
        validation = validation.take(divide(validation.labels, fraction, seed)[1])
    return Dataset(
        _examples(train, settings),
        _examples(test, settings),
        data.classes,
        mean=data.mean,
        std=data.std,
        validation=None if validation is None else _examples(validation, settings),
    )


def relabeled(data: Dataset, classes: np.ndarray) -> Dataset:
    """Return the same images with label `classes[i]` in place of i."""

    def renamed(examples: Examples) -> Examples:
        return Examples(examples.images, classes[examples.labels])

    return Dataset(
        renamed(data.train),
        renamed(data.test),
        data.classes,
        mean=data.mean,
        std=data.std,
        validation=None if data.validation is None else renamed(data.validation),
    )


def _rotated(split: Split, settings: SupervisedSettings, own: tuple[int, int], part: int) -> Split:
    return rotated(split, int(np.random.SeedSequence((*own, part)).generate_state(1)[0]), settings.rotations)


def _examples(split: Split, settings: SupervisedSettings) -> Examples:
    """Return images as the network sees them. Rotated images are inverted as a whole, so their corners are paper."""
    inverted = settings.polarity == "black-ink"
    return Examples(255 - split.images if inverted else split.images, split.labels)
