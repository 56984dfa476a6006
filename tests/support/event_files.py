"""What the driver reports of a made-up run, and what TensorBoard's own accumulator finds in the event files of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from leap_dist.nn.features import STATISTICS
from leap_dist.protocol.messages import AT_START
from leap_dist.telemetry.tensorboard import TensorBoard

GAMES = ("pong", "freeway", "air_raid")  # air_raid has no published scores
ALPHABETS = ("greek", "n_ko", "old_church_slavonic_cyrillic")

Line = dict[str, Any]
Points = dict[tuple[str, str], list[tuple[int, float]]]


def point(steps: int, score: float | None, value: float = 0.5) -> dict[str, Any]:
    means = {"loss": value, "policy_loss": value + 1, "value_loss": value + 2, "entropy": value + 3}
    return {"steps": steps, "episodes": 0 if score is None else 2, "score": score, "means": means}


def batches(steps: int, error: float, loss: float = 0.5) -> dict[str, Any]:
    """A curve's point of a supervised task."""
    return {"steps": steps, "episodes": 5, "score": error, "means": {"loss": loss, "error": error}}


def line(game: str, version: int, curve: list[dict[str, Any]], *, steps: int = 300, **values: Any) -> Line:
    """A ledger line; see MetaServer._ledger_lines."""
    path = {"energy": 4.0, "length": 2.0, "loss_term_norm": 1.0, "path_term_norm": 3.0, "cosine": -0.5}
    return {
        "version_before": version - 1,
        "version_after": version,
        "task": 0,
        "game": game,
        "visit": 0,
        "lease": "000000-abc",
        "worker": "w0",
        "seq": 1,
        "final": True,
        "lease_version": version - 1,
        "base_version": version - 1,
        "staleness": 0,
        "weight": 1.0,
        "norm": 1.0,
        "clip": 1.0,
        "updates": 15,
        "steps": steps,
        "new_steps": steps,
        "seconds": 1.5,
        "path": path,
        "curve": curve,
        "update_norm": 0.25,
        "agreement": 0.125,
        "total_steps": 1000 * version,
        **values,
    }


def ledger(updates: int, seed: int = 0, names: tuple[str, ...] = GAMES) -> list[list[Line]]:
    """Meta-updates of three tasks: every game (or alphabet), in changing order, with curves of changing length."""
    rng = np.random.default_rng(seed)
    made = []
    for version in range(1, updates + 1):
        lines = []
        for game in rng.permutation(names):
            steps = [100 * (i + 1) for i in range(int(rng.integers(1, 4)))]
            if names == ALPHABETS:
                curve = [batches(s, float(rng.random()), float(rng.normal())) for s in steps]
            else:
                scores = [float(rng.normal()) if rng.random() < 0.7 else None for _ in steps]
                curve = [point(s, score, float(rng.normal())) for s, score in zip(steps, scores, strict=True)]
                curve[0]["means"] |= {AT_START + name: float(rng.random()) for name in STATISTICS}
            lines.append(line(str(game), version, curve, norm=float(rng.random()), staleness=int(rng.integers(3))))
        made.append(lines)
    return made


def summary(seconds: float = 10.0, **values: Any) -> dict[str, Any]:
    """What the driver reports."""
    return {
        "meta_updates": 3,
        "tasks": 9,
        "tasks_waiting": 2,
        "tasks_wanted": 30,
        "complete": False,
        "contributions_applied": 9,
        "contributions_waiting": 2,
        "partials": 8,
        "duplicates": 1,
        "leases_lost": 4,
        "refused": {"stale": 5, "manifest": 6},
        "clipped": 3,
        "all_zero": 0,
        "quarantined": [],
        "quarantined_workers": ["w8"],
        "silent": [],
        "agent_steps": 1_234_567,
        "checkpoint_age": 3.5,
        "pushes": 100,
        "push_ms": {"p50": 1.5, "p99": 9.0},
        "pace_seconds": 0.5,
        "busy_share": 0.25,
        "update_ms": {"p50": 20.0, "p99": 30.0},
        "agreement_between_games": {"games": [], "cosines": []},
        "finished": False,
        "alerts": [],
        "leases": [],
        "state": "running",
        "preset": "quick",
        "mode": "buffered",
        "meta_learner": "leap",
        "updated": 1.7e9,
        "wall_seconds": seconds,
        "steps_per_second": 2310.0,
        "pushes_per_second": 2.5,
        "workers": [],
        "workers_alive": 2,
        "workers_wanted": 3,
        "restarts": 7,
        "server_restarts": 2,
        "eta_seconds": 3723.0,
        "time_to_first_task": None,
        "time_to_first_step": None,
        "start_seconds": {"ray": 4.0, "nodes": 0.5, "server": 1.5, "workers": 2.0, "loading": 1.0},
        **values,
    }


def shown(run_dir: Path) -> Points:
    """Every scalar that TensorBoard would show: (run, tag) → (step, value) in the order that it reads them."""
    root = run_dir / "tensorboard"
    found: Points = {}
    for run in {path.parent for path in root.rglob("events.*")}:
        events = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found[run.relative_to(root).as_posix(), tag] = [(e.step, e.value) for e in events.Scalars(tag)]
    return found


def curves(run_dir: Path) -> dict[tuple[str, str], Counter[tuple[int, float]]]:
    """The same without ops/* and their copy, which the ledger does not hold, and without order."""
    others = ("ops/", "_overview/steps_per_second")
    return {key: Counter(points) for key, points in shown(run_dir).items() if not key[1].startswith(others)}


def write(run_dir: Path, updates: list[list[Line]], **arguments: Any) -> TensorBoard:
    """Records meta-update after meta-update; the files stay open, as after a crash."""
    board = TensorBoard(run_dir, **arguments)
    for second, lines in enumerate(updates):
        board.record(lines, summary(second))
    return board


def merge(updates: list[list[Line]]) -> list[Line]:
    return [line for lines in updates for line in lines]


def newest_files(run_dir: Path) -> list[Path]:
    """One event file of every run."""
    runs = {path.parent for path in run_dir.rglob("events.*")}
    return [max(run.glob("events.*"), key=lambda path: int(path.name.rsplit(".", 1)[1])) for run in runs]
