"""One network that learns several data sets at once: shared convolutions, and a separate head for each data set.

This is multi-headed finetuning as the authors' published code does it (amzn/metalearn-leap, src/omniglot/wrapper.py,
`FtWrapper`): batches of all alphabets in random order, each of which moves the shared parameters
(`--meta-learner multitask`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

from leap_dist.leap.learner import EndlessLearner, Progress
from leap_dist.nn.flat_vector import load_vector
from leap_dist.tasks.images.classifier import Classifier


class JointClassifier(EndlessLearner):
    """Learns several data sets with the same convolutions. Implements `leap_dist.leap.learner.Learner`.

    Every batch belongs to one data set. Each data set comes once, in random order, before any of them comes again; a
    data set that has no epochs left, or whose validation error has stopped improving, is not drawn again.

    Args:
        classifiers: a classifier that has not trained yet for each data set, by name, all with the same shared
            parameters and the same batch size.
        seed: determines the order of the data sets.
        state: values of `local`, flat float32, from which training continues; None to begin anew.
    """

    def __init__(self, classifiers: Mapping[str, Classifier], seed: int, state: np.ndarray | None) -> None:
        self._classifiers = dict(classifiers)
        first, *others = self._classifiers.values()
        for other in others:
            other.share(first.shared)
        self.shared = first.shared
        self.local: Mapping[str, Tensor] = {
            f"{name}.{parameter}": tensor
            for name, one in self._classifiers.items()
            for parameter, tensor in one.local.items()
        }
        if state is not None:
            load_vector(self.local, state)
        self.descent = first.descent
        self.steps_per_update = first.steps_per_update
        self._random = np.random.default_rng(seed)
        self._left = list(self._classifiers)
        self._waiting: list[str] = []
        self._current = ""
        self._seen = 0
        self._order: list[str] = []  # names of the data sets of the batches since the last call of `progress`

    def backward(self) -> Tensor:
        """Set the gradient of a batch of the next data set in `.grad`, and return its mean cross-entropy, shape ()."""
        one = self._next()
        loss = one.backward()
        for parameter, own in zip(self.shared.values(), one.shared.values(), strict=True):
            parameter.grad = own.grad
        return loss

    def step(self) -> None:
        """Apply θ ← θ − α ∇f to the shared parameters and to the head of the batch's data set. Gradients are dropped.

        Raises RuntimeError if `backward` was not called before.
        """
        if not self._current:
            raise RuntimeError("there is no gradient: call step after backward")
        self._classifiers[self._current].step()
        for parameter in self.shared.values():
            parameter.grad = None

    @property
    def done(self) -> bool:
        """Whether training has ended for all data sets."""
        if self._current in self._left and self._classifiers[self._current].done:
            self._left.remove(self._current)
            self._waiting = [name for name in self._waiting if name != self._current]
        return not self._left

    def evaluate(self) -> Tensor:
        """Return the loss of a batch of the next data set, shape (), without a gradient."""
        return self._next().evaluate()

    def progress(self) -> Progress:
        """Return the batch errors since the last call as scores, the examples seen after each, and means."""
        if not self._order:
            return Progress((), {})
        found = {name: one.progress() for name, one in self._classifiers.items() if name in self._order}
        errors = {name: iter(progress.scores) for name, progress in found.items()}
        weights = [len(progress.scores) for progress in found.values()]
        means = {
            metric: float(np.average([progress.means[metric] for progress in found.values()], weights=weights))
            for metric in ("loss", "error")
        }
        first = self._seen - (len(self._order) - 1) * self.steps_per_update
        ended = tuple(range(first, self._seen + 1, self.steps_per_update))
        scores = tuple(next(errors[name]) for name in self._order)
        self._order = []
        return Progress(scores, means, ended)

    def show(self, see: Callable[[np.ndarray], None]) -> None:
        """Call `see` with the first image of every batch."""
        for one in self._classifiers.values():
            one.show(see)

    def close(self) -> None:
        """Do nothing: classifiers hold only memory."""

    def _next(self) -> Classifier:
        """Return the classifier of the next batch."""
        if not self._waiting:
            self._waiting = [self._left[i] for i in self._random.permutation(len(self._left))]
        self._current = self._waiting.pop()
        self._seen += self.steps_per_update
        self._order.append(self._current)
        return self._classifiers[self._current]
