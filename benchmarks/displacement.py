"""Show which part of the way from φ_0 to φ changes what an encoder computes, and which part kills its units.

    python -m benchmarks.displacement studies/reference/moving4/seed0/leap

Each row adds a part of the displacement φ − φ_0 of a run to φ_0 and shows that encoder frames of random play in each of
the run's training games. The cells have the share of units that are zero on all frames, the effective rank of the
features, and their mean norm. "Shuffled" has all numbers of the displacement in random order, so that nothing is left
of it but their distribution. The last two rows are what plain gradient descent would do: a step of the same length
against the mean of the contributions that are still in the run's journal, clipped as they were or all scaled to norm 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from benchmarks.controls import learned_by, start_of
from benchmarks.encoder_features import features_of, frames
from leap_dist.config.loading import ConfigError
from leap_dist.nn.flat_vector import Manifest, flatten
from leap_dist.storage.atomic import CorruptFile, read_packed, unpack
from leap_dist.storage.ledger import Ledger

LAYER = "linear.weight"
"""The parameter whose mean shift is singled out: each unit adds up 2,592 of its entries."""


def parts(start: np.ndarray, end: np.ndarray, manifest: Manifest) -> Iterator[tuple[str, np.ndarray]]:
    """Yield names and flat vectors of the encoders to compare, from φ_0 (`start`) and φ (`end`)."""
    step = end - start
    yield "φ_0", start
    yield "φ", end
    for title, prefix in (("its convolutions", "conv"), ("its linear layer", "linear")):
        part = np.zeros_like(step)
        for name, array in manifest.split(part).items():
            if name.startswith(prefix):
                array[...] = manifest.split(step)[name]
        yield f"only {title}", start + part
    shift = np.zeros_like(step)
    manifest.split(shift)[LAYER][...] = manifest.split(step)[LAYER].mean()
    yield "only the mean change of the linear weights", start + shift
    yield "all but that", end - shift
    yield "shuffled", start + np.random.default_rng(0).permutation(step)


def descent(run_dir: Path, length: float, size: int) -> dict[str, np.ndarray]:
    """Return steps of this length against means of the applied contributions in the journal, flat, by name.

    There are none if the journal has no applied contribution.
    """
    clips = {line["task"]: line["clip"] for line in Ledger(run_dir / "ledger.jsonl").lines()}
    found = []
    # Not through Journal, which removes the unfinished files of a server that may still run.
    for path in sorted((run_dir / "journal").glob("contribution-*.safetensors")):
        tensors, header = unpack(read_packed(path), path.name)
        task = header["lease"]["task"]["index"]
        if task in clips and tensors["vector"].size == size:
            found.append(clips[task] * tensors["vector"].astype(np.float64))
    if not found:
        return {}
    means = {
        "clipped": np.mean(found, axis=0),
        "normalized": np.mean([one / np.linalg.norm(one) for one in found], axis=0),
    }
    return {name: np.asarray(-length * mean / np.linalg.norm(mean), np.float32) for name, mean in means.items()}


def cells(vector: np.ndarray, seen: Mapping[str, Tensor]) -> list[str]:
    """Return dead units, effective rank and mean norm of an encoder's features for the frames of each game."""
    found = [features_of(vector, images) for images in seen.values()]
    return [f"{one.dead:.2f}, {one.rank:.1f}, {one.norm:.2g}" for one in found]


def table(rows: Sequence[tuple[str, np.ndarray]], seen: Mapping[str, Tensor]) -> str:
    """Return the comparison as a table in Markdown."""
    lines = [f"| φ_0 and | {' | '.join(seen)} |", "|---" * (1 + len(seen)) + "|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells(vector, seen))} |" for name, vector in rows)])


def main() -> None:
    """Print the table, and how far each parameter has moved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    given = parser.parse_args()
    try:
        learned = learned_by(given.run_dir)
        encoder = start_of(given.run_dir)
        manifest = Manifest.of(dict(encoder.named_parameters()))
        start, end = flatten(encoder.parameters()).numpy(), learned.vector(manifest)
        length = float(np.linalg.norm(end - start))
        rows = list(parts(start, end, manifest))
        steps = descent(given.run_dir, length, manifest.size)
    except (ConfigError, CorruptFile, OSError) as error:
        parser.error(str(error))
    rows += [(f"plain gradient descent of the same length, {name}", start + step) for name, step in steps.items()]
    print(table(rows, {game: frames([game], 64) for game in learned.metadata["games"]}))
    print(f"\nφ is {length:.3g} from φ_0, whose norm is {np.linalg.norm(start):.3g}")
    for name, part in manifest.split(end - start).items():
        print(f"{name}: mean change {part.mean():+.2g}, mean absolute change {np.abs(part).mean():.2g}")


if __name__ == "__main__":
    main()
