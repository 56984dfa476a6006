"""Measure the whole service of this project on one game, run by `launch.py train`. Mode N has N workers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.peers_arms import arguments

START_SECONDS = 120.0  # time limit for all workers to begin training
STOP_SECONDS = 60.0

Summary = Mapping[str, Any]


def main() -> None:
    """Train until the measurement is complete, then stop the service by SIGINT."""
    given = arguments(__doc__)
    workers = int(given.mode)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        process = subprocess.Popen(command(given.game, given.envs, workers, run_dir), stdout=sys.stderr)
        try:
            wait_for_workers(process, run_dir, workers)
            time.sleep(given.warmup)
            before = wait_for_workers(process, run_dir, workers)
            time.sleep(given.seconds)
            after = wait_for_workers(process, run_dir, workers)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait(STOP_SECONDS)
    steps, seconds = steps_between(before, after)
    print(json.dumps({"agent_steps": steps, "seconds": seconds}))


def command(game: str, envs: int, workers: int, run_dir: Path) -> list[str]:
    """Return the command line for the preset `fast`, with tasks too long to end during the measurement."""
    options = {
        "preset": "fast",
        "games": game,
        "agent.envs": envs,
        "workers": workers,
        "task-steps": 10**9,
        "address": "local",
        "run-dir": run_dir,
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "launch.py", "train", *flags]


def wait_for_workers(process: subprocess.Popen[bytes], run_dir: Path, workers: int) -> Summary:
    """Return the first summary in which every worker has trained. Exit with the service's code if it exits first."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(FileNotFoundError):
            summary: Summary = json.loads((run_dir / "summary.json").read_bytes())
            if sum(lease["steps"] > 0 for lease in summary["leases"]) == workers:
                return summary
        time.sleep(0.1)
    if process.poll() is not None:
        raise SystemExit(process.returncode or 1)  # the service has printed the reason
    raise RuntimeError("the workers of launch.py did not train")


def steps_between(before: Summary, after: Summary) -> tuple[int, float]:
    """Return the agent steps of all workers and the seconds that they took.

    A worker reports every other second, and its lease records the time since its last report. Each worker's steps are
    divided by the time between two of its own reports. The seconds are chosen so that the workers' rates add up.

    Raises:
        ValueError: If a worker changed its lease or did not report in between.
    """
    first, last = ({lease["lease"]: lease for lease in summary["leases"]} for summary in (before, after))
    if first.keys() != last.keys():
        raise ValueError(f"the leases changed from {sorted(first)} to {sorted(last)}")
    total, rate = 0, 0.0
    for name, lease in last.items():
        steps = lease["steps"] - first[name]["steps"]
        if steps <= 0:
            raise ValueError(f"{lease['worker']} has not reported again; measure for longer")
        reported = after["updated"] - lease["silent_seconds"]
        total += steps
        rate += steps / (reported - (before["updated"] - first[name]["silent_seconds"]))
    return total, total / rate


if __name__ == "__main__":
    main()
