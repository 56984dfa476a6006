"""The service as a user starts it: `launch.py train` or `evaluate` in a process of its own, on a real Ray."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from protocol import ledger

ROOT = Path(__file__).parents[2]
SYNC = ["--preset", "smoke", "--mode", "sync", "--meta-updates", "5", "--meta.batch-size", "2", "--task-steps", "500",
        "--worker.cpus", "0.5", "--worker.heartbeat-seconds", "0.5"]  # fmt: skip


class Launch:
    """A running `launch.py train`, or `evaluate` where arguments say what with, in a process group of its own.

    `scheme`: of the URL that it is given in place of the directory.
    """

    def __init__(self, environment: dict[str, str], run_dir: Path, *arguments: str, scheme: str = "") -> None:
        self.run_dir = run_dir
        self.log = run_dir.with_suffix(".log")
        which = ["evaluate", "--out"] if "--init" in arguments else ["train", "--run-dir"]
        command = [sys.executable, "launch.py", *which, f"{scheme}{run_dir}", *arguments]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def summary(self) -> dict[str, Any]:
        path = self.run_dir / "summary.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def wait_for(self, condition: Callable[[dict[str, Any]], Any], seconds: float = 240) -> Any:
        """The first true value of `condition` on the summary. Fails the test where the run ends or takes too long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (summary := self.summary()) and (value := condition(summary)):
                return value
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(f"not within {seconds} s: {self.summary()}\n{self.log.read_text()}")

    def end(self, seconds: float = 240) -> int:
        return self.process.wait(seconds)


def same_result(run_dir: Path, undisturbed: Path) -> None:
    assert (run_dir / "init.safetensors").read_bytes() == (undisturbed / "init.safetensors").read_bytes()
    assert ledger(run_dir) == ledger(undisturbed)


def playing(summary: dict[str, Any]) -> int | None:
    """Process of a worker in the middle of a task of the second meta-update or later."""
    busy = {lease["worker"] for lease in summary["leases"] if 0 < lease["steps"] < 500}
    pids = [w["pid"] for w in summary["workers"] if w["name"] in busy and w["pid"]]
    return pids[0] if pids and summary["meta_updates"] >= 1 else None
