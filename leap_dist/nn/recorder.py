"""Acting and learning from the same forward passes.

The parameters do not change within an unroll, so the update can reuse what the encoder computed to choose the actions.
A `Recorder` keeps the activations of every pass and runs one backward pass over all of them. That saves the second
forward pass, and one large backward pass is faster than one for each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leap_dist.nn.actor_critic import FRAME_SIZE, Encoder

_convolution_backward = torch.ops.aten.convolution_backward
_relu_backward = torch.ops.aten.threshold_backward


class Recorder:
    """Records an encoder's forward passes on up to `slots` batches of at most N frames for a joint backward pass.

    Args:
        encoder: the encoder, whose parameters get the gradients.
        slots: number of passes to keep. One more can be made with slot number `slots`, which `replay` leaves out.
        batch: largest number of frames N in a pass.
        dtype: precision of the passes; parameters and their gradients stay float32.
    """

    def __init__(self, encoder: Encoder, slots: int, batch: int, dtype: torch.dtype) -> None:
        weight = encoder.conv1.weight
        # In bfloat16 on a CPU, convolutions are equally fast in both layouts, so the emulator's layout is kept. In all
        # other cases channels_last pays for the reordering: the backward pass is up to six times faster.
        plain = weight.device.type == "cpu" and dtype == torch.bfloat16
        self._format = torch.contiguous_format if plain else torch.channels_last
        self._encoder = encoder
        self._dtype = dtype
        self._batch = batch
        rows = slots * batch
        self._rows = rows

        def buffer(*shape: int) -> Tensor:
            return torch.empty(rows + batch, *shape, device=weight.device, dtype=dtype).to(memory_format=self._format)

        self._frames = buffer(weight.shape[1], FRAME_SIZE, FRAME_SIZE)
        self._hidden1 = buffer(16, 20, 20)
        self._hidden2 = buffer(32, 9, 9)
        self._features = torch.empty(rows + batch, encoder.features, device=weight.device, dtype=dtype)
        # Updated in place, like the buffers, because a captured graph refers to addresses.
        self._weights = [
            torch.empty_like(p, dtype=dtype, memory_format=self._format if p.dim() == 4 else torch.contiguous_format)
            for p in encoder.parameters()
        ]

    @torch.no_grad()
    def begin(self) -> None:
        """Copy the current parameters for the passes that follow. Call it whenever they have changed.

        Pixels stay 0…255, which bfloat16 represents exactly; the scale 1/255 is folded into the first layer's weights.
        """
        for weight, parameter in zip(self._weights, self._encoder.parameters(), strict=True):
            weight.copy_(parameter / 255.0 if parameter is self._encoder.conv1.weight else parameter)

    @torch.no_grad()
    def encode(self, slot: int, frames: Tensor) -> Tensor:
        """Return features, float32 (n, 256), of frames, uint8 (n, C, 84, 84) with n ≤ N, and keep the activations."""
        start = slot * self._batch
        rows = slice(start, start + len(frames))
        w1, b1, w2, b2, w3, b3 = self._weights
        pixels = self._frames[rows].copy_(frames)
        hidden1 = torch.clamp_min(torch.conv2d(pixels, w1, b1, stride=4), 0, out=self._hidden1[rows])
        hidden2 = torch.clamp_min(torch.conv2d(hidden1, w2, b2, stride=2), 0, out=self._hidden2[rows])
        linear = torch.nn.functional.linear(hidden2.flatten(1), w3, b3)
        return torch.clamp_min(linear, 0, out=self._features[rows]).float()

    def replay(self) -> Tensor:
        """Return the same as `features`, but in the autograd graph: gradients flow to the encoder's parameters."""
        replay: Any = _Replay.apply
        features: Tensor = replay(self, *self._encoder.parameters())
        return features

    def features(self) -> Tensor:
        """Return the features of all slots, float32 (slots · N, 256), as a new tensor outside the autograd graph."""
        return self._features[: self._rows].to(torch.float32, copy=True)

    def backward(self, gradient: Tensor) -> Sequence[Tensor]:
        """Return the float32 gradients of all parameters, given that of the features, (slots · N, 256)."""
        frames, hidden1, hidden2, features = (
            kept[: self._rows] for kept in (self._frames, self._hidden1, self._hidden2, self._features)
        )
        w1, _, w2, _, w3, _ = self._weights
        upper = _relu_backward(gradient.to(self._dtype), features, 0)
        flat = hidden2.flatten(1)
        linear = upper.t() @ flat, upper.sum(0)
        upper = _relu_backward((upper @ w3).view(len(flat), 32, 9, 9), hidden2, 0)
        upper, *conv2 = _convolution(upper, hidden1, w2, stride=2, of_input=True)
        upper = _relu_backward(upper, hidden1, 0)
        _, weight, bias = _convolution(upper, frames, w1, stride=4, of_input=False)
        gradients = (weight.float().div_(255.0), bias, *conv2, *linear)
        return [g.to(torch.float32, memory_format=torch.contiguous_format) for g in gradients]


class _Replay(torch.autograd.Function):
    """The recorded features as a node of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, recorder: Recorder, *parameters: Tensor) -> Tensor:
        ctx.recorder = recorder
        return recorder.features()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, *ctx.recorder.backward(gradient)


def _convolution(gradient: Tensor, source: Tensor, weight: Tensor, *, stride: int, of_input: bool) -> Any:
    """Return the gradients of (source or None, weight, bias) of a convolution without padding."""
    return _convolution_backward(
        gradient, source, weight, [len(weight)], [stride] * 2, [0, 0], [1, 1], False, [0, 0], 1, [of_input, True, True]
    )
