"""The trained agents of an evaluation: their final parameters, kept so that they can be watched.

OUT/agents/<arm>/<game>/<seed>.safetensors     one agent per arm and game, the one of the first seed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from leap_dist.evaluation.runs import Run
from leap_dist.protocol import schema
from leap_dist.storage.atomic import CorruptFile, pack, read_packed, unpack, write_atomic

MOST_BYTES = 2**28
"""Maximum total size in bytes of the agents that an evaluation keeps. An Atari agent takes 1.4 MB."""
_SHAPE = {"arm": str, "game": str, "seed": int, "steps": int, "scope": str}


@dataclass(frozen=True)
class Agent:
    """A trained agent."""

    arm: str
    game: str
    seed: int
    steps: int
    """Agent steps that it was trained for."""
    scope: str
    """Name of the set of parameters at the start of the vector; see `ActorCritic.parameters_of`."""
    vector: np.ndarray
    """The shared parameters, followed by the agent's own, flat float32."""


class AgentStore:
    """Keeps the agent of the first seed of each arm and game, as 16-bit numbers, up to a total size.

    Args:
        out: directory of the evaluation.
        runs: all of its runs.
    """

    def __init__(self, out: Path, runs: Sequence[Run]) -> None:
        self._out = out
        self._first: dict[tuple[str, str], int] = {}
        for run in runs:
            key = run.arm.label, run.game
            self._first[key] = min(run.seed, self._first.get(key, run.seed))
        self._bytes = sum(path.stat().st_size for path in out.glob("agents/*/*/*.safetensors"))

    def keep(self, run: Run, steps: int, vector: np.ndarray) -> None:
        """Store the final parameters of a run if its agent is to be kept. Raises OSError if that fails."""
        if not vector.size or run.seed != self._first[run.arm.label, run.game] or self._bytes >= MOST_BYTES:
            return
        header = {"arm": run.arm.label, "game": run.game, "seed": run.seed, "steps": steps, "scope": run.arm.scope}
        data = pack({"parameters": vector.astype(np.float16)}, header)
        path = path_of(self._out, run.arm.label, run.game, run.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data, "transfer-agent", durable=False)
        self._bytes += len(data)


def path_of(out: Path, arm: str, game: str, seed: int) -> Path:
    """Return the path of an agent's file."""
    return out / "agents" / arm / game / f"{seed}.safetensors"


def names(out: Path) -> list[tuple[str, str, int]]:
    """Return arm, game and seed of every agent that an evaluation has kept, sorted."""
    found = [path for path in out.glob("agents/*/*/*.safetensors") if path.stem.isdecimal()]
    return sorted((path.parts[-3], path.parts[-2], int(path.stem)) for path in found)


def load(out: Path, arm: str, game: str, seed: int) -> Agent:
    """Return a stored agent. Raises OSError if it cannot be read, CorruptFile if it is damaged or not an agent."""
    path = path_of(out, arm, game, seed)
    tensors, header = unpack(read_packed(path), path.name)
    try:
        schema.check(header, _SHAPE, "agent")
        (vector,) = tensors.values()
        if vector.dtype != np.float16 or vector.ndim != 1 or not np.isfinite(vector).all():
            raise ValueError("its parameters are not finite 16-bit numbers")
    except ValueError as error:
        raise CorruptFile(f"{path} is not an agent: {error}") from None
    return Agent(**{name: header[name] for name in _SHAPE}, vector=vector.astype(np.float32))
