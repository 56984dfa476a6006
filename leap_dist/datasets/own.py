"""The user's own image data sets: files NAME.npz with four arrays, which `numpy.savez` writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from leap_dist.config.loading import ConfigError
from leap_dist.config.registry import normalize
from leap_dist.config.validation import did_you_mean
from leap_dist.datasets.splits import ClassificationProblem, Split

SIZE = 32
"""Height and width to which images are resized."""
MOST_CLASSES = 4096
MOST_BYTES = 2**32
"""Largest size of an array."""
LAYOUT = (
    "train_images and test_images, uint8 (N, H, W) or (N, H, W, 3), and train_labels and test_labels, integers from 0, "
    "(N,)"
)


def find(data_dir: Path, name: str) -> ClassificationProblem:
    """Read `data_dir/NAME.npz`, whose name may also be spelled with capitals and dashes, and resize its images.

    Raises ConfigError, whose one line says what is wrong with the file, or which files exist.
    """
    there: dict[str, list[Path]] = {}
    for path in sorted(data_dir.glob("*.npz")):
        there.setdefault(normalize(path.stem), []).append(path)
    if name not in there:
        known = did_you_mean(name, there) or (f"; there are {', '.join(there)}" if there else "")
        raise ConfigError(f"data_dir: there is no {name}.npz in {data_dir}{known}")
    path, *others = there[name]
    if others:
        raise ConfigError(
            f"data_dir: {name} may be {path.name} or {others[0].name}, because only letters from a to z and digits "
            "count; rename one"
        )
    try:
        train, test = (_split(path, word) for word in ("train", "test"))
    except Exception as error:  # NumPy reads headers with Python's parser, which raises many kinds for damaged ones
        is_clear = isinstance(error, OSError | ValueError | KeyError | MemoryError)
        reason = error if is_clear else f"it is damaged, or not an archive ({error})"
        raise ConfigError(f"data_dir: {path} cannot be used: {reason}; it must hold {LAYOUT}") from None
    classes = int(train.labels.max()) + 1
    if missing := sorted(set(range(classes)) - set(train.labels.tolist())):
        raise ConfigError(f"data_dir: {path} has training images of class {classes - 1}, but none of {missing[0]}")
    if int(test.labels.max()) >= classes:
        raise ConfigError(f"data_dir: {path} has test images of class {test.labels.max()}, but no training images")
    pixels = train.images.reshape(-1, 3) / 255
    mean, std = pixels.mean(0), pixels.std(0)
    return ClassificationProblem(
        name, classes, train, test, tuple(mean.tolist()), tuple(np.maximum(std, 1e-3).tolist()), ""
    )


def _split(path: Path, word: str) -> Split:
    """Return one part, resized and in color. Raises whatever NumPy raises for damaged files."""
    with np.load(path) as archive:  # never reads Python objects
        for name in (f"{word}_images", f"{word}_labels"):
            if archive.zip.getinfo(f"{name}.npy").file_size > MOST_BYTES:
                raise ValueError(f"{name} has more than {MOST_BYTES:,} bytes")
        images, labels = archive[f"{word}_images"], archive[f"{word}_labels"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (1,), (3,)):
        raise ValueError(f"{word}_images is {images.dtype} {images.shape}")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer) or not len(labels):
        raise ValueError(f"{word}_labels is {labels.dtype} {labels.shape} for {len(images)} images")
    if labels.min() < 0 or labels.max() >= MOST_CLASSES:
        raise ValueError(f"{word}_labels has {labels.min()} to {labels.max()}")
    return Split(np.stack([_image(image) for image in images]), labels.astype(np.int64))


def _image(pixels: np.ndarray) -> np.ndarray:
    """Return one image as uint8 (SIZE, SIZE, 3)."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels).convert("RGB")
    return np.asarray(image if image.size == (SIZE, SIZE) else image.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
