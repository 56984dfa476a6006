"""Statistics of an initialization as a starting point, which show a collapse long before an evaluation does.

They are measured on the first unroll of a task, before its first step, so they cost no environment step and change
nothing: at that point the encoder is φ. Only the entropy is measured again later, when the agent has begun to learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

STATISTICS = ("norm_ratio", "dead_units", "effective_rank", "entropy", "gradient_norm", "entropy_later")
"""Names of all figures: those that `at_start` returns, and the entropy after `LATER` updates."""
LATER = 1_000
"""Number of updates after which an agent's entropy is reported again."""


@torch.no_grad()
def at_start(encoder: nn.Module, features: Tensor, entropy: Tensor, gradients: Iterable[Tensor]) -> dict[str, float]:
    """Return the figures of an agent that has not made a step yet.

    Args:
        encoder: its encoder.
        features: what the encoder computes for n frames, (n, units).
        entropy: mean entropy of the policy on these frames in nats, shape ().
        gradients: gradient of the loss on these frames, not clipped, of all parameters.
    """
    squares = [gradient.double().square().sum().item() for gradient in gradients]
    return {
        "norm_ratio": norm_ratio(encoder),
        "dead_units": dead_units(features),
        "effective_rank": effective_rank(features),
        "entropy": entropy.item(),
        "gradient_norm": math.sqrt(sum(squares)),
    }


class StartReport:
    """What an agent reports, once, about the point that it starts from, and later about its entropy.

    Args:
        prefix: beginning of all reported names.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._found: dict[str, float] | None = None  # None before the first update; empty once it is reported
        self._updates = 0

    def observe(
        self, encoder: nn.Module, features: Callable[[], Tensor], entropy: Tensor, gradients: Iterable[Tensor]
    ) -> None:
        """See the gradients of an update before it is made; the arguments are as in `at_start`.

        `features` is only called before the first update.
        """
        if self._found is None:
            found = at_start(encoder, features(), entropy, gradients)
            self._found = {self._prefix + name: value for name, value in found.items()}
        elif self._updates == LATER:
            self._found[self._prefix + "entropy_later"] = entropy.item()
        self._updates += 1

    def take(self) -> dict[str, float]:
        """Return what has been found since the last call, by name."""
        found, self._found = self._found or {}, None if self._found is None else {}
        return found

    def state(self) -> dict[str, Any]:
        """Return what `load_state` needs, as plain data."""
        return {"at_start": self._found, "updates": self._updates}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, which may be one of an earlier version that did not count updates."""
        self._found, self._updates = state["at_start"], int(state.get("updates", LATER + 1))


def norm_ratio(encoder: nn.Module) -> float:
    """Return the norm of all parameters relative to that of a fresh encoder, with orthogonal weights of gain √2.

    An orthogonal matrix of r rows and c columns has a norm of √min(r, c) times its gain, whatever the seed.
    """
    parameters = [parameter.detach() for parameter in encoder.parameters()]
    found = sum(parameter.double().square().sum().item() for parameter in parameters)
    fresh = sum(2.0 * min(len(p), p[0].numel()) for p in parameters if p.dim() > 1)
    return math.sqrt(found / fresh)


def dead_units(features: Tensor) -> float:
    """Return the share of units that are zero on all frames; features are (n, units), after a ReLU."""
    return float((features == 0).all(0).float().mean())


def effective_rank(features: Tensor) -> float:
    """Return exp(−Σ p ln p), with p the singular values of the features, (n, units), divided by their sum.

    It lies between 1, if all frames look the same up to their brightness, and min(n, units); it is 0 if all features
    are zero (Roy and Vetterli 2007, "The effective rank").
    """
    values = torch.linalg.svdvals(features.detach().double().cpu())
    total = values.sum()
    if not total > 0:
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())
