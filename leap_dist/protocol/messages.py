"""Messages between the server and its workers: tasks, leases, contributions and acknowledgements."""

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
    """Name of the game, alphabet or data set."""
    visit: int
    """Number of times the sequence has drawn this game before."""
    seed: int
    """Seed of everything random in the task."""
    steps: int
    """Length of the task in agent steps."""


@dataclass(frozen=True)
class Lease:
    """The server's grant of one task to one incarnation of a worker."""

    id: str
    """Unique name of the lease."""
    task: Task
    """The task to train."""
    worker: str
    """Name of the worker."""
    incarnation: str
    """Identifier of one process with that name; a restarted worker has another."""
    version: int
    """Version of the snapshot that the task starts from."""
    seconds: float
    """Time after which the lease expires unless it is renewed."""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Lease:
        """Invert `dataclasses.asdict`. Raises ValueError if a field is missing, unknown or of a wrong type."""
        schema.check(data, _LEASE, "lease")
        lease = _construct(cls, {**data, "task": _construct(Task, data["task"])})
        if lease.task.index < 0 or not 0 < lease.seconds < math.inf:
            raise ValueError("lease has an invalid task index or duration")
        return lease


def process_of(incarnation: str) -> str:
    """Return the incarnation of a worker's process: that of a lease without the "/" and number at its end."""
    return incarnation.partition("/")[0]


@dataclass(frozen=True)
class Idle:
    """Answer to a worker for which there is no task now."""

    finished: bool
    """Whether there will be none later either, so that the worker can finish."""
    wait: float = 0.0
    """Minimum number of seconds to wait before asking again."""


RETURN_OF = "return/"
"""Prefix of the names of means that are returns of one game, in the curve of a task of all games."""


AT_START = "start/"
"""Prefix of the names of means that describe a task's starting point, in the first point of its curve."""


@dataclass(frozen=True)
class CurvePoint:
    """A point of the learning curve: training since the previous point."""

    steps: int
    """Agent steps since the start of the task."""
    episodes: int
    """Number of episodes that ended."""
    score: float | None
    """Mean raw return of these episodes, or None; for supervised tasks, mean error of a batch."""
    means: dict[str, float]
    """Mean loss, policy_loss, value_loss and entropy; for supervised tasks, mean loss and error.

    For agents, the first point also has the figures of `leap_dist.nn.features`, under the names `start/NAME`; for a
    task of all games, each has the mean return of each game, under the names `return/GAME`.
    """

    def plain(self) -> dict[str, Any]:
        """Return a JSON-compatible dict. Equivalent to `dataclasses.asdict`, but about 20 times faster."""
        return {**vars(self), "means": dict(self.means)}


@dataclass(frozen=True)
class Episode:
    """An episode that ended."""

    steps: int
    """Agent steps since the start of the task."""
    score: float
    """Raw return."""


@dataclass(frozen=True)
class PathStatistics:
    """Geometry of the gradient path so far (equation 4) and of the two terms of the pull-forward gradient."""

    energy: float
    """Sum of the squared lengths of the segments."""
    length: float
    """Sum of the lengths of the segments."""
    loss_term_norm: float
    """Norm of the term that contains the gradients of the loss."""
    path_term_norm: float
    """Norm of the term that contains the steps."""
    cosine: float
    """Cosine between the two terms; 0 if one of them is zero."""


@dataclass(frozen=True)
class Contribution:
    """A meta-learner's result for the path up to update `updates`. It is cumulative: the newest contains the others."""

    lease: str
    """Id of the lease."""
    worker: str
    """Name of the worker that holds it."""
    incarnation: str
    """Incarnation of that worker."""
    manifest: str
    """`Manifest.digest` of the parameters that the vector belongs to."""
    base_version: int
    """Version of the snapshot the worker knows: that of the lease, or with trajectory shifting a later one."""
    seq: int
    """Sequence number of this contribution within its lease: 1, 2, …"""
    final: bool
    """Whether the task is done."""
    updates: int
    """Updates of the learner so far."""
    steps: int
    """Agent steps so far."""
    seconds: float
    """Wall-clock time so far."""
    vector: np.ndarray
    """Flat float32: the shared parameters, followed by the game's head if heads persist.

    In a partial contribution it is empty, and `start` is None, if the server would not read it.
    """
    start: np.ndarray | None
    """φ_lease, flat float32, if the server corrects for the endpoint (ρ, fedasync)."""
    path: PathStatistics
    """Geometry of the path."""
    curve: tuple[CurvePoint, ...]
    """Learning curve from the start of the task."""
    episodes: tuple[Episode, ...] = ()
    """All episodes of the task, in the final contribution of an evaluation's task."""
    device: str = ""
    """Kind of device on which the task was trained, "cpu" or "cuda"; empty if unknown."""
    packed: Quantized | None = None
    """Quantized form of `vector`, which is sent and stored instead of it, if the run quantizes."""

    @classmethod
    def whole(cls, lease: Lease, manifest: str, vector: np.ndarray, path: PathStatistics | None = None) -> Contribution:
        """Return the only contribution to a lease, for programs with their own training loop.

        It cannot be used if the server corrects for the endpoint (ρ, fedasync).

        Args:
            lease: the lease whose task is done.
            manifest: digest of the manifest.
            vector: the pull-forward gradient, flat float32.
            path: geometry of the path, if it is known.
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
        """Return the same contribution with 16 or 8 bits per number; its `vector` is the rounded one.

        Raises ValueError if it has a `start`.
        """
        if self.start is not None:
            raise ValueError("a contribution with the start of its path cannot be quantized")
        packed = quantize(self.vector, bits)
        return dataclasses.replace(self, vector=packed.vector, packed=packed)

    def owned(self) -> Contribution:
        """Return a copy that may be kept: arrays from Ray are views that pin memory of its object store.

        The quantized form is dropped, because the vector made from it is not shared with anyone.
        """
        if self.packed is not None:
            return dataclasses.replace(self, packed=None)
        start = None if self.start is None else np.array(self.start)
        return dataclasses.replace(self, vector=np.array(self.vector), start=start)

    def header(self) -> dict[str, Any]:
        """Return everything but the arrays, as plain data."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _ARRAYS}
        data["path"] = dataclasses.asdict(self.path)
        data["curve"] = [point.plain() for point in self.curve]
        data["episodes"] = [dict(vars(episode)) for episode in self.episodes]
        return data

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays. A quantized contribution has codes and scales instead of the vector."""
        if self.packed is not None:
            return self.packed._asdict()
        return {"vector": self.vector} | ({} if self.start is None else {"start": self.start})

    @classmethod
    def from_parts(cls, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Contribution:
        """Invert `header` and `arrays`. Raises ValueError if a part is missing, unknown or of a wrong type."""
        header = {"device": "", **header}  # older files lack it
        schema.check(header, _HEADER, "contribution")
        path = _construct(PathStatistics, header["path"])
        curve = tuple(_construct(CurvePoint, point) for point in header["curve"])
        episodes = tuple(_construct(Episode, episode) for episode in header["episodes"])
        fields = {**header, "path": path, "curve": curve, "episodes": episodes}
        if arrays.keys() == {"codes", "scales"}:
            packed = Quantized(**arrays)
            packed.check()
            return _construct(cls, {**fields, "vector": packed.vector, "start": None, "packed": packed})
        if "vector" not in arrays or not arrays.keys() <= {"vector", "start"}:
            raise ValueError("contribution has no vector, or an unknown array")
        return _construct(cls, {**fields, "vector": arrays["vector"], "start": arrays.get("start"), "packed": None})

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle a quantized contribution without its vector, which the receiver computes again."""
        if self.packed is None:
            return super().__reduce_ex__(protocol)
        return Contribution.from_parts, (self.header(), self.arrays())


_ARRAYS = ("vector", "start", "packed")
_LEASE = schema.shape_of(Lease)
_HEADER = schema.shape_of(Contribution)
_T = TypeVar("_T")


def _construct(cls: Callable[..., _T], fields: dict[str, Any]) -> _T:
    try:
        return cls(**fields)
    except TypeError as error:
        raise ValueError(f"a field is unknown: {error}") from None


class Renewal(NamedTuple):
    """A request to renew a lease."""

    lease: str
    """Id of the lease."""
    incarnation: str
    """Incarnation of the worker that holds it."""
    steps: int
    """Agent steps into the task."""


@dataclass(frozen=True)
class Ack:
    """The server's answer to a push or a renewal."""

    accepted: bool
    """Whether the contribution counts, now or because it was received before."""
    durable: bool
    """Whether it is on disk and will be applied exactly once, whichever process is killed."""
    reason: str
    """Why it was not accepted; "duplicate" if it was known already; otherwise empty."""
    proceed: bool
    """Whether the worker still holds the lease and should go on."""
    version: int
    """The server's current version."""
    wait: float = 0.0
    """Minimum number of seconds before the next report, or before this push is repeated."""
