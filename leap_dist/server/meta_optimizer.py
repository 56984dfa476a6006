"""The meta-optimizer: a torch optimizer that moves φ along the direction that the aggregation returns."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from leap_dist.config.settings import MetaSettings


class MetaOptimizer:
    """φ and the torch optimizer that moves it. A step is committed or discarded as a whole."""

    def __init__(self, mode: str, settings: MetaSettings, vector: np.ndarray) -> None:
        self._mode = mode
        self._settings = settings
        self._parameter = torch.nn.Parameter(torch.from_numpy(np.array(vector, np.float32)))

    @functools.cached_property
    def _optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, which is created by the first step: torch then imports its compiler, which takes a second."""
        return _torch_optimizer(self._mode, self._settings, [self._parameter])

    @property
    def _is_fresh(self) -> bool:
        return "_optimizer" not in vars(self)

    @property
    def vector(self) -> np.ndarray:
        """A copy of φ, flat float32."""
        return self._parameter.detach().numpy().copy()

    def step(self, gradient: np.ndarray, *, done: float = 0.0) -> bool:
        """Move φ against a gradient, flat float32, and return whether that succeeded.

        If the gradient or the result is not finite, nothing changes and False is returned. An empty gradient is
        valid and changes nothing.

        Args:
            gradient: direction to descend along.
            done: fraction of the run's tasks that are applied already, for the learning-rate schedule.
        """
        if not np.isfinite(gradient).all():
            return False
        if gradient.size == 0:
            return True
        before, state = self.vector, self.state()
        norm = float(np.linalg.norm(gradient.astype(np.float64)))
        if 0 < self._settings.max_norm < norm:
            gradient = gradient * np.float32(self._settings.max_norm / norm)
        self._parameter.grad = torch.from_numpy(gradient)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._settings, done)
        self._optimizer.step()
        self._parameter.grad = None
        if all(np.isfinite(array).all() for array in (self.vector, *self.state().values())):
            return True
        self.restore(before, state)
        return False

    def state(self) -> dict[str, np.ndarray]:
        """Return copies of the optimizer's tensors, by name; there are none before the first step."""
        if self._is_fresh:
            return {}
        state = self._optimizer.state_dict()["state"].get(0, {})
        return {name: np.array(value.numpy()) for name, value in state.items() if isinstance(value, torch.Tensor)}

    def restore(self, vector: np.ndarray, state: dict[str, np.ndarray]) -> None:
        """Set φ and the optimizer's tensors to what `vector` and `state` returned earlier."""
        with torch.no_grad():
            self._parameter.copy_(torch.from_numpy(np.array(vector)))
        if self._is_fresh and not state:
            return
        full = self._optimizer.state_dict()
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
        full["state"] = {0: tensors} if tensors else {}
        self._optimizer.load_state_dict(full)


class DelayedNesterov(torch.optim.Optimizer):
    """Apply gradients immediately, but Nesterov momentum only with every N-th of them (arXiv 2401.09135).

    Each step θ ← θ − ε g/N; each N-th also m ← β m + ḡ and θ ← θ − ε β m, where ḡ is the mean of the last N gradients.
    With N = 1 this is torch's SGD with Nesterov momentum.

    Args:
        parameters: tensors to optimize.
        lr: learning rate ε.
        momentum: momentum β.
        delay: number of gradients N between two momentum steps.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], *, lr: float, momentum: float, delay: int) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "delay": delay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply the gradient in `.grad` of every parameter."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._apply(parameter, parameter.grad, group)

    def _apply(self, parameter: torch.nn.Parameter, gradient: torch.Tensor, group: dict[str, float]) -> None:
        state = self.state[parameter]
        if not state:
            state["count"] = torch.zeros(())
            state["mean"] = torch.zeros_like(parameter)
            state["momentum_buffer"] = torch.zeros_like(parameter)
        parameter.sub_(gradient, alpha=group["lr"] / group["delay"])
        state["mean"].add_(gradient, alpha=1.0 / group["delay"])
        state["count"] += 1
        if state["count"] >= group["delay"]:
            state["momentum_buffer"].mul_(group["momentum"]).add_(state["mean"])
            parameter.sub_(state["momentum_buffer"], alpha=group["lr"] * group["momentum"])
            state["mean"].zero_()
            state["count"].zero_()


def learning_rate(settings: MetaSettings, done: float) -> float:
    """Return the meta learning rate β after the fraction `done` of the run's tasks.

    The schedule is constant, or falls to 0 linearly or as half a cosine.
    """
    left = max(0.0, 1.0 - done)
    factor = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[settings.schedule]
    return settings.learning_rate * factor


def _torch_optimizer(mode: str, settings: MetaSettings, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    lr, momentum = settings.learning_rate, settings.momentum
    if mode == "delayed-nesterov":
        return DelayedNesterov(parameters, lr=lr, momentum=momentum, delay=settings.batch_size)
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=lr)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=settings.weight_decay)
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=lr, momentum=momentum)
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, nesterov=settings.nesterov)
