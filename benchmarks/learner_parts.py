"""Measure what each part of an agent's update costs on a CPU, and alternatives to the library's second convolution.

    python -m benchmarks.learner_parts --precision bfloat16 --repeats 12

An update has the six forward passes of an unroll of five steps, and one backward pass over all five. "whole" is the
update with the kernels that the worker uses. The other updates differ in the gradients of the second convolution only:
as products of patches with the gradient, which can be one large matrix product because each input pixel belongs to
2 × 2 blocks of 8 × 8 pixels; in channels_last; in oneDNN's own layout; and with the whole backward pass compiled by
torch.compile, which needs a C++ compiler. The parts are the loss with its gradient, and the copy of the frames from
uint8. All are in milliseconds; the arms take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from leap_dist.config.loading import resolve
from leap_dist.nn import recorder as recorders
from leap_dist.nn.actor_critic import network_for_game
from leap_dist.nn.device import resolve_precision
from leap_dist.tasks.atari.rollout import Rollout, a2c_loss

ACTIONS = range(6)
BATCHES = 20
"""Number of updates in a measurement."""

Backward = Callable[..., Any]


def as_patches(gradient: Tensor, source: Tensor, weight: Tensor, *, stride: int, of_input: bool) -> Any:
    """Return the gradients of (source, weight, bias) of a convolution whose kernel is twice its stride, as products.

    The source, (n, c, h, w), is cut into blocks of stride × stride pixels; a kernel then covers 2 × 2 blocks.
    """
    n, c, h, w = source.shape
    rows, columns, out = h // stride, w // stride, weight.shape[0]
    depth = stride * stride * c
    blocks = source.permute(0, 2, 3, 1).reshape(n, rows, stride, columns, stride, c).permute(0, 1, 3, 2, 4, 5)
    blocks = blocks.reshape(n, rows, columns, depth)
    corners = [(i, j) for i in (0, 1) for j in (0, 1)]
    parts = [blocks[:, i : i + rows - 1, j : j + columns - 1] for i, j in corners]
    patches = torch.stack(parts, 3).reshape(-1, 4 * depth)
    upper = gradient.permute(0, 2, 3, 1).reshape(-1, out)
    kernel = weight.permute(2, 3, 1, 0).reshape(2, stride, 2, stride, c, out).permute(0, 2, 1, 3, 4, 5)
    of_patches = (upper @ kernel.reshape(4 * depth, out).t()).view(n, rows - 1, columns - 1, 4, depth)
    of_blocks = torch.zeros_like(blocks)
    for k, (i, j) in enumerate(corners):
        of_blocks[:, i : i + rows - 1, j : j + columns - 1] += of_patches[:, :, :, k]
    of_source = of_blocks.view(n, rows, columns, stride, stride, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)
    of_kernel = (patches.t() @ upper).view(2, 2, stride, stride, c, out).permute(5, 4, 0, 2, 1, 3)
    return of_source, of_kernel.reshape(weight.shape), upper.sum(0)


def in_channels_last(gradient: Tensor, source: Tensor, weight: Tensor, *, stride: int, of_input: bool) -> Any:
    """Convert all operands to channels_last first."""
    last = [one.contiguous(memory_format=torch.channels_last) for one in (gradient, source, weight)]
    return _library(*last, stride=stride, of_input=of_input)


def in_onednn_layout(gradient: Tensor, source: Tensor, weight: Tensor, *, stride: int, of_input: bool) -> Any:
    """Convert gradient and source to the layout that oneDNN chooses, and the gradient of the source back."""
    plain = [one.contiguous() for one in (gradient, source)]
    operands = *(one.to_mkldnn() for one in plain), weight.contiguous()
    of_source, *rest = _library(*operands, stride=stride, of_input=of_input)
    return of_source.to_dense(), *rest


_library = recorders._convolution
SECOND = {
    "library": _library,
    "patches and products": as_patches,
    "channels_last": in_channels_last,
    "oneDNN's layout": in_onednn_layout,
}
"""Ways to compute the gradients of the second convolution, by name."""


def use(second: Backward) -> None:
    """Let recorders compute the gradients of the second convolution like this from now on."""

    def convolution(gradient: Tensor, source: Tensor, weight: Tensor, *, stride: int, of_input: bool) -> Any:
        return (second if of_input else _library)(gradient, source, weight, stride=stride, of_input=of_input)

    recorders._convolution = convolution


def rollout(precision: str) -> Rollout:
    """Return the device's side of an agent with the settings of `fast`, with frames and outcomes set."""
    agent = resolve("fast").agent
    model = network_for_game(4, ACTIONS, "encoder", 0)
    made = Rollout(
        model,
        agent,
        actions=len(ACTIONS),
        dtype=resolve_precision(precision, "cpu"),
        generator=torch.Generator().manual_seed(0),
        graph=None,
    )
    frames = np.random.default_rng(0).integers(0, 256, (agent.envs, 4, 84, 84), dtype=np.uint8)
    made.set_frames(frames)
    made.rewards[:], made.discounts[:] = 1.0, 0.99
    return made


def update(one: Rollout, steps: int) -> list[Tensor]:
    """Make an unroll and return the gradients."""
    one.start()
    for step in range(steps):
        one.act(step)
    return one.gradients()[1]


def milliseconds(call: Callable[[], Any]) -> float:
    """Return the mean duration of a call in ms."""
    start = time.perf_counter()
    for _ in range(BATCHES):
        call()
    return 1000 * (time.perf_counter() - start) / BATCHES


def arms(precision: str) -> dict[str, Callable[[], float]]:
    """Return what to measure, by name."""
    agent = resolve("fast").agent
    one, rows = rollout(precision), agent.unroll * agent.envs

    def whole(second: Backward) -> Callable[[], float]:
        def measure() -> float:
            use(second)
            try:
                return milliseconds(lambda: update(one, agent.unroll))
            finally:
                use(_library)

        return measure

    logits = torch.randn(rows, len(ACTIONS), requires_grad=True)
    values, returns = torch.randn(rows, requires_grad=True), torch.randn(rows)
    actions = torch.zeros(rows, 1, dtype=torch.int64)
    frames = torch.zeros(agent.envs, 4, 84, 84, dtype=torch.uint8)
    buffer = torch.zeros(frames.shape, dtype=resolve_precision(precision, "cpu"))

    def loss() -> None:
        torch.autograd.grad(a2c_loss(logits, values, returns, actions, agent)[0], [logits, values])

    def copies() -> None:
        for _ in range(agent.unroll + 1):
            buffer.copy_(frames)

    found = {f"whole, {name}": whole(second) for name, second in SECOND.items()}
    compiled = torch.compile(recorders.Recorder.backward)

    def with_compiler() -> float:
        plain, recorders.Recorder.backward = recorders.Recorder.backward, compiled  # type: ignore[method-assign]
        try:
            return milliseconds(lambda: update(one, agent.unroll))
        finally:
            recorders.Recorder.backward = plain  # type: ignore[method-assign]

    found["whole, torch.compile"] = with_compiler
    found["part: loss and its gradient"] = lambda: milliseconds(loss)
    found["part: frames from uint8"] = lambda: milliseconds(copies)
    return found


def main() -> None:
    """Print the table."""
    parser = harness.parser(__doc__, repeats=12)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    given = parser.parse_args()
    torch.set_num_threads(1)
    report = harness.Report("parts of an update", {"preset": "fast", "precision": given.precision})
    samples = harness.interleaved(arms(given.precision), given.repeats, warmup=True)
    for name, values in samples.items():
        report.add(name, "ms", values)
    for name, values in samples.items():
        if name.startswith("whole") and name != "whole, library":
            report.ratio(f"{name} / library", values, samples["whole, library"])
    report.show(given.json)


if __name__ == "__main__":
    main()
