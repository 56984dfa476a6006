"""The whole service with its run directory in object storage: the machine of the driver is lost, and nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from service import ROOT, SYNC, Launch, playing, same_result

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]


def test_a_run_by_its_url_survives_the_loss_of_the_driver_and_its_working_copy(
    undisturbed: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "copies").mkdir()
    environment = {**environment, "TMPDIR": str(tmp_path / "copies")}
    slow = {**environment, "LEAP_FAILPOINTS": "task.update=slow@1-100000"}  # so that it is not done before the kill
    run = Launch(slow, tmp_path / "run", *SYNC, "--workers", "1", scheme="file://")
    try:
        run.wait_for(playing)
        status = [sys.executable, "launch.py", "status", "--json", "--run-dir", f"file://{run.run_dir}"]
        alive = subprocess.run(status, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert json.loads(alive.stdout)["state"] == "running"
    finally:
        run.process.kill()
        run.process.wait()
    (copy,) = (tmp_path / "copies").glob("leap-dist-run-*")
    shutil.rmtree(copy, ignore_errors=True)

    resumed = Launch(environment, tmp_path / "run", "--resume", scheme="file://")
    try:
        assert resumed.end() == 0, resumed.log.read_text()
    finally:
        resumed.process.kill()
    printed = resumed.log.read_text()
    assert "has not released" in printed
    assert f"initialization  file://{run.run_dir}/init.safetensors" in printed
    same_result(run.run_dir, undisturbed)
    assert resumed.summary()["state"] == "done"
    assert resumed.summary()["wall_seconds"] > 1
    for name in ("progress.png", "config.yaml", "manifest.json"):
        assert (run.run_dir / name).stat().st_size > 100
    assert not list((run.run_dir / "ledger").glob("*")), "one ledger, whole"
    assert not list((tmp_path / "copies").glob("leap-dist-run-*/*")), "the working copy is gone: the URL has it all"
