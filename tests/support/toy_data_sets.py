"""Small parts of data sets, as the reader finds them, with classes that a few updates tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from leap_dist.datasets import multicv


def write_part(data_dir: Path, name: str, *, train: int = 6, test: int = 2, seed: int = 0) -> None:
    """`data_dir/name/name_N.npz`: of each class so many images, with a pattern of its own, as bright as published."""
    source, random = multicv.SOURCES[name], np.random.default_rng(seed)
    shape = (multicv.SIZE, multicv.SIZE, 3) if source.enlarge is None else (28, 28)
    brightness = 255 * float(np.mean(source.mean))
    patterns = random.uniform(0.4, 1.6, (source.classes, *shape)) * brightness
    arrays: dict[str, np.ndarray] = {}
    for word, each in (("train", train), ("test", test)):
        labels = np.repeat(np.arange(source.classes), each)
        noise = random.uniform(-0.2, 0.2, (len(labels), *shape)) * brightness
        arrays[f"{word}_images"] = np.clip(patterns[labels] + noise, 0, 255).astype(np.uint8)
        arrays[f"{word}_labels"] = labels.astype(np.uint8)
    folder = data_dir / name
    folder.mkdir(parents=True)
    np.savez(folder / f"{name}_{source.classes * (train + test)}.npz", **arrays)


def short_run(data_dir: Path) -> dict[str, Any]:
    """Write a part of MNIST to a directory, and return the settings of a run of two meta-updates on it."""
    write_part(data_dir, "mnist")
    return {
        "preset": "smoke", "tasks": "multi-cv", "games": ("mnist",), "data_dir": str(data_dir),
        "task_steps": 64, "meta_updates": 2, "worker.device": "cpu", "worker.precision": "float32",
    }  # fmt: skip
