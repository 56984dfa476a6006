"""The networks that come with the package learn as their tables say."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import in_process_driver
import numpy as np
import pytest

import leap_dist

DATA = Path(__file__).parents[3] / "shared" / "data"

# Omniglot, seed 0, alphabet angelic: the mean loss of each of the first four periods of 25 steps, and the test error
# after 100 steps. These are the runs of the table in docs/results-omniglot.md (reference/omniglot/200k), in bfloat16.
OMNIGLOT = {
    "leap-omniglot": ([1.713, 0.820, 0.571, 0.595], 0.197),
    "finetune-multi-omniglot": ([1.891, 0.766, 0.549, 0.514], 0.189),
}


def first_hundred_steps(monkeypatch: pytest.MonkeyPatch, init: str) -> tuple[dict[str, Any], ...]:
    """Return the learning curve of one run from `init`, shortened to 100 steps."""
    in_process_driver.install(monkeypatch)
    settings = {
        "preset": "paper", "tasks": "omniglot", "games": ["angelic"], "data_dir": str(DATA),
        "task_steps": 2000, "workers": 1, "worker.device": "cpu", "worker.precision": "float32",
        "supervised.network": "pool-norm", "supervised.test_interval": 100, "supervised.test_learning_rate": 0.0,
        "supervised.patience_steps": 0,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        (run,) = leap_dist.evaluate({"arm": init}, settings, seeds=1, out=Path(out) / "out", progress=False).runs()
    return run.curve


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
