"""A CPU twin of CUDA graphs: operations are recorded once, and launched again on the same memory without any Python.

Whatever a graph on a GPU would not see, this one does not see either: a tensor that was replaced instead of written
into, a number that was read back, a branch that would now go the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS_BACK = {torch.ops.aten._local_scalar_dense.default}


class TapeGraph:
    """Implements `leap_dist.nn.device.Graph` on a CPU."""

    launches: ClassVar[int] = 0
    """Of all graphs together."""

    def __init__(self) -> None:
        self._tape: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def warm_up(self, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        return function()

    def record(self, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        with _Recording(self._tape):
            results = function()
        for tensor in _written_anew(self._tape):
            tensor.fill_(-77)  # nothing has run yet, as far as anyone can tell
        return results

    def launch(self) -> None:
        TapeGraph.launches += 1
        with torch.no_grad():
            for operation, arguments, options, results in self._tape:
                again = operation(*arguments, **options)
                for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class _Recording(TorchDispatchMode):
    def __init__(self, tape: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]]) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert operation not in READS_BACK, "a captured function must not wait for the device"
        assert torch.Tag.nondeterministic_seeded not in operation.tags, f"{operation} draws random numbers"
        options = kwargs or {}
        results = operation(*args, **options)
        # By reference, and out of the graph: what counts is the memory.
        kept = [_detached(part) for part in (args, options, results)]
        self._tape.append((operation, kept[0], kept[1], kept[2]))
        return results


def _detached(part: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, part)


def _written_anew(tape: Any) -> list[Tensor]:
    """Floating-point memory that operations made for their results: not inputs, and no views of them."""
    inputs = {leaf.untyped_storage().data_ptr() for _, args, options, _ in tape
              for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)}  # fmt: skip
    made = [leaf for *_, results in tape for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
    return [t for t in made if t.is_floating_point() and t.untyped_storage().data_ptr() not in inputs]
