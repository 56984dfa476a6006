"""What depends on where a worker computes: the device, its arithmetic, and work that is launched as one piece."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def resolve_device(name: str) -> str:
    """ "auto" → "cuda" where there is one, else "cpu". Raises RuntimeError where cuda is asked for and missing."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("worker.device is cuda, but torch finds no GPU here")
    return name


def resolve_precision(name: str, device: str) -> torch.dtype:
    """ "auto" → bfloat16 where the hardware multiplies it natively, else float32."""
    if name == "auto":
        native = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def prepare(device: str, threads: int, gpu_share: float) -> None:
    """Settings of the process and the calling thread, to be made before either computes.

    `gpu_share`: the part of the GPU's memory that this process may take, so that one of several workers on a GPU that
    grows beyond its share fails alone; 0 or 1 for all of it.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    _keep_freed_memory()
    if device == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes stay the same for a whole task
        if 0 < gpu_share < 1:
            torch.cuda.set_per_process_memory_fraction(gpu_share)


def _keep_freed_memory() -> None:
    """Otherwise glibc gives the tensors of a batch back to the system, to get them again for the next, page by page."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        mallopt(_M_TRIM_THRESHOLD, 128 << 20)


class Graph(Protocol):
    """A sequence of operations that was recorded once and is launched as one piece."""

    def warm_up(self, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Runs the function as it is, in the way that recording wants it to have been run before."""

    def record(self, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Records what the function does. Its results get their values with each launch."""

    def launch(self) -> None:
        """Does it all again, with what the tensors hold now."""


class CudaGraph:
    """The graphs of a GPU."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """On a stream of its own, as a capture needs it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results = function()
        torch.cuda.current_stream().wait_stream(stream)
        return results

    def record(self, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Captures; nothing runs yet."""
        with torch.cuda.graph(self._graph):
            return function()

    def launch(self) -> None:
        """One launch for all kernels."""
        self._graph.replay()


def graph_for(device: torch.device) -> type[Graph] | None:
    """The kind of graph that a device has; None for a CPU, where calling a function costs little."""
    return CudaGraph if device.type == "cuda" else None


class CapturedGraph:
    """A function of tensors that stay in place, run again and again; recorded as a graph where there is a kind of it.

    Launching a small network's kernels one by one costs a GPU's worker more than running them. Here the first calls
    run as they are; then the function is recorded, and every later call is a single launch.

    The function reads its inputs from tensors that keep their addresses, and neither waits for the device nor draws
    random numbers. What it returns are new tensors at every call, so whoever takes them over may keep them; what it
    leaves in tensors of its own stays there.
    """

    WARM_UP = 3
    """Calls before the recording: on the first ones libraries choose algorithms and allocate workspaces."""

    def __init__(self, function: Callable[[], Sequence[Tensor]], graph: type[Graph] | None) -> None:
        self._function = function
        self._graph = graph() if graph else None
        self._results: Sequence[Tensor] | None = None
        self._calls = 0

    def __call__(self) -> Sequence[Tensor]:
        """Runs the function, or launches the graph of it."""
        if self._graph is None:
            return self._function()
        self._calls += 1
        if self._calls <= self.WARM_UP:
            return self._graph.warm_up(self._function)
        if self._results is None:
            self._results = self._graph.record(self._function)
        self._graph.launch()
        return [result.clone() for result in self._results]
