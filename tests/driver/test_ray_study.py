"""`launch.py study` on a real Ray: killed, gone on with, added to."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from service import ROOT
from toy_data_sets import write_part

from leap_dist.study.spec import Study

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]


def start(
    environment: dict[str, str], out: Path, data_dir: Path, *arguments: str
) -> tuple[subprocess.Popen[bytes], Path]:
    """The command, and where what it prints goes."""
    log = out.with_suffix(f".{len(list(out.parent.glob('*.log')))}.log")
    command = [sys.executable, "launch.py", "study", "--tasks", "multi-cv", "--preset", "smoke",
               "--games", "mnist,cifar10", "--out", str(out), "--data-dir", str(data_dir), "--seeds", "1",
               "--test-steps", "640", "--worker.cpus", "0.5", *arguments]  # fmt: skip
    with log.open("wb") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        ), log


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_and_grows(environment, tmp_path):
    data_dir, out = tmp_path / "data", tmp_path / "study"
    write_part(data_dir, "mnist")
    write_part(data_dir, "cifar10", seed=1)
    slow = {**environment, "LEAP_FAILPOINTS": "task.update=slow@1-1000000"}
    killed, log = start(slow, out, data_dir, "--arms", "leap", "none", "--groups", "mnist", "cifar10")
    first, second = out / "mnist/seed0/leap/summary.json", out / "cifar10/seed0/leap/summary.json"
    deadline = time.monotonic() + 240
    while not (second.exists() and json.loads(second.read_text())["leases"]):
        assert killed.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    assert json.loads(first.read_text())["state"] == "done"
    before = (out / "mnist/seed0/leap/init.safetensors").stat().st_mtime_ns
    tested = {path: path.read_bytes() for path in out.glob("mnist/seed0/test/runs/*/*/*.json")}
    assert tested, "the first group was tested before the second one was trained"

    again, log = start(environment, out, data_dir, "--arms", "leap,reptile,none", "--groups", "mnist", "cifar10")
    assert again.wait(300) == 0, log.read_text()
    assert (out / "mnist/seed0/leap/init.safetensors").stat().st_mtime_ns == before, "what is done is left alone"
    study = Study.read(out)
    assert (study.arms, study.groups) == (("leap", "reptile", "none"), ("mnist", "cifar10"))
    runs = sorted(path.relative_to(out).as_posix() for path in out.glob("*/seed0/test/runs/*/*/*.json"))
    assert runs == sorted(
        f"{group}/seed0/test/runs/{arm}/{group}/0.json" for group in study.groups for arm in study.arms
    )
    assert len(tested) == 2
    for path, content in tested.items():
        assert path.read_bytes() == content
    assert "| leap |" in (out / "table.md").read_text()
    for name in ("results.csv", "results.json", "figures/curves.png"):
        assert (out / name).stat().st_size > 0

    (out / "table.md").unlink()
    plotted = subprocess.run(
        [sys.executable, "launch.py", "plot", "--run-dir", str(out)], cwd=ROOT, env=environment, capture_output=True
    )
    assert plotted.returncode == 0, plotted.stderr
    assert (out / "table.md").exists()


def test_a_study_of_games_is_trained_tested_and_drawn(environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "atari"
    command = [sys.executable, "launch.py", "study", "--tasks", "atari", "--preset", "smoke", "--groups", "pong",
               "--games", "ms_pacman", "--game-steps", "ms_pacman=4000", "--atari.max-episode-frames", "400",
               "--seeds", "1", "--out", str(out), "--worker.cpus", "0.5"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test       2 agents, 4,000 agent steps each: 8,000 in all" in done.stdout
    runs = {path.relative_to(out).as_posix() for path in out.glob("*/seed0/test/runs/*/*/*.json")}
    assert runs == {f"pong/seed0/test/runs/{arm}/ms_pacman/0.json" for arm in ("leap", "none")}
    assert json.loads((out / "results.json").read_text())["groups"]["pong"]["budgets"] == {"ms_pacman": 4000}
    assert (out / "figures" / "figure4.png").stat().st_size > 10_000
    assert not list(out.glob("*/seed0/test/states"))
