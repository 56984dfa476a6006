"""Leap: the gradient of the length of the path that training takes (seed paper, equations 4, 6 and 8).

While a model trains, θ_0 → θ_1 → … → θ_K with losses f_0, f_1, …, `PullForward` accumulates

    G = Σ_i w_i (λ|Δf_i| ∇f(θ_i) − Δθ_i),    Δθ_i = θ_{i+1} − θ_i,  Δf_i = f_{i+1} − f_i,

with w_i = 1 (energy) or 1/n_i (length), n_i² = ‖Δθ_i‖² + λΔf_i². This is equation 8 with the Jacobians set to the
identity and the constant factor p left to the meta learning rate. Everything in it is a by-product of training.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from leap_dist.leap.path_statistics import DescentSums, Metric, PathSums, Scalar, inverse


class PullForward:
    """Accumulates the pull-forward gradient of one learning process.

    Call `observe(loss)` after every backward pass and before the optimizer's step, and `close()` after the last step.
    `gradient()` may be read at any time; it covers the path up to the last observation.

    Everything stays on the parameters' device, and `observe` never waits for it. Sums are in float32, or float64 for
    parameters in float64, so that models in float16 or bfloat16 lose nothing along the way.

    Args:
        parameters: the meta-learned parameters, each once. Others may be trained too, but are not part of the path. A
            frozen parameter (without `requires_grad` and without gradient) contributes zeros.
        metric: the functional of the path to shorten; the weights of segments are 1 (energy) or 1/n_i (length).
        loss_weight: λ, scale of the loss coordinate on the manifold. The paper uses 1; 0 measures the path in parameter
            space only, which makes `energy` the same as Reptile.
        stabilize: replace −Δf_i by |Δf_i|, so that a step that raised the loss does not push away (μ, section 2.3).
        loss_smoothing: d, decay of the moving average f̄_i = d f̄_{i−1} + (1−d) f_i, f̄_0 = f_0, which replaces f along
            the path and reduces the noise of batches. The paper uses 0, no smoothing.
        loss_warmup: number of segments, at the start of the path, whose Δf counts as 0. The paper uses 0.
        descent: α, if each step is exactly θ_{i+1} = θ_i − α∇f(θ_i). Then Δθ_i is known without reading the parameters,
            which halves the cost. None allows any optimizer.
        copy_gradients: keep a copy of each gradient instead of the tensor itself. Needed if something writes into
            `.grad` in place, such as `torch.nn.utils.clip_grad_norm_` or `zero_grad(set_to_none=False)`.

    Raises ValueError if an argument is out of range or a parameter is given twice.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        metric: Metric = "energy",
        loss_weight: float = 1.0,
        stabilize: bool = True,
        loss_smoothing: float = 0.0,
        loss_warmup: int = 0,
        descent: float | None = None,
        copy_gradients: bool = False,
    ) -> None:
        self._parameters = list(parameters)
        if not self._parameters:
            raise ValueError("PullForward needs at least one parameter")
        if len({id(parameter) for parameter in self._parameters}) < len(self._parameters):
            raise ValueError("a parameter is given twice, so that its steps would count twice: give each of them once")
        if metric not in ("energy", "length"):
            raise ValueError(f"metric is {metric!r}; choose 'energy' or 'length'")
        if not loss_weight >= 0:
            raise ValueError(f"loss_weight is {loss_weight}; it must not be negative")
        if not 0 <= loss_smoothing < 1:
            raise ValueError(f"loss_smoothing is {loss_smoothing}; it must be at least 0 and below 1")
        if not loss_warmup >= 0:
            raise ValueError(f"loss_warmup is {loss_warmup}; it must not be negative")
        if descent is not None and not descent > 0:
            raise ValueError(f"descent is {descent}; it must be above 0, or None")
        self._by_length = metric == "length"
        self._loss_weight = loss_weight
        self._stabilize = stabilize
        self._loss_smoothing = loss_smoothing
        self._warmup = loss_warmup  # number of segments left in the warm-up
        points = [p.detach() for p in self._parameters]  # the same memory, outside the graph
        self._sums: PathSums | DescentSums
        if descent is None:
            self._sums = PathSums(points, metric, copy_gradients=copy_gradients)
        else:
            self._sums = DescentSums(points, descent)
        self._device = points[0].device
        self._waits = self._device.type == "cpu"  # where values can be read without waiting
        self._energy: Scalar = 0.0
        self._length: Scalar = 0.0
        self._loss: Scalar = 0.0  # f(θ_i) of the last observation
        self._smoothed: Scalar = 0.0
        self._observed = self._closed = False
        self._shifted = False  # since the last observation
        self._no_grad = torch.no_grad()  # created once, because creating it takes 50 µs between two steps

    def observe(self, loss: Tensor | float) -> None:
        """Record that training is at θ_i, with loss f(θ_i), and ∇f(θ_i) in the parameters' `.grad`.

        Raises RuntimeError after `close`, if a parameter has no gradient, if the previous gradient was overwritten in
        place, or if a step was not the one that `descent` promises; nothing is recorded then. Only the first two steps
        are compared, and none on a GPU, which would have to be waited for.
        """
        with self._no_grad:
            if self._closed:
                raise RuntimeError("observe after close: the path has ended; start a new PullForward for a new path")
            gradients = [gradient for p in self._parameters if (gradient := p.grad) is not None]
            if len(gradients) < len(self._parameters):
                gradients = self._with_frozen(bool(gradients))
            self._end_segment(loss)
            self._sums.observe(gradients)
            self._observed = True

    @torch.no_grad()
    def close(self, final_loss: Tensor | float | None = None) -> None:
        """End the path. The last segment counts if f(θ_K) is given, and is dropped otherwise. Idempotent."""
        if not self._closed and final_loss is not None:
            self._end_segment(final_loss)
        self._closed = True
        self._sums.release()

    @torch.no_grad()
    def shift(self, amounts: Iterable[Tensor]) -> None:
        """Record that something other than training moved the parameters by `amounts`, one tensor per parameter.

        Such a move is not part of the path: the previous points move along, and the current segment leaves out the
        change of the loss, whose values at both ends belong to different places (trajectory shifting, Shin et al.
        2021).
        """
        self._sums.shift(amounts)
        self._shifted = True

    def gradient(self) -> Tensor:
        """Return G over the segments that have ended: a new flat float32 vector in the order of the parameters."""
        loss_term, path_term = self.terms()
        return loss_term + path_term

    def terms(self) -> tuple[Tensor, Tensor]:
        """Return the two summands of G, (Σ w_i λ|Δf_i| ∇f(θ_i), −Σ w_i Δθ_i), each a new flat float32 vector."""
        return self._sums.terms()

    @property
    def energy(self) -> float:
        """Σ n_i² over the segments that have ended (equation 4), where f is neither smoothed nor left out."""
        return float(self._energy)

    @property
    def length(self) -> float:
        """Σ n_i over the segments that have ended (equation 4 with p = 1), where f is neither smoothed nor left out."""
        return float(self._length)

    def _end_segment(self, loss: Tensor | float) -> None:
        """Add the segment from the last observation to the current parameters, where the loss is `loss`."""
        value = self._scalar(loss)
        left_out = self._shifted or self._warmup > 0 or not self._observed  # what is left out never enters the average
        smoothed = value if left_out else value + self._loss_smoothing * (self._smoothed - value)
        if self._observed:
            squared_step = self._sums.step_factor * self._scalar(self._sums.squared_step())
            measured: Scalar = 0.0 if self._shifted else value - self._loss
            loss_change: Scalar = 0.0 if left_out else smoothed - self._smoothed
            chord: Scalar = (squared_step + self._loss_weight * loss_change**2) ** 0.5
            weight: Scalar = inverse(chord) if self._by_length else 1.0
            outward: Any = abs(loss_change) if self._stabilize else -loss_change
            self._sums.add(self._loss_weight * weight * outward, weight)
            squared: Scalar = squared_step + self._loss_weight * measured**2  # n_i² of the path as it was
            self._energy = self._energy + squared
            self._length = self._length + squared**0.5
            self._warmup -= 1
        self._sums.advance()
        self._loss, self._smoothed = value, smoothed
        self._shifted = False

    def _scalar(self, value: Tensor | float) -> Scalar:
        if not isinstance(value, Tensor):
            return value
        return value.item() if self._waits else value.detach().to(self._device, torch.float64)

    def _with_frozen(self, any_gradient: bool) -> list[Tensor]:
        """Return the gradients with zeros for frozen parameters. Raises RuntimeError if another one has none."""
        for number, p in enumerate(self._parameters):
            if p.grad is None and (p.requires_grad or not any_gradient):
                raise RuntimeError(
                    f"parameter {number}, of shape {tuple(p.shape)}, has no gradient: call observe after backward and "
                    "before zero_grad; leave out, or freeze, a parameter that the loss does not depend on"
                )
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
