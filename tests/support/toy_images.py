"""Data sets of small images that can be learned in a few updates, for tests of the supervised learner."""

from __future__ import annotations

from typing import Any

import numpy as np

from leap_dist.config.image_settings import SupervisedSettings
from leap_dist.config.settings import WorkerSettings
from leap_dist.tasks.images.classifier import Classifier
from leap_dist.tasks.images.examples import Dataset, Examples

SIDE = 16
CLASSES = 4
SETTINGS = SupervisedSettings(batch=8)
WORKER = WorkerSettings(device="cpu", precision="float32")


def dataset(seed: int = 0, *, channels: int = 1, noise: float = 0.5, classes: int = CLASSES, each: int = 6) -> Dataset:
    """A random pattern for each class, and noise of its own for each image: `each` to train, half as many held out."""
    random = np.random.default_rng(seed)
    patterns = random.uniform(0, 255, (classes, SIDE, SIDE, channels))

    def examples(count: int) -> Examples:
        labels = np.repeat(np.arange(classes), count)
        own = random.uniform(0, 255, (len(labels), SIDE, SIDE, channels))
        return Examples(((1 - noise) * patterns[labels] + noise * own).astype(np.uint8), labels)

    return Dataset(examples(each), examples(each // 2), classes)


def classifier(data: Dataset, vector: np.ndarray, **settings: Any) -> Classifier:
    return Classifier(data, vector, **{"seed": 1, "settings": SETTINGS, "worker": WORKER, **settings})
