"""The networks that come with the package learn as their tables say."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import in_process_driver
import numpy as np
import pytest

import leap_dist
from leap_dist.evaluation.runs import RunResult

DATA = Path(__file__).parents[3] / "shared" / "data"

# Omniglot, seed 0, alphabet angelic: the mean loss of each of the first four periods of 25 steps, and the test error
# after 100 steps. These are the runs of the table in docs/results-omniglot.md (reference/omniglot/200k), in bfloat16.
OMNIGLOT = {
    "leap-omniglot": ([1.713, 0.820, 0.571, 0.595], 0.197),
    "finetune-multi-omniglot": ([1.891, 0.766, 0.549, 0.514], 0.189),
}


# breakout, seed 0: steps and returns of the first episodes, and what the encoder is like on their frames. This is the
# beginning of the run of the table in docs/results-atari.md (reference/atari/long), in float32.
REPTILE_ATARI = {
    "ended": [1952, 2016, 2032, 2032, 2064, 2064, 2080, 2112, 2112, 2112, 2176, 2448],
    "returns": [0.0] * 11 + [1.0],
    "start/norm_ratio": 1.394, "start/dead_units": 0.8906, "start/effective_rank": 4.838, "start/entropy": 1.3863,
}  # fmt: skip


def evaluated(monkeypatch: pytest.MonkeyPatch, init: str, settings: dict[str, Any]) -> RunResult:
    """Return the only run of an evaluation of `init` with these settings."""
    in_process_driver.install(monkeypatch)
    with tempfile.TemporaryDirectory() as out:
        (run,) = leap_dist.evaluate({"arm": init}, settings, seeds=1, out=Path(out) / "out", progress=False).runs()
    return run


def first_hundred_steps(monkeypatch: pytest.MonkeyPatch, init: str) -> tuple[dict[str, Any], ...]:
    """Return the learning curve of one run from `init`, shortened to 100 steps."""
    settings = {
        "preset": "paper", "tasks": "omniglot", "games": ["angelic"], "data_dir": str(DATA),
        "task_steps": 2000, "workers": 1, "worker.device": "cpu", "worker.precision": "float32",
        "supervised.network": "pool-norm", "supervised.test_interval": 100, "supervised.test_learning_rate": 0.0,
        "supervised.patience_steps": 0,
    }  # fmt: skip
    return evaluated(monkeypatch, init, settings).curve


@pytest.mark.skipif(not (DATA / "omniglot").is_dir(), reason="needs the real files")
@pytest.mark.parametrize("name", OMNIGLOT)
def test_a_run_of_the_omniglot_table_is_repeated(monkeypatch, name):
    losses, error = OMNIGLOT[name]
    curve = first_hundred_steps(monkeypatch, f"pretrained:{name}")
    periods = np.array([point["loss"] for point in curve]).reshape(4, 5).mean(1)
    assert periods == pytest.approx(losses, rel=0.05)
    assert curve[-1]["test_error"] == pytest.approx(error, abs=0.03)
    if name == "leap-omniglot":
        assert first_hundred_steps(monkeypatch, f"pretrained:{name}") == curve, "bit for bit"


@pytest.mark.emulator
def test_the_beginning_of_a_run_of_the_atari_table_is_repeated(monkeypatch):
    """Within the first 31 updates, rounding that depends on the processor changes no action."""
    settings = {
        "preset": "fast", "games": ["breakout"], "task_steps": 2640, "workers": 1, "worker.device": "cpu",
        "worker.precision": "float32",
    }  # fmt: skip
    run = evaluated(monkeypatch, "pretrained:reptile-atari", settings)
    early = run.ended <= 2480
    assert run.ended[early].tolist() == REPTILE_ATARI["ended"]
    assert run.returns[early].tolist() == REPTILE_ATARI["returns"]
    found = run.curve[0]
    for name in ("start/norm_ratio", "start/dead_units", "start/effective_rank", "start/entropy"):
        assert found[name] == pytest.approx(REPTILE_ATARI[name], rel=1e-3)
