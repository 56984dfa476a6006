"""Many classifiers in lockstep: the tasks of a meta-batch as one computation, for a GPU that one task leaves idle.

Each task has a row θ_b of one matrix (B, P). One pass of `torch.func` over all rows gives all gradients, and Leap's
accumulator is arithmetic on rows. Images, order, augmentation and heads are those of `Classifier` with the same seeds,
and the results are the same up to rounding. (If pixels of a pooling window are equal, rounding decides which of them
gets the gradient, and paths diverge sooner.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F

from leap_dist.config.image_settings import SupervisedSettings
from leap_dist.config.settings import LeapSettings, WorkerSettings
from leap_dist.nn.convnet import ConvNet, initialize
from leap_dist.nn.device import resolve_device, resolve_precision
from leap_dist.nn.flat_vector import flatten
from leap_dist.protocol.messages import PathStatistics
from leap_dist.tasks.images.classifier import Curve, Score
from leap_dist.tasks.images.examples import BatchSampler, Dataset, ImageStore, Seeds, maps_for_test, tensors_of

_SMALLEST_NORM = 1e-12


class Outcome(NamedTuple):
    """Result of training one task."""

    gradient: np.ndarray
    """Meta-gradient G (equation 8) with respect to the shared parameters, flat float32."""
    moved: np.ndarray
    """Displacement φ − θ_K, flat float32: what Reptile sends."""
    path: PathStatistics
    curve: Curve
    score: Score


class StackedPullForward:
    """Leap's accumulator for B paths at once, as `PullForward` is for one. It never waits for the device.

    Args:
        start: the shared parameters of each task, (B, S).
        settings: settings of Leap; smoothing is not supported.
    """

    def __init__(self, start: Tensor, settings: LeapSettings) -> None:
        self._settings = settings
        self._previous = start.clone()
        self._loss_term = torch.zeros_like(start)  # Σ w_i λ|Δf_i| ∇f(θ_i)
        self._path_term = torch.zeros_like(start)  # −Σ w_i Δθ_i
        self._gradients: Tensor | None = None
        self._losses = start.new_zeros(len(start), dtype=torch.float64)
        self._energy, self._length = torch.zeros_like(self._losses), torch.zeros_like(self._losses)

    def observe(self, losses: Tensor, points: Tensor, gradients: Tensor) -> None:
        """Observe losses (B,) and gradients (B, S) at `points` (B, S). Takes ownership of the gradients."""
        self.end_segments(losses, points)
        self._gradients = gradients

    def end_segments(self, losses: Tensor, points: Tensor) -> None:
        """Add the segment from each task's last observation to its current point."""
        settings, losses = self._settings, losses.double()
        if self._gradients is not None:
            behind = self._previous - points
            change = losses - self._losses
            squared = behind.norm(dim=1).double().square() + settings.loss_weight * change.square()
            norm = squared.sqrt()
            weight = 1 / norm.clamp_min(_SMALLEST_NORM) if settings.metric == "length" else torch.ones_like(norm)
            outward = weight * settings.loss_weight * (change.abs() if settings.stabilize else -change)
            self._loss_term.addcmul_(self._gradients, outward.float().unsqueeze(1))
            self._path_term.addcmul_(behind, weight.float().unsqueeze(1))
            self._energy += squared
            self._length += norm
        self._previous.copy_(points)
        self._losses = losses

    def report(self) -> list[tuple[np.ndarray, PathStatistics]]:
        """Return the meta-gradient G and the path's statistics of each task."""
        loss_terms, path_terms = self._loss_term.cpu(), self._path_term.cpu()
        found = []
        for loss, path, energy, length in zip(
            loss_terms, path_terms, self._energy.tolist(), self._length.tolist(), strict=True
        ):
            norms = loss.double().norm().item(), path.double().norm().item()
            product = norms[0] * norms[1]
            cosine = torch.dot(loss.double(), path.double()).item() / product if product > 0 else 0.0
            found.append(((loss + path).numpy(), PathStatistics(energy, length, *norms, cosine)))
        return found


class Stack:
    """B tasks of the same shape, each learned by its own network.

    Args:
        tasks: data of the tasks. Image shape, number of classes and normalization must be equal.
        vector: flat float32 vector φ that the shared parameters of all tasks start from.
        seeds: one seed for each task, as for `Classifier`.
        scope: the shared parameters, as for `Classifier`.

    Raises:
        ValueError: if the tasks differ in shape.
    """

    def __init__(
        self,
        tasks: Sequence[Dataset],
        vector: np.ndarray,
        *,
        seeds: Sequence[int],
        settings: SupervisedSettings,
        worker: WorkerSettings,
        leap: LeapSettings,
        scope: str = "model",
    ) -> None:
        device = torch.device(resolve_device(worker.device))
        _, side, _, channels = tasks[0].train.images.shape
        alike = {(task.train.images.shape[1:], task.classes, task.mean, task.std) for task in tasks}
        if len(alike) > 1:
            raise ValueError(f"tasks of several kinds cannot be stacked: {sorted(alike)}")
        self._settings = settings
        self._dtype = resolve_precision(worker.precision, device.type)
        self._model = ConvNet(channels, side, tasks[0].classes, settings.network)
        self._shapes = {name: parameter.shape for name, parameter in self._model.named_parameters()}
        own = [Seeds.of(seed) for seed in seeds]
        self._theta = self._start(own, vector, scope).to(device)
        self._shared = len(vector)  # the head comes last, so the shared parameters are the first part of a row
        self._pull_forward = StackedPullForward(self._theta[:, : self._shared], leap)
        self._model.to(device)
        self._buffers = {
            name: buffer.expand(len(tasks), *buffer.shape).clone() for name, buffer in self._model.named_buffers()
        }
        self._gradient = vmap(grad_and_value(self._loss, has_aux=True), randomness="error")

        parts = [tensors_of(task.train, settings, seed) for task, seed in zip(tasks, own, strict=True)]
        images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        self._train = ImageStore(images, labels, tasks[0], device)
        counts = [len(labels) for _, labels in parts]
        self._offsets = np.cumsum([0, *counts[:-1]]).tolist()
        self._orders = list(zip(counts, own, strict=True))
        self._held_out = [
            (ImageStore(*tensors_of(task.test, settings, seed), task, device), seed)
            for task, seed in zip(tasks, own, strict=True)
        ]

    @torch.no_grad()
    def train(self, updates: int) -> list[Outcome]:
        """Train each task for `updates` updates, and return the results in the order of the tasks. Call only once."""
        start = self._theta[:, : self._shared].clone()
        curve: list[Tensor] = []
        self._model.train()
        for index, maps in self._plan(updates):
            images, labels = self._train.take(index, maps)
            inputs = self._train.normalized(images).unflatten(0, (len(self._orders), -1))
            labels = labels.view(len(self._orders), -1)
            gradients, (losses, logits) = self._gradient(self._theta, self._buffers, inputs, labels)
            curve.append(torch.stack([losses.double(), (logits.argmax(2) != labels).double().mean(1)]))
            self._pull_forward.observe(losses, self._theta[:, : self._shared], gradients[:, : self._shared])
            self._theta = self._theta.add(gradients, alpha=-self._settings.learning_rate)
        moved = (start - self._theta[:, : self._shared]).cpu().numpy()
        curves = torch.stack(curve, dim=-1).cpu().numpy()  # (2, B, K)
        return [
            Outcome(gradient, moved[row], path, Curve(*curves[:, row]), self._test(row))
            for row, (gradient, path) in enumerate(self._pull_forward.report())
        ]

    def _start(self, seeds: Sequence[Seeds], vector: np.ndarray, scope: str) -> Tensor:
        rows = []
        for seed in seeds:
            initialize(self._model, torch.Generator().manual_seed(seed.head))
            _, local = self._model.parameters_of(scope)
            rows.append(torch.cat([torch.from_numpy(vector.astype(np.float32)), *map(_flat, local.values())]))
        return torch.stack(rows)

    def _plan(self, updates: int) -> list[tuple[Tensor, Tensor | None]]:
        """Return image numbers and maps of every update, with the batches of all tasks concatenated."""
        plan: list[tuple[Tensor, Tensor | None]] = []
        samplers = [BatchSampler(count, self._settings, seeds, updates) for count, seeds in self._orders]
        for _ in range(updates):
            index, maps = zip(*(sampler.next() for sampler in samplers), strict=True)
            together = torch.cat([one + offset for one, offset in zip(index, self._offsets, strict=True)])
            plan.append((together, None if maps[0] is None else torch.cat(maps)))
        return plan

    def _parameters(self, row: Tensor) -> dict[str, Tensor]:
        parts = row.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def _loss(self, row: Tensor, buffers: dict[str, Tensor], images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and logits of one task's batch. Batch norm's averages are updated in place."""
        with torch.autocast(images.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            logits = functional_call(self._model, (self._parameters(row), buffers), (images,)).float()
        return F.cross_entropy(logits, labels), logits

    def _test(self, row: int) -> Score:
        """Classify the held-out images of one task, as `Classifier.test` does."""
        source, seeds = self._held_out[row]
        self._model.eval()
        state = {**self._parameters(self._theta[row]), **{name: part[row] for name, part in self._buffers.items()}}
        images, labels = source.take(torch.arange(source.count), maps_for_test(source.count, self._settings, seeds))
        with torch.autocast(images.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            logits = functional_call(self._model, state, (source.normalized(images),)).float()
        return Score((logits.argmax(1) != labels).double().mean().item(), F.cross_entropy(logits, labels).item())


def _flat(tensor: Tensor) -> Tensor:
    return flatten([tensor])
