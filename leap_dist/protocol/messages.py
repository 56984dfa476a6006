"""What passes between the server and its workers: tasks, leases, contributions, acknowledgements."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from leap_dist.protocol import schema
from leap_dist.protocol.quantization import Quantized, quantize


@dataclass(frozen=True)
class Task:
    """One learning process to run."""

    index: int
    """Position in the run's fixed sequence of tasks; with the run's seed it determines everything else."""
    game: str
    visit: int
    """How often the sequence has drawn this game before."""
    seed: int
    steps: int
    """Agent steps."""


@dataclass(frozen=True)
class Lease:
    """The server's grant of one task to one incarnation of a worker."""

    id: str
    task: Task
    worker: str
    incarnation: str
    version: int
    """Of the snapshot that the task starts from."""
    seconds: float
    """Unless renewed for this long, the lease is taken back."""

    @classmethod
    def of(cls, data: dict[str, Any]) -> Lease:
        """The inverse of `dataclasses.asdict`. Raises ValueError where a field is missing, unknown or wrong."""
        schema.check(data, _LEASE, "lease")
        lease = _made(cls, {**data, "task": _made(Task, data["task"])})
        if lease.task.index < 0 or not 0 < lease.seconds < math.inf:
            raise ValueError("lease is of no task, or for no time")
        return lease


@dataclass(frozen=True)
class Idle:
    """Nothing to lease now. `finished` where there never will be."""

    finished: bool
    wait: float = 0.0
    """Seconds to wait at least before asking again."""


@dataclass(frozen=True)
class CurvePoint:
    """How training went between two reports."""

    steps: int
    """Agent steps since the task's start."""
    episodes: int
    score: float | None
    """Mean raw return of the episodes that ended, None where none did. Of supervised tasks, mean error of a batch."""
    means: dict[str, float]
    """Mean loss, policy_loss, value_loss, entropy; loss, error."""

    def plain(self) -> dict[str, Any]:
        """As plain data. `dataclasses.asdict` gives the same, twenty times slower."""
        return {**vars(self), "means": dict(self.means)}


@dataclass(frozen=True)
class Episode:
    """One that ended."""

    steps: int
    """Agent steps since the task's start."""
    score: float
    """Raw return."""


@dataclass(frozen=True)
class PathStatistics:
    """Geometry of the gradient path so far (equation 4) and of the two terms of the pull-forward gradient."""

    energy: float
    length: float
    loss_term_norm: float
    path_term_norm: float
    cosine: float
    """Between the two terms; 0 where one of them is zero."""


@dataclass(frozen=True)
class Contribution:
    """What a meta-learner makes of the path up to update `updates`: cumulative, the newest one holds all before it."""

    lease: str
    worker: str
    incarnation: str
    manifest: str
    """`Manifest.digest` of the parameters that the vector belongs to."""
    base_version: int
    """Of the snapshot that the worker last heard of: the lease's, or a later one with trajectory shifting."""
    seq: int
    """Counts the contributions of a lease: 1, 2, …"""
    final: bool
    updates: int
    steps: int
    """Agent steps so far."""
    seconds: float
    """Wall time so far."""
    vector: np.ndarray
    """Float32, flat: of the shared parameters, and then of the game's head where heads persist.

    Empty in what is not final, and `start` is None, where no prefix counts: nobody would read it.
    """
    start: np.ndarray | None
    """φ_lease, float32, flat, where the server corrects for the end point (ρ, fedasync)."""
    path: PathStatistics
    curve: tuple[CurvePoint, ...]
    """From the start of the task, cumulative as well."""
    episodes: tuple[Episode, ...] = ()
    """All of the task's, with the final contribution of a task that is an evaluation."""
    packed: Quantized | None = None
    """What `vector` is computed from, where the contribution travels and is stored in fewer bits: instead of it."""

    @classmethod
    def whole(cls, lease: Lease, manifest: str, vector: np.ndarray, path: PathStatistics | None = None) -> Contribution:
        """All that comes of a lease, sent when its task is done: for programs with a training loop of their own.

        `manifest` is the manifest's digest. Not for what the server corrects by the path's start (fedasync, ρ).
        """
        return cls(
            lease=lease.id,
            worker=lease.worker,
            incarnation=lease.incarnation,
            manifest=manifest,
            base_version=lease.version,
            seq=1,
            final=True,
            updates=0,
            steps=lease.task.steps,
            seconds=0.0,
            vector=vector,
            start=None,
            path=path or PathStatistics(0.0, 0.0, 0.0, 0.0, 0.0),
            curve=(),
        )

    def quantized(self, bits: int) -> Contribution:
        """The same in 16 or 8 bits a number: its vector is the rounded one, for whoever has it and whoever gets it.

        Not for what has a `start`. Raises ValueError.
        """
        if self.start is not None:
            raise ValueError("a contribution with the start of its path is not packed")
        packed = quantize(self.vector, bits)
        return dataclasses.replace(self, vector=packed.vector, packed=packed)

    def owned(self) -> Contribution:
        """The same, to be kept: Ray's arrays are read-only views into its object store, and must not be.

        What was packed is not any more, as its vector is nobody else's already.
        """
        if self.packed is not None:
            return dataclasses.replace(self, packed=None)
        start = None if self.start is None else np.array(self.start)
        return dataclasses.replace(self, vector=np.array(self.vector), start=start)

    def header(self) -> dict[str, Any]:
        """Everything but the arrays, as plain data."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _ARRAYS}
        data["path"] = dataclasses.asdict(self.path)
        data["curve"] = [point.plain() for point in self.curve]
        data["episodes"] = [dict(vars(episode)) for episode in self.episodes]
        return data

    def arrays(self) -> dict[str, np.ndarray]:
        """What `header` leaves out: of what is packed codes and scales, and no vector."""
        if self.packed is not None:
            return self.packed._asdict()
        return {"vector": self.vector} | ({} if self.start is None else {"start": self.start})

    @classmethod
    def of(cls, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Contribution:
        """The inverse of `header` and `arrays`. Raises ValueError where one is missing, unknown or of a wrong type."""
        schema.check(header, _HEADER, "contribution")
        path = _made(PathStatistics, header["path"])
        curve = tuple(_made(CurvePoint, point) for point in header["curve"])
        episodes = tuple(_made(Episode, episode) for episode in header["episodes"])
        fields = {**header, "path": path, "curve": curve, "episodes": episodes}
        if arrays.keys() == {"codes", "scales"}:
            packed = Quantized(**arrays)
            packed.check()
            return _made(cls, {**fields, "vector": packed.vector, "start": None, "packed": packed})
        if "vector" not in arrays or not arrays.keys() <= {"vector", "start"}:
            raise ValueError("contribution has no vector, or what it should not have")
        return _made(cls, {**fields, "vector": arrays["vector"], "start": arrays.get("start"), "packed": None})

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What is packed travels packed."""
        if self.packed is None:
            return super().__reduce_ex__(protocol)
        return Contribution.of, (self.header(), self.arrays())


_ARRAYS = ("vector", "start", "packed")
_LEASE = schema.shape_of(Lease)
_HEADER = schema.shape_of(Contribution)
_T = TypeVar("_T")


def _made(cls: Callable[..., _T], fields: dict[str, Any]) -> _T:
    try:
        return cls(**fields)
    except TypeError as error:
        raise ValueError(f"a field is unknown: {error}") from None


class Renewal(NamedTuple):
    """A lease to be extended."""

    lease: str
    incarnation: str
    steps: int
    """Agent steps into its task."""


@dataclass(frozen=True)
class Ack:
    """The server's answer to a push or a renewal."""

    accepted: bool
    """The contribution counts (now, or because it was received before)."""
    durable: bool
    """It is on disk and will be applied exactly once, whatever is killed."""
    reason: str
    """Why it was not accepted; "duplicate" where it was known already; else empty."""
    proceed: bool
    """The worker still holds the lease and should go on."""
    version: int
    """The server's present version."""
    wait: float = 0.0
    """Seconds to wait at least before the next report, or before this push again: the server has too much to do."""
