"""RMSProp with gradient clipping, in the forms of TensorFlow and PyTorch.

TensorFlow's RMSProp keeps ε inside the root and starts the mean square at one; PyTorch's keeps ε outside and starts at
zero. The paper does not say which one it used (docs/algorithm.md). Leap measures the path that the optimizer takes, so
the form changes the meta-gradient and not only the speed of training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def clip_factor(gradients: list[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """Return the factor that clips gradients to a global norm, and their norm before, both of shape ()."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return (max_norm / norm.clamp_min(1e-12)).clamp_max(1.0), norm


class RMSProp:
    """v ← ρv + (1−ρ)g²;  θ ← θ − α g / √(v + ε)  (`epsilon_inside`, v₀ = 1)  or  θ − α g / (√v + ε)  (v₀ = 0).

    `step` clips to a global norm without writing into `.grad`, because Leap still holds the raw gradient.

    Args:
        parameters: tensors to optimize.
        learning_rate: α.
        decay: ρ, decay of the mean square.
        epsilon: ε.
        epsilon_inside: keep ε inside the root, as TensorFlow does.
        max_grad_norm: global norm to which gradients are clipped.
        fused: make one pass over memory instead of many, which is four times as fast. Possible on a CPU only, and the
            default there.
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
        fused: bool | None = None,
    ) -> None:
        self._parameters = list(parameters)
        self._targets = [p.detach() for p in self._parameters]  # the same memory, outside the graph
        on_cpu = all(p.device.type == "cpu" for p in self._targets)
        form: type[_Fused | _Plain] = _Fused if (on_cpu and decay < 1 if fused is None else fused) else _Plain
        self._form = form(self._targets, learning_rate, decay, epsilon, epsilon_inside)
        self._max_grad_norm = max_grad_norm

    @property
    def mean_square(self) -> list[Tensor]:
        """v of each parameter, the optimizer's whole state, which may be changed in place.

        Raises RuntimeError if the optimizer is fused, because it then keeps another quantity.
        """
        if not isinstance(self._form, _Plain):
            raise RuntimeError("a fused optimizer has no mean square: make it with fused=False")
        return self._form.mean_square

    def state(self) -> tuple[list[Tensor], float]:
        """Return what the next step depends on besides the parameters: one uncopied tensor for each, and a number."""
        return self._form.state()

    @torch.no_grad()
    def load_state(self, tensors: list[Tensor], number: float) -> None:
        """Continue from what `state` of an optimizer of the same form returned."""
        torch._foreach_copy_(self._form.state()[0], tensors)
        self._form.set_number(number)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Update the parameters from `.grad` and set it to None. Return the norm of the raw gradient, shape ().

        Raises RuntimeError if a parameter has no gradient.
        """
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if len(gradients) != len(self._parameters):
            raise RuntimeError("a parameter has no gradient: call step after backward")
        scale, norm = clip_factor(gradients, self._max_grad_norm)
        self._form.step(gradients, scale)
        for parameter in self._parameters:
            parameter.grad = None
        return norm


class _Plain:
    """RMSProp as in the equations. Nothing is read back from the device."""

    def __init__(
        self, targets: list[Tensor], learning_rate: float, decay: float, epsilon: float, epsilon_inside: bool
    ) -> None:
        self._targets = targets
        self._learning_rate = learning_rate
        self._decay = decay
        self._epsilon = epsilon
        self._epsilon_inside = epsilon_inside
        self.mean_square = [torch.full_like(t, 1.0 if epsilon_inside else 0.0) for t in targets]
        # Kept from step to step: allocating memory each time costs more than the arithmetic on it.
        self._clipped = [torch.empty_like(t) for t in targets]
        self._denominators = [torch.empty_like(t) for t in targets]

    def state(self) -> tuple[list[Tensor], float]:
        """Return the mean squares, and a number that has no meaning here."""
        return self.mean_square, 0.0

    def set_number(self, number: float) -> None:
        """Do nothing: there is no number."""

    def step(self, gradients: list[Tensor], scale: Tensor) -> None:
        """Make one step with `scale` times the gradients."""
        clipped, mean_square, denominators = self._clipped, self.mean_square, self._denominators
        torch._foreach_copy_(clipped, gradients)
        torch._foreach_mul_(clipped, scale)
        torch._foreach_mul_(mean_square, self._decay)
        torch._foreach_addcmul_(mean_square, clipped, clipped, 1.0 - self._decay)
        torch._foreach_copy_(denominators, mean_square)
        if self._epsilon_inside:
            torch._foreach_add_(denominators, self._epsilon)
            torch._foreach_sqrt_(denominators)
        else:
            torch._foreach_sqrt_(denominators)
            torch._foreach_add_(denominators, self._epsilon)
        torch._foreach_addcdiv_(self._targets, clipped, denominators, -self._learning_rate)


class _Fused:
    """RMSProp through torch's fused Adagrad, w ← w + g², θ ← θ − a g / (√w + e), which makes a single pass.

    With k the clip factor and q = 1−ρ, let v = q k² w, or v + ε = q k² w where ε is inside. Then

        v ← ρv + q(kg)²           is    w ← ρ (k₋²/k²) w + g²           where k₋ is k of the previous step
        (inside) v ← ρv + q(kg)²  is    w ← ρ (k₋²/k²) w + ε/k² + g²
        α kg / (√v + ε)           is    (α/√q) g / (√w + ε/(k √q))      and without that ε if it is inside

    Adagrad does all of this except scaling w and adding ε/k². k is read back, which costs nothing on a CPU.
    """

    def __init__(
        self, targets: list[Tensor], learning_rate: float, decay: float, epsilon: float, epsilon_inside: bool
    ) -> None:
        self._targets = targets
        self._decay = decay
        self._epsilon = epsilon
        self._epsilon_inside = epsilon_inside
        self._root = math.sqrt(1.0 - decay)
        self._rate = learning_rate / self._root
        start = (1.0 + epsilon) / (1.0 - decay) if epsilon_inside else 0.0
        self._sums = [torch.full_like(t, start) for t in targets]
        self._squared_scale = 1.0
        self._steps = [torch.ones(()) for _ in targets]  # required by the decay of the learning rate, which is not used

    def state(self) -> tuple[list[Tensor], float]:
        """Return w and k₋²."""
        return self._sums, self._squared_scale

    def set_number(self, number: float) -> None:
        """Set k₋²."""
        self._squared_scale = number

    def step(self, gradients: list[Tensor], scale: Tensor) -> None:
        """Make one step with `scale` times the gradients."""
        k = scale.item() or math.nan  # k is 0 if the norm is infinite: the result must not look finite
        torch._foreach_mul_(self._sums, self._decay * self._squared_scale / k**2)
        if self._epsilon_inside:
            torch._foreach_add_(self._sums, self._epsilon / k**2)
        self._squared_scale = k**2
        torch._fused_adagrad_(
            self._targets,
            gradients,
            self._sums,
            self._steps,
            lr=self._rate,
            lr_decay=0.0,
            weight_decay=0.0,
            eps=0.0 if self._epsilon_inside else self._epsilon / (k * self._root),
            maximize=False,
        )
