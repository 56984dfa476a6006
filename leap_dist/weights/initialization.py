"""Reading of init.safetensors, the meta-learned initialization of a run.

Nothing in the file is executed or trusted: checksum, metadata, names, shapes and finite values are checked.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from leap_dist.config import loading as configuration
from leap_dist.config import pretrained
from leap_dist.config.image_settings import SupervisedSettings
from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import ENVIRONMENTS, Config
from leap_dist.envs.atari_vector import channels
from leap_dist.nn import convnet
from leap_dist.nn.actor_critic import FRAME_SIZE, SCALE, Encoder, initialize
from leap_dist.nn.flat_vector import Manifest, load_vector
from leap_dist.protocol import schema
from leap_dist.storage.atomic import CorruptFile, is_packed, read_packed, unpack
from leap_dist.tasks.task import family_named, family_of
from leap_dist.weights import foreign

_ORDER = {
    "gray4": "oldest frame first",
    "rgb1": "red, green, blue",
    "rgb4": "oldest frame first; red, green, blue within a frame",
}
_SCOPES = ("encoder", "convolutions", "model")
_METADATA = {
    "version": int,
    "preset": str,
    "meta_learner": str,
    "shared": str,
    "games": [str],
    "preprocessing": {...: object},
}
"""Metadata that every file has."""
_MORE = {"mode": str, "task_steps": int, "agent_steps": int, "tasks": str}
"""Metadata that newer files have in addition."""


class OtherSetting(NamedTuple):
    """A setting in which a run differs from the one that made an initialization."""

    name: str
    wanted: Any
    """Its value in the run."""
    found: Any
    """Its value for which the initialization was made."""


@dataclass(frozen=True)
class Preprocessing:
    """The observations that an encoder was meta-learned on and expects."""

    frames: str
    """Kind of frames: "gray4" (four gray frames), "rgb1" (one RGB frame) or "rgb4" (four RGB frames)."""
    frame_skip: int
    """Number of ALE frames per observation, of which the last two are max-pooled."""
    size: int = FRAME_SIZE
    """Height and width in pixels, resized by area averaging."""
    scale: str = SCALE
    """How uint8 pixels become the encoder's input."""

    @property
    def order(self) -> str:
        """Order of the channels, which precede height and width."""
        return _ORDER[self.frames]

    @property
    def channels(self) -> int:
        """Number of channels of an observation."""
        return channels(self.frames)


@dataclass(frozen=True)
class Initialization:
    """The checked content of an init.safetensors, as returned by `read_initialization`."""

    tensors: dict[str, np.ndarray]
    """Parameters, float32, by name as in `Encoder`, with policy.* and value.* if the scope is "model"."""
    metadata: dict[str, Any]
    """Metadata of the run at the file's meta-update: version (number of meta-updates), preset, meta_learner, shared,
    games, preprocessing; in newer files also mode, tasks, task_steps, and agent_steps (total so far)."""
    sha256: str
    """SHA-256 of the file's bytes, hexadecimal."""

    @property
    def scope(self) -> str:
        """Name of the set of meta-learned parameters: "encoder", "convolutions" or "model"."""
        return str(self.metadata["shared"])

    @property
    def tasks(self) -> str:
        """Family of tasks that it was meta-learned on, a value of the setting `tasks`."""
        return str(self.metadata.get("tasks", "atari"))

    @property
    def manifest(self) -> Manifest:
        """Manifest of the parameters in the file."""
        return _manifest(self.metadata)

    @property
    def channels(self) -> int:
        """Number of input channels of the first convolution."""
        return int(self.manifest.shapes[0][1])

    @property
    def preprocessing(self) -> Preprocessing:
        """The observations that the encoder expects."""
        given = self.metadata["preprocessing"]
        return Preprocessing(given["frames"], given["frame_skip"])

    def other_setting(
        self, config: Config, names: Sequence[str] = ("frames", "frame_skip", "network")
    ) -> OtherSetting | None:
        """Return a setting in which `config` differs from what this initialization was made for; None if there is none.

        These settings do not change any shape, or not always: the kind of frames, the number of frames of an agent
        step, and the order of the layers of a classifier. `names` are those that are compared.
        """
        family, seen = family_of(config), self.metadata.get("preprocessing") or {}
        here = family.preprocessing(config)
        for name in names:
            usual = SupervisedSettings.network if name == "network" else None
            wanted, found = here.get(name, usual), seen.get(name, usual)
            if wanted is None or found is None:
                continue
            if not (convnet.computes_alike(wanted, found) if name == "network" else wanted == found):
                return OtherSetting(f"{family.sections[-1]}.{name}", wanted, found)
        return None

    def settings_in(self, run_dir: Path) -> Config | None:
        """Return the settings in a run directory; None if there are none, or if they belong to another run."""
        try:
            saved = configuration.completed(configuration.read_yaml(run_dir / "config.yaml"))
            config = configuration.resolve(str(saved.get("preset")), saved)
        except ConfigError:
            return None
        here = (config.tasks, config.preset, config.meta_learner, config.scope, list(config.games))
        there = (self.tasks, *(self.metadata[name] for name in ("preset", "meta_learner", "shared", "games")))
        return config if here == there and self.other_setting(config) is None else None

    def vector(self, manifest: Manifest) -> np.ndarray:
        """Return the flat float32 vector, (manifest.size,), of the parameters that `manifest` names.

        Raises ValueError, which lists every parameter that is missing or has another shape.
        """
        return manifest.join({name: self.tensors[name] for name in manifest.names if name in self.tensors})

    def encoder(self, *, linear_seed: int | None = None) -> InitializedEncoder:
        """Return a new encoder with these parameters.

        If only convolutions were meta-learned, `linear_seed` determines the orthogonal linear layer, as at the start of
        every task of the run. Raises ValueError if it is needed but None, or if the tasks were not environments.
        """
        if self.tasks not in ENVIRONMENTS:
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

    def network(self, classes: int | None = None, *, head_seed: int | None = None) -> convnet.ConvNet:
        """Return a new network with these parameters, for tasks that are classification; see `load_network`.

        Raises ValueError if the tasks were environments, or if a new head is needed and no seed is given.
        """
        if self.tasks in ENVIRONMENTS:
            raise ValueError("this initialization is for environments; see load_encoder")
        given = self.metadata["preprocessing"]
        network = family_named(self.tasks).network({**given, "classes": classes or given["classes"]})
        assert isinstance(network, convnet.ConvNet)
        shared, local = network.parameters_of(self.scope)
        if network.head.out_features != given["classes"]:
            shared, local = network.parameters_of("encoder")
        if local and head_seed is None:
            raise ValueError(
                "this initialization has no head for these classes; give head_seed=0, or any other, for a fresh one"
            )
        if local:
            convnet.initialize(network, torch.Generator().manual_seed(head_seed or 0))
        load_vector(shared, self.vector(Manifest.of(shared)))
        return network


class InitializedEncoder(Encoder):
    """An `Encoder` with a description of the observations that it expects."""

    def __init__(self, channels: int, preprocessing: Preprocessing) -> None:
        super().__init__(channels)
        self.preprocessing = preprocessing


def load_encoder(path: str | Path, *, linear_seed: int | None = None) -> InitializedEncoder:
    """Load the encoder of an init.safetensors: (N, C, 84, 84) float32 in [0, 1] → (N, 256), with `.preprocessing`.

    Args:
        path: path of the file or of a run directory, or `pretrained:NAME`; links are followed.
        linear_seed: seed of the linear layer; used only if the file holds nothing but the convolutions.

    Raises:
        OSError: if the file cannot be read.
        CorruptFile: if it is damaged, of a newer format, or something else.
        ValueError: if the linear layer is missing and no seed is given.
    """
    return read_initialization(path).encoder(linear_seed=linear_seed)


def load_network(path: str | Path, classes: int | None = None, *, head_seed: int | None = None) -> convnet.ConvNet:
    """Load the network of a supervised run: (N, channels, size, size) float32 → logits (N, classes).

    Args:
        path: path of the file or of a run directory, or `pretrained:NAME`; links are followed.
        classes: number of outputs of the head; None for that of the run's tasks.
        head_seed: seed of a new head; used only if the file has no head with this number of outputs.

    Raises:
        OSError: if the file cannot be read.
        CorruptFile: if it is damaged, of a newer format, or something else.
        ValueError: if it is for Atari games, or a new head is needed and no seed is given.
    """
    return read_initialization(path).network(classes, head_seed=head_seed)


def read_initialization(path: str | Path) -> Initialization:
    """Read an init.safetensors; links are followed.

    `path` may also be a run directory, whose best initialization is read if early stopping has chosen one, or
    `pretrained:NAME`, or an encoder that another library has saved as safetensors. Raises OSError, CorruptFile that
    says what is wrong, or ConfigError if there is no initialization of that name.
    """
    path = pretrained.path_of(str(path))
    return initialization_of(read_bytes(path), str(path))


def read_bytes(path: Path, name: str = "") -> bytes:
    """Return the content of a safetensors file, which errors call `name`, by default its path; links are followed.

    Raises OSError if it cannot be read, CorruptFile if its size is wrong.
    """
    return read_packed(Path(os.path.realpath(path)), name or str(path))


def initialization_of(data: bytes, name: str) -> Initialization:
    """Return the initialization in the content of a file. Raises CorruptFile, which gives the `name` of the file."""
    found, metadata = _foreign(data, name) if not is_packed(data) else unpack(data, name)
    tensors = dict(sorted(found.items()))  # the order in which they are read differs between processes
    try:
        _check(tensors, metadata)
    except ValueError as error:
        raise CorruptFile(f"{name} is not an initialization that this version can read: {error}") from None
    return Initialization(tensors, metadata, hashlib.sha256(data).hexdigest())


def _foreign(data: bytes, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        return foreign.read(data)
    except ValueError as error:
        raise CorruptFile(f"{name} is not an initialization that this version can read: {error}") from None


def _manifest(metadata: Mapping[str, Any]) -> Manifest:
    """Return the manifest of the parameters that a file with this metadata must hold."""
    with torch.device("meta"):  # shapes only
        network = family_named(metadata.get("tasks", "atari")).network(metadata["preprocessing"])
    shared, _ = network.parameters_of(metadata["shared"])
    return Manifest.of(shared)


def _check(tensors: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    """Raise ValueError if the content is not what a run writes."""
    more = {name: shape for name, shape in _MORE.items() if name in metadata}
    schema.check(metadata, {**_METADATA, **more}, "metadata")
    scope = metadata["shared"]
    if scope not in _SCOPES:
        raise ValueError(f"shared is {scope[:40]!r}, which is not one of {', '.join(_SCOPES)}")
    family_named(metadata.get("tasks", "atari")).check_preprocessing(metadata["preprocessing"])
    _manifest(metadata).join(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32:
            raise ValueError(f"{name} is {tensor.dtype}, not float32")
        if not np.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite")
