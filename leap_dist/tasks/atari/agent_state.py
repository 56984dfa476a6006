"""The state of an agent between two unrolls: network, optimizer, random numbers and environments."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from leap_dist.leap.learner import LearnerState, OtherDevice
from leap_dist.leap.optimizers import RMSProp
from leap_dist.nn.flat_vector import Manifest, flatten, load_vector
from leap_dist.tasks.atari.environments import Environments

_ENVIRONMENTS = "environments."
"""Prefix of the names of the environments' arrays."""


def read(
    model: nn.Module,
    optimizer: RMSProp,
    generator: torch.Generator,
    environments: Environments,
    own: dict[str, Any],
) -> LearnerState | None:
    """Return the state with JSON-compatible values `own` of the learner itself.

    None if the state of the environments cannot be read.
    """
    played = environments.state()
    if played is None:
        return None
    arrays, values = played
    moments, number = optimizer.state()
    parts = {
        "model": flatten(model.parameters()).cpu().numpy(),
        "optimizer": flatten(moments).cpu().numpy(),
        "generator": generator.get_state().numpy(),
    }
    return LearnerState(
        {**parts, **{_ENVIRONMENTS + name: array for name, array in arrays.items()}},
        {"optimizer": number, "environments": values, "own": own},
    )


def load(
    state: LearnerState,
    model: nn.Module,
    optimizer: RMSProp,
    generator: torch.Generator,
    environments: Environments,
) -> np.ndarray:
    """Continue from what `read` returned, and return the environments' observations, uint8 (N, C, 84, 84).

    Raises OtherDevice, before anything has changed, if the state was saved on another kind of device.
    """
    arrays, values = state.arrays, state.values
    # The states of the generators of processors and GPUs differ in size. The optimizer keeps other moments there, too.
    if arrays["generator"].size != generator.get_state().numel():
        raise OtherDevice(f"the state was not saved on a {generator.device.type} device")
    named = dict(model.named_parameters())
    load_vector(named, arrays["model"])
    moments = Manifest.of(named).split(arrays["optimizer"])
    optimizer.load_state(
        [torch.from_numpy(moments[name]).to(parameter.device) for name, parameter in named.items()],
        float(values["optimizer"]),
    )
    generator.set_state(torch.from_numpy(arrays["generator"].copy()))
    played = {
        name.removeprefix(_ENVIRONMENTS): array for name, array in arrays.items() if name.startswith(_ENVIRONMENTS)
    }
    return environments.load_state(played, values["environments"])
