"""φ and every contribution on its way into it: accepted → journal → meta-update → checkpoint → ledger.

The order of the writes is what makes a contribution count exactly once, whatever is killed in between:

1. an accepted contribution is in the journal before anybody hears of it;
2. a meta-update exists once its checkpoint does; the checkpoint says which contributions it holds, and carries the
   ledger lines that follow it;
3. a journal file is removed when every checkpoint kept holds its contribution.

A restart takes the newest checkpoint that is whole, makes up for its ledger lines, and replays the journal beyond it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leap_dist import aggregation
from leap_dist.aggregation import Direction, MetaOptimizer, Pull
from leap_dist.checkpoint import Checkpoint, CheckpointStore, CorruptFile, Journal, Ledger, pack, write_atomic
from leap_dist.config import Config
from leap_dist.contribution import Contribution, Lease
from leap_dist.models import FRAME_SIZE, Manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Accepted:
    """A final contribution that is in the journal."""

    order: int
    """Counts all that was ever accepted."""
    lease: Lease
    contribution: Contribution
    norm: float


class MetaState:
    """Owns φ, its meta-optimizer, and the run directory's checkpoints, journal and ledger. See the module's text.

    `alert` is called with what a person should know. `restore` has to be called before anything else.
    """

    def __init__(
        self, config: Config, run_dir: Path, manifest: Manifest, initial: np.ndarray, alert: Callable[[str], None]
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._manifest = manifest
        self._initial = initial
        self._alert = alert
        self._checkpoints = CheckpointStore(run_dir / "checkpoints", config.server.keep_checkpoints)
        self.journal = Journal(run_dir / "journal")
        self.ledger = Ledger(run_dir / "ledger.jsonl")
        self._optimizer = MetaOptimizer(config.meta, initial)
        self.version = 0
        self.applied = 0
        """Contributions in φ."""
        self.applied_steps = 0
        """Agent steps that went into them."""
        self.waiting: list[Accepted] = []
        """Accepted, not applied; in order of acceptance."""
        self._next_order = 0
        self._covered = deque([0], maxlen=config.server.keep_checkpoints)  # first order that each kept checkpoint lacks
        self._norms: deque[float] = deque(maxlen=config.meta.clip_window)
        self._unwritten: list[dict[str, Any]] = []  # ledger lines that are in a checkpoint, but not in the ledger yet

    @property
    def vector(self) -> np.ndarray:
        """A copy of φ."""
        return self._optimizer.vector

    def accept(self, lease: Lease, contribution: Contribution, norm: float) -> None:
        """Durable when this returns. Raises OSError, and then it was not accepted."""
        accepted = Accepted(self._next_order, lease, contribution, norm)
        header = {"lease": asdict(lease), "norm": norm, "contribution": contribution.header()}
        self.journal.write(accepted.order, contribution.vector, header)
        self.waiting.append(accepted)
        self._next_order += 1

    def update(self, count: int, rest: dict[str, Any]) -> None:
        """Makes a meta-update of the first `count` waiting contributions.

        `rest` is stored along, for `restore` to return. Raises OSError where the checkpoint cannot be saved; φ and the
        optimizer are as before then, and the contributions go on waiting.
        """
        # In the order of the tasks, whatever order they arrived in: the same contributions give the same bits.
        batch = sorted(self.waiting[:count], key=lambda accepted: accepted.lease.task.index)
        before, optimizer_before = self._optimizer.vector, self._optimizer.state()
        direction = self._direction(batch)
        self._optimizer.step(direction.gradient)
        change = float(np.linalg.norm((self._optimizer.vector - before).astype(np.float64)))
        if not np.isfinite(change):
            self._optimizer.restore(before, optimizer_before)
            self._alert(f"meta-update {self.version + 1} was not finite: the initialization stays as it was")
            change = 0.0
        lines = self._ledger_lines(batch, direction, change)
        try:
            self._checkpoints.save(self._checkpoint(count, lines, rest))
        except OSError:
            self._optimizer.restore(before, optimizer_before)
            raise
        self._commit(count, lines)

    def restore(self) -> tuple[dict[str, Any] | None, list[Accepted]]:
        """Brings back what the run directory holds, or makes its first checkpoint.

        Returns the `rest` of the newest whole checkpoint (None for a new run), and the contributions accepted after
        it. Raises CorruptFile where no checkpoint can be used, or it is of another encoder; OSError.
        """
        checkpoint, warnings = self._checkpoints.load_newest()
        for warning in warnings:
            self._alert(warning)
        if checkpoint is None and warnings:
            raise CorruptFile("no usable checkpoint is left: " + "; ".join(warnings))
        if checkpoint is None:
            self._checkpoints.save(self._checkpoint(0, [], None))
            self._write_ledger()
        else:
            self._adopt(checkpoint)
        for order, vector, header in self.journal.entries(self._next_order):
            if order != self._next_order:
                self._alert(f"journal entries {self._next_order} to {order - 1} are missing")
            lease, contribution = Lease.of(header["lease"]), Contribution.of(header["contribution"], vector)
            self.waiting.append(Accepted(order, lease, contribution, header["norm"]))
            self._next_order = order + 1
        return (checkpoint.state["rest"] if checkpoint else None), self.waiting

    def _direction(self, batch: Sequence[Accepted]) -> Direction:
        pulls = [Pull(a.lease.version, a.norm, a.contribution.vector) for a in batch]
        return aggregation.combine(self._config.mode, self._config.meta, pulls, self.version, self._norms)

    def _checkpoint(self, count: int, lines: list[dict[str, Any]], rest: dict[str, Any] | None) -> Checkpoint:
        """The state as it will be when the first `count` waiting contributions are applied."""
        batch = self.waiting[:count]
        state = {
            "applied": self.applied + count,
            "applied_steps": self.applied_steps + _steps(batch),
            "covered": [*self._covered, batch[-1].order + 1] if batch else [0],
            "norms": [*self._norms, *(a.norm for a in batch)],
            "ledger": {"offset": self.ledger.size, "lines": [*self._unwritten, *lines]},
            "rest": rest,
        }
        version = self.version + 1 if batch else 0
        return Checkpoint(version, self._manifest.split(self._optimizer.vector), self._optimizer.state(), state)

    def _commit(self, count: int, lines: list[dict[str, Any]]) -> None:
        """What follows a durable checkpoint. A crash anywhere in here is made good by `restore`."""
        batch, self.waiting = self.waiting[:count], self.waiting[count:]
        self.version += 1
        self.applied += count
        self.applied_steps += _steps(batch)
        self._norms.extend(a.norm for a in batch)
        self._covered.append(batch[-1].order + 1)
        self._unwritten += lines
        self._write_ledger()
        self.journal.discard_before(self._covered[0])

    def _adopt(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        self.version = checkpoint.version
        try:
            vector = self._manifest.join(checkpoint.init)
        except ValueError as error:
            raise CorruptFile(f"checkpoint {checkpoint.version} is of another encoder: {error}") from None
        self._optimizer.restore(vector, checkpoint.optimizer)
        self.applied, self.applied_steps = state["applied"], state["applied_steps"]
        self._covered.extend(state["covered"])
        self._next_order = self._covered[-1]
        self._norms.extend(state["norms"])
        self.ledger.append(state["ledger"]["offset"], state["ledger"]["lines"])
        self._write_ledger()

    def _write_ledger(self) -> None:
        """Brings the ledger and init.safetensors up to date, now or, where the disk is full, with the next update."""
        try:
            self.ledger.append(self.ledger.size, self._unwritten)
            self._unwritten = []
            write_atomic(self._run_dir / "init.safetensors", self._export())
        except OSError as error:
            self._alert(f"the ledger or init.safetensors could not be written and waits: {error}")

    def _ledger_lines(self, batch: list[Accepted], direction: Direction, update_norm: float) -> list[dict[str, Any]]:
        return [
            {
                "version_before": self.version,
                "version_after": self.version + 1,
                "task": a.lease.task.index,
                "game": a.lease.task.game,
                "visit": a.lease.task.visit,
                "lease": a.lease.id,
                "worker": a.lease.worker,
                "lease_version": a.lease.version,
                "staleness": self.version - a.lease.version,
                "weight": weight,
                "norm": a.norm,
                "clip": clip,
                "updates": a.contribution.updates,
                "steps": a.contribution.steps,
                "seconds": a.contribution.seconds,
                "path": asdict(a.contribution.path),
                "curve": [asdict(point) for point in a.contribution.curve],
                "update_norm": update_norm,
                "agreement": direction.agreement,
                "total_steps": self.applied_steps + _steps(batch),
            }
            for a, weight, clip in zip(batch, direction.weights, direction.clips, strict=True)
        ]

    def _export(self) -> bytes:
        """init.safetensors, for other programs."""
        atari = self._config.atari
        preprocessing = {
            "frames": atari.frames,
            "size": FRAME_SIZE,
            "frame_skip": atari.frame_skip,
            "scale": "pixels / 255",
        }
        header = {
            "version": self.version,
            "preset": self._config.preset,
            "meta_learner": self._config.meta_learner,
            "games": list(self._config.games),
            "preprocessing": preprocessing,
        }
        return pack(self._manifest.split(self._optimizer.vector), header)


def _steps(batch: Sequence[Accepted]) -> int:
    return sum(accepted.contribution.steps for accepted in batch)
