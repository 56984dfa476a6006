"""What a contribution has to be before anything counts."""

from __future__ import annotations

import numpy as np

from leap_dist.contribution import Contribution, Lease
from leap_dist.meta_state import MetaState
from leap_dist.models import Manifest
from leap_dist.settings import Config


class Examination:
    """Looks at contributions to open leases; changes nothing."""

    def __init__(self, config: Config, manifest: Manifest, state: MetaState) -> None:
        self._config = config
        self._manifest = manifest
        self._state = state

    def problem(self, lease: Lease, contribution: Contribution) -> str:
        """Why a contribution cannot count; "" where it can."""
        vector, start, size = contribution.vector, contribution.start, self._manifest.size
        if contribution.manifest != self._manifest.digest:
            return "manifest"
        if not lease.version <= contribution.base_version <= self._state.version:
            return "base-version"
        if vector.dtype != np.float32 or (start is not None and start.dtype != np.float32):
            return "dtype"
        if not (contribution.final or self._config.prefixes_count) and vector.shape == (0,) and start is None:
            return ""  # nobody would read it, so it was not sent
        if vector.shape != (self._expected_size(lease, vector.size),):
            return "shape"
        if self._config.corrects_endpoint != (start is not None) or (start is not None and start.shape != (size,)):
            return "shape"
        added = self._state.added(contribution)
        if not np.isfinite(added).all() or (start is not None and not np.isfinite(start).all()):
            return "non-finite"
        counts = contribution.final or self._config.mode == "stream"
        return "exploding" if counts and self._state.norm(added) > self._state.largest_norm() else ""

    def _expected_size(self, lease: Lease, found: int) -> int:
        """Length that a vector should have. A game's first head may have any."""
        size = self._manifest.size
        if self._config.meta_learner == "none":
            return 0
        if lease.id in self._state.unfinished:  # it is measured from that
            return len(self._state.unfinished[lease.id].vector)
        if self._config.keeps_heads:
            return size + (self._state.head_size(lease.task.game) or max(1, found - size))
        return size
