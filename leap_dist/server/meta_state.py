"""φ and every contribution on its way into it: accepted → journal → meta-update → checkpoint → ledger.

The order of the writes makes each contribution count exactly once, whatever is killed in between:

1. An accepted contribution is in the journal before its worker is told.
2. A meta-update exists once its checkpoint does. The checkpoint says which contributions it contains, and carries the
   ledger lines that will follow it.
3. A journal entry is removed once every kept checkpoint contains it and it is not the base of a later push (`Backlog`).

After a restart, `recovery` loads the newest valid checkpoint, writes the ledger lines that are missing, and replays
the journal.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from leap_dist.config.loading import fixed_settings
from leap_dist.config.settings import Config
from leap_dist.nn.flat_vector import Manifest
from leap_dist.server import aggregation, staleness
from leap_dist.server.aggregation import Direction, Pull
from leap_dist.server.backlog import Accepted, Backlog
from leap_dist.server.meta_optimizer import MetaOptimizer
from leap_dist.server.monitoring import Alert, DeadUnits
from leap_dist.storage.atomic import CorruptFile, pack, write_atomic
from leap_dist.storage.checkpoint import Checkpoint, CheckpointStore
from leap_dist.storage.journal import Journal
from leap_dist.storage.ledger import Ledger
from leap_dist.storage.replica import NO_REPLICA, NoReplica
from leap_dist.testing.failpoints import failpoint

STATE_SHAPE = {
    **dict.fromkeys(("applied", "applied_tasks", "applied_steps", "clipped"), int),
    "covered": [int],
    "bases": {...: int},
    "norms": [float],
    "ledger": {"offset": int, "sha256": str, "lines": [{...: object}]},
    "settings": {...: object},
    "rest": (None, {...: object}),
}
"""Shape of a checkpoint's state; see `schema.check`."""


class MetaState:
    """Owns φ, its meta-optimizer, and the checkpoints, journal and ledger of the run directory.

    Before its first use it must be restored by `recovery.Recovery`, or begun by `begin`.

    Args:
        config: the run's configuration.
        run_dir: existing directory of the run.
        manifest: names and shapes of the shared parameters.
        initial: φ₀, flat float32.
        alert: called with each message meant for the user.
        preprocessing: description of the network's input, as written into init.safetensors.
        replica: remote copy of the run directory, if any.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        manifest: Manifest,
        initial: np.ndarray,
        alert: Alert,
        *,
        preprocessing: Mapping[str, Any] = MappingProxyType({}),
        replica: NoReplica = NO_REPLICA,
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._manifest = manifest
        self._alert = alert
        self._preprocessing = dict(preprocessing)
        keep = config.server.keep_checkpoints
        self.checkpoints = CheckpointStore(run_dir / "checkpoints", keep, replica)
        self.ledger = Ledger(run_dir / "ledger.jsonl", replica)
        whole_paths = config.meta.shift == "trajectory"
        self.backlog = Backlog(Journal(run_dir / "journal", replica), manifest.size, keep, whole_paths=whole_paths)
        self._optimizer = MetaOptimizer(config.mode, config.meta, initial)
        self._dead_units = DeadUnits(alert)
        self.heads: dict[str, np.ndarray] = {}
        """The sum of what training has added to each game's initial head, by game, if heads persist.

        If one agent learns all games: its heads and the state of its optimizer, under the name of all games.
        """
        self.version = 0
        """Number of meta-updates made."""
        self.applied = 0
        """Number of contributions in φ."""
        self.applied_tasks = 0
        """Number of final contributions in φ."""
        self.applied_steps = 0
        """Agent steps behind the contributions in φ."""
        self.clipped = 0
        """Number of applied contributions that the norm clip made smaller."""
        self._norms: deque[float] = deque(maxlen=config.meta.clip_window)
        self._unwritten: list[dict[str, Any]] = []  # ledger lines that are in a checkpoint, but not in the ledger yet
        self._has_ledger = False  # whether this process has made the file, or cut off what a crash left at its end
        self._exported: int | None = None  # version of φ in init.safetensors

    @property
    def vector(self) -> np.ndarray:
        """A copy of φ."""
        return self._optimizer.vector

    def max_norm(self) -> float:
        """Return the largest norm a contribution may have.

        It is a multiple of the running median of norms, or of the norm of φ while there are none.
        """
        usual = float(np.median(self._norms)) if self._norms else max(1.0, self.backlog.norm(self.vector))
        return (self._config.meta.refuse_norm or math.inf) * usual

    def head_size(self, game: str) -> int | None:
        """Return the length of a game's persistent head, or None if no contribution has contained one yet."""
        if game in self.heads:
            return len(self.heads[game])
        waiting = self.backlog.waiting
        sizes = (len(a.vector) - self._manifest.size for a in waiting if a.lease.task.game == game)
        return next(sizes, None)

    def begin(self) -> None:
        """Save version 0, the first checkpoint of a new run. Raises OSError."""
        self.checkpoints.save(self._checkpoint(0, [], None))
        self.write_files()

    def update(self, count: int, bookkeeping: dict[str, Any]) -> None:
        """Make a meta-update from the first `count` waiting contributions.

        Args:
            count: number of contributions to apply.
            bookkeeping: plain data stored in the checkpoint, for `recovery`.

        Raises OSError if the checkpoint cannot be saved. Whatever is raised, either the meta-update is complete, or φ,
        the optimizer and the waiting contributions are as before.
        """
        self.backlog.journal.sync()
        # Summed in order of the tasks, whatever order they arrived in: the same contributions give the same bits.
        batch = sorted(self.backlog.waiting[:count], key=lambda accepted: accepted.lease.task.index)
        before, optimizer_before, heads_before = self.vector, self._optimizer.state(), self.heads
        direction = self._direction(batch, before)
        heads = self._trained_heads(batch)
        finite = all(np.isfinite(head).all() for head in heads.values())
        failpoint("update.apply")
        try:
            if finite and self._optimizer.step(direction.gradient, done=self.applied_tasks / self._config.total_tasks):
                self.heads = heads
            else:
                self._alert(f"meta-update {self.version + 1} was not finite: the initialization stays as it was")
            failpoint("update.applied")
            lines = self._ledger_lines(batch, direction, self.backlog.norm(self.vector - before))
            self.checkpoints.save(self._checkpoint(count, lines, bookkeeping))
        except BaseException:  # even an unexpected error, or the batch would be applied a second time
            self._optimizer.restore(before, optimizer_before)
            self.heads = heads_before
            raise
        self._commit(count, lines)

    def adopt(self, vector: np.ndarray, checkpoint: Checkpoint) -> None:
        """Take over a valid checkpoint, whose φ is `vector`, and write the ledger lines that it carries.

        If they cannot be written, an alert says so, and `write_files` tries again.
        """
        state = checkpoint.state
        self.version = checkpoint.version
        self._optimizer.restore(vector, checkpoint.optimizer)
        self.heads = checkpoint.heads
        self.applied, self.applied_tasks = state["applied"], state["applied_tasks"]
        self.applied_steps, self.clipped = state["applied_steps"], state["clipped"]
        self.backlog.restore(state)
        self._norms.extend(state["norms"])
        size = state["ledger"]["offset"]
        self.ledger.verify(
            size,
            state["ledger"]["sha256"],
            lambda: self._alert(
                f"the first {size} bytes of ledger.jsonl are not what was written: its account of the run may be wrong "
                "or incomplete; φ is not affected"
            ),
        )
        self.ledger.rewind(size)
        self._unwritten = list(state["ledger"]["lines"])
        self.write_files()  # if the disk is full, it is tried again

    def _direction(self, batch: Sequence[Accepted], vector: np.ndarray) -> Direction:
        size = self._manifest.size
        pulls = [Pull(a.contribution.base_version, a.norm, a.vector[:size], a.contribution.start) for a in batch]
        return aggregation.combine(
            self._config.mode, self._config.meta, pulls, version=self.version, vector=vector, recent=self._norms
        )

    def _trained_heads(self, batch: Sequence[Accepted]) -> dict[str, np.ndarray]:
        """Return the heads after a meta-update: each moves by the mean of its own game's contributions.

        They are neither weighted by staleness nor clipped: a head belongs to one game, and other games do not make it
        stale. If one agent learns all games, its contribution holds whole heads and optimizer states, which replace the
        old ones.
        """
        heads = dict(self.heads)
        if self._config.is_joint:
            heads.update({a.lease.task.game: a.vector[self._manifest.size :].copy() for a in batch})
        elif self._config.keeps_heads:
            for game in sorted({a.lease.task.game for a in batch}):
                pulls = [a.vector[self._manifest.size :] for a in batch if a.lease.task.game == game]
                # In `stream` mode increments add up, and two of them may be of one task.
                count = 1 if self._config.mode == "stream" else len(pulls)
                change = -staleness.weighted_mean(pulls, [1.0] * len(pulls), count)
                heads[game] = heads[game] + change if game in heads else change
        return heads

    def _checkpoint(self, count: int, lines: list[dict[str, Any]], bookkeeping: dict[str, Any] | None) -> Checkpoint:
        """Return the state as it will be once the first `count` waiting contributions are applied."""
        batch = self.backlog.waiting[:count]
        state = {
            "applied": self.applied + count,
            "applied_tasks": self.applied_tasks + _tasks(batch),
            "applied_steps": self.applied_steps + _steps(batch),
            "clipped": self.clipped + _clipped(lines),
            **self.backlog.state_after(count),
            "norms": [*self._norms, *_norms(batch)],
            "ledger": {
                "offset": self.ledger.size,
                "sha256": self.ledger.sha256,
                "lines": [*self._unwritten, *lines],
            },
            "settings": fixed_settings(self._config),
            "rest": bookkeeping,
        }
        version = self.version + 1 if batch else 0
        return Checkpoint(version, self._manifest.split(self.vector), self._optimizer.state(), self.heads, state)

    def _commit(self, count: int, lines: list[dict[str, Any]]) -> None:
        """Complete a meta-update whose checkpoint is durable. Recovery completes it after a crash anywhere in here."""
        batch = self.backlog.waiting[:count]
        self.backlog.commit(count)
        self.version += 1
        self.applied += count
        self.applied_tasks += _tasks(batch)
        self.applied_steps += _steps(batch)
        self.clipped += _clipped(lines)
        self._norms.extend(_norms(batch))
        self._dead_units.observe(accepted.contribution for accepted in batch)
        self._unwritten += lines
        self.write_files()
        self.backlog.discard()

    @property
    def is_written(self) -> bool:
        """Whether the ledger and init.safetensors contain all meta-updates that the checkpoints contain."""
        return self._has_ledger and not self._unwritten and self._exported == self.version

    def write_files(self) -> None:
        """Bring the ledger and init.safetensors up to date; if that fails, an alert says so, and it can be repeated."""
        if self.is_written:
            return
        for name, write in (("the ledger", self._write_ledger), ("init.safetensors", self._write_initialization)):
            try:
                write()
            except (OSError, MemoryError) as error:
                self._alert(f"{name} could not be written; the server tries again: {error}", kind=name)

    def read_ledger(self, offset: int) -> tuple[list[dict[str, Any]], int]:
        """Return a page of the ledger; see `Ledger.read_page`. If it cannot be read, there is an alert and no line."""
        try:
            return self.ledger.read_page(offset)
        except (OSError, CorruptFile) as error:
            self._alert(
                f"the ledger could not be read, so curves may be behind; training is not affected: {error}", kind="read"
            )
            return [], offset

    def _write_ledger(self) -> None:
        if self._unwritten or not self._has_ledger:
            self.ledger.append(self.ledger.size, self._unwritten)
            self._unwritten, self._has_ledger = [], True

    def _write_initialization(self) -> None:
        if self._exported == self.version:
            return
        write_atomic(self._run_dir / "init.safetensors", self._export(), "init")
        self._exported = self.version

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
                "device": a.contribution.device,
                "seq": a.contribution.seq,
                "final": a.contribution.final,
                "lease_version": a.lease.version,
                "base_version": a.contribution.base_version,
                "staleness": self.version - a.contribution.base_version,
                "weight": weight,
                "norm": a.norm,
                "clip": clip,
                "updates": a.contribution.updates,
                "steps": a.contribution.steps,
                "new_steps": a.steps,
                "seconds": a.contribution.seconds,
                "path": asdict(a.contribution.path),
                # Curves are cumulative, so the final line contains all of it.
                "curve": [point.plain() for point in a.contribution.curve] if a.contribution.final else [],
                "update_norm": update_norm,
                "agreement": direction.agreement,
                "total_steps": self.applied_steps + _steps(batch),
            }
            for a, weight, clip in zip(batch, direction.weights, direction.clips, strict=True)
        ]

    def _export(self) -> bytes:
        """Return init.safetensors, φ in a form that other programs read."""
        header = {
            "version": self.version,
            "tasks": self._config.tasks,
            "preset": self._config.preset,
            "meta_learner": self._config.meta_learner,
            "shared": self._config.scope,
            "mode": self._config.mode,
            "games": list(self._config.games),
            "task_steps": self._config.task_steps,
            "agent_steps": self.applied_steps,
            "preprocessing": self._preprocessing,
        }
        return pack(self._manifest.split(self.vector), header)


def _steps(batch: Sequence[Accepted]) -> int:
    return sum(accepted.steps for accepted in batch)


def _norms(batch: Sequence[Accepted]) -> list[float]:
    """Return the norms that show how large contributions are.

    In `stream` mode, the record that closes a lost lease adds nothing, and its norm of zero has no meaning.
    """
    return [accepted.norm for accepted in batch if accepted.norm > 0]


def _tasks(batch: Sequence[Accepted]) -> int:
    return sum(accepted.contribution.final for accepted in batch)


def _clipped(lines: list[dict[str, Any]]) -> int:
    return sum(line["clip"] < 1 for line in lines)
