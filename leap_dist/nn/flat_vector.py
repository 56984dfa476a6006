"""Flat vectors: the parameters of a model as one contiguous float32 vector, with a manifest that names its parts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Manifest:
    """Names and shapes of the parameters behind a flat vector, in the vector's order."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor]) -> Manifest:
        """Return the manifest of named parameters."""
        return cls(tuple(parameters), tuple(tuple(parameter.shape) for parameter in parameters.values()))

    @property
    def size(self) -> int:
        """Length of the flat vector."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change with any name, any shape and the order."""
        return hashlib.sha256(repr((self.names, self.shapes)).encode()).hexdigest()[:16]

    def split(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """Return views of `vector`, (size,), by parameter name. Raises ValueError if its length differs."""
        if vector.shape != (self.size,):
            raise ValueError(f"vector has shape {vector.shape}, the encoder needs ({self.size},)")
        return {
            name: part.numpy() for name, part in zip(self.names, self._views(torch.from_numpy(vector)), strict=True)
        }

    def join(self, tensors: dict[str, np.ndarray]) -> np.ndarray:
        """Return the flat float32 vector of `tensors`. Raises ValueError with every difference from this manifest."""
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wanted = dict(zip(self.names, self.shapes, strict=True))
        if found != wanted:
            names = [*wanted, *(name for name in found if name not in wanted)]
            lines = [f"{n}: {found.get(n, 'missing')} instead of {wanted.get(n, 'nothing')}"
                     for n in names if found.get(n) != wanted.get(n)]  # fmt: skip
            raise ValueError("encoder differs: " + "; ".join(lines))
        return np.concatenate([np.asarray(tensors[name], np.float32).ravel() for name in self.names])

    def _views(self, vector: Tensor) -> Iterator[Tensor]:
        start = 0
        for shape in self.shapes:
            stop = start + math.prod(shape)
            yield vector[start:stop].view(shape)
            start = stop


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Concatenate tensors, each in row-major order, to one new float32 vector."""
    return torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])


@torch.no_grad()
def load_vector(parameters: Mapping[str, Tensor], vector: np.ndarray) -> None:
    """Copy a flat vector into parameters. Raises ValueError if its length differs."""
    parts = Manifest.of(parameters).split(np.array(vector, np.float32))
    for name, parameter in parameters.items():
        parameter.copy_(torch.from_numpy(parts[name]))


@torch.no_grad()
def add_vector(parameters: Mapping[str, Tensor], vector: np.ndarray) -> list[Tensor]:
    """Add a flat vector to parameters, and return its parts. Raises ValueError if its length differs."""
    split = Manifest.of(parameters).split(np.array(vector, np.float32))
    parts = [torch.from_numpy(split[name]).to(parameter.device) for name, parameter in parameters.items()]
    for parameter, part in zip(parameters.values(), parts, strict=True):
        parameter.add_(part)
    return parts
