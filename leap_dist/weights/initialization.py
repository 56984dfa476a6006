"""init.safetensors, read back: the initialization of a run for whoever goes on from it.

Nothing of what is read is executed, and nothing is taken on trust: checksum, metadata, names, shapes, finite values.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import torch

from leap_dist.config.settings import Config
from leap_dist.envs.atari_vector import STACKS, channels
from leap_dist.nn import convnet
from leap_dist.nn.actor_critic import ALL_ACTIONS, FRAME_SIZE, SCALE, ActorCritic, Encoder, initialize
from leap_dist.nn.flat_vector import Manifest, load_vector
from leap_dist.protocol import schema
from leap_dist.storage.atomic import CorruptFile, read_regular, unpack

_ORDER = {
    "gray4": "oldest frame first",
    "rgb1": "red, green, blue",
    "rgb4": "oldest frame first; red, green, blue within a frame",
}
_SCOPES = ("encoder", "convolutions", "model")
_FRAMES = {"frames": str, "size": int, "frame_skip": int, "scale": str}
_IMAGES = {"channels": int, "size": int, "classes": int}
_METADATA = {
    "version": int,
    "preset": str,
    "meta_learner": str,
    "shared": str,
    "games": [str],
    "preprocessing": {...: object},
}
"""What `MetaState` writes at least."""
_MORE = {"mode": str, "task_steps": int, "agent_steps": int, "tasks": str}
"""What it writes besides, since version 0.1."""
_MOST = 4096  # of channels, pixels, classes: what claims more is damage


@dataclass(frozen=True)
class Preprocessing:
    """What an encoder expects to be given: the observations that it was meta-learned on."""

    frames: str
    """The kind: "gray4" (four gray frames), "rgb1" (one RGB frame) or "rgb4" (four RGB frames)."""
    frame_skip: int
    """ALE frames per observation, of which the last two are max-pooled."""
    size: int = FRAME_SIZE
    """Height and width in pixels, resized by area averaging."""
    scale: str = SCALE
    """From uint8 pixels to the encoder's input."""

    @property
    def order(self) -> str:
        """Of the channels, which come first, before height and width."""
        return _ORDER[self.frames]

    @property
    def channels(self) -> int:
        """Channels of an observation."""
        return channels(self.frames)


@dataclass(frozen=True)
class Initialization:
    """The content of an init.safetensors. `read_initialization` makes and checks it."""

    tensors: dict[str, np.ndarray]
    """float32, by parameter name as in `Encoder`, and policy.* and value.* where the scope is "model"."""
    metadata: dict[str, Any]
    """As written with the run's newest meta-update: version (meta-updates), preset, meta_learner, shared, games,
    preprocessing, and of newer files mode, task_steps, and agent_steps, which is how many went into it."""
    sha256: str
    """Of the file's bytes, hexadecimal."""

    @property
    def scope(self) -> str:
        """What was meta-learned: "encoder", "convolutions" or "model"."""
        return str(self.metadata["shared"])

    @property
    def tasks(self) -> str:
        """What it was meta-learned on: "atari", "omniglot" or "multi-cv"."""
        return str(self.metadata.get("tasks", "atari"))

    @property
    def manifest(self) -> Manifest:
        """Of the parameters that are here."""
        return _manifest(self.metadata)

    @property
    def channels(self) -> int:
        """Input channels of the first convolution."""
        return int(self.manifest.shapes[0][1])

    @property
    def preprocessing(self) -> Preprocessing:
        """What the encoder expects."""
        given = self.metadata["preprocessing"]
        return Preprocessing(given["frames"], given["frame_skip"])

    def vector(self, manifest: Manifest) -> np.ndarray:
        """The flat float32 vector (manifest.size,) of the parameters that `manifest` names, of those that are here.

        Raises ValueError that lists every parameter that is missing or of another shape.
        """
        return manifest.join({name: self.tensors[name] for name in manifest.names if name in self.tensors})

    def encoder(self, *, linear_seed: int | None = None) -> InitializedEncoder:
        """A new encoder with these parameters. Where only convolutions were meta-learned, `linear_seed` determines the
        rest: an orthogonal linear layer, as every task of the run began with. Raises ValueError where it is missing, or
        where this is no initialization for Atari games.
        """
        if self.tasks != "atari":
            raise ValueError(f"this initialization is for tasks {self.tasks}, not for Atari games; see load_network")
        encoder = InitializedEncoder(self.channels, self.preprocessing)
        if self.scope == "convolutions":
            if linear_seed is None:
                raise ValueError(
                    "this initialization holds the convolutions only (meta.shared convolutions), and no linear layer; "
                    "give linear_seed=0, or any other seed, to get a fresh one"
                )
            initialize(encoder, torch.Generator().manual_seed(linear_seed))
        parameters = {name: p for name, p in encoder.named_parameters() if name in self.tensors}
        load_vector(parameters, self.vector(Manifest.of(parameters)))
        return encoder


class InitializedEncoder(Encoder):
    """An `Encoder` that knows what it expects to be given."""

    def __init__(self, channels: int, preprocessing: Preprocessing) -> None:
        super().__init__(channels)
        self.preprocessing = preprocessing


def load_encoder(path: str | Path, *, linear_seed: int | None = None) -> InitializedEncoder:
    """The encoder of an init.safetensors: (N, C, 84, 84) float32 in [0, 1] → (N, 256), with `.preprocessing`.

    Args:
        path: of the file; links are followed.
        linear_seed: of the linear layer, needed (and used) only where the file holds no more than the convolutions.

    Raises OSError where there is no such file, CorruptFile where it is damaged, of a newer format or not such a file,
    ValueError where the linear layer is missing and no seed is given.
    """
    return read_initialization(path).encoder(linear_seed=linear_seed)


def load_network(path: str | Path, classes: int | None = None, *, head_seed: int | None = None) -> convnet.ConvNet:
    """The network of a supervised run's init.safetensors: (N, channels, size, size) float32 → logits (N, classes).

    Args:
        path: of the file; links are followed.
        classes: outputs of the head; None: as many as the run's tasks had.
        head_seed: of a fresh head, needed (and used) where the head is not in the file, or has other classes.

    Raises OSError where there is no such file, CorruptFile where it is damaged, of a newer format or not such a file,
    ValueError where it is for Atari games, or the head is missing and no seed is given.
    """
    found = read_initialization(path)
    if found.tasks == "atari":
        raise ValueError("this initialization is for Atari games; see load_encoder")
    given = found.metadata["preprocessing"]
    network = convnet.ConvNet(given["channels"], given["size"], classes or given["classes"])
    shared, local = network.parameters_of(found.scope)
    if network.head.out_features != given["classes"]:
        shared, local = network.parameters_of("encoder")
    if local and head_seed is None:
        raise ValueError(
            "this initialization has no head for these classes; give head_seed=0, or any other, for a fresh one"
        )
    if local:
        convnet.initialize(network, torch.Generator().manual_seed(head_seed or 0))
    load_vector(shared, found.vector(Manifest.of(shared)))
    return network


def read_initialization(path: str | Path) -> Initialization:
    """Reads an init.safetensors. Links are followed. Raises OSError, or CorruptFile that says what is wrong."""
    path = Path(path)
    data = read_regular(Path(os.path.realpath(path)))
    found, metadata = unpack(data, path.name)
    tensors = dict(sorted(found.items()))  # reading gives them in another order in every process
    try:
        _check(tensors, metadata)
    except ValueError as error:
        raise CorruptFile(f"{path.name} is no initialization that this version can read: {error}") from None
    return Initialization(tensors, metadata, hashlib.sha256(data).hexdigest())


def _manifest(metadata: Mapping[str, Any]) -> Manifest:
    given = metadata["preprocessing"]
    model: ActorCritic | convnet.ConvNet
    with torch.device("meta"):  # shapes only
        if metadata.get("tasks", "atari") == "atari":
            model = ActorCritic(Encoder(channels(given["frames"])), ALL_ACTIONS)
        else:
            model = convnet.ConvNet(given["channels"], given["size"], given["classes"])
        shared, _ = model.parameters_of(metadata["shared"])
    return Manifest.of(shared)


def _check(tensors: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    """Raises ValueError where the content is not what a run writes."""
    more = {name: shape for name, shape in _MORE.items() if name in metadata}
    schema.check(metadata, {**_METADATA, **more}, "metadata")
    scope, given, tasks = metadata["shared"], metadata["preprocessing"], metadata.get("tasks", "atari")
    if scope not in _SCOPES:
        raise ValueError(f"shared is {scope[:40]!r}, which is none of {', '.join(_SCOPES)}")
    if tasks not in get_args(get_type_hints(Config)["tasks"]):
        raise ValueError(f"tasks is {tasks[:40]!r}, which this version does not know")
    schema.check(given, _FRAMES if tasks == "atari" else _IMAGES, "preprocessing")
    if tasks == "atari":
        if given["frames"] not in STACKS:
            raise ValueError(f"frames is {given['frames'][:40]!r}, which is none of {', '.join(STACKS)}")
        if (given["size"], given["scale"]) != (FRAME_SIZE, SCALE) or given["frame_skip"] < 1:
            raise ValueError("its preprocessing is another one")
    elif not all(1 <= number <= _MOST for number in given.values()) or given["size"] < convnet.SMALLEST:
        raise ValueError("its images are none")
    _manifest(metadata).join(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32:
            raise ValueError(f"{name} is {tensor.dtype}, not float32")
        if not np.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite")
