"""docs/examples: searches with Ray Tune and Optuna, as a user starts them."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from service import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def ended(environment: dict[str, str], folder: Path, script: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "docs/examples" / script), "--preset", "smoke", *arguments]
    done = subprocess.run(
        command, cwd=folder, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not importlib.util.find_spec("pandas"), reason="Ray Tune needs pandas and pyarrow")
def test_asha_searches_for_a_meta_learning_rate(environment, tmp_path):
    out = tmp_path / "tune"
    text = ended(environment, tmp_path, "tune_asha.py", "--trials", "3", "--updates", "2", "--out", str(out))
    assert re.search(r"best meta.learning_rate: \S+, path length \d", text)
    runs = list(out.iterdir())
    assert len(runs) == 3
    updates = []
    for run in runs:
        lines = (run / "ledger.jsonl").read_text().splitlines()
        updates.append(len({json.loads(line)["version_after"] for line in lines}))
    assert all(1 <= count <= 2 for count in updates)
    assert max(updates) == 2
    rates = {re.findall(r"learning_rate: (.*)", (run / "config.yaml").read_text())[0] for run in runs}
    assert len(rates) == 3, "each trial has its own"


@pytest.mark.skipif(not importlib.util.find_spec("optuna"), reason="optuna is an optional package")
def test_optuna_prunes_and_leaves_runs_that_can_be_resumed(environment, tmp_path):
    out = tmp_path / "optuna"
    text = ended(environment, tmp_path, "optuna_pruning.py", "--trials", "3", "--out", str(out))
    assert re.search(r"best: \{'meta.learning_rate': \S+\}, path length \d", text)
    states = [json.loads((out / f"trial-{number}" / "summary.json").read_text())["state"] for number in range(3)]
    assert set(states) <= {"done", "interrupted"}
    assert states[:2] == ["done", "done"], "nothing is pruned before there is a median"
