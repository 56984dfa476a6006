"""What a worker watches during training and returns afterwards: one small class per meta-learner."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from leap_dist.config import Config
from leap_dist.contribution import PathStatistics
from leap_dist.leap import PullForward


class MetaLearner(Protocol):
    """Watches one learning process."""

    def observe(self, loss: Tensor) -> None:
        """After the backward pass, before the step."""

    def close(self, final_loss: Tensor | None = None) -> None:
        """After the last step."""

    def vector(self) -> Tensor:
        """What the server gets, flat float32: cumulative from the start of the path."""

    def statistics(self) -> PathStatistics:
        """Geometry of the path so far."""


class Leap(PullForward):
    """The pull-forward gradient, with its statistics."""

    def vector(self) -> Tensor:
        """G."""
        return self.gradient()

    def statistics(self) -> PathStatistics:
        """Energy, length, and how the two terms of G compare."""
        loss_term, path_term = (term.double() for term in self.terms())
        norms = loss_term.norm().item(), path_term.norm().item()
        product = norms[0] * norms[1]
        cosine = torch.dot(loss_term, path_term).item() / product if product > 0 else 0.0
        return PathStatistics(self.energy, self.length, norms[0], norms[1], cosine)


def make(config: Config, parameters: Iterable[Tensor]) -> MetaLearner:
    """The configured meta-learner, watching `parameters`."""
    return Leap(
        parameters, metric=config.leap.metric, loss_weight=config.leap.loss_weight, stabilize=config.leap.stabilize
    )
