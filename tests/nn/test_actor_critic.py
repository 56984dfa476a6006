"""The network, its initialization, and the flat vector that travels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from leap_dist.nn.actor_critic import ALL_ACTIONS, ActorCritic, Encoder, initialization, initialize
from leap_dist.nn.flat_vector import Manifest, add_vector, flatten, load_vector


def named(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters())


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.second = nn.Linear(2, 1, bias=False)


MANIFEST = Manifest(("first.weight", "first.bias", "second.weight"), ((2, 3), (2,), (1, 2)))


def test_the_papers_encoder_has_675120_parameters():
    # conv 8·8·3·16 + 16, conv 4·4·16·32 + 32, linear 9·9·32·256 + 256
    expected = 3_088 + 8_224 + 663_808
    assert expected == 675_120
    assert sum(p.numel() for p in Encoder(3).parameters()) == expected
    assert Manifest.of(named(Encoder(3))).size == expected
    assert len(initialization(3, 0)[1]) == expected


def test_shapes_of_the_network():
    model = ActorCritic(Encoder(4), 6)
    frames = torch.rand(5, 4, 84, 84)
    assert model.encoder(frames).shape == (5, 256)
    logits, value = model(frames)
    assert logits.shape == (5, 6)
    assert value.shape == (5,)
    assert model(frames[:1])[1].shape == (1,)


def test_the_network_is_the_one_of_mnih_2013():
    """Recomputed with torch's functions: two strided convolutions and a linear layer with ReLUs, linear heads."""
    torch.manual_seed(0)
    model = ActorCritic(Encoder(3), 4)
    frames = torch.rand(2, 3, 84, 84)
    p = dict(model.named_parameters())
    x = nn.functional.conv2d(frames, p["encoder.conv1.weight"], p["encoder.conv1.bias"], stride=4).clamp_min(0)
    assert x.shape == (2, 16, 20, 20)
    x = nn.functional.conv2d(x, p["encoder.conv2.weight"], p["encoder.conv2.bias"], stride=2).clamp_min(0)
    assert x.shape == (2, 32, 9, 9)
    x = (x.reshape(2, -1) @ p["encoder.linear.weight"].T + p["encoder.linear.bias"]).clamp_min(0)
    logits, value = model(frames)
    torch.testing.assert_close(logits, x @ p["policy.weight"].T + p["policy.bias"])
    torch.testing.assert_close(value, (x @ p["value.weight"].T + p["value.bias"])[:, 0])


def test_weights_are_orthogonal_with_the_gain_of_their_layer_and_biases_zero():
    model = ActorCritic(Encoder(3), 6)
    initialize(model, torch.Generator().manual_seed(0))
    gains = {"policy": 0.01, "value": 1.0}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    assert set(layers) == {"encoder.conv1", "encoder.conv2", "encoder.linear", "policy", "value"}
    for name, layer in layers.items():
        assert not layer.bias.any()
        matrix = layer.weight.detach().double().flatten(1)
        rows, columns = matrix.shape
        assert rows <= columns  # so it is the rows that are orthonormal
        gain = gains.get(name, math.sqrt(2))
        expected = gain**2 * torch.eye(rows, dtype=torch.float64)
        torch.testing.assert_close(matrix @ matrix.T, expected, rtol=0, atol=1e-5 * gain**2)


def test_an_initialization_is_determined_by_its_seed():
    torch.manual_seed(1)
    first = initialization(4, 7)[1]
    torch.manual_seed(2)  # the global generator must not matter
    assert np.array_equal(first, initialization(4, 7)[1])
    assert first.dtype == np.float32
    assert first.shape == (Manifest.of(named(Encoder(4))).size,)
    different = first != initialization(4, 8)[1]
    weights = len(first) - (16 + 32 + 256)
    assert different.sum() > 0.99 * weights, "every layer must depend on the seed"


def test_a_new_initialization_does_not_touch_the_global_generator():
    module = nn.Linear(3, 2)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    initialize(module, torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(1), expected)


def test_flatten_and_load_are_inverse():
    vector = initialization(4, 0)[1]
    encoder = Encoder(4)
    load_vector(named(encoder), vector)
    assert np.array_equal(flatten(encoder.parameters()).numpy(), vector)
    # still usable: the same vector in another encoder gives the same function
    other = Encoder(4)
    load_vector(named(other), flatten(encoder.parameters()).numpy())
    frames = torch.rand(2, 4, 84, 84)
    assert torch.equal(encoder(frames), other(frames))


def test_a_loaded_or_flattened_vector_is_a_copy():
    vector = np.arange(10, dtype=np.float32)
    module = Small()
    load_vector(named(module), vector)
    vector[:] = -1
    assert flatten(module.parameters()).tolist() == list(range(10))
    single = nn.Linear(2, 1, bias=False)
    flat = flatten(single.parameters())
    flat.fill_(17.0)
    assert not (single.weight == 17.0).any()


def test_flatten_is_row_major_whatever_the_memory_layout():
    transposed = torch.arange(6.0).reshape(2, 3).t()
    assert flatten([transposed, torch.tensor(9.0)]).tolist() == [0, 3, 1, 4, 2, 5, 9]
    weight = torch.arange(2.0 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    assert flatten([weight.to(memory_format=torch.channels_last)]).tolist() == list(range(24))


def test_a_read_only_vector_loads_without_a_warning(recwarn):
    """Ray hands out read-only arrays."""
    vector = np.arange(10, dtype=np.float32)
    vector.flags.writeable = False
    module = Small()
    load_vector(named(module), vector)
    assert flatten(module.parameters()).tolist() == list(range(10))
    assert not recwarn.list


@pytest.mark.parametrize("length", [9, 11])
def test_a_vector_of_another_length_is_refused(length):
    module = Small()
    before = flatten(module.parameters())
    with pytest.raises(ValueError, match=rf"\({length},\).*\(10,\)"):
        load_vector(named(module), np.zeros(length, np.float32))
    with pytest.raises(ValueError, match=rf"\({length},\).*\(10,\)"):
        MANIFEST.split(np.zeros(length, np.float32))
    assert torch.equal(flatten(module.parameters()), before)


def test_a_manifest_describes_its_module():
    manifest = Manifest.of(named(Small()))
    assert manifest == MANIFEST
    assert manifest.size == 10


def test_split_and_join_are_inverse():
    vector = np.arange(10, dtype=np.float32)
    parts = MANIFEST.split(vector)
    assert list(parts) == list(MANIFEST.names)
    assert parts["first.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert parts["first.bias"].tolist() == [6, 7]
    assert parts["second.weight"].tolist() == [[8, 9]]
    assert np.array_equal(MANIFEST.join(parts), vector)
    assert np.array_equal(MANIFEST.join(dict(reversed(parts.items()))), vector), "names count, not their order"
    assert MANIFEST.join(parts).dtype == np.float32


def test_join_lists_every_difference():
    tensors = {
        "first.weight": np.zeros((3, 2), np.float32),
        "second.weight": np.zeros((1, 2), np.float32),
        "third.weight": np.zeros(4, np.float32),
    }
    with pytest.raises(ValueError) as caught:
        MANIFEST.join(tensors)
    text = str(caught.value)
    assert "first.weight: (3, 2) instead of (2, 3)" in text
    assert "first.bias: missing instead of (2,)" in text
    assert "third.weight: (4,) instead of nothing" in text
    assert "second.weight" not in text, "what agrees is not a difference"


def test_digests_differ_with_names_shapes_and_order():
    names, shapes = MANIFEST.names, MANIFEST.shapes
    others = [
        Manifest(("first.weight", "first.bias", "other.weight"), shapes),
        Manifest(names, ((3, 2), (2,), (1, 2))),
        Manifest(names, ((2, 3), (2,), (2,))),
        Manifest(names[::-1], shapes[::-1]),
        Manifest((names[0], names[2], names[1]), shapes),
        Manifest(names[:2], shapes[:2]),
    ]
    digests = {manifest.digest for manifest in (MANIFEST, *others)}
    assert len(digests) == 1 + len(others)
    assert Manifest(names, shapes).digest == MANIFEST.digest
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in digests)
    assert Manifest.of(named(Encoder(1))).digest != Manifest.of(named(Encoder(3))).digest


# --- what is shared ------------------------------------------------------------------------------------------------

CONVOLUTIONS = ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias")
LINEAR = ("linear.weight", "linear.bias")
HEADS = ("policy.weight", "policy.bias", "value.weight", "value.bias")
SCOPES = {
    "convolutions": (CONVOLUTIONS, LINEAR + HEADS),
    "encoder": (CONVOLUTIONS + LINEAR, HEADS),
    "model": (CONVOLUTIONS + LINEAR + HEADS, ()),
}


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_divides_all_parameters_into_shared_and_local_ones(scope):
    model = ActorCritic(Encoder(4), 6)
    shared, local = model.parameters_of(scope)
    assert (tuple(shared), tuple(local)) == SCOPES[scope]
    divided = [*shared.values(), *local.values()]
    assert [id(p) for p in divided] == [id(p) for p in model.parameters()], "the parameters themselves, each once"


@pytest.mark.parametrize("scope", SCOPES)
def test_an_initialization_holds_what_its_scope_shares(scope):
    manifest, vector = initialization(4, 7, scope)
    assert manifest.names == SCOPES[scope][0]
    assert vector.dtype == np.float32
    assert vector.shape == (manifest.size,)
    assert np.array_equal(vector, initialization(4, 7, "model")[1][: manifest.size]), "one seed, one network"
    if scope == "model":
        assert manifest.split(vector)["policy.weight"].shape == (ALL_ACTIONS, 256) == (18, 256)
        assert manifest.split(vector)["value.weight"].shape == (1, 256)


def test_scopes_have_different_digests():
    assert len({initialization(4, 0, scope)[0].digest for scope in SCOPES}) == len(SCOPES)


LEGAL = [0, 3, 4, 11]


def test_a_masked_head_is_a_softmax_over_18_logits_of_which_the_illegal_ones_are_minus_infinity():
    torch.manual_seed(0)
    model = ActorCritic(Encoder(4), ALL_ACTIONS, legal=LEGAL)
    frames = torch.rand(5, 4, 84, 84)
    logits, value = model(frames)
    everything = model.policy(model.encoder(frames))
    assert everything.shape == (5, 18)
    illegal = [action for action in range(18) if action not in LEGAL]
    everything[:, illegal] = -math.inf
    probabilities = everything.softmax(-1)
    assert not probabilities[:, illegal].any()
    torch.testing.assert_close(logits.softmax(-1), probabilities[:, LEGAL])
    assert value.shape == (5,)
    assert "legal" not in "".join(model.state_dict()), "the game's, not the network's"


def test_a_masked_head_learns_from_legal_actions_only_and_as_a_plain_one_does():
    torch.manual_seed(0)
    encoder = Encoder(4)
    masked, plain = ActorCritic(encoder, ALL_ACTIONS, legal=LEGAL), ActorCritic(encoder, len(LEGAL))
    with torch.no_grad():
        plain.policy.weight.copy_(masked.policy.weight[LEGAL])
        plain.policy.bias.copy_(masked.policy.bias[LEGAL])
        plain.value.load_state_dict(masked.value.state_dict())
    frames, weights = torch.rand(5, 4, 84, 84), torch.randn(5, len(LEGAL))
    gradients = []
    for model in (masked, plain):
        encoder.zero_grad()
        logits, value = model(frames)
        loss = (weights * logits.log_softmax(-1)).sum() + value.square().sum()
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in encoder.parameters())])
    torch.testing.assert_close(*gradients)
    illegal = [action for action in range(18) if action not in LEGAL]
    for name in ("weight", "bias"):
        of_masked, of_plain = (getattr(model.policy, name).grad for model in (masked, plain))
        torch.testing.assert_close(of_masked[LEGAL], of_plain)
        assert not of_masked[illegal].any()
    torch.testing.assert_close(masked.value.weight.grad, plain.value.weight.grad)


def test_adding_a_vector_moves_parameters_by_it_and_returns_its_parts():
    """Ray hands out read-only arrays."""
    module = Small()
    load_vector(named(module), np.arange(10, dtype=np.float32))
    vector = np.linspace(-1, 1, 10).astype(np.float32)
    vector.flags.writeable = False
    parts = add_vector(named(module), vector)
    assert np.array_equal(flatten(module.parameters()).numpy(), np.arange(10, dtype=np.float32) + vector)
    assert [part.shape for part in parts] == [p.shape for p in module.parameters()]
    assert np.array_equal(flatten(parts).numpy(), vector)
    for part in parts:
        part.fill_(17.0)
    assert not (vector == 17.0).any(), "the parts are new"


@pytest.mark.parametrize("length", [9, 11])
def test_adding_a_vector_of_another_length_is_refused(length):
    module = Small()
    before = flatten(module.parameters())
    with pytest.raises(ValueError, match=rf"\({length},\).*\(10,\)"):
        add_vector(named(module), np.ones(length, np.float32))
    assert torch.equal(flatten(module.parameters()), before)
