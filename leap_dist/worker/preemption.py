"""Notice that a worker's node is about to be taken away."""

from __future__ import annotations

import time
from collections.abc import Callable


class PreemptionNotice:
    """Tells a running task that its worker will soon be stopped. Any thread may give the notice."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deadline: float | None = None

    def give(self, seconds: float) -> None:
        """Announce that the worker will be stopped in `seconds` seconds."""
        self._deadline = self._clock() + seconds

    @property
    def given(self) -> bool:
        """Whether the worker will be stopped."""
        return self._deadline is not None

    def leaves_time_for(self, seconds: float) -> bool:
        """Return whether work that takes `seconds` seconds from now can still be finished."""
        return self._deadline is None or self._clock() + seconds <= self._deadline
