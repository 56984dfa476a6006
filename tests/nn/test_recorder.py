"""The recorder against autograd: same features, same gradients, whatever the precision and the order of use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leap_dist.nn.actor_critic import Encoder, initialize
from leap_dist.nn.recorder import Recorder

SLOTS, BATCH = 3, 2


def encoder_of(channels: int, seed: int = 0) -> Encoder:
    encoder = Encoder(channels)
    initialize(encoder, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for layer in (encoder.conv1, encoder.conv2, encoder.linear):
            layer.bias.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(seed + 1))
    return encoder


def pixels(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 256, (*shape, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def recorded(recorder: Recorder, frames: Tensor) -> Tensor:
    recorder.begin()
    return torch.stack([recorder.encode(slot, batch) for slot, batch in enumerate(frames)])


def gradients(encoder: Encoder, features: Tensor, weights: Tensor) -> list[Tensor]:
    """Of a loss in which every feature counts, and not linearly."""
    loss = (weights * features + 0.1 * features.square()).sum()
    return list(torch.autograd.grad(loss, list(encoder.parameters())))


@pytest.mark.parametrize("channels", [3, 4, 12])
def test_features_and_gradients_are_those_of_one_large_forward_pass(channels):
    encoder, frames = encoder_of(channels), pixels(1, SLOTS, BATCH, channels)
    weights = torch.randn(SLOTS * BATCH, 256, generator=torch.Generator().manual_seed(2))
    recorder = Recorder(encoder, SLOTS, BATCH, torch.float32)
    acted = recorded(recorder, frames).flatten(0, 1)
    plain = encoder(frames.flatten(0, 1).float() / 255)
    replayed = recorder.replay()
    assert replayed.requires_grad
    assert torch.equal(acted, replayed)
    assert torch.equal(acted, recorder.features())
    assert not recorder.features().requires_grad
    assert (acted - plain).abs().max() <= 1e-5 * plain.abs().max()
    found, expected = gradients(encoder, replayed, weights), gradients(encoder, plain, weights)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert a.is_contiguous(), "flat vectors are made of views"
        assert b.norm() > 0
        assert (a - b).norm() <= 2e-5 * b.norm()


def test_bfloat16_is_float32_rounded():
    encoder, frames = encoder_of(4), pixels(1, SLOTS, BATCH, 4)
    weights = torch.randn(SLOTS * BATCH, 256, generator=torch.Generator().manual_seed(2))
    recorder = Recorder(encoder, SLOTS, BATCH, torch.bfloat16)
    acted = recorded(recorder, frames).flatten(0, 1)
    plain = encoder(frames.flatten(0, 1).float() / 255)
    assert acted.dtype == torch.float32
    assert not torch.equal(acted, plain)
    assert (acted - plain).norm() <= 0.02 * plain.norm()
    for a, b in zip(gradients(encoder, recorder.replay(), weights), gradients(encoder, plain, weights), strict=True):
        assert a.dtype == torch.float32
        assert torch.dot(a.flatten(), b.flatten()) > 0.99 * a.norm() * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_uses_the_parameters_as_they_were_at_the_beginning(dtype):
    encoder, frames = encoder_of(4), pixels(1, SLOTS, BATCH, 4)
    recorder = Recorder(encoder, SLOTS, BATCH, dtype)
    before = recorded(recorder, frames)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.5)
    assert torch.equal(recorder.encode(0, frames[0]), before[0]), "the same unroll, the same parameters"
    recorder.begin()
    assert not torch.equal(recorder.encode(0, frames[0]), before[0])


def test_slots_keep_their_own_and_the_last_one_is_left_out():
    encoder, frames = encoder_of(4), pixels(1, SLOTS + 1, BATCH, 4)
    recorder = Recorder(encoder, SLOTS, BATCH, torch.float32)
    recorded(recorder, frames[:SLOTS])
    before = recorder.features()
    weights = torch.ones(SLOTS * BATCH, 256)
    expected = gradients(encoder, recorder.replay(), weights)
    extra = recorder.encode(SLOTS, frames[SLOTS])
    one = recorder.encode(SLOTS, frames[SLOTS, :1])  # fewer frames than N
    # The values are those of any batch; the last bits need not be, where a library blocks another size differently.
    torch.testing.assert_close(one, extra[:1])
    assert torch.equal(recorder.features(), before)
    assert all(torch.equal(a, b) for a, b in zip(gradients(encoder, recorder.replay(), weights), expected, strict=True))
    recorder.encode(1, frames[0])
    assert not torch.equal(recorder.features(), before)


def test_the_next_unroll_starts_afresh():
    """What a gradient is made of are the passes since the last `begin`, not those before."""
    encoder, first, second = encoder_of(4), pixels(1, SLOTS, BATCH, 4), pixels(2, SLOTS, BATCH, 4)
    weights = torch.ones(SLOTS * BATCH, 256)
    used, fresh = (Recorder(encoder, SLOTS, BATCH, torch.float32) for _ in range(2))
    recorded(used, first)
    kept = gradients(encoder, used.replay(), weights)
    copies = [g.clone() for g in kept]
    recorded(used, second)
    recorded(fresh, second)
    new = gradients(encoder, used.replay(), weights)
    assert all(torch.equal(a, b) for a, b in zip(new, gradients(encoder, fresh.replay(), weights), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True)), "whoever took them over keeps them"
