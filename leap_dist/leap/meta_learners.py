"""What a worker watches during training and returns afterwards: one small class per meta-learner.

    leap              G                                                           equation 8
    reptile           φ − θ_K                                                     Nichol et al., arXiv 1803.02999
    fomaml            ∇f(θ_K), averaged over fresh rollouts or held-out batches   Finn et al., arXiv 1703.03400
    finetune-multi    φ − θ_K, and the same of the game's persistent head
    finetune-single   φ − θ_K, where φ holds one head for all games
    none              nothing

Each is a vector that the server descends along. All of them measure the path in the same way, so that runs can be
compared, and all of them get along with the task's budget of rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leap_dist.config.settings import Config
from leap_dist.leap.learner import Learner
from leap_dist.leap.pull_forward import PullForward
from leap_dist.nn.flat_vector import flatten
from leap_dist.protocol.messages import PathStatistics


class MetaLearner:
    """Watches one learning process. This one returns nothing: `none`, the baseline that learns no initialization."""

    def __init__(self, config: Config, learner: Learner) -> None:
        self._learner = learner
        is_leap = config.meta_learner == "leap"
        self._path = PullForward(
            learner.shared.values(),
            metric=config.leap.metric if is_leap else "energy",
            loss_weight=config.leap.loss_weight,
            stabilize=config.leap.stabilize,
            loss_smoothing=config.leap.loss_smoothing,
            descent=learner.descent,
        )

    def observe(self, loss: Tensor) -> None:
        """After the backward pass, before the step."""
        self._path.observe(loss)

    def shift(self, amounts: Sequence[Tensor]) -> None:
        """After the shared parameters were moved by the server's progress, one tensor for each."""
        self._path.shift(amounts)

    def measure(self) -> None:
        """Takes one of the task's last rollouts, which `Config.held_back` keeps from training."""
        raise NotImplementedError("this meta-learner holds no rollout back")

    def finish(self) -> None:
        """After the last rollout."""
        self._path.close()

    def report(self) -> tuple[Tensor, PathStatistics]:
        """What the server gets, flat float32 and cumulative from the start of the path, and the path's geometry."""
        loss_term, path_term = self._path.terms()
        norms = loss_term.double().norm().item(), path_term.double().norm().item()
        product = norms[0] * norms[1]
        cosine = torch.dot(loss_term.double(), path_term.double()).item() / product if product > 0 else 0.0
        statistics = PathStatistics(self._path.energy, self._path.length, *norms, cosine)
        return self._vector(loss_term, path_term), statistics

    def _vector(self, loss_term: Tensor, path_term: Tensor) -> Tensor:
        return loss_term.new_empty(0)


class Leap(MetaLearner):
    """The pull-forward gradient."""

    def measure(self) -> None:
        """With `leap.final_loss` the last rollout measures f(θ_K), which closes the last segment."""
        self._path.close(self._learner.evaluate())

    def _vector(self, loss_term: Tensor, path_term: Tensor) -> Tensor:
        return loss_term + path_term


class Displacement(MetaLearner):
    """Start minus end: of the shared parameters, and of the task's own where those persist."""

    def __init__(self, config: Config, learner: Learner) -> None:
        super().__init__(config, learner)
        self._parameters = [*learner.shared.values(), *(learner.local.values() if config.keeps_heads else ())]
        self._start = [parameter.detach().clone() for parameter in self._parameters]

    def shift(self, amounts: Sequence[Tensor]) -> None:
        """The start moves along: a shift is the server's way, not the task's."""
        super().shift(amounts)
        for start, amount in zip(self._start, amounts, strict=False):  # what is the task's own is not shifted
            start.add_(amount)

    def _vector(self, loss_term: Tensor, path_term: Tensor) -> Tensor:
        return flatten(start - end.detach() for start, end in zip(self._start, self._parameters, strict=True))


class Fomaml(MetaLearner):
    """The gradient at the end of the path. Before the end, that of the last rollout."""

    _measured = 0

    def observe(self, loss: Tensor) -> None:
        """Takes the gradient over, as the path does."""
        super().observe(loss)
        self._gradient = self._present_gradient()

    def measure(self) -> None:
        """One more gradient at θ_K."""
        for parameter in self._learner.shared.values():
            parameter.grad = None  # some learners' backward adds to what is there, others' replaces it
        self._path.close(self._learner.measure())
        gradient = flatten(self._present_gradient())
        self._gradient = [self._gradient[0] + gradient if self._measured else gradient]
        self._measured += 1

    def _present_gradient(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._learner.shared.values() if parameter.grad is not None]

    def _vector(self, loss_term: Tensor, path_term: Tensor) -> Tensor:
        return flatten(self._gradient) / max(1, self._measured)


class NoMetaLearning(MetaLearner):
    """Does not even measure the path: of an evaluation, which takes as long as training alone."""

    def __init__(self) -> None:
        """Knows no learner."""

    def observe(self, loss: Tensor) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""

    def report(self) -> tuple[Tensor, PathStatistics]:
        """Nothing."""
        return torch.empty(0), PathStatistics(0.0, 0.0, 0.0, 0.0, 0.0)


_CLASSES: dict[str, type[MetaLearner]] = {
    "leap": Leap,
    "reptile": Displacement,
    "fomaml": Fomaml,
    "finetune-multi": Displacement,
    "finetune-single": Displacement,
    "none": MetaLearner,
}


def make(config: Config, learner: Learner) -> MetaLearner:
    """The configured meta-learner, watching `learner`, which has not trained yet."""
    return _CLASSES[config.meta_learner](config, learner)
