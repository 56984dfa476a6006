"""Errors that end a run although the user's input is valid. Each is reported in one line, with exit code 1."""

from __future__ import annotations

from pathlib import Path


class RunFailed(RuntimeError):
    """The run cannot go on. The message is one line for the user."""


class ClusterError(RunFailed):
    """The cluster does not work properly."""


class HeadLost(ClusterError):
    """The cluster's head node went away. The process must end without calling ray.shutdown.

    `outcome` is how the work ended: "failed", or "interrupted" if a signal had asked for a stop.
    """

    def __init__(self, outcome: str) -> None:
        super().__init__("the cluster's head node is gone; the same command continues on another cluster")
        self.outcome = outcome


class RunDirectoryLost(RunFailed):
    """Somebody removed or replaced the run directory while the run was using it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"run-dir: {folder} was removed while the run was using it; nothing more can be saved there")
