"""init.safetensors, read back: what a run has written, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from initialization_files import CHANNELS, written
from safetensors.numpy import save

import leap_dist
from leap_dist.nn.actor_critic import Encoder, initialization
from leap_dist.nn.flat_vector import Manifest, load_vector
from leap_dist.storage import atomic
from leap_dist.storage.atomic import CorruptFile, NewerFormat, pack, unpack
from leap_dist.weights.initialization import InitializedEncoder, load_encoder, read_initialization


@pytest.mark.parametrize("frames", CHANNELS)
def test_the_encoder_is_that_of_the_run(tmp_path, frames):
    encoder = leap_dist.load_encoder(written(tmp_path, frames))
    expected = Encoder(CHANNELS[frames])
    load_vector(dict(expected.named_parameters()), initialization(CHANNELS[frames], 3)[1])
    assert isinstance(encoder, Encoder)
    images = torch.rand(2, CHANNELS[frames], 84, 84)
    assert torch.equal(encoder(images), expected(images))
    assert list(encoder.state_dict()) == list(expected.state_dict())
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    preprocessing = encoder.preprocessing
    assert (preprocessing.frames, preprocessing.frame_skip, preprocessing.size) == (frames, 4, 84)
    assert preprocessing.channels == CHANNELS[frames]


@pytest.mark.parametrize("frames", CHANNELS)
def test_everything_else_that_is_in_the_file(tmp_path, frames):
    path = written(tmp_path, frames)
    found = read_initialization(str(path))
    assert found.scope == "encoder"
    assert found.channels == CHANNELS[frames]
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (found.metadata["version"], found.metadata["games"]) == (0, ["pong", "freeway"])
    manifest, initial = initialization(CHANNELS[frames], 3)
    assert np.array_equal(found.vector(manifest), initial)


def test_a_manifest_takes_what_it_names(tmp_path):
    found = read_initialization(written(tmp_path, meta_learner="finetune-single"))
    assert found.scope == "model"
    assert {"policy.weight", "value.bias"} < set(found.tensors)
    encoder_only = initialization(4, 3)[0]
    assert found.vector(encoder_only).shape == (encoder_only.size,)
    with pytest.raises(ValueError, match=r"conv1.weight: \(16, 4, 8, 8\) instead of \(16, 3, 8, 8\)"):
        found.vector(initialization(3, 3)[0])
    with pytest.raises(ValueError, match="other: missing"):
        found.vector(Manifest(("other",), ((1,),)))


def test_of_a_whole_model_the_encoder_is_taken(tmp_path):
    encoder = load_encoder(written(tmp_path, meta_learner="finetune-single"))
    expected = initialization(4, 3)[1]
    assert np.array_equal(np.concatenate([p.detach().numpy().ravel() for p in encoder.parameters()]), expected)


def test_convolutions_alone_need_to_be_told_what_the_linear_layer_is(tmp_path):
    path = written(tmp_path, **{"meta.shared": "convolutions"})
    with pytest.raises(ValueError, match=r"holds the convolutions only .* give linear_seed=0"):
        load_encoder(path)
    first, again, other = (load_encoder(path, linear_seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.linear.weight, again.linear.weight)
    assert not torch.equal(first.linear.weight, other.linear.weight)
    gram = (first.linear.weight @ first.linear.weight.T).detach()
    torch.testing.assert_close(gram, 2 * torch.eye(256), rtol=0, atol=1e-4)
    for encoder in (first, other):
        expected = read_initialization(path).tensors
        assert np.array_equal(encoder.conv1.weight.detach().numpy(), expected["conv1.weight"])
        assert np.array_equal(encoder.conv2.weight.detach().numpy(), expected["conv2.weight"])


def test_an_encoder_is_saved_and_loaded_as_any_module(tmp_path):
    encoder = load_encoder(written(tmp_path))
    torch.save(encoder.state_dict(), tmp_path / "state.pt")
    other = InitializedEncoder(4, encoder.preprocessing)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other.conv1.weight, encoder.conv1.weight)


def test_links_are_followed(tmp_path):
    """Caches of downloaded models are made of links."""
    path = written(tmp_path)
    (tmp_path / "latest").symlink_to(path)
    assert read_initialization(tmp_path / "latest").sha256 == read_initialization(path).sha256


def changed(path: Path, **metadata: Any) -> None:
    tensors, header = unpack(path.read_bytes(), path.name)
    preprocessing = {**header["preprocessing"], **metadata.pop("preprocessing", {})}
    path.write_bytes(pack(tensors, {**header, "preprocessing": preprocessing, **metadata}))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"shared": "decoder"}, "shared is 'decoder', which is not one of encoder, convolutions, model"),
        (
            {"shared": "convolutions"},
            "encoder differs: linear.bias: .* instead of nothing; linear.weight: .* instead of nothing",
        ),
        ({"shared": "model"}, r"encoder differs: policy.weight: missing instead of \(18, 256\)"),
        ({"games": "pong"}, "metadata.games is of a wrong type: str"),
        ({"version": True}, "metadata.version is of a wrong type: bool"),
        ({"preprocessing": {"frames": "gray5"}}, "frames is 'gray5', which is not one of gray4, rgb1, rgb4"),
        ({"preprocessing": {"frames": "rgb1"}}, r"conv1.weight: \(16, 4, 8, 8\) instead of \(16, 3, 8, 8\)"),
        ({"preprocessing": {"size": 64}}, "this version does not support its preprocessing"),
        ({"preprocessing": {"scale": "none"}}, "this version does not support its preprocessing"),
        ({"preprocessing": {"frame_skip": 0}}, "this version does not support its preprocessing"),
    ],
)
def test_what_a_run_does_not_write_is_refused(tmp_path, metadata, message):
    path = written(tmp_path)
    changed(path, **metadata)
    with pytest.raises(CorruptFile, match=rf"^\S*init.safetensors is not an initialization that .*{message}") as caught:
        load_encoder(path)
    assert "\n" not in str(caught.value)


def test_numbers_that_are_none_and_other_types_are_refused(tmp_path):
    path = written(tmp_path)
    tensors, header = unpack(path.read_bytes(), path.name)
    bias = tensors["conv1.bias"]
    for wrong, message in ((bias * np.nan, "is not finite"), (bias.astype(np.float64), "is float64, not float32")):
        path.write_bytes(pack({**tensors, "conv1.bias": wrong}, header))
        with pytest.raises(CorruptFile, match=f"conv1.bias {message}"):
            load_encoder(path)


def test_an_older_file_without_what_is_needed_is_refused(tmp_path):
    path = written(tmp_path)
    tensors, header = unpack(path.read_bytes(), path.name)
    del header["preprocessing"]
    path.write_bytes(pack(tensors, header))
    with pytest.raises(CorruptFile, match=r"metadata\.preprocessing is missing"):
        load_encoder(path)


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    path = written(tmp_path)
    tensors, header = unpack(path.read_bytes(), path.name)
    monkeypatch.setattr(atomic, "FORMAT", atomic.FORMAT + 1)
    path.write_bytes(pack(tensors, header))
    monkeypatch.undo()
    with pytest.raises(NewerFormat, match=r"is newer than .*; update leap-dist"):
        load_encoder(path)


def test_every_kind_of_damage_is_refused(tmp_path):
    path = written(tmp_path)
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-1000] ^= 1
    foreign = save({"conv1.weight": np.zeros((16, 4, 8, 8), np.float32)})
    for data in (b"", b"\0" * 8, good[:-1], good[: len(good) // 2], bytes(flipped), foreign, b"PK\3\4 torch.save"):
        path.write_bytes(data)
        with pytest.raises(CorruptFile, match=r"^\S*init\.safetensors is ") as caught:
            load_encoder(path)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        load_encoder(path)
    with pytest.raises(FileNotFoundError):
        load_encoder(tmp_path)  # a run directory means its initialization
    os.mkfifo(path)
    with pytest.raises(CorruptFile, match="is not a regular file"):
        load_encoder(path)


def test_a_checkpoints_file_is_not_taken_for_it(tmp_path):
    written(tmp_path)
    with pytest.raises(CorruptFile, match=r"metadata\.version is missing"):
        load_encoder(tmp_path / "checkpoints" / "000000" / "init.safetensors")


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import json, sys, leap_dist; before = [m for m in ('torch', 'numpy', 'ray') if m in sys.modules];"
        "leap_dist.load_encoder; leap_dist.MetaServer;"
        "print(json.dumps([before, 'torch' in sys.modules, 'ray' in sys.modules, dir(leap_dist)]))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    before, torch_after, ray_after, names = json.loads(output.stdout)
    assert before == []
    assert (torch_after, ray_after) == (True, False)
    assert {"load_encoder", "PullForward", "MetaServer", "__version__"} <= set(names)


def test_there_is_nothing_else_in_the_package():
    with pytest.raises(AttributeError, match="no attribute 'load_encoders'"):
        leap_dist.load_encoders  # noqa: B018
    for name in leap_dist._LIBRARY:
        assert getattr(leap_dist, name).__name__ == name
