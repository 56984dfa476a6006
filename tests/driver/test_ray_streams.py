"""A whole training run whose output nobody reads."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from service import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sink", "poor"),
    [
        ("2>&1 | head -1; exit ${PIPESTATUS[0]}", {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "COLUMNS": "40"}),
        (">&- 2>&-", {}),
    ],
    ids=["head", "closed"],
)
def test_training_ends_well_though_its_output_is_gone(tmp_path, environment, sink, poor):
    run_dir = tmp_path / "run"
    line = f'"$1" launch.py train --preset smoke --workers 1 --meta-updates 1 --run-dir "$2" {sink}'
    done = subprocess.run(
        ["bash", "-c", line, "bash", sys.executable, str(run_dir)],
        cwd=ROOT,
        env={**environment, **poor},
        capture_output=True,
        timeout=400,
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert b"Traceback" not in done.stdout + done.stderr
    assert json.loads((run_dir / "summary.json").read_text())["state"] == "done"
    assert (run_dir / "progress.png").exists()
