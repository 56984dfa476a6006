"""The next gradients of several classifiers as one computation, for a GPU that one task leaves idle.

Everything else stays separate for each classifier: data, order of batches, averages of batch norm, steps, tests. So
each task proceeds as it would alone, up to rounding. (If pixels of a pooling window are equal, rounding decides which
of them gets the gradient, and paths diverge sooner.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from leap_dist.leap.learner import Learner
from leap_dist.tasks.images.classifier import Classifier, Prepared


def prepare(learners: Sequence[Learner], *, on_cpu: bool = False) -> None:
    """Compute the gradients that the next `backward` of each learner will set, together for those of the same kind.

    On a CPU nothing is computed ahead unless `on_cpu` is set: stacking costs more than it saves there, and without it
    each task's results are identical to the bit to those of training alone.
    """
    kinds: defaultdict[tuple[object, ...], list[Classifier]] = defaultdict(list)
    for learner in learners:
        if isinstance(learner, Classifier) and (on_cpu or next(learner.model.parameters()).is_cuda):
            kinds[learner.kind].append(learner)
    for alike in kinds.values():
        if len(alike) > 1:
            _prepare_alike(alike)


def _prepare_alike(learners: Sequence[Classifier]) -> None:
    first = learners[0]
    inputs, labels = (torch.stack(parts) for parts in zip(*(one.next_inputs() for one in learners), strict=True))
    parameters = _stacked([dict(one.model.named_parameters()) for one in learners])
    buffers = _stacked([dict(one.model.named_buffers()) for one in learners])

    def loss_of(
        parameters: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        return first.loss(lambda images: functional_call(first.model, (parameters, buffers), (images,)), inputs, labels)

    compute = vmap(grad_and_value(loss_of, has_aux=True), randomness="error")
    gradients, (losses, logits) = compute(parameters, buffers, inputs, labels)  # batch norm updates `buffers` in place
    for row, one in enumerate(learners):
        for name, buffer in one.model.named_buffers():
            buffer.copy_(buffers[name][row])
        of_row = [gradients[name][row] for name, _ in one.model.named_parameters()]
        one.prepare(Prepared(losses[row].detach(), logits[row].detach(), labels[row], of_row))


def _stacked(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}
