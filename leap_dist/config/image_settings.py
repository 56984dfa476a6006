"""Declarations of the settings of image classification: how a task is learned, and when meta-training ends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from leap_dist.config.declaration import setting


@dataclass(frozen=True)
class SupervisedSettings:
    """The classifier for omniglot, multi-cv and images (appendices C and D)."""

    batch: int = setting(20, "number of examples in a batch", low=1, high=100_000)
    learning_rate: float = setting(0.1, "learning rate α of gradient descent", above=0)
    shuffle: Literal["epoch", "task"] = setting(
        "epoch",
        "order of a task's images: each once before any is repeated, in a new random order every time (epoch), or all "
        "visits of the whole task in one random order, as in the authors' code (task)",
    )
    augmentation: Literal["none", "affine", "rotations", "turned"] = setting(
        "none",
        "augmentation of images: none; a random rotation, shift and scale of each (affine); a random one of 36 "
        "rotations of each (rotations); or one rotation for the whole task (turned)",
    )
    pretraining: int = setting(
        20, "omniglot: number of alphabets in the set `pretraining`, drawn by seed", low=1, high=35
    )
    labels: Literal["fixed", "drawn"] = setting(
        "fixed",
        "omniglot: labels of the characters: the same in every task of an alphabet (fixed), or permuted for each "
        "task, so that a head cannot memorize them (drawn)",
    )
    resampling: Literal["lanczos", "nearest"] = setting(
        "lanczos", "omniglot: filter that resizes images from 105 × 105 to 28 × 28"
    )
    rotations: int = setting(
        0, "omniglot: number of fixed random rotations of each image; 0: the images as they are", low=0, high=360
    )
    split: Literal["drawing", "first", "image", "training"] = setting(
        "drawing",
        "omniglot: how a task's test images are chosen: five drawings of each character with all their rotations, "
        "drawn by seed (drawing) or the first five (first); a quarter of all images, so that other rotations of a "
        "test drawing are trained on (image); or the training images themselves, as in the authors' code until "
        "December 2019 (training)",
    )
    held_out_images: Literal["rotated", "upright"] = setting(
        "rotated", "omniglot: test and validation images: rotated like the training images, or upright"
    )
    polarity: Literal["white-ink", "black-ink"] = setting(
        "white-ink", "omniglot: white ink on black paper, or black ink on white paper"
    )
    network: Literal["pool-norm", "norm-pool", "authors"] = setting(
        "pool-norm",
        "order of layers after a convolution: pooling, batch norm, ReLU (pool-norm), or batch norm, ReLU, pooling "
        "(norm-pool); authors is pool-norm with scales γ of batch norm drawn from [0, 1)",
    )
    epochs: int = setting(
        0, "end a task after this many passes over its images, if task_steps is not reached first; 0: no limit", low=0
    )
    patience: int = setting(
        0,
        "end a task after this many epochs without a new lowest error on its validation images; 0: never",
        low=0,
    )
    patience_steps: int = setting(
        0, "like patience, but counted in updates, for tasks with long epochs; use one of the two", low=0, high=10**9
    )
    validation_interval: int = setting(
        25, "number of updates between two measurements of the validation error, with patience_steps", low=1
    )
    validation: float = setting(
        0.15,
        "fraction of a task's training images that is kept for validation, with patience or patience_steps",
        above=0,
        high=0.5,
    )
    test_learning_rate: float = setting(
        0.0,
        "learning rate of evaluations, and of an arm's tests in studies (see --with); 0: that of training, or in "
        "studies the one that all tests share",
        low=0,
    )
    test_epochs: int = setting(0, "like epochs, but for the runs of studies and evaluations; 0: as in training", low=0)
    test_interval: int = setting(
        0, "minimum number of updates between two tests within an evaluation's run; 0: test only at its end", low=0
    )

    def in_tests(self) -> SupervisedSettings:
        """Return the settings for the runs of studies and evaluations."""
        return replace(self, epochs=self.test_epochs or self.epochs)

    def test_steps(self, task_steps: int) -> int:
        """Return the usual length of such a run, in examples, if a training task has `task_steps`.

        It is longer in proportion to the epochs, so that the number of epochs remains the limit.
        """
        return task_steps * self.test_epochs // self.epochs if self.test_epochs and self.epochs else task_steps


@dataclass(frozen=True)
class EarlyStoppingSettings:
    """Early stopping on omniglot's validation alphabets (appendix C)."""

    interval: int = setting(
        0, "number of meta-updates between two measurements of the validation alphabets' error; 0: none", low=0
    )
    patience: int = setting(
        5, "stop after this many measurements without a new lowest error; 0: measure, but never stop", low=0
    )
    task_steps: int = setting(
        0,
        "examples that a measurement trains on for each alphabet; 0: task_steps, or more if supervised.test_epochs is "
        "more than supervised.epochs",
        low=0,
    )
