"""RMSProp as the paper's framework defines it, with the gradient clipped on the way.

Two optimizers go by the name of RMSProp (notes with the presets): TensorFlow's keeps ε inside the root and starts the
mean square at one, PyTorch's keeps ε outside and starts at zero. Leap measures the path that the optimizer takes, so
the form changes the meta-gradient and not only the speed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class RMSProp:
    """v ← ρv + (1−ρ)g²;  θ ← θ − α g / √(v + ε)  (`epsilon_inside`, v₀ = 1)  or  θ − α g / (√v + ε)  (v₀ = 0).

    `step` clips to a global norm without writing into `.grad`, so that whoever holds the raw gradient (Leap does)
    still holds it afterwards.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        learning_rate: float,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        epsilon_inside: bool = True,
        max_grad_norm: float = float("inf"),
    ) -> None:
        self._parameters = list(parameters)
        self._learning_rate = learning_rate
        self._decay = decay
        self._epsilon = epsilon
        self._epsilon_inside = epsilon_inside
        self._max_grad_norm = max_grad_norm
        self._targets = [p.detach() for p in self._parameters]  # the same memory, outside the graph
        self._mean_square = [torch.full_like(p, 1.0 if epsilon_inside else 0.0) for p in self._targets]
        # Kept from step to step: memory that is asked for anew each time costs more than the arithmetic on it.
        self._clipped = [torch.empty_like(p) for p in self._targets]
        self._denominators = [torch.empty_like(p) for p in self._targets]

    @torch.no_grad()
    def step(self) -> Tensor:
        """Updates the parameters from their `.grad` and drops it (set to None). Returns the raw gradient's norm, ()."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if len(gradients) != len(self._parameters):
            raise RuntimeError("a parameter has no gradient: call step after backward")
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        scale = (self._max_grad_norm / norm.clamp_min(1e-12)).clamp_max(1.0)
        for i, (target, gradient) in enumerate(zip(self._targets, gradients, strict=True)):
            clipped = torch.mul(gradient, scale, out=self._clipped[i])
            mean_square = self._mean_square[i].mul_(self._decay).addcmul_(clipped, clipped, value=1.0 - self._decay)
            if self._epsilon_inside:
                denominator = torch.add(mean_square, self._epsilon, out=self._denominators[i]).sqrt_()
            else:
                denominator = torch.sqrt(mean_square, out=self._denominators[i]).add_(self._epsilon)
            target.addcdiv_(clipped, denominator, value=-self._learning_rate)
        for parameter in self._parameters:
            parameter.grad = None
        return norm
