"""Supervised classification of small images: a task is a data set, and the loss is the cross-entropy of a batch.

Details that the paper does not state follow the authors' code (amzn/metalearn-leap, src/omniglot): the affine
augmentation, the statistics that batch norm uses, and the area under a curve. docs/studies.md compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from leap_dist.config.image_settings import SupervisedSettings
from leap_dist.config.settings import WorkerSettings
from leap_dist.leap.learner import LearnerState, Progress
from leap_dist.nn.convnet import ConvNet, initialize
from leap_dist.nn.device import resolve_device, resolve_precision
from leap_dist.nn.flat_vector import add_vector, load_vector
from leap_dist.nn.profiling import Stopwatch
from leap_dist.tasks.images.examples import (
    BatchSampler,
    Dataset,
    Examples,
    ImageStore,
    Seeds,
    maps_for_test,
    tensors_of,
)

HELD_OUT_BATCH = 500
"""Batch size for the classification of held-out images. It affects only the memory used."""


class Curve(NamedTuple):
    """Loss and error of every batch so far, float64 (updates,) each."""

    losses: np.ndarray
    errors: np.ndarray
    """Fraction of each batch that was classified wrongly."""


class Score(NamedTuple):
    """Result on a set of images."""

    error: float
    """Fraction of the images that was classified wrongly."""
    loss: float
    """Mean cross-entropy."""


class Prepared(NamedTuple):
    """Loss and gradient of a batch."""

    loss: Tensor
    """Mean cross-entropy, shape ()."""
    logits: Tensor
    labels: Tensor
    gradients: Sequence[Tensor]
    """Gradients of all parameters, in the order of the network."""


class Patience:
    """Early stopping: notices when an error has not improved for `length` measurements; never if `length` is 0."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._lowest = math.inf
        self._since = 0

    def add(self, error: float) -> None:
        """Add the next measurement."""
        self._since = 0 if error < self._lowest else self._since + 1
        self._lowest = min(self._lowest, error)

    @property
    def over(self) -> bool:
        """Whether training should stop."""
        return 0 < self._length <= self._since


class Classifier:
    """A network that learns one data set from given parameters. Implements `leap_dist.leap.learner.Learner`.

    A step of the task is one example. Batch norm's running averages are not parameters: each task starts with new ones.

    Args:
        data: the task's images, kept as bytes.
        vector: flat float32 vector φ that the shared parameters start from.
        seed: determines head, batches and augmentation. On a CPU the same seed gives the same run, bit for bit.
        scope: the shared parameters: "encoder" (or "convolutions", which is the same here), or "model" with one head
            for all tasks.
        head_seed: seed of the task's own parameters if they persist from task to task; None to use `seed`.
        head_change: flat float32 vector that earlier tasks added to the task's own parameters.
        updates: number of batches in the task, for `supervised.shuffle task`.
        stopwatch: measures how long each part of the work takes.
    """

    def __init__(
        self,
        data: Dataset,
        vector: np.ndarray,
        *,
        seed: int,
        settings: SupervisedSettings,
        worker: WorkerSettings,
        scope: str = "encoder",
        head_seed: int | None = None,
        head_change: np.ndarray | None = None,
        updates: int | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.stopwatch = stopwatch or Stopwatch()
        device = torch.device(resolve_device(worker.device))
        self._seeds = Seeds.of(seed)
        _, side, _, channels = data.train.images.shape
        self._model = ConvNet(channels, side, data.classes, settings.network)
        initialize(self._model, torch.Generator().manual_seed(self._seeds.head if head_seed is None else head_seed))
        self._model.to(device)
        self.shared: Mapping[str, Tensor]
        self.local: Mapping[str, Tensor]
        self.shared, self.local = self._model.parameters_of(scope)
        load_vector(self.shared, vector)
        if head_change is not None:
            add_vector(self.local, head_change)
        self._parameters = list(self._model.parameters())
        self._targets = [parameter.detach() for parameter in self._parameters]  # same memory, outside of autograd
        self.steps_per_update = settings.batch
        self.descent: float | None = settings.learning_rate
        self._learning_rate = settings.learning_rate
        self._dtype = resolve_precision(worker.precision, device.type)

        def store(examples: Examples) -> ImageStore:
            return ImageStore(*tensors_of(examples, settings, self._seeds), data, device)

        self._train, self._held_out = store(data.train), store(data.test)
        most = settings.epochs * self._train.count or math.inf
        if updates is not None and most < updates * settings.batch:  # the task ends with its last epoch
            updates = -(-int(most) // settings.batch)
        self._draws = BatchSampler(self._train.count, settings, self._seeds, updates)
        self._settings = settings
        in_epochs = replace(settings, shuffle="epoch")
        self._fresh = BatchSampler(self._held_out.count, in_epochs, self._seeds._replace(order=self._seeds.test))
        self._validation = None if data.validation is None else store(data.validation)
        self._check_every = self._train.count  # examples between two measurements of the validation error
        checks, self._scored, self._tested = settings.patience, 0, 0
        if settings.patience_steps:
            self._check_every = settings.validation_interval * settings.batch
            checks = -(-settings.patience_steps // settings.validation_interval)
        self._patience = Patience(checks)
        self._most = most
        self._on_image: Callable[[np.ndarray], None] | None = None
        self._seen = 0
        self._prepared: Prepared | None = None
        self._recent: list[tuple[Tensor, Tensor, Tensor]] = []  # loss, logits and labels of each batch
        self._past: list[np.ndarray] = []

    def share(self, shared: Mapping[str, Tensor]) -> None:
        """Use another classifier's shared parameters from now on: a step of either then moves both.

        To be called before the first `backward`.
        """
        for name, parameter in self.shared.items():
            parameter.data = shared[name].data
        self._targets = [parameter.detach() for parameter in self._parameters]

    def backward(self) -> Tensor:
        """Set the gradient of a new batch's mean cross-entropy in `.grad`, and return the loss, shape ()."""
        with self.stopwatch("update"):
            if self._prepared is None:
                return self._backward(*self._batch())
            prepared, self._prepared = self._prepared, None
            return self._set_gradient(prepared, in_curve=True)

    def backward_held_out(self) -> Tensor:
        """Do the same with a batch of held-out images, which is not a part of the curve."""
        with self.stopwatch("update"):
            images, labels = self._held_out.take(*self._fresh.next())
            self._seen += len(labels)
            return self._backward(images, labels, in_curve=False)

    def _backward(self, images: Tensor, labels: Tensor, *, in_curve: bool = True) -> Tensor:
        logits = self._logits(images)
        loss = F.cross_entropy(logits, labels)
        # The biases of convolutions do not take part in the graph; their gradient is zero.
        gradients = torch.autograd.grad(loss, self._parameters, materialize_grads=True)
        return self._set_gradient(Prepared(loss.detach(), logits.detach(), labels, gradients), in_curve=in_curve)

    def _set_gradient(self, found: Prepared, *, in_curve: bool) -> Tensor:
        for parameter, gradient in zip(self._parameters, found.gradients, strict=True):
            parameter.grad = gradient
        if in_curve:
            self._recent.append((found.loss, found.logits, found.labels))
        return found.loss

    # For `lockstep`, which computes the gradients of several classifiers at once -------------------------------------

    @property
    def kind(self) -> tuple[object, ...]:
        """Everything in which classifiers must agree to be computed together."""
        shapes = tuple(parameter.shape for parameter in self._parameters)
        return shapes, self._targets[0].device, self._dtype, self._settings.batch, self._settings.network

    @property
    def model(self) -> ConvNet:
        """The network."""
        return self._model

    def next_inputs(self) -> tuple[Tensor, Tensor]:
        """Draw the next batch: the network's input, float32 (batch, C, S, S), and labels (batch,)."""
        images, labels = self._batch()
        return self._train.normalized(images), labels

    def prepare(self, prepared: Prepared) -> None:
        """Set what the next `backward` returns and sets as gradient, computed for the batch of `next_inputs`."""
        self._prepared = prepared

    def loss(self, model: Callable[[Tensor], Tensor], inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean cross-entropy and logits, in the precision of the worker."""
        logits = self._in_precision(model, inputs)
        return F.cross_entropy(logits, labels), logits

    def step(self) -> None:
        """Apply θ ← θ − α ∇f. Gradients are dropped, not overwritten. Raises RuntimeError if one is missing."""
        with self.stopwatch("update"):
            gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
            if len(gradients) != len(self._parameters):
                raise RuntimeError("a parameter has no gradient: call step after backward")
            torch._foreach_add_(self._targets, gradients, alpha=-self._learning_rate)
            for parameter in self._parameters:
                parameter.grad = None

    @property
    def done(self) -> bool:
        """Whether all epochs are over, or the validation error has stopped improving."""
        checks = self._seen // self._check_every
        if self._validation is not None and checks > self._scored:
            self._patience.add(self._score(self._validation).error)
            self._scored = checks
        return self._seen >= self._most or self._patience.over

    def state(self) -> LearnerState | None:
        """Return None: a classifier trains for minutes at most, so it starts again from the beginning."""
        return None

    def load_state(self, state: LearnerState) -> None:
        """Raise RuntimeError, because there is no such state."""
        raise RuntimeError("an image classifier has no state to continue from")

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """Return the loss of one more batch, shape (), without a gradient. Batch norm works as in training."""
        images, labels = self._batch()
        with self._model.without_trace():
            logits = self._logits(images)
        loss = F.cross_entropy(logits, labels)
        self._recent.append((loss, logits, labels))
        return loss

    @torch.no_grad()
    def test(self) -> Score:
        """Classify every held-out image once with the current network, augmented like training images.

        Batch norm uses its running averages. They start at (0, 1) and move by a tenth per update, so a test means
        little before about 50 updates. Two calls in a row give the same result, and training is not affected.
        """
        return self._score(self._held_out)

    @torch.no_grad()
    def _score(self, store: ImageStore, beat: Callable[[], None] = lambda: None) -> Score:
        """Classify all images of a store, each augmented once, in the same way at every call."""
        loss = wrong = 0.0
        maps = maps_for_test(store.count, self._settings, self._seeds)
        self._model.eval()
        for index in torch.arange(store.count).split(HELD_OUT_BATCH):
            images, labels = store.take(index, None if maps is None else maps[index])
            logits = self._logits(images)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            wrong += (logits.argmax(1) != labels).sum().item()
            beat()
        self._model.train()
        return Score(wrong / store.count, loss / store.count)

    def interim(self, beat: Callable[[], None]) -> dict[str, float]:
        """Return error and loss on the held-out images, if `test_interval` updates have passed since the last test."""
        interval = self._settings.test_interval * self.steps_per_update
        if not interval or self._seen - self._tested < interval:
            return {}
        self._tested = self._seen
        test = self._score(self._held_out, beat)
        return {"test_error": test.error, "test_loss": test.loss}

    def conclude(self, beat: Callable[[], None]) -> dict[str, float]:
        """Return error and loss on the held-out images and the error on the training images, by name."""
        test, train = self._score(self._held_out, beat), self._score(self._train, beat)
        return {"test_error": test.error, "test_loss": test.loss, "train_error": train.error}

    def curve(self) -> Curve:
        """Return the curve of all updates so far."""
        self._settle()
        losses, errors = np.concatenate([np.empty((0, 2)), *self._past]).T
        return Curve(losses, errors)

    def progress(self) -> Progress:
        """Return the batch errors since the last call as scores, the examples seen after each, and means."""
        recent = self._settle()
        if not len(recent):
            return Progress((), {})
        losses, errors = recent.T
        ended = np.arange(self._seen - (len(recent) - 1) * self.steps_per_update, self._seen + 1, self.steps_per_update)
        means = {"loss": float(losses.mean()), "error": float(errors.mean())}
        return Progress(tuple(errors.tolist()), means, tuple(ended.tolist()))

    def show(self, see: Callable[[np.ndarray], None]) -> None:
        """Call `see` with the first image of every batch."""
        self._on_image = see

    def close(self) -> None:
        """Do nothing: a classifier holds only memory."""

    def _batch(self) -> tuple[Tensor, Tensor]:
        images, labels = self._train.take(*self._draws.next())
        if self._on_image is not None:
            self._on_image(images[0].cpu().numpy())
        self._seen += len(labels)
        return images, labels

    def _logits(self, images: Tensor) -> Tensor:
        """Return logits in float32."""
        return self._in_precision(self._model, self._train.normalized(images))

    def _in_precision(self, model: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Return logits in float32. Autocast is entered for each pass, because it caches copies of the weights."""
        with torch.autocast(inputs.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            logits: Tensor = model(inputs)
        return logits.float()

    def _settle(self) -> np.ndarray:
        """Compute loss and error of the batches since the last call, (n, 2), all at once, and keep them."""
        recent = np.empty((0, 2))
        if self._recent:
            losses, logits, labels = (torch.stack(part) for part in zip(*self._recent, strict=True))
            errors = (logits.argmax(2) != labels).double().mean(1)
            recent = torch.stack([losses.double(), errors], dim=1).cpu().numpy()
        self._past.append(recent)
        self._recent = []
        return recent
