"""docs/notebook.ipynb, from top to bottom, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from service import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_the_notebook_runs_from_top_to_bottom(environment, tmp_path):
    """Its cells one after the other, as a kernel runs them; the last expression of a cell is evaluated, not shown."""
    cells = json.loads((ROOT / "docs/notebook.ipynb").read_text())["cells"]
    program = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    checks = """
assert run.outcome == "stopped" and 3 <= len(run.meta_updates()) < 40, run
assert features.shape == (1, 256)
assert len(report.runs()) == 2
"""
    done = subprocess.run(
        [sys.executable, "-c", program + checks], cwd=tmp_path, capture_output=True, text=True, timeout=580,
        env={**environment, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert told == [f"meta-update {n}" for n in range(1, len(told) + 1)]
    assert len(told) >= 3
