"""The alternatives to the library's convolution compute the same gradients."""

from __future__ import annotations

import pytest
import torch

from benchmarks import learner_parts
from benchmarks.learner_parts import SECOND


@pytest.mark.parametrize("name", SECOND)
def test_every_way_gives_the_gradients_of_the_convolution(name: str) -> None:
    source = torch.rand(3, 16, 20, 20, requires_grad=True)
    weight, bias = torch.randn(32, 16, 4, 4, requires_grad=True), torch.randn(32, requires_grad=True)
    upper = torch.randn(3, 32, 9, 9)
    wanted = torch.autograd.grad(torch.conv2d(source, weight, bias, stride=2), [source, weight, bias], upper)
    found = SECOND[name](upper, source.detach(), weight.detach(), stride=2, of_input=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_an_update_takes_the_way_that_is_asked_for() -> None:
    one, seen = learner_parts.rollout("float32"), []

    def noted(*operands: torch.Tensor, **more: object) -> object:
        seen.append([tuple(operand.shape) for operand in operands])
        return SECOND["library"](*operands, **more)

    learner_parts.use(noted)
    try:
        learner_parts.update(one, 5)
    finally:
        learner_parts.use(SECOND["library"])
    assert seen == [[(80, 32, 9, 9), (80, 16, 20, 20), (32, 16, 4, 4)]]
    learner_parts.update(one, 5)
    assert len(seen) == 1
