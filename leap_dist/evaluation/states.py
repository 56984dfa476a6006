"""The states of an evaluation's running agents, from which they continue after a crash or in the next launch.

OUT/states/<arm>/<game>/<seed>.safetensors     the newest state of a run that has no result yet
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from leap_dist.config.settings import Config
from leap_dist.evaluation.runs import Run
from leap_dist.storage.atomic import DECODE_ERRORS, CorruptFile, pack, read_packed, unpack, write_atomic


class StateStore:
    """Keeps the newest state of each running agent.

    Args:
        out: directory of the evaluation.
        config: settings of the agents. A state that was stored with others is not used.
    """

    def __init__(self, out: Path, config: Config) -> None:
        self._out = out
        self._config = config

    def keep(self, run: Run, state: bytes, steps: int) -> None:
        """Store the state after `steps` steps, durably, replacing the previous one. Raises OSError."""
        path = self._path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"identity": run.identity(self._config), "steps": steps}
        data = pack({"state": np.frombuffer(state, np.uint8)}, header)
        write_atomic(path, data, "transfer-state")

    def load(self, run: Run) -> tuple[bytes, int] | None:
        """Return the state of a run and its steps; None if none was stored with the same settings.

        Raises CorruptFile if it is damaged, and OSError if it cannot be read.
        """
        path = self._path(run)
        try:
            arrays, header = unpack(read_packed(path), path.name)
        except FileNotFoundError:
            return None
        try:
            found = arrays["state"].tobytes(), int(header["steps"])
            return found if header["identity"] == run.identity(self._config) else None
        except DECODE_ERRORS as error:
            raise CorruptFile(f"{path.name} is not the state of a run: {error}") from None

    def drop(self, run: Run) -> None:
        """Remove the state of a run that has a result."""
        path = self._path(run)
        with contextlib.suppress(OSError):  # a state that remains is never used
            path.unlink(missing_ok=True)
            for folder in path.parents[:3]:  # up to `states`, as far as they are empty
                folder.rmdir()

    def _path(self, run: Run) -> Path:
        return self._out / "states" / run.arm.label / run.game / f"{run.seed}.safetensors"
