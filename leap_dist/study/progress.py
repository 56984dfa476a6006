"""How far a study is, from what its runs have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leap_dist.config.loading import ConfigError
from leap_dist.storage import run_directory
from leap_dist.study.spec import Study, evaluation_of, training_of


def progress(out: Path) -> dict[str, Any]:
    """What is done and what is left, as plain data. Raises ConfigError where `out` holds no study."""
    study = Study.read(out)
    comparisons = [_comparison(out, study, group, seed) for seed in study.seeds for group in study.groups]
    done = sum(arm["state"] == "done" for one in comparisons for arm in one["arms"].values())
    return {
        "tasks": study.tasks,
        "trained": done,
        "to_train": sum(len(one["arms"]) for one in comparisons),
        "tested": sum(one["test"]["state"] == "done" for one in comparisons),
        "to_test": len(comparisons),
        "comparisons": comparisons,
    }


def text(found: dict[str, Any]) -> str:
    """The same for people: a line for each group and seed."""
    counts = f"{found['trained']} of {found['to_train']} trained, {found['tested']} of {found['to_test']} tested"
    lines = [f"{found['tasks']}: {counts}"]
    for one in found["comparisons"]:
        parts = {**one["arms"], "test": one["test"]}
        shown = ", ".join(f"{name} {_shown(part)}" for name, part in parts.items())
        lines.append(f"group {one['group']}, seed {one['seed']}: {shown}")
    return "\n".join(lines)


def _comparison(out: Path, study: Study, group: str, seed: int) -> dict[str, Any]:
    arms = {arm: _state(training_of(out, group, seed, arm)) for arm in study.arms if arm != "none"}
    folder = evaluation_of(out, group, seed)
    test = _state(folder)
    if test["state"] == "done" and not all((folder / "runs" / arm).is_dir() for arm in study.arms):
        test["state"] = "waiting"  # arms were added since
    return {"group": group, "seed": seed, "arms": arms, "test": test}


def _state(folder: Path) -> dict[str, Any]:
    try:
        summary = run_directory.read_summary(folder)
    except ConfigError:
        return {"state": "waiting", "done": 0, "of": 0}
    ended = summary["state"] in run_directory.ENDED or run_directory.is_alive(folder)
    state = summary["state"] if ended else "died"
    return {"state": state, "done": summary.get("tasks", 0), "of": summary["tasks_wanted"]}


def _shown(part: dict[str, Any]) -> str:
    return (
        str(part["state"]) if part["state"] in ("done", "waiting") else f"{part['state']} {part['done']}/{part['of']}"
    )
