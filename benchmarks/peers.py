"""Compare the agent steps per second of the whole service, Stable-Baselines3's A2C and RLlib's IMPALA.

    make bench                                          everything, after creating the peers' environments
    python -m benchmarks.peers --games pong --arms ours sb3-dummy --seconds 10 --repeats 1

An agent step is one decision, four ALE frames. All systems have the same network (conv 16, conv 32, linear 256), the
same preprocessing (84×84 gray, four frames, maximum of the last two, up to 30 no-ops, fire on reset) and all cores.
A2C's rollouts are five steps long. This project runs N environments in each of two workers, Stable-Baselines3 runs N
or, as "-2n", 2N environments in one agent. IMPALA has N environments in each runner and keeps its own batches. Steps
count from the end of a warm-up on, while all agents train.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

from benchmarks.harness import Report, interleaved, parser

ROOT = Path(__file__).parent.parent
START_SECONDS = 240.0  # time limit for a system to start
STOP_SECONDS = 90.0


class Arm(NamedTuple):
    """Measured system: a script in `peers_arms`, its environment mode, and its number of environments in units of N."""

    system: str
    mode: str
    times: int = 1
    own: bool = True
    """Whether the system itself offers this mode. Other modes are shown, but not used for comparison."""


OURS, ONE_WORKER = "ours", "ours-one-worker"
ARMS = {
    OURS: Arm("service", "2"),
    ONE_WORKER: Arm("service", "1"),
    "sb3-dummy": Arm("sb3", "dummy"),
    "sb3-dummy-2n": Arm("sb3", "dummy", 2),
    "sb3-subproc": Arm("sb3", "subproc"),
    "sb3-subproc-2n": Arm("sb3", "subproc", 2),
    "sb3-ale-vector-2n": Arm("sb3", "ale-vector", 2, own=False),
    "impala-1": Arm("rllib", "1"),
    "impala-2": Arm("rllib", "2"),
}
TARGETS = {"sb3": 4.0, "rllib": 3.5}


def main() -> None:
    """Run the benchmark and print the report."""
    given = _parser().parse_args()
    pythons = {"service": Path(sys.executable), "sb3": given.sb3_python, "rllib": given.rllib_python}
    for system in sorted({ARMS[name].system for name in given.arms}):
        if not pythons[system].exists():
            _complain(f"{pythons[system]} does not exist; run `make bench` to create that environment")
    # The games are the outer loop, so that arms of one game are measured close together.
    samples = interleaved(
        {f"{game}: {name}": partial(measure, given, ARMS[name], pythons, game)
         for game in given.games for name in given.arms},
        given.repeats,
    )  # fmt: skip
    settings = {"envs": given.envs, "seconds": given.seconds, "warmup": given.warmup}
    report = Report("Agent steps per second of whole systems, each alone on all cores", settings)
    for name, rates in samples.items():
        report.add(name, "agent steps/s", rates)
    for game in given.games:
        add_ratios(report, game, {name: samples[f"{game}: {name}"] for name in given.arms})
    for name in given.arms:
        if not ARMS[name].own:
            report.notes.append(f"{name}: not one of {ARMS[name].system}'s own modes, so not used for comparison")
    report.show(given.json)


def add_ratios(report: Report, game: str, rates: Mapping[str, Sequence[float]]) -> None:
    """Add the ratios of this project to each peer's best own mode and to one worker, where both were measured."""
    for system, target in TARGETS.items():
        if (name := best(rates, system)) and OURS in rates:
            report.ratio(f"{game}: ours / {name}", rates[OURS], rates[name], target=target)
    if OURS in rates and ONE_WORKER in rates:
        report.ratio(f"{game}: two workers / one", rates[OURS], rates[ONE_WORKER], target=1.9)


def best(rates: Mapping[str, Sequence[float]], system: str) -> str | None:
    """Return the arm with the highest median among a system's own modes, or None if none was measured."""
    own = [name for name in rates if ARMS[name].system == system and ARMS[name].own]
    return max(own, key=lambda name: statistics.median(rates[name]), default=None)


def measure(given: argparse.Namespace, arm: Arm, pythons: Mapping[str, Path], game: str) -> float:
    """Run an arm's script once with its system's Python and return the rate. Exit the program if it fails."""
    python = pythons[arm.system]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    environment.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory(prefix="ldb") as home:  # short, because Ray puts sockets below it
        environment |= {"HOME": home, "TMPDIR": home, "RAY_TMPDIR": home, "RAY_USAGE_STATS_ENABLED": "0"}
        out, err = Path(home) / "out", Path(home) / "err"
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                command(given, arm, python, game),
                cwd=ROOT,
                env=environment,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        code = finish(process, START_SECONDS + given.warmup + given.seconds)
        if code != 0 or (figure := result(out.read_text())) is None:
            said = [line.strip() for line in err.read_text(errors="replace").splitlines() if line.strip()]
            why = "took too long" if code is None else said[-1] if said else "printed nothing"
            _complain(f"{arm.system} {arm.mode}, run by {python} (created by `make bench`): {why}")
    return figure


def command(given: argparse.Namespace, arm: Arm, python: Path, game: str) -> list[str]:
    """Return the command line of an arm's script."""
    options = {
        "game": game,
        "mode": arm.mode,
        "envs": given.envs * arm.times,
        "warmup": given.warmup,
        "seconds": given.seconds,
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [str(python), "-m", f"benchmarks.peers_arms.{arm.system}", *flags]


def finish(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Return a process's exit code, or None after interrupting it, and if necessary killing its group, at a timeout."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def result(printed: str) -> float | None:
    """Return the agent steps per second from a script's output, or None if no line reports them."""
    lines = [line for line in printed.splitlines() if line.startswith('{"agent_steps"')]
    if not lines:
        return None
    found = json.loads(lines[-1])
    return float(found["agent_steps"] / found["seconds"])


def _complain(message: str) -> NoReturn:
    raise SystemExit(f"benchmarks.peers: error: {message}")


def _parser() -> argparse.ArgumentParser:
    parsed = parser(__doc__, repeats=5)
    parsed.add_argument(
        "--games", nargs="+", default=["breakout", "pong"], help="games to measure (default breakout pong)"
    )
    parsed.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM",
                        help=f"systems to measure (default {' '.join(ARMS)})")  # fmt: skip
    parsed.add_argument("--envs", type=int, default=16, help="N, environments per worker or runner (default 16)")
    parsed.add_argument("--seconds", type=float, default=30.0, help="measured seconds per arm (default 30)")
    parsed.add_argument(
        "--warmup", type=float, default=10.0, help="seconds of warm-up after the first update (default 10)"
    )
    for system in TARGETS:
        python = ROOT / f".venv-{system}" / "bin" / "python"
        parsed.add_argument(
            f"--{system}-python",
            type=lambda text: Path(text).absolute(),
            default=python,
            help=f"Python interpreter with {system} installed",
        )
    return parsed


if __name__ == "__main__":
    main()
