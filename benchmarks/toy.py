"""Toy tasks for meta-learning in seconds (quadratics and sinusoids), and Algorithm 1 on them.

The learners implement the project's interface. Meta-learners, meta-update and path measurement are the project's own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from leap_dist.config.loading import resolve
from leap_dist.config.settings import Config
from leap_dist.leap import meta_learners
from leap_dist.leap.learner import EndlessLearner, Progress
from leap_dist.nn.actor_critic import initialize
from leap_dist.nn.flat_vector import add_vector, flatten, load_vector
from leap_dist.server.aggregation import Pull, combine
from leap_dist.server.meta_optimizer import MetaOptimizer
from leap_dist.worker.trajectory import limited_shift


class ToyLearner(EndlessLearner):
    """Common base of the toy learners: all parameters are meta-learned, the optimizer is SGD, nothing is reported."""

    shared: Mapping[str, Tensor]
    local: Mapping[str, Tensor]
    descent: float | None = None  # although plain SGD has a rate: the toys test what holds for any optimizer
    steps_per_update = 1
    learning_rate: float

    def __init__(self, shared: Mapping[str, Tensor], vector: np.ndarray) -> None:
        self.shared, self.local = shared, {}
        load_vector(shared, vector)

    def backward(self) -> Tensor:
        """Return f(θ_i) and store its gradient in `.grad`."""
        raise NotImplementedError

    def evaluate(self) -> Tensor:
        """Return f(θ_K), on a fresh batch if the task has batches."""
        raise NotImplementedError

    def expected_loss(self) -> float:
        """Return f of the whole task, instead of a batch, at the current parameters."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self) -> None:
        """Take the step θ ← θ − α ∇f."""
        for parameter in self.shared.values():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad, alpha=self.learning_rate)

    def progress(self) -> Progress:
        """Return empty progress."""
        return Progress((), {})

    def show(self, see: Callable[[np.ndarray], None]) -> None:
        """Do nothing, because there are no frames to show."""

    def close(self) -> None:
        """Do nothing, because there are no resources to free."""


class Quadratic(ToyLearner):
    """Quadratic f(θ) = ½ (θ−c)ᵀ A (θ−c) + offset with exact gradients in float64: deterministic gradient descent.

    Seed and `apart` determine the task. A's eigenvalues are log-uniform in [0.2, 2] and its basis is random; c is
    normal with ‖c‖ ≈ 1. If `apart` > 0, a random u, uniform in [−1, 1], makes A steeper by the factor 10^(u/2) and
    moves c by `apart`·u.
    """

    dimension = 10
    learning_rate = 0.1

    def __init__(self, vector: np.ndarray, seed: int, *, apart: float = 0.0) -> None:
        random = np.random.default_rng(seed)
        basis, _ = np.linalg.qr(random.normal(size=(self.dimension, self.dimension)))
        eigenvalues = np.exp(random.uniform(math.log(0.2), math.log(2.0), self.dimension))
        centre = random.normal(size=self.dimension) / math.sqrt(self.dimension)
        self.offset = random.uniform(0.0, 1.0)
        if apart > 0:
            u = random.uniform(-1.0, 1.0)
            eigenvalues *= 10 ** (u / 2)
            centre[0] += apart * u
        self.A, self.c = torch.from_numpy(basis * eigenvalues @ basis.T), torch.from_numpy(centre)
        self._theta = nn.Parameter(torch.zeros(self.dimension, dtype=torch.float64))
        super().__init__({"theta": self._theta}, vector)

    @torch.no_grad()
    def backward(self) -> Tensor:
        """Return f and store ∇f = A (θ−c)."""
        self._theta.grad = self.A @ (self._theta - self.c)
        return self.evaluate()

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """Return f, which has no batches."""
        difference = self._theta - self.c
        return 0.5 * torch.dot(difference, self.A @ difference) + self.offset

    def expected_loss(self) -> float:
        """Return f minus its minimum."""
        return self.evaluate().item() - self.offset


class Sinusoid(ToyLearner):
    """Regression on y = a sin(x + b) by a tanh network 1–40–40–1; f is the mean squared error of a fresh batch.

    The seed determines a in [0.1, 5], b in [0, π] and the batches of ten x, uniform in [−5, 5] (MAML, section 5.1).
    """

    steps_per_update = 10
    learning_rate = 0.02

    def __init__(self, vector: np.ndarray, seed: int) -> None:
        random = np.random.default_rng(seed)
        self._amplitude, self._phase = random.uniform(0.1, 5.0), random.uniform(0.0, math.pi)
        self._batches = torch.Generator().manual_seed(seed)
        self._network = _network()
        super().__init__(dict(self._network.named_parameters()), vector)

    def backward(self) -> Tensor:
        """Return f of a fresh batch and store ∇f."""
        self._network.zero_grad()
        loss = self._loss(self._batch())
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """Return f of a fresh batch."""
        return self._loss(self._batch())

    @torch.no_grad()
    def expected_loss(self) -> float:
        """Return f on an even grid."""
        return self._loss(torch.linspace(-5.0, 5.0, 101).unsqueeze(1)).item()

    def _batch(self) -> Tensor:
        return torch.rand(self.steps_per_update, 1, generator=self._batches) * 10.0 - 5.0

    def _loss(self, x: Tensor) -> Tensor:
        return nn.functional.mse_loss(self._network(x), self._amplitude * torch.sin(x + self._phase))


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))


def far_away(seed: int) -> np.ndarray:
    """Return φ₀ for quadratics: a random direction, three times as far from the origin as a typical center."""
    direction = np.random.default_rng(seed).normal(size=Quadratic.dimension)
    return (3.0 * direction / np.linalg.norm(direction)).astype(np.float32)


def untrained(seed: int) -> np.ndarray:
    """Return φ₀ for sinusoids, with orthogonal weights."""
    network = _network()
    initialize(network, torch.Generator().manual_seed(seed))
    return flatten(network.parameters()).numpy()


@dataclass(frozen=True)
class Family:
    """Distribution of tasks and the starting point of meta-learning."""

    make: Callable[[np.ndarray, int], ToyLearner]
    """Function that returns the learner at a given φ for the task of a given seed."""
    start: Callable[[int], np.ndarray]
    """Function that returns φ₀ as float32 for the seed of a run."""
    smallest_rates: dict[str, float]
    """Smallest meta learning rate of the search grid, by arm."""

    def learners(self, vector: np.ndarray, seeds: Sequence[int]) -> list[ToyLearner]:
        """Return one learner per task, all at φ."""
        return [self.make(vector, seed) for seed in seeds]


_QUADRATIC_RATES = {"leap, energy": 0.003, "leap, length": 0.001, "reptile": 0.03, "fomaml": 0.3}
FAMILIES = {
    "quadratics": Family(Quadratic, far_away, _QUADRATIC_RATES),
    "quadratics, steep apart": Family(functools.partial(Quadratic, apart=1.5), far_away, _QUADRATIC_RATES),
    "sinusoids": Family(
        Sinusoid,
        untrained,
        {
            "leap, energy": 0.0003,
            "leap, length": 0.001,
            "reptile": 0.03,
            "fomaml": 0.003,
            "no shift": 0.03,
            "increments": 0.03,
            "trajectory": 0.01,  # whole paths count with every push, so that they need smaller rates
        },
    ),
}


class Point(NamedTuple):
    """Means over tasks that train K updates from the same φ."""

    length: float
    energy: float
    loss: float
    """Final loss over the whole task instead of a batch, relative to the minimum if that is known."""


def configuration(arm: dict[str, Any], rollouts: int, rate: float = 1.0) -> Config:
    """Return the configuration of Algorithm 1 with an arm's meta-learner.

    A rollout counts as one agent step, so K is the step budget.
    """
    return resolve(
        "smoke",
        {"mode": "sync", "meta.optimizer": "sgd", "meta.learning_rate": rate, "meta.contribution_clip": 0.0},
        {"task_steps": rollouts, "agent.envs": 1, "agent.unroll": 1},
        arm,
    )


def train(config: Config, learner: ToyLearner) -> meta_learners.MetaLearner:
    """Train one task as a worker does, and return its meta-learner."""
    watch = meta_learners.make(config, learner)
    for _ in range(config.rollouts_per_task - config.held_back):
        watch.observe(learner.backward())
        learner.step()
    for _ in range(config.held_back):
        watch.observe_held_back()
    watch.finish()
    return watch


def meta_step(config: Config, learners: Sequence[ToyLearner], initialization: MetaOptimizer) -> bool:
    """Run one round of Algorithm 1's outer loop. If the result is not finite, leave φ unchanged and return False."""
    pulls = []
    for learner in learners:
        vector, _ = train(config, learner).report()
        pulls.append(Pull(0, vector.double().norm().item(), vector.numpy()))
    if not all(math.isfinite(pull.norm) for pull in pulls):
        return False
    direction = combine("sync", config.meta, pulls, version=0, vector=initialization.vector, recent=())
    return initialization.step(direction.gradient)


def stream(config: Config, learners: Sequence[ToyLearner], initialization: MetaOptimizer) -> bool:
    """Train one task per learner in lockstep in mode `stream`. If a step is not finite, stop there and return False.

    φ moves after every `worker.push_interval` rollouts, by what all tasks push, and then running tasks follow it as
    `meta.shift` says.
    """
    settings = dataclasses.replace(config.meta, batch_size=len(learners))
    watches = [meta_learners.make(config, learner) for learner in learners]
    sent = [np.zeros_like(initialization.vector) for _ in learners]
    for rollout in range(1, config.rollouts_per_task + 1):
        for watch, learner in zip(watches, learners, strict=True):
            watch.observe(learner.backward())
            learner.step()
        final = rollout == config.rollouts_per_task
        if rollout % config.worker.push_interval and not final:
            continue
        before, pushed = initialization.vector, [watch.report()[0].numpy() for watch in watches]
        whole = config.meta.shift == "trajectory"
        added = [new if whole else new - old for new, old in zip(pushed, sent, strict=True)]
        sent = pushed
        pulls = [Pull(0, float(np.linalg.norm(vector.astype(np.float64))), vector) for vector in added]
        direction = combine("stream", settings, pulls, version=0, vector=before, recent=())
        if not initialization.step(direction.gradient):
            return False
        if config.meta.shift != "no" and not final:
            for watch, learner in zip(watches, learners, strict=True):
                shift = limited_shift(initialization.vector - before, learner, config)
                watch.shift(add_vector(learner.shared, shift))
    return True


def measure(learners: Sequence[ToyLearner], updates: int, loss_weight: float = 1.0) -> Point:
    """Measure equation 4 over K updates. One more rollout evaluates f(θ_K), so the last update is included."""
    whole = {"meta_learner": "leap", "leap.final_loss": True, "leap.loss_weight": loss_weight}
    config = configuration(whole, updates + 1)
    paths = [train(config, learner).report()[1] for learner in learners]
    columns = [p.length for p in paths], [p.energy for p in paths], [x.expected_loss() for x in learners]
    return Point(*(float(np.mean(column)) for column in columns))


def shortest(tasks: Sequence[Quadratic], updates: int) -> np.ndarray:
    """Return the float32 φ that minimizes the tasks' mean path length (equation 4) over `updates` updates.

    That length is a convex function of φ as long as gradient descent does not overshoot. It is minimized directly, by
    differentiating through the updates.
    """
    matrices, centres = torch.stack([task.A for task in tasks]), torch.stack([task.c for task in tasks])
    initialization = centres.mean(0, keepdim=True).requires_grad_()
    optimizer = torch.optim.LBFGS([initialization], max_iter=500, line_search_fn="strong_wolfe")

    def length() -> float:
        optimizer.zero_grad()
        difference, points = initialization - centres, []
        for _ in range(updates + 1):
            gradient = torch.einsum("tij,tj->ti", matrices, difference)
            points.append(torch.cat([difference, 0.5 * (difference * gradient).sum(1, keepdim=True)], 1))
            difference = difference - Quadratic.learning_rate * gradient
        total = torch.stack(points).diff(dim=0).norm(dim=2).sum(0).mean()
        total.backward()
        return float(total.detach())

    optimizer.step(length)
    return flatten([initialization]).numpy()
