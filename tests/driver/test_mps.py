"""NVIDIA's MPS daemon for our own workers, with a program that pretends to be it; no GPU is needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from daemon_actors import Actors

from leap_dist.config.loading import resolve
from leap_dist.driver import mps
from leap_dist.driver.mps import Daemon, Daemons
from leap_dist.driver.placement import Room

FAKE = f"""#!{sys.executable}
import os, pathlib, signal, sys
folder = pathlib.Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
if sys.argv[1:] == ["-f"]:
    BEGIN
    (folder / "pid").write_text(str(os.getpid()))
    (folder / "control").touch()
    signal.pause()
elif sys.stdin.read().startswith("quit"):
    os.kill(int((folder / "pid").read_text()), signal.SIGTERM)
"""
WORKS = 'print(\'[[["H100", 1, 2, "0", ""]], ""]\')'
GPU, WHOLE, CPU = (
    Room(4, "cuda", 0.25, "worker.gpus"),
    Room(1, "cuda", 1.0, "worker.gpus"),
    Room(4, "cpu", 0.0, "processors"),
)


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program on the PATH, and a GPU with which CUDA works."""
    path = tmp_path / mps.TOOL
    path.write_text(FAKE.replace("BEGIN", ""))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(mps, "GPU_SCRIPT", WORKS)
    monkeypatch.setattr(mps, "runs_already", lambda: False)
    return path


def test_a_daemon_runs_with_directories_of_its_own_and_leaves_nothing(tool: Path) -> None:
    daemon = Daemon()
    assert daemon.start() == ""
    folder = daemon.folder
    assert folder is not None
    assert daemon.is_running
    assert folder.stat().st_mode & 0o077 == 0, "nobody else gets in"
    assert {daemon.environment()[name] for name in (mps.PIPES, mps.LOGS)} == {str(folder)}
    assert mps.PIPES not in os.environ, "this process goes on as it was"
    daemon.stop()
    assert not daemon.is_running
    assert not folder.exists()


@pytest.mark.parametrize(
    ("begin", "script", "problem"),
    [
        ("sys.exit(1)", WORKS, "the daemon ended at once"),
        ("signal.pause()", WORKS, "the daemon does not start"),
        ("", "print('[[], \"out of memory\"]')", "CUDA does not work through it: out of memory"),
        ("", "print('[[], \"\"]')", "CUDA does not work through it: no GPU"),
        ("", "raise SystemExit(3)", "CUDA does not work through it: CalledProcessError"),
    ],
)
def test_where_it_does_not_work_nothing_is_left_of_it(
    tool: Path, monkeypatch: pytest.MonkeyPatch, begin: str, script: str, problem: str
) -> None:
    tool.write_text(FAKE.replace("BEGIN", begin))
    monkeypatch.setattr(mps, "GPU_SCRIPT", script)
    monkeypatch.setattr(mps, "START_SECONDS", 0.5 if "does not start" in problem else 30.0)
    monkeypatch.setattr(mps, "END_SECONDS", 0.2)
    daemon = Daemon()
    assert daemon.start() == problem
    assert (daemon.folder, daemon.is_running) == (None, False)


SUBSET = """
import json, os
visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
served = SERVED if "CUDA_MPS_PIPE_DIRECTORY" in os.environ else visible
print(json.dumps([[[name, 1, 2, name, ''] for name in visible if name in served], ""]))
"""
"""A node of four GPUs, of which CUDA and the daemon show some."""


@pytest.mark.parametrize(
    ("served", "problem"),
    [(["1", "2", "3"], ""), (["1", "2"], "CUDA does not work through it: it shows 2 of 3 GPUs")],
)
def test_a_daemon_serves_all_gpus_that_ray_was_given_under_their_own_numbers(
    tool: Path, monkeypatch: pytest.MonkeyPatch, served: list[str], problem: str
) -> None:
    """One that sees a subset numbers it from 0, and a worker that is told to use GPU 3 would find none."""
    tool.write_text(FAKE.replace("BEGIN", '(folder.parent / "seen").write_text(repr(dict(os.environ)))'))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2,3")
    monkeypatch.setattr(mps, "GPU_SCRIPT", SUBSET.replace("SERVED", repr(served)))
    monkeypatch.setattr(mps.tempfile, "mkdtemp", lambda prefix: str(tool.with_name("pipes")))
    tool.with_name("pipes").mkdir()
    daemon = Daemon()
    assert daemon.start() == problem
    assert daemon.is_running == (not problem)
    seen = tool.with_name("seen").read_text()
    assert "CUDA_MPS_PIPE_DIRECTORY" in seen
    assert "CUDA_VISIBLE_DEVICES" not in seen
    assert daemon.environment()["CUDA_VISIBLE_DEVICES"] == "1,2,3", "workers keep it"
    daemon.stop()


def test_somebody_elses_daemon_is_left_alone_and_a_missing_tool_is_no_error(
    tool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mps, "runs_already", lambda: True)
    assert Daemon().start() == "another daemon is already running"
    monkeypatch.setenv("PATH", "/nowhere")
    assert Daemon().start() == "nvidia-cuda-mps-control is not installed"


def test_a_running_daemon_is_recognized_by_its_name(tmp_path: Path) -> None:
    assert not mps.runs_already()
    program = tmp_path / mps.TOOL
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([program, "60"])
    deadline = time.monotonic() + 20
    while not mps.runs_already() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert mps.runs_already()
    process.kill()
    process.wait()


HOLDER = """
import sys
from leap_dist.driver import mps
mps.GPU_SCRIPT, mps.runs_already = sys.argv[1], lambda: False
daemon = mps.Daemon()
assert daemon.start() == "", "it does not start"
print((daemon.folder / "pid").read_text(), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of another system does not do it")
def test_a_daemon_ends_with_the_process_that_holds_it_even_if_that_is_killed(tool: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, WORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    daemon = int(holder.stdout.readline())
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{daemon}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{daemon}").exists() or "Z" in Path(f"/proc/{daemon}/stat").read_text().split()[2]


def test_only_nodes_whose_workers_share_a_gpu_get_a_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    actors = Actors(monkeypatch)
    hosts = {"gpu": GPU, "whole": WHOLE, "cpu": CPU}
    Daemons(resolve("smoke", {"worker.mps": "no"})).follow(hosts)
    assert actors.started == []
    daemons = Daemons(resolve("smoke"))
    for _ in range(2):
        daemons.follow(hosts)
    assert actors.started == ["gpu"]
    assert [daemons.is_undecided(name) for name in hosts] == [True, False, False]
    actors.answers["gpu.start"] = "/tmp/leap-mps-1", ""
    daemons.follow(hosts)
    assert (daemons.is_undecided("gpu"), daemons.pipes, daemons.states) == (
        False, {"gpu": "/tmp/leap-mps-1"}, {"gpu": "running"},
    )  # fmt: skip
    daemons.close()
    assert actors.ended == ["gpu"]


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (("", "nvidia-cuda-mps-control is not installed"), "nvidia-cuda-mps-control is not installed"),
        (mps.RayError("gone"), "lost (RayError)"),
    ],
)
def test_without_a_daemon_workers_do_not_wait(monkeypatch: pytest.MonkeyPatch, answer: Any, state: str) -> None:
    actors = Actors(monkeypatch)
    daemons = Daemons(resolve("smoke"))
    daemons.follow({"gpu": GPU})
    actors.answers["gpu.start"] = answer
    daemons.follow({"gpu": GPU})
    assert (daemons.is_undecided("gpu"), daemons.pipes["gpu"], daemons.states) == (False, "", {"gpu": state})


def test_the_next_worker_goes_on_without_a_daemon_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    actors = Actors(monkeypatch)
    daemons = Daemons(resolve("smoke"))
    daemons.follow({"gpu": GPU})
    actors.answers["gpu.start"] = "/tmp/leap-mps-1", ""
    daemons.follow({"gpu": GPU})
    actors.answers["gpu.is_running"] = True
    daemons.follow({"gpu": GPU})
    assert daemons.pipes == {"gpu": "/tmp/leap-mps-1"}
    actors.answers["gpu.is_running"] = False
    daemons.follow({"gpu": GPU})
    assert (daemons.pipes, daemons.states) == ({"gpu": ""}, {"gpu": "the daemon has ended"})
    daemons.follow({})
    assert (daemons.pipes, actors.ended) == ({}, ["gpu"])
