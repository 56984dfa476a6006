"""What a node reports about itself, and whether it can run workers: GPUs, emulator, packages, storage."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from leap_dist.driver.memory import WORKER_GPU_BYTES
from leap_dist.driver.nodes import Node

EQUAL = ("torch", "ray")
"""Packages whose versions must be the same on all nodes, except for the build, like that of Python."""
PACKAGES = (*EQUAL, "numpy", "ale-py", "gymnasium", "safetensors")
"""Packages that a worker needs, and whose versions influence what it computes."""

GPU_SCRIPT = """
import json, os
gpus, problem = [], ""
def said(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
try:
    import torch
    torch.cuda.init()
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    for index in range(torch.cuda.device_count()):
        gpu = ["GPU", 0, 0, visible[index] if index < len(visible) else str(index), ""]
        try:
            gpu[0] = torch.cuda.get_device_name(index)
            torch.ones(8, device=f"cuda:{index}").sum().item()  # fails where torch has no code for this GPU
            gpu[1:3] = torch.cuda.mem_get_info(index)
        except Exception as error:
            gpu[4] = said(error)
        gpus.append(gpu)
except Exception as error:
    problem = said(error)
print(json.dumps([gpus, problem]))
"""
"""Prints the fields of a Gpu for each GPU that torch finds, and why torch cannot start CUDA, or nothing."""


class Gpu(NamedTuple):
    """One GPU of a node, as torch describes it."""

    name: str
    free: int
    """Free memory in bytes."""
    total: int
    """Total memory in bytes."""
    id: str = "0"
    """CUDA_VISIBLE_DEVICES calls the GPU by this number or UUID."""
    problem: str = ""
    """Why torch cannot compute on it; empty if it can."""

    @property
    def fault(self) -> str:
        """Why no worker can use it, or an empty text."""
        if self.problem:
            return f"GPU {self.id}, {self.name}: {self.problem[:200]}"
        if self.free < WORKER_GPU_BYTES:
            used = f"{self.free / 2**30:.1f} of {self.total / 2**30:.0f} GB free"
            return f"GPU {self.id}, {self.name}, has {used}"
        return ""


class Question(NamedTuple):
    """The questions that a node is asked."""

    path: str
    """A probe file in the run directory; empty if the node need not share it."""
    data_dir: str
    """Directory of the data sets; empty if none is needed."""
    games: tuple[str, ...]
    """Atari games whose ROMs are needed."""
    gpu_script: str
    """Program that lists the GPUs; empty if the node's GPUs are not needed."""


class Answer(NamedTuple):
    """What a node reported about itself."""

    content: str | None
    """Content of the probe file, or None if the node cannot read it."""
    unwritable: str
    """Why the node cannot write next to the probe file; empty if it can."""
    python: str
    versions: dict[str, str | None]
    """Installed version by package, or None if the package is missing."""
    has_data: bool
    """Whether the directory of the data sets exists."""
    emulator: str
    """Why the emulator or a ROM is missing; empty if all are there."""
    gpus: list[Gpu]
    """All GPUs that torch finds, as plain tuples while they travel."""
    gpu_problem: str
    """Why torch cannot start CUDA; empty if it can."""
    processors: tuple[int, int] = (0, 0)
    """Number of processors that processes there may use, and the number that Ray counts by itself; 0 if unknown."""


class Verdict(NamedTuple):
    """Whether a node can run workers."""

    node: Node | None
    """The node with the resources that workers can use there, or None if it is left out."""
    lines: list[str]
    """Messages for the user: why the node is left out, or what differs there."""


def report(question: tuple[Any, ...], packages: tuple[str, ...]) -> tuple[Any, ...]:
    """Return the fields of an Answer about the machine that this runs on. Needs none of our modules."""
    import importlib.metadata
    import json
    import os
    import pathlib
    import platform
    import subprocess
    import sys

    path, data_dir, games, gpu_script = question
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    content, unwritable = None, ""
    if path:
        try:
            content = pathlib.Path(path).read_text()
            beside = pathlib.Path(f"{path}-{os.getpid()}-{os.urandom(4).hex()}")
            beside.touch()
            beside.unlink()
        except OSError as error:
            unwritable = error.strerror or str(error)
    emulator = ""
    if games:
        try:
            import ale_py  # noqa: F401  (its native library may not load)
            from ale_py import roms

            missing = [game for game in games if not roms.get_rom_path(game)]
            emulator = f"no ROM of {missing[0]}" if missing else ""
        except Exception as error:
            emulator = f"{type(error).__name__}: {error}"
    gpus: list[tuple[str, int, int, str, str]] = []
    gpu_problem = ""
    if gpu_script:  # in a separate process, because CUDA keeps hundreds of megabytes until its process ends
        try:
            command = [sys.executable, "-c", gpu_script]
            done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
            found, gpu_problem = json.loads(done.stdout.strip().splitlines()[-1])
            gpus = [(str(gpu[0]), int(gpu[1]), int(gpu[2]), str(gpu[3]), str(gpu[4])) for gpu in found]
        except Exception as error:
            gpu_problem = f"torch does not start: {type(error).__name__}"
    python = platform.python_version()
    has_data = not data_dir or pathlib.Path(data_dir).is_dir()
    processors = 0, 0
    try:
        from ray._private.utils import get_num_cpus

        processors = len(os.sched_getaffinity(0)), int(get_num_cpus(override_docker_cpu_warning=True))
    except Exception:  # the interface is not public, and not every system has affinities
        pass
    return content, unwritable, python, versions, has_data, emulator, gpus, gpu_problem, processors


def judge(
    node: Node,
    answer: Answer,
    *,
    content: str,
    folder: Path | None,
    data_dir: str,
    device: str,
    gpu_bytes: float | None = None,
) -> Verdict:
    """Decide from its answer whether a node can run workers.

    Args:
        node: the node.
        answer: what it reported.
        content: what the probe file holds.
        folder: directory that it must share, or None.
        data_dir: directory of the data sets that it must have; empty if none is needed.
        device: worker.device of the run.
        gpu_bytes: memory of each GPU for workers, from an earlier check, if they occupy it now. By default, it is what
            the answer says is free.
    """
    host = node.host
    if folder is not None and answer.content != content:
        return _left_out(
            f"run-dir: {folder} is not shared with node {host}; put it on storage that every node has, give a URL, "
            "or use --server.storage node, with which only this node can resume the run"
        )
    if folder is not None and answer.unwritable:
        return _left_out(
            f"run-dir: {folder} cannot be written from node {host} ({answer.unwritable}); grant write access, or use "
            "--server.storage node"
        )
    if not answer.has_data:
        return _left_out(f"data_dir: node {host} has no {data_dir}; put the data sets there, or on shared storage")
    if missing := [package for package in PACKAGES if answer.versions[package] is None]:
        return _left_out(
            f"address: node {host} lacks {', '.join(missing)}; install this project's requirements.txt there"
        )
    here = {"Python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}
    there = {"Python": answer.python, **answer.versions}
    if other := [name for name in ("Python", *EQUAL) if _release(there[name]) != _release(here[name])]:
        return _left_out(f"address: node {host} has {_listed(other, there, here)}; install the same there")
    if answer.emulator:
        return _left_out(
            f"address: node {host} cannot start the emulator ({answer.emulator[:200]}); install ale-py "
            f"{here['ale-py']} there"
        )
    different = [name for name in PACKAGES if there[name] != here[name]]
    differs = f"node {host} has {_listed(different, there, here)}: results may not be identical to the bit"
    lines = [differs] if different else []
    usable, counted = answer.processors
    if usable < counted == node.resources.get("CPU") and not node.bundles:
        node = node._replace(resources={**node.resources, "CPU": float(usable)})
        lines.append(f"node {host} may use only {usable} of {counted} processors, and gets workers for these")
    if device == "cpu" or not node.resources.get("GPU"):
        return Verdict(node, lines)
    return _with_gpus(node, answer, lines, device, gpu_bytes)


def _with_gpus(node: Node, answer: Answer, lines: list[str], device: str, gpu_bytes: float | None) -> Verdict:
    """Judge the GPUs of a node. If they are optional and unusable, the node is used for its processors."""
    wanted, gpus = math.ceil(node.resources["GPU"] - 1e-9), [Gpu(*gpu) for gpu in answer.gpus]
    if not node.bundles:
        gpus = gpus[:wanted]  # Ray gives workers the first ones; in a reservation, which ones is not known
    if gpu_bytes is not None:
        gpus = [gpu if gpu.problem else gpu._replace(free=int(min(gpu_bytes, gpu.total))) for gpu in gpus]
    good = sorted((gpu for gpu in gpus if not gpu.fault), key=lambda gpu: -gpu.free)
    if len(good) >= wanted:
        return Verdict(node._replace(gpu_bytes=good[wanted - 1].free if gpu_bytes is None else gpu_bytes), lines)
    if len(gpus) < wanted:
        reason = answer.gpu_problem or f"torch sees only {len(gpus)} of {wanted}, perhaps because of MIG"
        advice = "see cluster/README.md for compatible versions of the driver and torch"
    else:
        bad = next(gpu for gpu in gpus if gpu.fault)
        reason = bad.fault
        advice = "see cluster/README.md for what torch supports" if bad.problem else "end the programs that use it"
        if good and not node.bundles:
            left = ",".join(gpu.id for gpu in gpus if not gpu.fault)
            advice += f", or start Ray there with CUDA_VISIBLE_DEVICES={left}, which leaves it out"
    line = f"worker.device: GPUs of node {node.host} cannot be used ({reason[:300]}); {advice}"
    if device == "cuda":
        return Verdict(None, [f"{line}, or use --worker.device cpu"])
    return Verdict(node.without_gpus(), [*lines, f"{line}. Its processors are used meanwhile"])


def _left_out(line: str) -> Verdict:
    return Verdict(None, [line])


def _release(version: str | None) -> str:
    """Return a version without its build, such as +cpu."""
    return (version or "").partition("+")[0]


def _listed(names: Sequence[str], there: dict[str, Any], here: dict[str, Any]) -> str:
    return ", ".join(f"{name} {there[name]} (here {here[name]})" for name in names)
