"""Faults at every named point: a server in a process of its own, ended by SIGKILL there; a disk that is full there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crashes import RUNS, assert_same_end, play
from protocol import config, fast_folder, ledger, serve
from server_process import Process

from leap_dist.testing import failpoints

_OTHERS = (
    "study",
    "validation.",
    "task.",
    "config.",
    "manifest.",
    "summary.",
    "arms.",
    "transfer-",
    "object.",
    "position.",
)
POINTS = [point for point in failpoints.POINTS if not point.startswith(_OTHERS)]
"""Those that a server reaches."""

SLOW = pytest.mark.slow
OTHERS = ("sync", "buffered", "async", "stream")
"""Runs left to `make test-all`: `stream-heads` reaches the most points."""


@pytest.fixture
def folder() -> Iterator[Path]:
    with fast_folder() as path:
        yield path


def killed_play(run_dir: Path, settings: Any, kills: list[str]) -> set[tuple[int, int]]:
    """A run whose servers are killed where `kills` says, one after the other; what was acknowledged."""
    left = list(kills)
    server, acknowledged = play(run_dir, settings, lambda *arguments: Process(*arguments, left.pop(0) if left else ""))
    assert not left, "every kill has happened"
    server.close()
    return acknowledged


def hits(run_dir: Path, settings: Any) -> dict[str, int]:
    """How often an undisturbed run reaches each point."""
    failpoints.arm("task.start=kill@1000000")  # counts, and kills nobody
    try:
        server, _ = play(run_dir, settings)
        server.close()
        return dict(failpoints.hits)
    finally:
        failpoints.arm("")


@pytest.mark.parametrize("run", ["stream-heads", *(pytest.param(run, marks=SLOW) for run in OTHERS)])
def test_a_server_killed_at_any_named_point_leaves_no_trace(folder: Path, run: str) -> None:
    settings = config(**RUNS[run], server__keep_checkpoints=2)
    undisturbed, acknowledged = play(folder / "undisturbed", settings)
    undisturbed.close()
    reached = hits(folder / "counted", settings)
    assert set(reached) == set(POINTS), "a run reaches every point that there is"
    for point in POINTS:
        for hit in sorted({1, (reached[point] + 1) // 2, reached[point]}):
            run_dir = folder / f"{point}@{hit}"
            found = killed_play(run_dir, settings, [f"{point}=kill@{hit}", ""])
            assert found == acknowledged, f"{point}@{hit}"
            assert ledger(run_dir) == ledger(folder / "undisturbed"), f"{point}@{hit}"
            server = serve(run_dir, settings)
            assert_same_end(server, run_dir, undisturbed, folder / "undisturbed", f"{point}@{hit}")
            server.close()
            shutil.rmtree(run_dir)


DISK = [point for point in POINTS if not point.startswith(("update.", "push.", "lease.acknowledge"))]
SILENT = ("journal.discard", "lease.close")
"""What is left lying harms nobody."""


@pytest.mark.parametrize("run", ["stream-heads", *(pytest.param(run, marks=SLOW) for run in ("sync", "buffered"))])
def test_a_disk_that_is_full_at_any_write_for_a_while_changes_nothing(folder: Path, run: str) -> None:
    """Training goes on, nothing is acknowledged that is not durable, and all of it counts once there is room again."""
    settings = config(**RUNS[run], server__keep_checkpoints=2)
    undisturbed, acknowledged = play(folder / "undisturbed", settings)
    undisturbed.close()
    for point in DISK:
        for first in (1, 2, 4):
            run_dir = folder / f"{point}@{first}"

            def start(run_dir: Path, settings: Any, fault: str = f"{point}=full@{first}-{first + 2}") -> Any:
                server = serve(run_dir, settings)
                failpoints.arm(fault)
                return server

            try:
                server, found = play(run_dir, settings, start)
                fired = failpoints.hits[point] >= first
            finally:
                failpoints.arm("")
            assert fired or first > 1
            assert bool(server.alerts) == (fired and point not in SILENT), point
            server.close()
            server = serve(run_dir, settings)
            lines = ledger(run_dir)
            assert sorted((line["task"], line["seq"]) for line in lines) == sorted(found), f"{point}@{first}"
            assert found == acknowledged, f"{point}@{first}"
            assert [line["version_before"] for line in lines] == sorted(line["version_before"] for line in lines)
            if run == "sync":  # elsewhere the order in which workers get through is part of the result
                assert_same_end(server, run_dir, undisturbed, folder / "undisturbed", f"{point}@{first}")
            server.close()
            shutil.rmtree(run_dir)
