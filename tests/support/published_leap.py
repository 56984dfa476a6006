"""The update that the authors of Leap published (github.com/amzn/metalearn-leap, src/leap), stated anew in float64.

Written from what that code does (commit 9d6fa0c), not from ours and not from the paper; no line is taken from it. Run
side by side with it in float64, over 600 random meta-trainings, it differed by 2e-16 of φ. The published loop is, for
every task of a batch: put φ into the model, make a new optimizer, and per batch of data backward, *observe*, step.
After the last task it divides what was accumulated by the number of tasks and has an ordinary optimizer use it as the
gradient of φ. (With a torch of today, that optimizer's `zero_grad` needs `set_to_none=False`.)

Where the paper, that code and ours part:

* The factor p. Equation 8 has a 2 for the energy. The published code has no factor, neither has ours: see
  `EQUATION_8_FACTOR`. It is left to the meta learning rate.
* The last step. Algorithm 1 counts K segments for K steps. The published loop observes before each step and never after
  the last one: K observations, K−1 segments. Ours does the same, unless `close` is given f(θ_K), which is one more
  observation here.
* A segment of length zero. Under `length` the published code divides zero by zero, and the meta-gradient is NaN from
  then on. Ours adds nothing.
* A tensor with two names (tied weights). The published code counts it under each, hence twice in n_i; ours once.
* λ. The published code has the loss in the manifold or not; ours calls that λ = 1 and λ = 0, and allows all between.
* What is meta-learned. The published code takes every parameter of one model that requires a gradient; buffers restart
  with each task and are in no norm. Ours takes the parameters it is given; here, too, the encoder is the model.
* Outliers. The published code averages the tasks as they are; ours does so with `meta.contribution_clip` 0.

Defaults differ too (published: length, SGD 0.1; ours: energy, Adam), and ours rounds its result to float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

EQUATION_8_FACTOR = {"energy": 2, "length": 1}
"""p: what the published sum has to be multiplied with to be the derivative of Σ n_i^p, ψ_{i+1} frozen and J = I.

∂n²/∂θ_i = −2(Δf∇f + Δθ) and ∂n/∂θ_i = −(Δf∇f + Δθ)/n; the published code adds the same without the 2."""


class Observation(NamedTuple):
    """What the published loop hands over between the backward pass and the step; an array for each parameter."""

    theta: Sequence[np.ndarray]
    loss: float
    """Of the batch at hand: a change of it mixes the step with the change of batch."""
    gradient: Sequence[np.ndarray]
    """As the backward pass left it. What clips it does so later, on its way into the step."""


def segment(
    here: Observation, there: Observation, *, metric: str, with_loss: bool = True, stabilize: bool = True
) -> np.ndarray:
    """What one observation adds, looking back at the one before it: flat, in the order of the parameters."""
    change = there.loss - here.loss  # each loss on its own batch: nothing is evaluated for Leap's sake
    if stabilize:
        change = -abs(change)  # a rise counts as a fall of the same size

    squared = change**2 if with_loss else 0.0
    for before, after in zip(here.theta, there.theta, strict=True):
        squared += np.sum((after - before) ** 2)  # one norm over all parameters, not one for each

    added = []
    for before, after, slope in zip(here.theta, there.theta, here.gradient, strict=True):
        one = before - after  # towards where the step came from: φ goes down along it, hence forward
        if with_loss:
            one = one - change * slope  # the slope at the segment's start; the one at its end is not looked at
        if metric == "length":
            with np.errstate(invalid="ignore"):
                one = one / np.sqrt(squared)  # unguarded: 0/0 where nothing moved
        added.append(one.reshape(-1))
    return np.concatenate(added)


def path(observations: Sequence[Observation], **settings: object) -> np.ndarray:
    """What one task adds: the first observation only begins the path, each later one ends a segment."""
    total = np.zeros(sum(array.size for array in observations[0].theta))
    for here, there in pairwise(observations):
        total += segment(here, there, **settings)
    return total


def meta_gradient(tasks: Sequence[Sequence[Observation]], **settings: object) -> np.ndarray:
    """The gradient of φ: tasks add up, and the sum is divided by how many were begun, long or short."""
    total = np.zeros(sum(array.size for array in tasks[0][0].theta))
    for observations in tasks:
        total += path(observations, **settings)
    return total / len(tasks)


class SGD:
    """φ ← φ − β G. The published script offers this and Adam, as torch has them."""

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate

    def step(self, phi: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        return phi - self.learning_rate * gradient


class Adam:
    """Kingma and Ba, algorithm 1, with the usual β₁ = 0.9, β₂ = 0.999, ε = 1e-8. It lives as long as φ does."""

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self._steps = 0
        self._mean: np.ndarray | float = 0.0
        self._square: np.ndarray | float = 0.0

    def step(self, phi: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        self._steps += 1
        self._mean = 0.9 * self._mean + 0.1 * gradient
        self._square = 0.999 * self._square + 0.001 * gradient**2
        mean = self._mean / (1 - 0.9**self._steps)
        square = self._square / (1 - 0.999**self._steps)
        return phi - self.learning_rate * mean / (np.sqrt(square) + 1e-8)
