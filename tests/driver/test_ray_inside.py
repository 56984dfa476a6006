"""Training inside other programs: several runs in one process, one in a thread, and one in a task of somebody's Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from protocol import ledger

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

PROGRAM = """
import json, sys, threading
import leap_dist

folder, found = sys.argv[1], []
SETTINGS = {"preset": "smoke", "mode": "sync", "workers": 1, "worker.cpus": 0.5}

def train(name):
    run = leap_dist.train(SETTINGS, run_dir=f"{folder}/{name}", progress=False)
    found.append((name, run.outcome))

train("first")
train("second")
thread = threading.Thread(target=train, args=["in a thread"])
thread.start()
thread.join()

import ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)

@ray.remote(num_cpus=1)
def trial():
    run = leap_dist.train(SETTINGS, run_dir=f"{folder}/in a trial", progress=False)
    return "in a trial", run.outcome

found.append(ray.get(trial.remote()))
ray.shutdown()
print(json.dumps(found))
"""
"""What a notebook and a Ray Tune trial do: each training starts where none runs any more."""


def test_trainings_one_after_the_other_in_a_thread_and_in_a_trial_end_with_the_same_bits(
    environment: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    names = ["first", "second", "in a thread", "in a trial"]
    assert json.loads(done.stdout.splitlines()[-1]) == [[name, "done"] for name in names]
    vectors = {(tmp_path / name / "init.safetensors").read_bytes() for name in names}
    assert len(vectors) == 1
    assert all(ledger(tmp_path / name) == ledger(tmp_path / "first") for name in names)
