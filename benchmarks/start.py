"""Measure the seconds from the start of a run to its first agent step, by parts, on this machine.

    python -m benchmarks.start
    python -m benchmarks.start --uncompiled

Each repetition starts `launch.py train` in a process of its own, reads the parts of its start from summary.json, and
interrupts the run. The clock of the parts begins when Ray starts; "before Ray" is what comes before that, from the
command on: imports and the trial that the plan makes. With `--uncompiled`, each repetition also starts once without
the compiled modules of Python, as after an install that leaves them out where Python may not keep them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from benchmarks.harness import Report, parser, progress

ROOT = Path(__file__).parents[1]
LONGEST = 300.0
"""Seconds after which a start has failed."""


def start(preset: str, folder: Path, *, compiled: bool) -> dict[str, float]:
    """Start a run, wait for its first step, and interrupt it. Return the seconds of the parts of its start by name.

    Raises RuntimeError with the end of the run's output if it ends or takes too long.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    if not compiled:
        environment |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": str(folder / "nothing")}
    command = [sys.executable, str(ROOT / "launch.py"), "train", "--preset", preset, "--run-dir", str(folder / "run")]
    with (folder / "log").open("w") as log:
        began = time.monotonic()
        run = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            parts = _parts(run, folder / "run" / "summary.json", began + LONGEST)
            whole = time.monotonic() - began
        finally:
            if run.poll() is None:
                run.send_signal(signal.SIGINT)
            run.wait()
    if parts is None:
        raise RuntimeError((folder / "log").read_text()[-2000:])
    return {"before Ray": whole - sum(parts.values()), **parts, "first step after the command": whole}


def _parts(run: subprocess.Popen[bytes], summary: Path, deadline: float) -> dict[str, float] | None:
    """Return the parts of the start, as soon as the run reports its first step; None if it does not."""
    while run.poll() is None and time.monotonic() < deadline:
        if summary.exists():
            found = json.loads(summary.read_text())
            if found.get("time_to_first_step") is not None:
                return {name: float(seconds) for name, seconds in found["start_seconds"].items()}
        time.sleep(0.05)
    return None


def main() -> None:
    """Run the benchmark and print the report."""
    command = parser(__doc__, repeats=5)
    command.add_argument("--preset", default="quick")
    command.add_argument("--uncompiled", action="store_true", help="also start without Python's compiled modules")
    given = command.parse_args()
    kinds = {"compiled": True, **({"not compiled": False} if given.uncompiled else {})}
    samples: dict[str, dict[str, list[float]]] = {kind: defaultdict(list) for kind in kinds}
    for repetition in range(-1, given.repeats):
        for kind in [*kinds][:: -1 if repetition % 2 else 1]:
            with tempfile.TemporaryDirectory() as folder:
                parts = start(given.preset, Path(folder), compiled=kinds[kind])
            progress(f"{kind}: {parts['first step after the command']:.1f} s ({repetition + 1} of {given.repeats})")
            for name, seconds in parts.items() if repetition >= 0 else ():  # the first one fills the file cache
                samples[kind][name].append(seconds)
    report = Report("Seconds from the start of a run to its first agent step", {"preset": given.preset})
    for kind, by_part in samples.items():
        for name, values in by_part.items():
            report.add(name if len(kinds) == 1 else f"{name}, {kind}", "s", values)
    whole = {kind: by_part["first step after the command"] for kind, by_part in samples.items()}
    own = [total - before for total, before in zip(whole["compiled"], samples["compiled"]["before Ray"], strict=True)]
    report.ratio("from the start of Ray / 8 s", own, [8.0] * len(own), target=1.0, at_most=True)
    if given.uncompiled:
        report.ratio("not compiled / compiled", whole["not compiled"], whole["compiled"])
    report.show(given.json)


if __name__ == "__main__":
    main()
