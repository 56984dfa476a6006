"""SIGINT, SIGTERM and SIGHUP at any time: the first asks for a clean stop, the second stops at once."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from leap_dist.driver.signals import SIGNALS, Stopped, check_stop, stop_signal

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_says_so_and_the_second_stops_at_once(number: int, capfd: Any) -> None:
    before = signal.getsignal(number)
    with stop_signal() as stop:
        check_stop()
        stop.message = "stopping: 3 accepted contributions are kept"
        signal.raise_signal(number)
        assert stop.asked
        assert capfd.readouterr().err == "\nstopping: 3 accepted contributions are kept\n"
        with pytest.raises(Stopped):
            check_stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) == before


def test_a_wait_ends_with_the_signal() -> None:
    with stop_signal() as stop:
        threading.Timer(0.2, signal.raise_signal, [signal.SIGTERM]).start()
        started = time.monotonic()
        stop.wait(60)
        assert time.monotonic() - started < 10


def test_what_is_nested_shares_the_signal() -> None:
    with stop_signal() as outer:
        with stop_signal() as inner:
            assert inner is outer
        signal.raise_signal(signal.SIGHUP)
        with stop_signal() as inner, pytest.raises(Stopped):
            inner.check()
    with stop_signal() as later:
        later.check()


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_nothing_fails() -> None:
    found: list[bool] = []

    def work() -> None:
        with stop_signal() as stop:
            stop.wait(0.01)
            check_stop()
            found.append(stop.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def test_a_command_without_anything_to_finish_stops_at_the_first_signal() -> None:
    with stop_signal() as stop:
        stop.immediate = True
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# The start of the real program -------------------------------------------------------------------------------------


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    with contextlib.suppress(FileNotFoundError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def marked(home: Path) -> list[str]:
    """The command lines of all processes that were started with this HOME."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"HOME={home}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:150])
    return found


def start(home: Path, run_dir: Path) -> subprocess.Popen[bytes]:
    # With so many meta-updates, no run is done before its signal, however much faster than the first one it is.
    smoke = ["--preset", "smoke", "--meta-updates", "1000", "--workers", "1"]
    command = [sys.executable, "launch.py", "train", *smoke, "--run-dir", str(run_dir)]
    environment = {**os.environ, "HOME": str(home), "RAY_TMPDIR": str(home), "OMP_NUM_THREADS": "1"}
    with run_dir.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )


def seconds_to_first_task(home: Path, run_dir: Path) -> float:
    """How long the start takes here and now."""
    process = start(home, run_dir)
    try:
        while not catches(process.pid, signal.SIGTERM):
            time.sleep(0.005)
        begun = time.monotonic()
        while not (run_dir / "summary.json").exists():
            assert process.poll() is None, run_dir.with_suffix(".log").read_text()
            assert time.monotonic() - begun < 200
            time.sleep(0.05)
        return time.monotonic() - begun
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


@pytest.mark.ray
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("moments", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_a_signal_at_any_moment_of_the_start_ends_it_cleanly(tmp_path: Path, moments: int) -> None:
    """Each second signal goes to the whole process group."""
    with tempfile.TemporaryDirectory(prefix="ld") as home:  # short: Ray puts sockets below it
        signal_the_start(Path(home), tmp_path, moments)


def signal_the_start(home: Path, folder: Path, moments: int) -> None:
    whole = seconds_to_first_task(home, folder / "undisturbed")
    for moment in range(moments):
        run_dir = folder / f"run{moment}"
        number = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)[moment // 2 % 3]
        process = start(home, run_dir)
        while not catches(process.pid, signal.SIGTERM):
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(1.1 * whole * moment / moments)
        what = f"{signal.Signals(number).name} after {1.1 * whole * moment / moments:.1f} of {whole:.1f} s"
        (os.killpg if moment % 2 else os.kill)(process.pid, number)
        log = run_dir.with_suffix(".log")
        assert process.wait(120) == 130, f"{what}: {log.read_text()}"
        assert not re.search(r"Traceback|\*\*\* SIG", log.read_text()), f"{what}: {log.read_text()}"
        assert marked(home) == [], what
