"""Export of an initialization to another library: weights, code that loads them, preprocessing and a model card.

Files that are the same in every export are copied from templates/; what depends on the run is in the model card.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
import secrets
import shutil
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from safetensors.torch import save

from leap_dist.config import pretrained
from leap_dist.config.files import create_new
from leap_dist.config.loading import ConfigError
from leap_dist.config.plurals import counted
from leap_dist.config.settings import ENVIRONMENTS
from leap_dist.storage import manifest
from leap_dist.storage.atomic import DECODE_ERRORS, CorruptFile
from leap_dist.weights.initialization import Initialization, InitializedEncoder, read_initialization


class Target(NamedTuple):
    """A library to export to."""

    name: str
    library: str
    """Name of the library on model hubs."""
    weights: str
    """Name of the file that holds the weights."""
    prefix: dict[str, str]
    """Names of the layers in the library's network, by our names."""
    code: tuple[str, ...]
    """Paths of the files to copy, relative to templates/."""


_OURS = {"conv1": "conv1", "conv2": "conv2", "linear": "linear"}
_CLEANRL = {"conv1": "network.0", "conv2": "network.2", "linear": "network.5"}
TARGETS = {
    target.name: target
    for target in (
        Target(
            "sb3",
            "stable-baselines3",
            "encoder.safetensors",
            _OURS,
            ("sb3/features_extractor.py", "sb3/environments.py", "sb3/example.py"),
        ),
        Target("torch", "pytorch", "encoder.safetensors", _OURS, ("torch/load.py", "environment.py")),
        Target("cleanrl", "cleanrl", "agent.safetensors", _CLEANRL, ("cleanrl/agent.py", "environment.py")),
    )
}
_KINDS = {"gray4": "Four gray frames", "rgb1": "One RGB frame", "rgb4": "Four RGB frames"}
_REWARDS = {"bound": "the game's, within ±5", "sign": "−1, 0 or 1", "none": "the game's"}


def export(init: Path, to: str, out: Path, *, linear_seed: int | None = None) -> list[str]:
    """Export the initialization in the file `init` to the new folder `out`, completely or not at all.

    Args:
        init: path of an init.safetensors.
        to: name of the library, a key of TARGETS.
        out: folder to create; it must not exist yet, or be empty.
        linear_seed: seed of the linear layer, as for `load_encoder`.

    Returns:
        Names of the files.

    Raises:
        ConfigError: in one line, if something is missing, unknown or in the way.
        CorruptFile: in one line, if `init` is damaged.
    """
    if to not in TARGETS:
        near = difflib.get_close_matches(to.lower(), TARGETS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"to: {to[:80]!r} is not one of {', '.join(TARGETS)}{hint}")
    if linear_seed is not None and not 0 <= linear_seed < 2**31:
        raise ConfigError(f"linear-seed: {linear_seed} is out of range; use 0 to {2**31 - 1}")
    init = pretrained.path_of(str(init))
    initialization = _read(init)
    if initialization.scope == "convolutions" and linear_seed is None:
        raise ConfigError(
            f"linear-seed: {init} holds the convolutions only; give --linear-seed 0, or any other seed, for a fresh "
            "linear layer behind them"
        )
    encoder = initialization.encoder(linear_seed=linear_seed)
    files = _files(TARGETS[to], initialization, encoder, init.resolve().parent)
    _write(out, files)
    return list(files)


def _read(path: Path) -> Initialization:
    try:
        found = read_initialization(path)
        if found.tasks != "atari":
            raise ConfigError(
                f"init: {path} is for tasks {found.tasks}, not for Atari games; use leap_dist."
                f"{'load_encoder' if found.tasks in ENVIRONMENTS else 'load_network'} in a program"
            )
        return found
    except FileNotFoundError:
        names = [other.name for other in path.parent.glob("*.safetensors")]
        near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.0)
        hint = f"did you mean {path.parent / near[0]}?" if near else pretrained.choices(scratch=False)
        raise ConfigError(f"init: there is no {path}; {hint}") from None
    except OSError as error:
        raise ConfigError(
            f"init: {path} cannot be read ({error.strerror}); {pretrained.choices(scratch=False)}"
        ) from None
    except CorruptFile as error:
        raise CorruptFile(f"init: {error}") from None


def _files(
    target: Target, initialization: Initialization, encoder: InitializedEncoder, run_dir: Path
) -> dict[str, bytes]:
    """Return the content of all files of the export, by name."""
    tensors = {}
    for name, tensor in encoder.state_dict().items():
        layer, _, kind = name.partition(".")
        tensors[f"{target.prefix[layer]}.{kind}"] = tensor
    files = {
        target.weights: save(tensors, {"format": "pt"}),
        "preprocessing.json": json.dumps(_preprocessing(initialization), indent=2).encode() + b"\n",
    }
    templates = resources.files("leap_dist.weights").joinpath("templates")
    for path in target.code:
        files[Path(path).name] = templates.joinpath(path).read_bytes()
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    hashes["init.safetensors (its source)"] = initialization.sha256
    preprocessing = initialization.preprocessing
    card = Template(templates.joinpath("README.md").read_text(encoding="utf-8")).substitute(
        library=target.library,
        facts="\n".join(f"| {name} | {value} |" for name, value in _facts(initialization, run_dir).items()),
        usage=templates.joinpath(target.name, "usage.md").read_text(encoding="utf-8").strip(),
        frames=_KINDS[preprocessing.frames],
        frame_skip=preprocessing.frame_skip,
        order=preprocessing.order,
        hashes="\n".join(f"{digest}  {name}" for name, digest in hashes.items()),
    )
    return {"README.md": card.encode(errors="replace"), **files}


def _preprocessing(initialization: Initialization) -> dict[str, Any]:
    preprocessing = initialization.preprocessing
    return {
        **dataclasses.asdict(preprocessing),
        "channels": preprocessing.channels,
        "order": preprocessing.order,
        "max_pooled_frames": min(2, preprocessing.frame_skip),
        "resize": "area averaging",
        "before_an_episode": "zeros",
        "input": "float32",
    }


def _facts(initialization: Initialization, run_dir: Path) -> dict[str, str]:
    """Return the facts for the model card, from the metadata and from the run directory, if the file is in one."""
    metadata = initialization.metadata
    games = metadata["games"]
    facts = {
        f"meta-trained on {counted(len(games), 'game')}": ", ".join(games),
        "meta-learner": metadata["meta_learner"],
        "meta-updates": f"{metadata['version']:,}" if metadata["version"] else "none yet: the weights are random",
    }
    names = {"mode": "mode", "task_steps": "agent steps per task", "agent_steps": "agent steps in all"}
    facts |= {
        text: f"{metadata[name]:,}" if isinstance(metadata[name], int) else metadata[name]
        for name, text in names.items()
        if name in metadata
    }
    facts |= {
        "preset that the settings started from": metadata["preset"],
        "meta-learned part": {
            "encoder": "the whole encoder",
            "convolutions": "the convolutions; the linear layer is a fresh one",
            "model": "the encoder, and one head for all games, which is left out here",
        }[initialization.scope],
    }
    if (config := initialization.settings_in(run_dir)) is not None:
        meta = config.meta
        facts |= {
            "meta-optimizer": f"{meta.optimizer}, learning rate {meta.learning_rate:g}, |B| = {meta.batch_size}",
            "rewards in training": _REWARDS[config.agent.reward_clip],
            "sticky actions": f"{config.atari.sticky_actions:g}",
            "seed": str(config.seed),
            **_manifest(run_dir),
        }
    return {name: " ".join(value.replace("|", "\\|").split()) for name, value in facts.items()}


def _manifest(run_dir: Path) -> dict[str, str]:
    try:
        session = manifest.last_session(run_dir)
    except (OSError, CorruptFile, *DECODE_ERRORS):
        return {}
    versions = ", ".join(f"{n} {session['packages'].get(n, 'unknown')}" for n in ("torch", "ale-py"))
    return {"leap-dist revision": session["leap_dist"], "last started": session["started"], "with": versions}


def _write(out: Path, files: dict[str, bytes]) -> None:
    """Create the folder atomically. Raises ConfigError if something is in the way."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"out: {out} is not a directory; choose a new one")
    try:
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"out: {out} is not empty; choose a new one")
        final = Path(os.path.realpath(out))
        if final == Path.cwd():  # replacing it would leave the user's shell in the old one
            raise ConfigError(f"out: {out} is the current directory; choose a new one")
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.{secrets.token_hex(8)}.tmp")
        try:
            temporary.mkdir()
            for name, data in files.items():
                with create_new(temporary / name) as file:
                    file.write(data)
            os.replace(temporary, final)
        finally:
            with contextlib.suppress(OSError):
                shutil.rmtree(temporary)
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be written ({error.strerror}); choose another") from None
