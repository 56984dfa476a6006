"""The run directories of tests/fixtures/old_runs, and how a test continues them.

Commit f3e3d92 left them behind when it was killed in mid-run; tests/fixtures/README.md says what each one holds.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol import Worker, ledger
from safetensors.numpy import load_file

from leap_dist.config.settings import Config
from leap_dist.protocol.messages import AT_START, Idle, Lease
from leap_dist.server.meta_server import MetaServer

OLD_RUNS = Path(__file__).parents[1] / "fixtures" / "old_runs"
SERVER = OLD_RUNS / "server"
RAY = OLD_RUNS / "ray"

COUNTS = ("meta_updates", "tasks", "contributions_applied", "agent_steps", "clipped")
"""Counts in a server's status that do not depend on how often it was killed."""


def names(folder: Path) -> list[str]:
    """Return the names of all run directories in a folder."""
    return sorted(path.stem for path in (folder / "expected").glob("*.json"))


def expected(folder: Path, name: str) -> dict[str, Any]:
    """Return how the old commit itself ended a run."""
    return json.loads((folder / "expected" / f"{name}.json").read_text())


def phi_sha256(file: Path) -> str:
    """Return the hash of an init.safetensors: its numbers in little-endian float32, tensors ordered by name."""
    tensors = load_file(file)
    return hashlib.sha256(b"".join(tensors[name].astype("<f4").tobytes() for name in sorted(tensors))).hexdigest()


def machine() -> dict[str, str]:
    """Return what the last bits of a result depend on besides settings and seeds."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(reversed([(part.strip() for part in line.split(":", 1)) for line in info if ":" in line]))
    vectors = [flag for flag in facts.get("flags", "").split() if flag.startswith(("avx", "fma", "f16c", "amx"))]
    return {
        "machine": platform.machine(),
        "processor": " ".join(facts.get(name, "?") for name in ("vendor_id", "cpu family", "model")),
        "vectors": " ".join(sorted(vectors)),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def alike(found: Any, wanted: Any) -> bool:
    """Return whether plain data are equal, floating-point numbers up to what another machine changes."""
    if isinstance(wanted, float) and isinstance(found, float):
        return math.isclose(found, wanted, rel_tol=1e-4, abs_tol=1e-6)
    if isinstance(wanted, dict) and isinstance(found, dict):
        return found.keys() == wanted.keys() and all(alike(found[name], wanted[name]) for name in wanted)
    if isinstance(wanted, list) and isinstance(found, list):
        return len(found) == len(wanted) and all(map(alike, found, wanted))
    return type(found) is type(wanted) and found == wanted


class Remembering(Worker):
    """A worker that can be saved in the middle of a task as plain data, and restored."""

    start: np.ndarray | None = None
    head: np.ndarray | None = None

    def train(self, lease: Lease, start: np.ndarray, head: np.ndarray | None) -> list[Any]:
        self.start, self.head = start, head
        return super().train(lease, start, head)

    def plain(self) -> dict[str, Any]:
        """Return name, lease, start of the task, and how many of its contributions are not answered yet."""
        if not self.todo or self.lease is None or self.start is None:
            return {"name": self.name, "lease": None}
        head = None if self.head is None else self.head.tolist()
        return {
            "name": self.name,
            "lease": asdict(self.lease),
            "start": self.start.tolist(),
            "head": head,
            "left": len(self.todo),
        }

    def revive(self, plain: dict[str, Any]) -> Remembering:
        """Continue where the worker was that returned `plain`. Return itself."""
        self.name = plain["name"]
        if plain["lease"] is not None:
            self.lease = Lease.from_dict(plain["lease"])
            start = np.array(plain["start"], np.float32)
            head = None if plain["head"] is None else np.array(plain["head"], np.float32)
            self.todo = self.train(self.lease, start, head)[-plain["left"] :]
        return self


def copied(folder: Path, name: str, tmp_path: Path) -> Path:
    run_dir = tmp_path / name
    shutil.copytree(folder / name, run_dir)
    return run_dir


def team(settings: Config, suffix: str = "") -> list[Remembering]:
    """Return three workers, whose tasks make one or two pushes; in a stream two, with two or three pushes."""
    count, least = (2, 2) if settings.mode == "stream" else (3, 1)
    return [Remembering(settings, f"w{i}{suffix}", lambda task: least + task.index % 2) for i in range(count)]


def go_on(server: Any, workers: Sequence[Worker], turn: int = 0) -> None:
    """Let the workers step in turn, until each has heard that the run has ended."""
    idle: set[str] = set()
    while len(idle) < len(workers):
        worker = workers[turn % len(workers)]
        turn += 1
        if worker.step(server) == Idle(finished=True):
            idle.add(worker.name)


def _without_later_figures(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ledger lines without what curves did not have when the run directories were made."""
    for line in lines:
        for point in line["curve"]:
            point["means"] = {name: value for name, value in point["means"].items() if not name.startswith(AT_START)}
    return lines


def result(server: MetaServer, run_dir: Path) -> dict[str, Any]:
    """Return how a run ended: φ, the heads, the ledger without names of workers and leases, and counts."""
    status = server.status()
    heads = {game: server.head(game) for game in server._config.games}
    return {
        "phi_sha256": phi_sha256(run_dir / "init.safetensors"),
        "phi": server.snapshot()[1].tolist(),
        "heads": {game: head.tolist() for game, head in heads.items() if head is not None},
        "counts": {name: status[name] for name in COUNTS},
        "ledger": _without_later_figures(ledger(run_dir)),
    }


def assert_gone_on(run_dir: Path, mode: str) -> None:
    """Assert that a run of the service ended as expected, bit for bit on the machine that made the run directory.

    Elsewhere training gives other numbers: contributions that were in the run directory are alike, and the others are
    of the same tasks, in the same order, with the same weights.
    """
    old, lines = expected(RAY, mode), _without_later_figures(ledger(run_dir))
    if machine() == old["machine"]:
        assert lines == old["ledger"]
        assert phi_sha256(run_dir / "init.safetensors") == old["phi_sha256"]
    applied, waiting = old["holds"]["applied"], len(old["holds"]["not_in_checkpoint"])
    assert alike(lines[:applied], old["ledger"][:applied])
    for line, wanted in zip(lines[applied:], old["ledger"][applied:], strict=True):
        for name in PLAN if waiting <= 0 else PLAN + TRAINED:
            assert alike(line[name], wanted[name]), name
        waiting -= 1


PLAN = ("version_before", "version_after", "task", "game", "visit", "seq", "final", "lease_version", "base_version",
        "staleness", "weight", "updates", "steps", "new_steps", "total_steps")  # fmt: skip
"""Keys of a ledger line whose values do not depend on what training computes."""
TRAINED = ("norm", "path", "curve")
"""Keys of a ledger line that a contribution brought with it."""
