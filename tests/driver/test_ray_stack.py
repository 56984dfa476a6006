"""A worker that trains several tasks in lockstep, on a real Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from service import ROOT
from toy_data_sets import write_part

from leap_dist.storage.ledger import Ledger

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(480)]


def test_a_stack_leaves_the_phi_of_one_by_one(environment, tmp_path):
    data_dir = tmp_path / "data"
    for seed, name in enumerate(("mnist", "cifar10")):
        write_part(data_dir, name, seed=seed)

    def train(stack: int) -> Path:
        out = tmp_path / f"stack{stack}"
        command = [sys.executable, "launch.py", "train", "--tasks", "multi-cv", "--preset", "smoke", "--mode", "sync",
                   "--games", "mnist,cifar10", "--data-dir", str(data_dir), "--run-dir", str(out), "--workers", "1",
                   "--worker.stack", str(stack), "--worker.precision", "float32"]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        return out

    alone, stacked = train(1), train(3)
    assert (alone / "init.safetensors").read_bytes() == (stacked / "init.safetensors").read_bytes()
    one, other = (list(Ledger(out / "ledger.jsonl").lines()) for out in (alone, stacked))
    assert {line["worker"] for line in one} == {"w0"}
    assert {line["worker"] for line in other} == {"w0", "w0/1"}
    assert [line["norm"] for line in one] == [line["norm"] for line in other]
