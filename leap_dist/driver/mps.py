"""NVIDIA's MPS daemon, which lets workers that share a GPU compute at the same time instead of taking turns.

Each node with GPUs has one daemon, which has its own directories and serves only our workers. It changes no setting of
the card, and ends with the run: the actor that holds it is its parent, and the kernel ends it with its parent. If the
tool is missing, another daemon is already running, or CUDA does not work through ours, workers run without it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from leap_dist.config.plurals import counted
from leap_dist.config.settings import Config
from leap_dist.driver.node_report import GPU_SCRIPT, Gpu
from leap_dist.driver.placement import Room
from leap_dist.storage.redaction import redact_output

TOOL = "nvidia-cuda-mps-control"
PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
"""Environment variables that tell CUDA where the daemon is."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
"""Environment variable that names the GPUs that a process may use. Ray may have been given a part of them in it."""
START_SECONDS = 10.0
TRY_SECONDS = 60.0
"""Time limit for a first computation through the daemon."""
END_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1  # prctl.h


class Daemon:
    """The daemon of this machine. `folder` is its directory of pipes, or None if we run no daemon."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> str:
        """Start the daemon. Returns "" if CUDA works through it, or else why workers run without it."""
        tool = shutil.which(TOOL)
        if tool is None:
            return f"{TOOL} is not installed"
        if runs_already():
            return "another daemon is already running"
        expected = max(1, _gpus(os.environ)[0]) if VISIBLE in os.environ else 1
        self.folder = Path(tempfile.mkdtemp(prefix="leap-mps-"))
        # A daemon that sees only some devices numbers them anew, but its clients go on to name theirs as before.
        environment = {name: value for name, value in self.environment().items() if name != VISIBLE}
        try:
            self._process = subprocess.Popen(
                [tool, "-f"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                preexec_fn=_end_with_parent,
            )
            problem = self._wait() or self._try(expected)
        except OSError as error:
            problem = str(error)
        if problem:
            self.stop()
        return problem

    def environment(self) -> dict[str, str]:
        """Return this process's environment, with the daemon's directories."""
        return {**os.environ, PIPES: str(self.folder), LOGS: str(self.folder)}

    @property
    def is_running(self) -> bool:
        """Whether the daemon runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End the daemon and remove its directories."""
        if self.is_running and self._process is not None:
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                tool = shutil.which(TOOL) or TOOL
                subprocess.run([tool], input=b"quit -t 2\n", env=self.environment(), timeout=END_SECONDS, check=False)
                self._process.wait(END_SECONDS)
            if self.is_running:
                self._process.kill()
                self._process.wait()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder = None

    def _wait(self) -> str:
        """Wait until the daemon listens. Returns "" or what is wrong."""
        assert self.folder is not None
        deadline = time.monotonic() + START_SECONDS
        while self.is_running and time.monotonic() < deadline:
            if (self.folder / "control").exists():
                return ""
            time.sleep(0.02)
        return "the daemon does not start" if self.is_running else "the daemon ended at once"

    def _try(self, expected: int) -> str:
        """Compute something on at least `expected` GPUs through the daemon. Returns "" or what is wrong."""
        found, problem = _gpus(self.environment())
        if not problem and found < expected:
            problem = f"it shows {found} of {counted(expected, 'GPU')}" if found else "no GPU"
        return f"CUDA does not work through it: {problem}" if problem else ""


def _gpus(environment: Mapping[str, str]) -> tuple[int, str]:
    """Return the number of GPUs on which another process can compute, and why it cannot use one more."""
    command = [sys.executable, "-c", GPU_SCRIPT]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TRY_SECONDS, check=True)
        found, problem = json.loads(done.stdout.strip().splitlines()[-1])
        gpus = [Gpu(*gpu) for gpu in found]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, TypeError) as error:
        return 0, type(error).__name__
    problems = [gpu.problem for gpu in gpus if gpu.problem]
    return len(gpus) - len(problems), problem or next(iter(problems), "")


def runs_already() -> bool:
    """Return whether a daemon, or a server of one, runs on this machine, no matter who started it."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "comm").read_text().startswith("nvidia-cuda-mps"):  # cut off after 15 bytes
                return True
    return False


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class DaemonActor:
    """A Daemon in a Ray actor on its node."""

    def __init__(self) -> None:
        redact_output()
        self._daemon = Daemon()

    def start(self) -> tuple[str, str]:
        """Start the daemon. Returns the directory of its pipes, or "" and why there is none."""
        problem = self._daemon.start()
        return ("", problem) if problem else (str(self._daemon.folder), "")

    def is_running(self) -> bool:
        """Return whether the daemon runs."""
        return self._daemon.is_running

    def stop(self) -> None:
        """End the daemon."""
        self._daemon.stop()


DAEMON: Any = ray.remote(num_cpus=0, max_restarts=0)(DaemonActor)


class Daemons:
    """The daemons of all nodes whose GPUs are shared by workers. Never blocks, except in `close`.

    Args:
        config: the run's configuration.
    """

    def __init__(self, config: Config) -> None:
        self._wanted = config.worker.mps == "auto"
        self._actors: dict[str, tuple[Any, Any]] = {}  # actor and its next answer, by node
        self.pipes: dict[str, str] = {}
        """Directory of the pipes by node, for those whose daemon has started."""
        self.states: dict[str, str] = {}
        """State of the daemon by node: "running", or the reason why there is none."""

    def follow(self, hosts: Mapping[str, Room], occupied: Collection[str] = ()) -> None:
        """Start a daemon on each new node whose workers share GPUs, and take note of those that have ended.

        A daemon is ended if its node is neither among `hosts`, which may get workers, nor `occupied` by one, as it is
        while a node that is about to go leaves its workers time for their tasks.
        """
        if not self._wanted:
            return
        for name, room in hosts.items():
            if name not in self._actors and room.device == "cuda" and room.gpus < 1:
                there = NodeAffinitySchedulingStrategy(name, soft=False)
                actor = DAEMON.options(scheduling_strategy=there).remote()
                self._actors[name] = actor, actor.start.remote()
        for name, (actor, answer) in list(self._actors.items()):
            if name not in hosts and name not in occupied:
                self._forget(name)
            elif answer is not None and ray.wait([answer], timeout=0)[0]:
                self._take(name, actor, answer)

    def is_undecided(self, host: str) -> bool:
        """Return whether a node's daemon is still starting, so that workers there have to wait."""
        return host in self._actors and host not in self.states

    def close(self) -> None:
        """End all daemons."""
        with contextlib.suppress(RayError):
            ray.get([actor.stop.remote() for actor, _ in self._actors.values()], timeout=3 * END_SECONDS)
        for name in list(self._actors):
            self._forget(name)

    def _take(self, name: str, actor: Any, answer: Any) -> None:
        try:
            found = ray.get(answer)
        except RayError as error:
            found = "", f"lost ({type(error).__name__})"
        if isinstance(found, tuple):
            self.pipes[name], problem = found
            self.states[name] = problem or "running"
        elif not found:
            self.pipes[name], self.states[name] = "", "the daemon has ended"
        runs = bool(self.pipes[name])
        self._actors[name] = actor, actor.is_running.remote() if runs else None

    def _forget(self, name: str) -> None:
        ray.kill(self._actors.pop(name)[0])
        self.pipes.pop(name, None)
        self.states.pop(name, None)
