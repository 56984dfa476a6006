"""Write what a meta-learned initialization has to be better than: the one that it started from, as it was and scaled.

    python -m benchmarks.controls studies/reference/moving4/seed0/leap --out controls

`start.safetensors` is φ_0, from which the run started. `scaled.safetensors` is φ_0 with a linear layer (weights and
biases) multiplied by one number, so that its features have the same mean norm as those of the run's φ. Both norms are
measured on frames of random play in the run's training games. An agent that learns from the second file has whatever
the scale of the features is worth, and nothing else of what the run has learned.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.encoder_features import features_of, frames
from leap_dist.config.loading import ConfigError
from leap_dist.nn.actor_critic import Encoder
from leap_dist.nn.flat_vector import flatten, load_vector
from leap_dist.storage import run_directory
from leap_dist.storage.atomic import CorruptFile, pack, write_atomic
from leap_dist.tasks.task import family_of
from leap_dist.weights.initialization import Initialization, read_initialization
from leap_dist.weights.warm_start import initial_vector


def feature_norm(encoder: Encoder, seen: Tensor) -> float:
    """Return the mean norm of the features of the frames `seen`, (n, 4, 84, 84)."""
    return features_of(flatten(encoder.parameters()).numpy(), seen).norm


def learned_by(run_dir: Path) -> Initialization:
    """Return φ of a run.

    Raises ConfigError if it is no encoder of four gray frames of Atari games, CorruptFile or OSError if it cannot be
    read.
    """
    found = read_initialization(run_dir / "init.safetensors")
    if found.tasks != "atari" or found.scope != "encoder" or found.preprocessing.frames != "gray4":
        raise ConfigError(f"{run_dir}: φ is not an encoder of four gray frames of Atari games")
    return found


def start_vector(run_dir: Path) -> np.ndarray:
    """Return φ_0 of a run, flat float32. Raises ConfigError if its settings cannot be read."""
    config = run_directory.load_config(run_dir, {})
    vector = initial_vector(config)
    return family_of(config).initialization(config, config.seed, config.scope)[1] if vector is None else vector


def start_of(run_dir: Path) -> Encoder:
    """Return an encoder with φ_0 of a run. Raises ConfigError if its settings cannot be read."""
    encoder = Encoder(4)
    load_vector(dict(encoder.named_parameters()), start_vector(run_dir))
    return encoder


@torch.no_grad()
def scaled(start: Encoder, norm: float, seen: Tensor) -> tuple[Encoder, float]:
    """Return a copy of an encoder whose features have the mean norm `norm`, and the factor of its linear layer.

    The features are multiplied by the same number, because a ReLU follows the layer.
    """
    factor = norm / feature_norm(start, seen)
    copy = Encoder(4)
    copy.load_state_dict(start.state_dict())
    copy.linear.weight.mul_(factor)
    copy.linear.bias.mul_(factor)
    return copy, factor


def write(path: Path, encoder: Encoder, learned: Initialization) -> None:
    """Write an initialization that `evaluate --init` accepts, for the observations of `learned`."""
    header = {**learned.metadata, "version": 0, "meta_learner": "none", "games": [], "agent_steps": 0}
    tensors = {name: parameter.detach().numpy() for name, parameter in encoder.named_parameters()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, pack(tensors, header), "init")


def main() -> None:
    """Write both files, and print the norms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    try:
        learned = learned_by(given.run_dir)
        start = start_of(given.run_dir)
    except (ConfigError, CorruptFile, OSError) as error:
        parser.error(str(error))
    seen = frames(learned.metadata["games"])
    norm = feature_norm(learned.encoder(), seen)
    control, factor = scaled(start, norm, seen)
    for name, encoder in (("start", start), ("scaled", control)):
        write(given.out / f"{name}.safetensors", encoder, learned)
        print(f"{given.out / name}.safetensors: mean norm of the features {feature_norm(encoder, seen):.3g}")
    print(f"{given.run_dir}: {norm:.3g}; the linear layer was multiplied by {factor:.3g}")


if __name__ == "__main__":
    main()
