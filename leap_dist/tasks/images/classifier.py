"""Supervised classification of small images: a task is a data set, the loss the cross-entropy of a batch.

What the paper leaves open is as in the authors' published code (amzn/metalearn-leap, src/omniglot): order of the
network's layers, shape of the augmentation, which statistics batch norm uses, what the area under a curve is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from leap_dist.config.settings import SupervisedSettings, WorkerSettings
from leap_dist.leap.learner import Progress
from leap_dist.nn.convnet import ConvNet, initialize
from leap_dist.nn.device import resolve_device, resolve_precision
from leap_dist.nn.flat_vector import add_vector, load_vector
from leap_dist.nn.profiling import Stopwatch
from leap_dist.tasks.images.examples import Dataset, Draws, Examples, Seeds, Source, draws_for_test, tensors_of

HELD_OUT_BATCH = 500
"""Images at once when the held-out ones are classified; it decides nothing but how much memory that takes."""


class Curve(NamedTuple):
    """Of a task's updates so far, one number for each, float64: the batch's loss and the part that was wrong."""

    losses: np.ndarray
    errors: np.ndarray


class Score(NamedTuple):
    """On the held-out images."""

    error: float
    """The part that was classified wrongly."""
    loss: float


class Patience:
    """Says when an error, noted every now and then, has not been the lowest for long; never with a length of 0."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._lowest = math.inf
        self._since = 0

    def note(self, error: float) -> None:
        """The error as it is now."""
        self._since = 0 if error < self._lowest else self._since + 1
        self._lowest = min(self._lowest, error)

    @property
    def over(self) -> bool:
        """Enough."""
        return 0 < self._length <= self._since


class Classifier:
    """One network learning one data set, from given parameters. Implements `leap_dist.leap.learner.Learner`.

    A step of the task is one example. Batch norm's averages begin anew in every task; they are no parameters.

    Args:
        data: of the task. It is kept as bytes, once.
        vector: flat float32 vector φ that the shared parameters start from.
        seed: determines head, batches and augmentation: on a CPU the same seed gives the same run, bit for bit.
        scope: which parameters are shared: "encoder" (or "convolutions", which is the same here), or "model", with one
            head for all tasks.
        head_seed: determines the task's own parameters instead of `seed`, where they last from task to task.
        head_change: flat float32 vector, what earlier tasks added to the parameters that `head_seed` gives.
        stopwatch: to be told what the time goes to.
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
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.stopwatch = stopwatch or Stopwatch()
        device = torch.device(resolve_device(worker.device))
        self._seeds = Seeds.of(seed)
        _, side, _, channels = data.train.images.shape
        self._model = ConvNet(channels, side, data.classes)
        initialize(self._model, torch.Generator().manual_seed(self._seeds.head if head_seed is None else head_seed))
        self._model.to(device)
        self.shared: Mapping[str, Tensor]
        self.local: Mapping[str, Tensor]
        self.shared, self.local = self._model.parameters_of(scope)
        load_vector(self.shared, vector)
        if head_change is not None:
            add_vector(self.local, head_change)
        self._parameters = list(self._model.parameters())
        self._targets = [parameter.detach() for parameter in self._parameters]  # the same memory, outside the graph
        self.steps_per_update = settings.batch
        self.descent: float | None = settings.learning_rate
        self._learning_rate = settings.learning_rate
        self._dtype = resolve_precision(worker.precision, device.type)

        def source(examples: Examples) -> Source:
            return Source(*tensors_of(examples, settings, self._seeds), data, device)

        self._train, self._held_out = source(data.train), source(data.test)
        self._draws = Draws(self._train.count, settings, self._seeds)
        self._settings = settings
        self._fresh = Draws(self._held_out.count, settings, self._seeds._replace(order=self._seeds.test))
        self._validation = None if data.validation is None else source(data.validation)
        self._patience, self._scored = Patience(settings.patience), 0  # epochs
        self._most = settings.epochs * self._train.count or math.inf
        self._see: Callable[[np.ndarray], None] | None = None
        self._seen = 0
        self._recent: list[tuple[Tensor, Tensor, Tensor]] = []  # loss, logits and labels of each batch
        self._past: list[np.ndarray] = []

    def backward(self) -> Tensor:
        """Leaves the gradient of a fresh batch's mean cross-entropy in `.grad`. Returns the loss, shape ()."""
        with self.stopwatch("update"):
            return self._backward(*self._batch())

    def measure(self) -> Tensor:
        """The same of a batch of held-out images; they are no part of the curve."""
        with self.stopwatch("update"):
            images, labels = self._held_out.take(*self._fresh.next())
            self._seen += len(labels)
            return self._backward(images, labels, note=False)

    def _backward(self, images: Tensor, labels: Tensor, *, note: bool = True) -> Tensor:
        logits = self._logits(images)
        loss = F.cross_entropy(logits, labels)
        # Zeros for what is not used: the biases of convolutions are constants.
        gradients = torch.autograd.grad(loss, self._parameters, materialize_grads=True)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        return self._note(loss.detach(), logits.detach(), labels) if note else loss.detach()

    def step(self) -> None:
        """θ ← θ − α ∇f; the gradients are dropped, not overwritten."""
        with self.stopwatch("update"):
            gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
            if len(gradients) != len(self._parameters):
                raise RuntimeError("a parameter has no gradient: call step after backward")
            torch._foreach_add_(self._targets, gradients, alpha=-self._learning_rate)
            for parameter in self._parameters:
                parameter.grad = None

    @property
    def done(self) -> bool:
        """All epochs are over, or validation says that there is no more to gain."""
        epochs = self._seen // self._train.count
        if self._validation is not None and epochs > self._scored:
            self._patience.note(self._score(self._validation).error)
            self._scored = epochs
        return self._seen >= self._most or self._patience.over

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """The loss of one more batch, normalized by itself as in training, without a gradient, shape ()."""
        images, labels = self._batch()
        with self._model.without_trace():
            logits = self._logits(images)
        return self._note(F.cross_entropy(logits, labels), logits, labels)

    @torch.no_grad()
    def test(self) -> Score:
        """Classifies every held-out image once, augmented like the training images, as the network is now.

        Batch norm uses its averages over the task's training, so an image's class does not depend on the others'. They
        begin at (0, 1) and forget that by a tenth per update: a test means little before some 50 of them. Two calls in
        a row give the same, and training goes on as if there had been none.
        """
        return self._score(self._held_out)

    @torch.no_grad()
    def _score(self, source: Source, beat: Callable[[], None] = lambda: None) -> Score:
        """Of all images, each augmented once, the same at every call."""
        loss = wrong = 0.0
        maps = draws_for_test(source.count, self._settings, self._seeds)
        self._model.eval()
        for index in torch.arange(source.count).split(HELD_OUT_BATCH):
            images, labels = source.take(index, None if maps is None else maps[index])
            logits = self._logits(images)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            wrong += (logits.argmax(1) != labels).sum().item()
            beat()
        self._model.train()
        return Score(wrong / source.count, loss / source.count)

    def conclude(self, beat: Callable[[], None]) -> dict[str, float]:
        """Error and loss on the held-out images, and the error on the training images, as the network is now."""
        test, train = self._score(self._held_out, beat), self._score(self._train, beat)
        return {"test_error": test.error, "test_loss": test.loss, "train_error": train.error}

    def curve(self) -> Curve:
        """Of all updates so far."""
        self._settle()
        losses, errors = np.concatenate([np.empty((0, 2)), *self._past]).T
        return Curve(losses, errors)

    def progress(self) -> Progress:
        """The error of each batch since the last call, as scores, with the examples seen by then; and the means."""
        recent = self._settle()
        if not len(recent):
            return Progress((), {})
        losses, errors = recent.T
        ended = np.arange(self._seen - (len(recent) - 1) * self.steps_per_update, self._seen + 1, self.steps_per_update)
        means = {"loss": float(losses.mean()), "error": float(errors.mean())}
        return Progress(tuple(errors.tolist()), means, tuple(ended.tolist()))

    def show(self, see: Callable[[np.ndarray], None]) -> None:
        """Shows the first image of every batch."""
        self._see = see

    def close(self) -> None:
        """Nothing to free."""

    def _batch(self) -> tuple[Tensor, Tensor]:
        images, labels = self._train.take(*self._draws.next())
        if self._see is not None:
            self._see(images[0].cpu().numpy())
        self._seen += len(labels)
        return images, labels

    def _logits(self, images: Tensor) -> Tensor:
        """Float32. The context is entered for each pass: it keeps copies of the weights for as long as it is open."""
        with torch.autocast(images.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            logits: Tensor = self._model(self._train.normalized(images))
        return logits.float()

    def _note(self, loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Takes a batch into the curve. What was wrong is counted later, in many batches at once."""
        self._recent.append((loss, logits, labels))
        return loss

    def _settle(self) -> np.ndarray:
        """What was noted since the last call, (n, 2), to go into the past."""
        recent = np.empty((0, 2))
        if self._recent:
            losses, logits, labels = (torch.stack(part) for part in zip(*self._recent, strict=True))
            errors = (logits.argmax(2) != labels).double().mean(1)
            recent = torch.stack([losses.double(), errors], dim=1).cpu().numpy()
        self._past.append(recent)
        self._recent = []
        return recent
