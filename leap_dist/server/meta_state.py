"""φ, the heads, and every contribution on its way into them: accepted → journal → meta-update → checkpoint → ledger.

The order of the writes is what makes a contribution count exactly once, whatever is killed in between:

1. an accepted contribution is in the journal before anybody hears of it;
2. a meta-update exists once its checkpoint does; the checkpoint says which contributions it holds, and carries the
   ledger lines that follow it;
3. a journal file is removed when every checkpoint kept holds its contribution, and no later push of the same lease,
   which is cumulative, is still to be measured from it.

A restart takes the newest checkpoint that is whole, makes up for its ledger lines, and replays the journal beyond it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leap_dist.config.loading import fixed_settings
from leap_dist.config.settings import Config
from leap_dist.nn.flat_vector import Manifest
from leap_dist.protocol import schema
from leap_dist.protocol.messages import Contribution, Lease
from leap_dist.server import aggregation, staleness
from leap_dist.server.aggregation import Direction, MetaOptimizer, Pull
from leap_dist.storage.atomic import CorruptFile, NewerFormat, pack, write_atomic
from leap_dist.storage.checkpoint import Checkpoint, CheckpointStore
from leap_dist.storage.journal import Journal
from leap_dist.storage.ledger import Ledger
from leap_dist.storage.replica import NO_REPLICA, NoReplica
from leap_dist.tasks.task import family_of
from leap_dist.testing.failpoints import failpoint

_STATE = {
    **dict.fromkeys(("applied", "applied_tasks", "applied_steps", "clipped"), int),
    "covered": [int],
    "bases": {...: int},
    "norms": [float],
    "ledger": {"offset": int, "sha256": str, "lines": [{...: object}]},
    "settings": {...: object},
    "rest": (None, {...: object}),
}
"""What `MetaState._checkpoint` puts into a checkpoint's state."""


@dataclass(frozen=True)
class Accepted:
    """A contribution that is in the journal."""

    order: int
    """Counts all that was ever accepted."""
    lease: Lease
    contribution: Contribution
    vector: np.ndarray
    """What it adds to what its lease has sent before: all of it, but in mode stream."""
    norm: float
    """Of the vector's shared part."""
    steps: int
    """Agent steps since the lease's accepted contribution before."""


class MetaState:
    """Owns φ, its meta-optimizer, and the run directory's checkpoints, journal and ledger. See the module's text.

    `alert` is called with what a person should know. `restore` has to be called before anything else.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        manifest: Manifest,
        initial: np.ndarray,
        alert: Callable[[str], None],
        replica: NoReplica = NO_REPLICA,
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._manifest = manifest
        self._alert = alert
        self._replica = replica
        self._checkpoints = CheckpointStore(run_dir / "checkpoints", config.server.keep_checkpoints, replica)
        self.journal = Journal(run_dir / "journal", replica)
        self.ledger = Ledger(run_dir / "ledger.jsonl", replica)
        self._optimizer = MetaOptimizer(config.mode, config.meta, initial)
        self.heads: dict[str, np.ndarray] = {}
        """By game, what training has added to the head that the game began with, where heads persist."""
        self.version = 0
        self.applied = 0
        """Contributions in φ."""
        self.applied_tasks = 0
        """Those of them that were final."""
        self.applied_steps = 0
        """Agent steps that went into them."""
        self.clipped = 0
        """How many of them were made smaller, their norm being far from what is usual."""
        self.waiting: list[Accepted] = []
        """Accepted, not applied; in order of acceptance."""
        self.unfinished: dict[str, Contribution] = {}
        """By lease, what was accepted of it last, while more may follow."""
        self.unmeasurable: set[str] = set()
        """Leases that end with a restart: what their next push is to be measured from is lost."""
        self._next_order = 0
        self._entries: dict[str, deque[int]] = {}  # orders of the journal's entries, by lease
        self._bases: dict[str, int] = {}  # by lease, entry that the checkpoint holds and a later push is measured from
        self._covered = deque([0], maxlen=config.server.keep_checkpoints)  # first order that each kept checkpoint lacks
        self._norms: deque[float] = deque(maxlen=config.meta.clip_window)
        self._unwritten: list[dict[str, Any]] = []  # ledger lines that are in a checkpoint, but not in the ledger yet
        # Kept for `norm`: new memory of that size costs more, page by page, than the sum that it is for.
        self._double = np.empty(manifest.size, np.float64)

    @property
    def vector(self) -> np.ndarray:
        """A copy of φ."""
        return self._optimizer.vector

    def added(self, contribution: Contribution) -> np.ndarray:
        """What a contribution adds to what its lease has sent before."""
        before = self.unfinished.get(contribution.lease)
        return contribution.vector if before is None else contribution.vector - before.vector

    def norm(self, vector: np.ndarray) -> float:
        """Of the shared part."""
        shared = vector[: self._manifest.size]
        double = self._double[: len(shared)]
        double[:] = shared
        return float(np.linalg.norm(double))

    def largest_norm(self) -> float:
        """That a contribution may have: a multiple of the running median, before there is one of the norm of φ."""
        usual = float(np.median(self._norms)) if self._norms else max(1.0, self.norm(self.vector))
        return (self._config.meta.refuse_norm or math.inf) * usual

    def head_size(self, game: str) -> int | None:
        """Length of a game's persistent head, None where nobody has sent one yet."""
        if game in self.heads:
            return len(self.heads[game])
        sizes = (len(a.vector) - self._manifest.size for a in self.waiting if a.lease.task.game == game)
        return next(sizes, None)

    def accept(self, lease: Lease, contribution: Contribution, arrays: dict[str, np.ndarray] | None = None) -> None:
        """Durable when this returns. Raises OSError, and then it was not accepted.

        The contribution's arrays are kept. What is stored are `arrays`, which it was received with: maybe packed ones.
        """
        header = {"lease": asdict(lease), "contribution": contribution.header()}
        self.journal.write(self._next_order, contribution.arrays() if arrays is None else arrays, header)
        self._append(lease, contribution)

    def forget(self, lease_id: str) -> None:
        """Nothing more will come of a lease; what was accepted of it stays."""
        self.unfinished.pop(lease_id, None)

    def update(self, count: int, rest: dict[str, Any]) -> None:
        """Makes a meta-update of the first `count` waiting contributions.

        `rest` is stored along, for `restore` to return. Raises OSError where the checkpoint cannot be saved; φ and the
        optimizer are as before then, and the contributions go on waiting.
        """
        self.journal.sync()
        # In the order of the tasks, whatever order they arrived in: the same contributions give the same bits.
        batch = sorted(self.waiting[:count], key=lambda accepted: accepted.lease.task.index)
        before, optimizer_before, heads_before = self.vector, self._optimizer.state(), self.heads
        direction = self._direction(batch, before)
        heads = self._trained_heads(batch)
        finite = all(np.isfinite(head).all() for head in heads.values())
        failpoint("update.apply")
        if finite and self._optimizer.step(direction.gradient, done=self.applied_tasks / self._config.total_tasks):
            self.heads = heads
        else:
            self._alert(f"meta-update {self.version + 1} was not finite: the initialization stays as it was")
        failpoint("update.applied")
        change = self.norm(self.vector - before)
        lines = self._ledger_lines(batch, direction, change)
        try:
            self._checkpoints.save(self._checkpoint(count, lines, rest))
        except OSError:
            self._optimizer.restore(before, optimizer_before)
            self.heads = heads_before
            raise
        self._commit(count, lines)

    def restore(self) -> tuple[dict[str, Any] | None, list[Accepted]]:
        """Brings back what the run directory holds, or makes its first checkpoint.

        Returns the `rest` of the newest whole checkpoint (None for a new run), and the contributions accepted after
        it. Raises CorruptFile where no checkpoint can be used, or it is of another format, encoder or run; OSError.

        What is damaged in the journal is set aside, with an alert: its task is trained again.
        """
        self._replica.catch_up()
        checkpoint, warnings = self._checkpoints.load_newest()
        for warning in warnings:
            self._alert(warning)
        if checkpoint is None and warnings:
            raise CorruptFile("no usable checkpoint is left: " + "; ".join(warnings))
        if checkpoint is None and (self.ledger.size or self.journal.orders()):
            raise CorruptFile("no checkpoint is left, but ledger.jsonl or journal/ say that there was one")
        if checkpoint is None:
            self._checkpoints.save(self._checkpoint(0, [], None))
            self._write_ledger()
        else:
            self._adopt(checkpoint)
        self._replay()
        return (checkpoint.state["rest"] if checkpoint else None), self.waiting

    def _replay(self) -> None:
        """Takes in the journal, beyond what the checkpoint holds."""
        first = self._next_order
        for order in self.journal.orders():
            if order < first:
                self._recall(order)
        for lease_id, order in self._bases.items():
            if order not in self._entries.get(lease_id, ()):
                self._alert(f"journal entry {order} is lost, from which the rest of lease {lease_id} is measured")
                self.unmeasurable.add(lease_id)
                self.forget(lease_id)
        for order in self.journal.orders():
            if order >= first:
                if order > self._next_order:
                    self._alert(f"journal entries {self._next_order} to {order - 1} are missing")
                self._next_order = order
                if (entry := self._read(order)) is None:
                    self._next_order += 1
                else:
                    self._append(*entry)

    def _recall(self, order: int) -> None:
        """Takes note of an entry that the checkpoint holds: in a stream, a later push may be measured from it."""
        if self._config.mode != "stream":
            self._entries[f"entry {order}"] = deque([order])
        elif (entry := self._read(order)) is not None:
            self._note(order, entry[1])

    def _read(self, order: int) -> tuple[Lease, Contribution] | None:
        """An entry of the journal; None where it is damaged, and set aside. Raises NewerFormat."""
        try:
            arrays, header = self.journal.read(order)
            lease = Lease.of(header["lease"])
            contribution = Contribution.of(header["contribution"], arrays).owned()
            if problem := self._misfit(lease, contribution):
                raise ValueError(problem)
        except NewerFormat:
            raise
        except (CorruptFile, OSError, KeyError, ValueError) as error:
            self._alert(f"journal entry {order} is set aside, its task is trained again unless it is done: {error}")
            self.journal.set_aside(order)
            return None
        return lease, contribution

    def _misfit(self, lease: Lease, contribution: Contribution) -> str:
        """Why what is in the journal cannot be of this run; "" where it can."""
        vector, start, size = contribution.vector, contribution.start, self._manifest.size
        if lease.id in self.unmeasurable:
            return f"what the rest of lease {lease.id} is measured from is lost"
        if contribution.lease != lease.id or lease.task.game not in self._config.games:
            return "it is of another lease or run"
        if contribution.manifest != self._manifest.digest or vector.ndim != 1:
            return "it is of another encoder"
        known = self.head_size(lease.task.game) if self._config.keeps_heads else 0
        wanted = (
            0
            if self._config.meta_learner == "none"
            else size + (max(1, len(vector) - size) if known is None else known)
        )
        arrays = [vector] if start is None else [vector, start]
        if len(vector) != wanted or (start is not None and start.shape != (size,)):
            return "it is of another encoder"
        if self._config.corrects_endpoint != (start is not None):
            return "it is of a run with other settings"
        if not all(array.dtype == np.float32 and np.isfinite(array).all() for array in arrays):
            return "it is not finite float32"
        return ""

    def _append(self, lease: Lease, contribution: Contribution) -> None:
        """What follows when a contribution is in the journal."""
        before = self.unfinished.get(contribution.lease)
        steps = contribution.steps - (before.steps if before else 0)
        vector = self.added(contribution)
        accepted = Accepted(self._next_order, lease, contribution, vector, self.norm(vector), steps)
        self.waiting.append(accepted)
        self._note(accepted.order, contribution)
        self._next_order += 1

    def _note(self, order: int, contribution: Contribution) -> None:
        self._entries.setdefault(contribution.lease, deque()).append(order)
        if contribution.final:
            self.forget(contribution.lease)
        else:
            self.unfinished[contribution.lease] = contribution

    def _discard(self) -> None:
        """Removes the journal entries that nobody needs any more."""
        first = self._covered[0]
        for lease_id, orders in list(self._entries.items()):
            # A push is measured from the one before it; the last of a lease is done with when the lease is.
            while orders and orders[0] < first:
                if orders[1] >= first if len(orders) > 1 else lease_id in self.unfinished:
                    break
                self.journal.discard(orders.popleft())
            if not orders:
                del self._entries[lease_id]
        self.journal.flush_discarded()

    def _measured_from(self, first: int) -> dict[str, int]:
        """By lease, the journal's entry before `first` that pushes from there on are, or will be, measured from."""
        bases = {}
        for lease_id, orders in self._entries.items():
            before = [order for order in orders if order < first]
            if before and (len(before) < len(orders) or lease_id in self.unfinished):
                bases[lease_id] = before[-1]
        return bases

    def _direction(self, batch: Sequence[Accepted], vector: np.ndarray) -> Direction:
        size = self._manifest.size
        pulls = [Pull(a.contribution.base_version, a.norm, a.vector[:size], a.contribution.start) for a in batch]
        return aggregation.combine(
            self._config.mode, self._config.meta, pulls, version=self.version, vector=vector, recent=self._norms
        )

    def _trained_heads(self, batch: Sequence[Accepted]) -> dict[str, np.ndarray]:
        """The heads after a meta-update: each moves by the mean of its own game's contributions.

        Neither weighed by staleness nor clipped: a head belongs to one game, and nobody else's progress makes it old.
        """
        heads = dict(self.heads)
        if self._config.keeps_heads:
            for game in sorted({a.lease.task.game for a in batch}):
                pulls = [a.vector[self._manifest.size :] for a in batch if a.lease.task.game == game]
                # In a stream each adds to those before it, and two may be of one task.
                count = 1 if self._config.mode == "stream" else len(pulls)
                change = -staleness.weighted_mean(pulls, [1.0] * len(pulls), count)
                heads[game] = heads[game] + change if game in heads else change
        return heads

    def _checkpoint(self, count: int, lines: list[dict[str, Any]], rest: dict[str, Any] | None) -> Checkpoint:
        """The state as it will be when the first `count` waiting contributions are applied."""
        batch = self.waiting[:count]
        first = batch[-1].order + 1 if batch else 0
        state = {
            "applied": self.applied + count,
            "applied_tasks": self.applied_tasks + _tasks(batch),
            "applied_steps": self.applied_steps + _steps(batch),
            "clipped": self.clipped + _clipped(lines),
            "covered": [*self._covered, first] if batch else [0],
            "bases": self._measured_from(first),
            "norms": [*self._norms, *_norms(batch)],
            "ledger": {
                "offset": self.ledger.size,
                "sha256": self.ledger.sha256,
                "lines": [*self._unwritten, *lines],
            },
            "settings": fixed_settings(self._config),
            "rest": rest,
        }
        version = self.version + 1 if batch else 0
        return Checkpoint(version, self._manifest.split(self.vector), self._optimizer.state(), self.heads, state)

    def _commit(self, count: int, lines: list[dict[str, Any]]) -> None:
        """What follows a durable checkpoint. A crash anywhere in here is made good by `restore`."""
        batch, self.waiting = self.waiting[:count], self.waiting[count:]
        self.version += 1
        self.applied += count
        self.applied_tasks += _tasks(batch)
        self.applied_steps += _steps(batch)
        self.clipped += _clipped(lines)
        self._norms.extend(_norms(batch))
        self._covered.append(batch[-1].order + 1)
        self._unwritten += lines
        self._write_ledger()
        self._discard()

    def _adopt(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        self.version = checkpoint.version
        try:
            vector = self._manifest.join(checkpoint.init)
        except ValueError as error:
            raise CorruptFile(f"checkpoint {checkpoint.version} is of another encoder: {error}") from None
        try:
            schema.check(state, _STATE, "state")
            self._check(vector, checkpoint)
        except ValueError as error:
            raise CorruptFile(f"checkpoint {checkpoint.version} cannot be gone on from: {error}") from None
        self._optimizer.restore(vector, checkpoint.optimizer)
        self.heads = checkpoint.heads
        self.applied, self.applied_tasks = state["applied"], state["applied_tasks"]
        self.applied_steps, self.clipped = state["applied_steps"], state["clipped"]
        self._covered.extend(state["covered"])
        self._next_order = self._covered[-1]
        self._bases = dict(state["bases"])
        self._norms.extend(state["norms"])
        before = state["ledger"]["offset"]
        if not self.ledger.begins_with(before, state["ledger"]["sha256"]):
            self._alert(
                f"ledger.jsonl is not what was written, somewhere in its first {before} bytes: what it says about the "
                "run so far may be wrong or missing, what was learned is not touched"
            )
        self.ledger.append(before, state["ledger"]["lines"])
        self._write_ledger()

    def _check(self, vector: np.ndarray, checkpoint: Checkpoint) -> None:
        """Raises ValueError where a checkpoint, though whole, is not of this run."""
        state, now = checkpoint.state, fixed_settings(self._config)
        then = {name: value for name, value in state["settings"].items() if name in now}
        if changed := [f"{name}: {value} -> {now[name]}" for name, value in then.items() if value != now[name]]:
            raise ValueError(f"it is of a run with other settings: {'; '.join(changed)}")
        if not state["covered"] or state["ledger"]["offset"] < 0:
            raise ValueError("its counts make no sense")
        trial = MetaOptimizer(self._config.mode, self._config.meta, vector)
        trial.step(np.zeros_like(vector))
        found = {name: (array.size, array.dtype) for name, array in checkpoint.optimizer.items()}
        if found and found != {name: (array.size, array.dtype) for name, array in trial.state().items()}:
            raise ValueError(f"its optimizer is another one: {', '.join(found)}")
        arrays = [vector, *checkpoint.optimizer.values(), *checkpoint.heads.values()]
        if not all(np.isfinite(array).all() for array in (*arrays, np.array(state["norms"]))):
            raise ValueError("it is not finite")
        if any(head.ndim != 1 or head.dtype != np.float32 for head in checkpoint.heads.values()):
            raise ValueError("its heads are not vectors")

    def _write_ledger(self) -> None:
        """Brings the ledger and init.safetensors up to date, now or, where the disk is full, with the next update."""
        try:
            self.ledger.append(self.ledger.size, self._unwritten)
            self._unwritten = []
            write_atomic(self._run_dir / "init.safetensors", self._export(), "init")
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
                # Cumulative: the final line has it all.
                "curve": [point.plain() for point in a.contribution.curve] if a.contribution.final else [],
                "update_norm": update_norm,
                "agreement": direction.agreement,
                "total_steps": self.applied_steps + _steps(batch),
            }
            for a, weight, clip in zip(batch, direction.weights, direction.clips, strict=True)
        ]

    def _export(self) -> bytes:
        """init.safetensors, for other programs."""
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
            "preprocessing": family_of(self._config).preprocessing(self._config),
        }
        return pack(self._manifest.split(self.vector), header)


def _steps(batch: Sequence[Accepted]) -> int:
    return sum(accepted.steps for accepted in batch)


def _norms(batch: Sequence[Accepted]) -> list[float]:
    """Of what says something about how large contributions are: the end of a lost lease in `stream` adds nothing."""
    return [accepted.norm for accepted in batch if accepted.norm > 0]


def _tasks(batch: Sequence[Accepted]) -> int:
    return sum(accepted.contribution.final for accepted in batch)


def _clipped(lines: list[dict[str, Any]]) -> int:
    return sum(line["clip"] < 1 for line in lines)
