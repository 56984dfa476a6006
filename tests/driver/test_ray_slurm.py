"""The Slurm scripts as they are, on plain processes: stand-ins for its commands, real Ray, real runs.

Two things of Ray look at the whole machine, and would meet the other tests': `ray symmetric-run` refuses to start where
any Ray runs, and ends every Ray at its end. The stand-in for `ray` confines both to the node that it stands on; all
else is Ray's. A node is an address of loopback (127.0.0.2, …) and a mark in the environment of its processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SMOKE = ["--preset", "smoke", "--workers", "2", "--worker.cpus", "1"]

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

_COMMON = f"""#!{sys.executable}
import os, signal, socket, subprocess, sys, time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
"""

STAND_INS = {
    "scontrol": """
        assert sys.argv[1:3] == ["show", "hostnames"], sys.argv
        print(*sys.argv[3].split(","), sep="\\n")
    """,
    "srun": """
        # Once on every node of the job; the worst exit code is its own.
        assert "--cpu-bind=none" in sys.argv, "a site may bind the one task of a node to one core"
        command = sys.argv[next(at for at, word in enumerate(sys.argv) if at and not word.startswith("--")):]
        tasks = [
            subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(number), "NODE": node})
            for number, node in enumerate(os.environ["SLURM_JOB_NODELIST"].split(","))
        ]
        sys.exit(max(task.wait() for task in tasks))
    """,
    "sbatch": """
        # An array of jobs, each on a node of its own. Its output is to say nothing but the job's number.
        array = next(word for word in sys.argv if word.startswith("--array=1-"))
        script = next(word for word in sys.argv[1:] if not word.startswith("--"))
        for task in range(1, int(array.removeprefix("--array=1-")) + 1):
            subprocess.Popen(
                ["bash", script], start_new_session=True, stdout=open(f"{os.environ['JOBS']}/{task}.log", "ab"),
                stderr=subprocess.STDOUT,
                env={**os.environ, "NODE": f"127.0.0.{task + 2}", "SLURM_JOB_ID": f"5{task}", "JOB": f"worker-{task}",
                     "SLURM_CPUS_PER_TASK": "1", "SLURM_ARRAY_JOB_ID": "50", "SLURM_ARRAY_TASK_ID": str(task)},
            )
        print("50")
    """,
    "scancel": """
        # All processes of the jobs are told to go. (Slurm kills, a while later, what stays.)
        assert sys.argv[1:] == ["50"], sys.argv
        Path(os.environ["JOBS"], "cancelled").touch()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                marks = (process / "environ").read_bytes().split(b"\\0")
                if f"RUN={os.environ['RUN']}".encode() in marks and any(m.startswith(b"JOB=worker-") for m in marks):
                    os.kill(int(process.name), signal.SIGTERM)
            except (OSError, ProcessLookupError):
                pass
    """,
    "squeue": """
        # The jobs of the array that still have a process.
        for process in Path("/proc").glob("[0-9]*"):
            try:
                marks = (process / "environ").read_bytes().split(b"\\0")
            except OSError:
                continue
            if f"RUN={os.environ['RUN']}".encode() in marks and any(mark.startswith(b"JOB=worker-") for mark in marks):
                print(process.name)
    """,
    "ray": """
        from ray.autoscaler._private.constants import RAY_PROCESSES
        words = sys.argv[1:]
        def of_this_node():
            # What `ray stop` would end, by its own list, where it is this node's.
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    marks = (process / "environ").read_bytes().split(b"\\0")
                    name = (process / "comm").read_text()
                    line = (process / "cmdline").read_text()
                except OSError:
                    continue
                if f"NODE={os.environ['NODE']}".encode() in marks and f"RUN={os.environ['RUN']}".encode() in marks:
                    if any(word[:15] in name if of_name else word in line for word, of_name in RAY_PROCESSES):
                        yield int(process.name)
        if words[0] == "stop":
            deadline = time.monotonic() + 10  # and then by force, as Ray does
            while left := list(of_this_node()):
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL)
                time.sleep(0.5)
        elif words[0] == "symmetric-run":
            from ray.scripts import symmetric_run
            symmetric_run.check_ray_already_started = lambda: bool(list(of_this_node()))
            here = SimpleNamespace(family=socket.AF_INET, address=os.environ["NODE"])
            symmetric_run.psutil.net_if_addrs = lambda: {"lo": [here]}
            sys.argv[:] = ["ray", *words]
            symmetric_run.symmetric_run(words[1:])
        else:
            if words[0] == "start" and not any(word.startswith("--node-ip-address") for word in words):
                words.append("--node-ip-address=" + os.environ["NODE"])
            from ray.scripts.scripts import main
            sys.argv[:] = ["ray", *words]
            main()
    """,
}


class Slurm:
    """Runs a batch script on stand-ins; knows every process of it by its mark."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.folder = folder
        self.mark = f"RUN={folder}"
        self.log = folder / "job.log"
        commands = folder / "commands"
        commands.mkdir()
        for name, code in STAND_INS.items():
            body = "\n".join(line.removeprefix(" " * 8) for line in code.splitlines())
            (commands / name).write_text(_COMMON + body)
            (commands / name).chmod(0o755)
        self.environment = {
            **environment,
            "PATH": os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "LEAP_TMPDIR": environment["HOME"],
            "RAY_memory_monitor_refresh_ms": "0",  # what else runs on this machine is not the job's doing
            "RUN": str(folder),
            "JOBS": str(folder),
            "JOB": "head",
            "SLURM_JOB_ID": str(7000 + os.getpid() % 3000),
            "NODE": "127.0.0.2",
        }

    def start(self, script: str, *arguments: str, **more: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                ["bash", f"cluster/slurm/{script}", *arguments],
                cwd=ROOT,
                env={**self.environment, **more},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def said(self) -> str:
        return "\n".join(file.read_text() for file in sorted(self.folder.glob("*.log")))

    def processes(self) -> dict[int, tuple[str, str]]:
        """Name of the job and of the program, of all processes of this run that still are."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                marks = (process / "environ").read_bytes().decode(errors="replace").split("\0")
                if self.mark in marks:
                    job = next((mark for mark in marks if mark.startswith("JOB=")), "")  # Ray writes titles over it
                    found[int(process.name)] = job, (process / "comm").read_text().strip()
        return found

    def wait_for(self, what: Callable[[], Any], seconds: float = 240) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := what():
                return value
            time.sleep(0.1)
        raise AssertionError(f"not within {seconds} s\n{self.said()}")


@pytest.fixture
def slurm(environment: dict[str, str], tmp_path: Path) -> Iterator[Slurm]:
    folder = tmp_path / "slurm"
    folder.mkdir()
    job = Slurm(environment, folder)
    yield job
    for pid in job.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def summary(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "summary.json"
    return json.loads(path.read_text()) if path.exists() else {}


def nothing_left(slurm: Slurm) -> None:
    """But, for a while, the agents of a raylet, which end by themselves: they look for it now and then."""
    agents = ("ray::DashboardA", "ray::RuntimeEnv")  # as far as the kernel writes a name

    def left() -> dict[int, tuple[str, str]]:
        return {pid: found for pid, found in slurm.processes().items() if found[1] not in agents}

    deadline = time.monotonic() + 60
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left() == {}
    assert not list(Path(slurm.environment["LEAP_TMPDIR"]).glob("leap-*")), "the private folders are removed"


def test_a_fixed_job_trains_on_all_its_nodes_and_leaves_nothing_behind(slurm: Slurm, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    nodes = {"SLURM_JOB_NODELIST": "127.0.0.2,127.0.0.3", "SLURM_JOB_NUM_NODES": "2", "SLURM_SUBMIT_DIR": str(ROOT)}
    job = slurm.start("fixed.sbatch", str(run_dir), *SMOKE, **nodes)
    assert job.wait(240) == 0, slurm.said()
    result = summary(run_dir)
    assert result["state"] == "done", slurm.said()
    assert "On head node" in slurm.said()
    assert "On worker node" in slurm.said()
    nothing_left(slurm)


def test_an_elastic_job_loses_a_worker_job_and_goes_on(slurm: Slurm, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    nodes = {
        "SLURM_JOB_NODELIST": "127.0.0.2",
        "SLURM_JOB_NUM_NODES": "1",
        "LEAP_FAILPOINTS": "task.update=slow@1-1000000",
    }
    job = slurm.start("elastic.sbatch", str(run_dir), "2", *SMOKE, "--wait-for-nodes", "yes", **nodes)
    slurm.wait_for(
        lambda: job.poll() is not None or sum(bool(lease["steps"]) for lease in summary(run_dir).get("leases", [])) == 2
    )
    assert job.poll() is None, slurm.said()

    shell = next(
        pid for pid, (name, program) in slurm.processes().items() if (name, program) == ("JOB=worker-1", "bash")
    )
    os.kill(shell, signal.SIGTERM)  # as --signal=B:TERM@120 does before the time limit
    slurm.wait_for(lambda: any("because the node is about to go" in alert for alert in summary(run_dir)["alerts"]))
    slurm.wait_for(lambda: not any(name == "JOB=worker-1" for name, _ in slurm.processes().values()))

    assert job.wait(240) == 0, slurm.said()
    result = summary(run_dir)
    assert result["state"] == "done", slurm.said()
    assert result["restarts"] == 0, "a move is no failure"
    assert (slurm.folder / "cancelled").exists()
    nothing_left(slurm)
