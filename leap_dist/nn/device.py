"""The device that a worker computes on: its choice, its precision, and CUDA graphs."""

from __future__ import annotations

import ctypes
import logging
import re
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class NoGpu(RuntimeError):
    """Torch finds no GPU in this process, although it is to compute on one."""


_FAILED_CALLS = re.compile("CUDA (driver )?error|No CUDA GPUs|NVIDIA driver|cuDNN error|CU(BLAS|DNN)_STATUS")
"""What plain RuntimeErrors of torch say if the driver or a library of CUDA has failed."""


def is_of_gpu(error: BaseException) -> bool:
    """Return whether an error means that the GPU, or its free memory, does not suffice, whatever was computed."""
    if isinstance(error, torch.AcceleratorError | torch.OutOfMemoryError | NoGpu):
        return True
    return isinstance(error, RuntimeError) and _FAILED_CALLS.search(str(error)) is not None


def resolve_device(name: str) -> str:
    """Return "cuda" or "cpu"; "auto" prefers a GPU. Raises NoGpu if cuda is asked for and there is none."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise NoGpu("worker.device is cuda, but torch finds no GPU here")
    return name


def resolve_precision(name: str, device: str) -> torch.dtype:
    """Return the dtype to compute in; "auto" is bfloat16 if the hardware multiplies it natively, else float32."""
    if name == "auto":
        if device == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def prepare(device: str, threads: int, gpu_share: float) -> None:
    """Configure torch and malloc in this process; call it from the thread that computes, before any computation.

    Args:
        device: "cuda" or "cpu".
        threads: number of threads of torch.
        gpu_share: fraction of the GPU's memory that this process may take; 0 or 1 for all of it. If several workers
            share a GPU, one that outgrows its share fails alone.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    _keep_freed_memory()
    if device == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes stay the same for a whole task
        if 0 < gpu_share < 1:
            torch.cuda.set_per_process_memory_fraction(gpu_share)


def _keep_freed_memory() -> None:
    """Keep glibc from returning a batch's tensors to the system, only to get them back page by page for the next."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest value that it accepts
        mallopt(_M_TRIM_THRESHOLD, 128 << 20)


class Graph(Protocol):
    """A sequence of operations that is recorded once and then launched as one."""

    def warm_up(self, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Run the function without recording it, but under the conditions that a recording needs."""

    def record(self, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Record the function. Its results get their values at each launch."""

    def launch(self) -> None:
        """Run the recorded operations on the current content of their tensors."""


class CudaGraph:
    """A CUDA graph."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Run the function on a side stream, as a capture requires."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results = function()
        torch.cuda.current_stream().wait_stream(stream)
        return results

    def record(self, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Capture the function; nothing is computed yet."""
        with torch.cuda.graph(self._graph):
            return function()

    def launch(self) -> None:
        """Launch all kernels at once."""
        self._graph.replay()


def graph_for(device: torch.device) -> type[Graph] | None:
    """Return the kind of graph for a device; None for a CPU, where calling a function costs little."""
    return CudaGraph if device.type == "cuda" else None


class CapturedGraph:
    """A function that is called again and again, recorded as a graph if the device has graphs.

    On a GPU, launching the kernels of a small network one by one takes longer than running them. The first calls run
    the function itself; then it is recorded, and every later call is a single launch.

    The function must read its inputs from tensors that keep their addresses, and neither wait for the device nor draw
    random numbers. Every call returns new tensors, which the caller may keep. If the recording fails, every call
    runs the function itself.
    """

    WARM_UP = 3
    """Number of calls before the recording, in which libraries choose algorithms and allocate workspaces."""

    def __init__(self, function: Callable[[], Sequence[Tensor]], graph: type[Graph] | None) -> None:
        self._function = function
        self._graph = graph() if graph else None
        self._results: Sequence[Tensor] | None = None
        self._calls = 0

    def __call__(self) -> Sequence[Tensor]:
        """Run the function, or launch its graph."""
        if self._graph is None:
            return self._function()
        self._calls += 1
        if self._calls <= self.WARM_UP:
            return self._graph.warm_up(self._function)
        if self._results is None:
            try:
                self._results = self._graph.record(self._function)
            except RuntimeError as error:  # a driver, or an operation, that cannot be captured
                log.warning("work on the GPU runs step by step, because it cannot be captured as a graph: %s", error)
                self._graph = None
                return self._function()
        self._graph.launch()
        return [result.clone() for result in self._results]
