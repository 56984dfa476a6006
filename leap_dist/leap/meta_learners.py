"""Meta-learners: what a worker observes during training and returns to the server, one small class for each.

    leap              G                                                           equation 8
    reptile           φ − θ_K                                                     Nichol et al., arXiv 1803.02999
    fomaml            ∇f(θ_K), averaged over fresh rollouts or held-out batches   Finn et al., arXiv 1703.03400
    finetune-multi    φ − θ_K, and the same for the game's persistent head
    finetune-single   φ − θ_K, where φ contains one head for all games
    multitask         φ − θ_K of one agent that learns all games, and its heads and optimizer as they are

Each returns a vector that the server descends along, or nothing (`none`), measures the length of the path in the same
way, so that runs can be compared, and stays within the task's budget of rollouts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leap_dist.config.settings import Config
from leap_dist.leap.learner import Learner
from leap_dist.leap.pull_forward import PullForward
from leap_dist.nn.flat_vector import flatten
from leap_dist.protocol.messages import PathStatistics


class MetaLearner:
    """Observes one learning process. This base class is `none`, the baseline that meta-learns nothing."""

    def __init__(self, config: Config, learner: Learner) -> None:
        self._learner = learner
        self._path = PullForward(
            learner.shared.values(),
            metric=config.leap.metric if config.meta_learner == "leap" else "energy",
            loss_weight=config.leap.loss_weight,
            stabilize=config.leap.stabilize,
            loss_smoothing=config.leap.loss_smoothing,
            loss_warmup=round(config.leap.loss_warmup * config.rollouts_per_task),
            descent=learner.descent,
        )

    def observe(self, loss: Tensor) -> None:
        """Record an update. To be called after its backward pass and before its step."""
        self._path.observe(loss)

    def shift(self, amounts: list[Tensor]) -> None:
        """Record that the server's progress moved the shared parameters by `amounts`, one tensor each."""
        self._path.shift(amounts)

    def observe_held_back(self) -> None:
        """Use one of the task's last rollouts, which `Config.held_back` keeps from training."""
        raise NotImplementedError("this meta-learner holds no rollout back")

    def finish(self) -> None:
        """End the path. To be called after the last rollout."""
        self._path.close()

    def report(self) -> tuple[Tensor, PathStatistics]:
        """Return the vector for the server, flat float32 and cumulative, and the geometry of the path."""
        loss_term, path_term = self._path.terms()
        norms = loss_term.double().norm().item(), path_term.double().norm().item()
        product = norms[0] * norms[1]
        cosine = torch.dot(loss_term.double(), path_term.double()).item() / product if product > 0 else 0.0
        return self._vector(loss_term, path_term), PathStatistics(self._path.energy, self._path.length, *norms, cosine)

    def _vector(self, loss_term: Tensor, path_term: Tensor) -> Tensor:
        return loss_term.new_empty(0)


class Leap(MetaLearner):
    """Returns the pull-forward gradient."""

    def observe_held_back(self) -> None:
        """With `leap.final_loss`, measure f(θ_K) on the last rollout, which closes the last segment."""
        self._path.close(self._learner.evaluate())

    def _vector(self, loss_term: Tensor, path_term: Tensor) -> Tensor:
        return loss_term + path_term


class Displacement(MetaLearner):
    """Returns start minus end of the shared parameters, and of the task's own if heads persist."""

    def __init__(self, config: Config, learner: Learner) -> None:
        super().__init__(config, learner)
        moving = learner.local.values() if config.meta_learner == "finetune-multi" else ()
        self._parameters = [*learner.shared.values(), *moving]
        self._start = [parameter.detach().clone() for parameter in self._parameters]

    def shift(self, amounts: list[Tensor]) -> None:
        """Move the start too: a shift is progress of the server, not of the task."""
        super().shift(amounts)
        for start, amount in zip(self._start, amounts, strict=False):  # the task's own parameters are not shifted
            start.add_(amount)

    def _vector(self, loss_term: Tensor, path_term: Tensor) -> Tensor:
        return flatten(start - end.detach() for start, end in zip(self._start, self._parameters, strict=True))


class Multitask(Displacement):
    """Returns start minus end of the shared parameters, and the rest of the state, which the next task starts from."""

    def _vector(self, loss_term: Tensor, path_term: Tensor) -> Tensor:
        moved = super()._vector(loss_term, path_term)
        return torch.cat((moved, flatten(tensor.detach() for tensor in self._learner.local.values())))


class Fomaml(MetaLearner):
    """Returns the gradient at the end of the path; while the task is running, that of the last rollout."""

    _measured = 0

    def observe(self, loss: Tensor) -> None:
        """Record an update, and keep its gradient."""
        super().observe(loss)
        self._gradient = self._current_gradient()

    def observe_held_back(self) -> None:
        """Compute one more gradient at θ_K."""
        for parameter in self._learner.shared.values():
            parameter.grad = None  # some learners add to an existing gradient, others replace it
        self._path.close(self._learner.backward_held_out())
        gradient = flatten(self._current_gradient())
        self._gradient = [self._gradient[0] + gradient if self._measured else gradient]
        self._measured += 1

    def _current_gradient(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._learner.shared.values() if parameter.grad is not None]

    def _vector(self, loss_term: Tensor, path_term: Tensor) -> Tensor:
        return flatten(self._gradient) / max(1, self._measured)


class NoMetaLearning(MetaLearner):
    """Null object for evaluations: it does not even measure the path, so that nothing but training takes time."""

    def __init__(self) -> None:
        """Create the null object, which needs no learner."""

    def observe(self, loss: Tensor) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""

    def report(self) -> tuple[Tensor, PathStatistics]:
        """Return an empty vector and a path of length zero."""
        return torch.empty(0), PathStatistics(0.0, 0.0, 0.0, 0.0, 0.0)


_CLASSES: dict[str, type[MetaLearner]] = {
    "leap": Leap,
    "fomaml": Fomaml,
    **dict.fromkeys(("reptile", "finetune-multi", "finetune-single"), Displacement),
    "multitask": Multitask,
    "none": MetaLearner,
}


def make(config: Config, learner: Learner) -> MetaLearner:
    """Return the configured meta-learner for a learner that has not trained yet."""
    return _CLASSES[config.meta_learner](config, learner)
