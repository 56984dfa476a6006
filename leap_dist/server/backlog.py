"""Accepted contributions, from the moment they are in the journal until φ contains them.

Contributions are cumulative. In `stream` mode the server applies what each push adds to the previous push of the same
lease, its *base*, or with `meta.shift trajectory` the whole of each push. A journal entry is therefore needed until
every kept checkpoint contains it and it cannot be the base of a later push.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from leap_dist.protocol.messages import Contribution, Lease
from leap_dist.storage.journal import Journal


@dataclass(frozen=True)
class Accepted:
    """A contribution that is in the journal."""

    order: int
    """Number of contributions accepted before this one; names the journal entry."""
    lease: Lease
    contribution: Contribution
    vector: np.ndarray
    """What the contribution adds to the previous one of its lease: all of it, except in `stream` mode."""
    norm: float
    """Norm of the shared part of `vector`."""
    steps: int
    """Agent steps since the previous accepted contribution of the lease."""


class Backlog:
    """Accepted contributions that wait for a meta-update, and the journal entries that are still needed.

    Args:
        journal: where accepted contributions are stored.
        size: number of shared parameters, which come first in every vector.
        keep_checkpoints: number of checkpoints kept; an entry outlives the oldest one that lacks it.
        whole_paths: add the whole of every push, instead of its difference from the push before.
    """

    def __init__(self, journal: Journal, size: int, keep_checkpoints: int, *, whole_paths: bool = False) -> None:
        self.journal = journal
        self._whole_paths = whole_paths
        self.waiting: list[Accepted] = []
        """Contributions that are accepted and not yet applied, in order of acceptance."""
        self.unfinished: dict[str, Contribution] = {}
        """Newest accepted contribution of each lease that may still send more."""
        self.unmeasurable: set[str] = set()
        """Leases that end with a restart because the base of their next push is lost."""
        self.next_order = 0
        """Order of the next contribution to be accepted."""
        self._entries: dict[str, deque[int]] = {}  # by lease, orders of its journal entries
        self._bases: dict[str, int] = {}  # by lease, entry in the checkpoint that is the base of a later push
        self._covered = deque([0], maxlen=keep_checkpoints)  # first order that each kept checkpoint lacks
        # Kept for `norm`: allocating memory of this size costs more, page by page, than the sum itself.
        self._double = np.empty(size, np.float64)

    def added(self, contribution: Contribution) -> np.ndarray:
        """Return what a contribution adds to φ: its difference from the previous one of its lease, or all of it.

        The record that closes a lost lease repeats its last push, and adds nothing.
        """
        before = self.unfinished.get(contribution.lease)
        whole = before is None or (self._whole_paths and contribution.seq > before.seq)
        return contribution.vector if whole or before is None else contribution.vector - before.vector

    def norm(self, vector: np.ndarray) -> float:
        """Return the norm of the shared part of a vector, computed in float64."""
        double = self._double[: len(vector)]
        double[:] = vector[: len(double)]
        return float(np.linalg.norm(double))

    def accept(self, lease: Lease, contribution: Contribution, arrays: dict[str, np.ndarray]) -> None:
        """Store a contribution durably and append it to `waiting`. Raises OSError if it could not be stored.

        The contribution's arrays are kept in memory; `arrays`, the form in which it was received, possibly quantized,
        is what goes to disk.
        """
        header = {"lease": asdict(lease), "contribution": contribution.header()}
        self.journal.write(self.next_order, arrays, header)
        self.append(lease, contribution)

    def append(self, lease: Lease, contribution: Contribution) -> None:
        """Append a contribution whose journal entry is `next_order`."""
        before = self.unfinished.get(contribution.lease)
        steps = contribution.steps - (before.steps if before else 0)
        vector = self.added(contribution)
        self.waiting.append(Accepted(self.next_order, lease, contribution, vector, self.norm(vector), steps))
        self.recall(self.next_order, contribution)
        self.next_order += 1

    def recall(self, order: int, contribution: Contribution) -> None:
        """Register a journal entry and, unless it is final, make it the base of the lease's next push."""
        self._entries.setdefault(contribution.lease, deque()).append(order)
        if contribution.final:
            self.forget(contribution.lease)
        else:
            self.unfinished[contribution.lease] = contribution

    def recall_unread(self, order: int) -> None:
        """Register a journal entry that is in the checkpoint and is no lease's base, without reading it."""
        self._entries[f"entry {order}"] = deque([order])

    def forget(self, lease_id: str) -> None:
        """Expect no further contribution to a lease; accepted ones stay."""
        self.unfinished.pop(lease_id, None)

    def commit(self, count: int) -> None:
        """Drop the first `count` waiting contributions, which a durable checkpoint now contains."""
        self._covered.append(self.waiting[count - 1].order + 1)
        del self.waiting[:count]

    def discard(self) -> None:
        """Remove the journal entries that are no longer needed."""
        first = self._covered[0]
        for lease_id, orders in list(self._entries.items()):
            # An entry is also needed while it is the base of the next one, or of a push that may still come.
            while orders and orders[0] < first:
                if orders[1] >= first if len(orders) > 1 else lease_id in self.unfinished:
                    break
                self.journal.discard(orders.popleft())
            if not orders:
                del self._entries[lease_id]
        self.journal.flush_discarded()

    def state_after(self, count: int) -> dict[str, Any]:
        """Return, as plain data for `restore`, the state once the first `count` waiting contributions are applied."""
        first = self.waiting[count - 1].order + 1 if count else 0
        bases = {}
        for lease_id, orders in self._entries.items():
            before = [order for order in orders if order < first]
            if before and (len(before) < len(orders) or lease_id in self.unfinished):
                bases[lease_id] = before[-1]
        return {"covered": [*self._covered, first] if count else [0], "bases": bases}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_after` has returned."""
        self._covered.extend(state["covered"])
        self._bases = dict(state["bases"])
        self.next_order = self._covered[-1]

    def drop_lost_bases(self) -> list[tuple[str, int]]:
        """Give up the leases whose base was not recalled, and return them with the order of the lost entry."""
        lost = [(name, order) for name, order in self._bases.items() if order not in self._entries.get(name, ())]
        for lease_id, _ in lost:
            self.unmeasurable.add(lease_id)
            self.forget(lease_id)
        return lost
