"""`train --resume auto`: one command for the first start and every restart; `test_driver.py` kills the real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import in_process
import pytest
from crashes import Killed
from protocol import ledger

from leap_dist.cli import commands, parser
from leap_dist.storage import run_directory

pytestmark = pytest.mark.emulator


def launch(run_dir: Path) -> bool:
    """What the command does, without Ray. Returns whether it continued a run."""
    command = ["train", "--resume", "auto", "--run-dir", str(run_dir), "--preset", "smoke", "--mode", "sync"]
    config, run = commands.training(parser.parse(command))
    with run:
        run_directory.prepare(run.folder, config)
        in_process.train(config, run.folder)
    return run.continues


def test_a_job_that_is_killed_twice_ends_with_one_complete_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launch(tmp_path / "undisturbed")
    tasks, run_task = 0, in_process.run_task

    def killed_in_the_second_and_fourth_task(lease: Any, start: Any, config: Any, server: Any) -> Any:
        nonlocal tasks
        tasks += 1
        if tasks in (2, 4):
            server.close()  # as the end of its process does
            raise Killed
        return run_task(lease, start, config, server)

    monkeypatch.setattr(in_process, "run_task", killed_in_the_second_and_fourth_task)
    for _ in range(2):
        with pytest.raises(Killed):
            launch(tmp_path / "killed")
    assert launch(tmp_path / "killed"), "it goes on where the last one was killed"
    assert tasks == 6, "four tasks, two of them begun twice"
    assert ledger(tmp_path / "killed") == ledger(tmp_path / "undisturbed")
    killed, undisturbed = (tmp_path / name / "init.safetensors" for name in ("killed", "undisturbed"))
    assert killed.read_bytes() == undisturbed.read_bytes()
    assert launch(tmp_path / "killed"), "a run that is complete stays as it is"
    assert tasks == 6
