"""The data sets of Multi-CV (the paper's appendix D), prepared as in Serrà et al. (2018): 32 × 32, three channels.

Sizes, means and standard deviations are those of Serrà et al.'s paper and code, for images divided by 255. MNIST and
Fashion-MNIST get a border of zeros (their means include it); notMNIST is enlarged from 28 × 28 by Lanczos' filter; gray
images are repeated for three channels; traffic signs and faces are resized as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from leap_dist.config.loading import ConfigError
from leap_dist.datasets import folders, formats
from leap_dist.datasets.folders import DatasetError, DatasetMissing, pad, read_npz, resize
from leap_dist.datasets.splits import ClassificationProblem, Split, divide, repeat_channel

SIZE = 32
_NEAR = 0.06
"""Largest difference of the images' mean from the published one. The data sets in the same format, MNIST, Fashion-MNIST
and notMNIST, have means that differ by 0.1 and more."""
_LARGEST_PART = 100_000
"""Largest number of images in a part of a data set whose size is not fixed."""
SUBSET_TEST_FRACTION = 0.2
"""Fraction of a data set's test images that is held out if only those are present."""


@dataclass(frozen=True)
class Source:
    """A data set: its properties, its reader, and advice on where to get it.

    Args:
        title: name of the data set in messages.
        classes: number of classes.
        train: number of training images; 0 if it depends on who collected them.
        test: number of test images; likewise.
        mean: mean of images / 255: one number, or one for each channel.
        std: standard deviation of the same.
        home: address from which the user can download it.
        layout: description of the files that its folder must hold.
        read: function that reads both splits from a folder.
        enlarge: function that enlarges gray images from 28 × 28 to 32 × 32; None if the images are 32 × 32 in color.
        balanced: whether all classes have the same number of images.
    """

    title: str
    classes: int
    train: int
    test: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    home: str
    layout: str
    read: Callable[[Path, Source, int], tuple[Split, Split]]
    enlarge: Callable[[np.ndarray, int], np.ndarray] | None = None
    balanced: bool = False


def find(data_dir: Path, name: str, seed: int = 0) -> ClassificationProblem:
    """Decode and check the data set `name` in `data_dir/name`: a pure function of the files and the seed.

    If only a part of the data set is present, return that part under a name that says so: `cifar10_5000` for
    cifar10_5000.npz, `mnist_t10k` for the test images alone. The seed matters only for such parts and for FaceScrub,
    which have no published splits.

    Raises ConfigError, whose one line says what was found, where to get the data set, and how to lay it out.
    """
    if name not in SOURCES:
        raise ConfigError(f"data set: no {name[:40]!r} among {', '.join(SOURCES)}")
    source, folder = SOURCES[name], data_dir / name
    try:
        if not folder.is_dir():
            raise DatasetMissing(f"{folder} is not a folder")
        try:
            train, test = source.read(folder, source, seed)
            found = _prepared(name, "", source, train, test)
        except DatasetMissing as missing:
            part = _part(folder, name, source, seed)
            if part is None:
                raise missing from None
            found = part
        _check(found, source, folder)
    except (DatasetError, OSError) as error:
        advice = f"{source.title} comes from {source.home}; {folder} must hold {source.layout}"
        raise ConfigError(f"data_dir: {error}. {advice}") from None
    return found


def at_hand(data_dir: Path) -> tuple[str, ...]:
    """Return the names of the data sets that have a folder in `data_dir`, whatever it contains."""
    return tuple(name for name in SOURCES if (data_dir / name).is_dir())


def _prepared(name: str, part: str, source: Source, train: Split, test: Split) -> ClassificationProblem:
    mean, std = (values * (3 // len(values)) for values in (source.mean, source.std))
    return ClassificationProblem(name, source.classes, _fit(train, source), _fit(test, source), mean, std, part)


def _fit(split: Split, source: Source) -> Split:
    if source.enlarge is None:
        return split
    return Split(repeat_channel(source.enlarge(split.images[..., 0], SIZE)[..., None]), split.labels)


def _check(found: ClassificationProblem, source: Source, folder: Path) -> None:
    """Check labels, numbers of images and their mean. Raises DatasetError if they are not the data set's."""
    for word, split, count in (("training", found.train, source.train), ("test", found.test, source.test)):
        if count and not found.part and len(split) != count:
            raise DatasetError(f"{folder} has {len(split):,} {word} images, not {count:,}")
        if len(split) == 0 or split.labels.min() < 0 or split.labels.max() >= source.classes:
            raise DatasetError(f"{folder}: {word} labels are not from 0 to {source.classes - 1}")
        counts = np.bincount(split.labels, minlength=source.classes)
        if counts.min() == 0:
            raise DatasetError(f"{folder} has no {word} image of class {counts.argmin()}")
        if source.balanced and not found.part and counts.min() != counts.max():
            raise DatasetError(
                f"{folder} has from {counts.min():,} to {counts.max():,} {word} images of a class, "
                f"not {len(split) // source.classes:,} of each"
            )
        some = split.images[:: max(1, len(split) // 2000)]
        mean, published = float(some.mean()) / 255, float(np.mean(source.mean))
        if source.train and abs(mean - published) > _NEAR:
            raise DatasetError(
                f"{folder}: the {word} images are not {source.title}: their mean is {mean:.2f}, not {published:.2f}"
            )


# Parts of data sets


def _part(folder: Path, name: str, source: Source, seed: int) -> ClassificationProblem | None:
    """Read a part of a data set; None if there is no file of a part. Raises DatasetError."""
    found = (re.fullmatch(rf"{name}_([1-9]\d{{0,5}})\.npz", path.name) for path in folder.iterdir())
    if totals := [int(match[1]) for match in found if match]:
        total = max(totals)
        train, test = _from_archive(folder / f"{name}_{total}.npz", source, total)
        return _prepared(f"{name}_{total}", f"{total:,} images of {source.title}", source, train, test)
    if source.read is _mnist and (everything := formats.mnist_test(folder, source.test)):
        try:
            kept, held = divide(everything.labels, SUBSET_TEST_FRACTION, seed)
        except ValueError as error:
            raise DatasetError(f"{folder}: {error}") from None
        words = f"the {source.test:,} test images of {source.title}, a fifth of them held out"
        return _prepared(f"{name}_t10k", words, source, everything.take(kept), everything.take(held))
    return None


def _from_archive(path: Path, source: Source, total: int) -> tuple[Split, Split]:
    """Read NAME_N.npz with train_images, train_labels, test_images and test_labels: N images in all.

    Raises DatasetError if it holds anything else.
    """
    if total > (source.train + source.test or _LARGEST_PART):
        raise DatasetError(f"the name of {path} states more images than {source.title} has")
    image = (SIZE, SIZE, 3) if source.enlarge is None else (formats.MNIST_SIZE, formats.MNIST_SIZE)
    some = range(1, total)
    arrays = read_npz(
        path,
        {
            f"{word}_{what}": (np.uint8, (some, *shape))
            for word in ("train", "test")
            for what, shape in (("images", image), ("labels", ()))
        },
    )
    splits = []
    for word in ("train", "test"):
        images, labels = arrays[f"{word}_images"], arrays[f"{word}_labels"]
        if len(images) != len(labels):
            raise DatasetError(f"{path} has {len(images):,} {word} images and {len(labels):,} labels")
        splits.append(Split(images.reshape(len(images), *image[:2], -1), labels.astype(np.int64)))
    if (found := sum(map(len, splits))) != total:
        raise DatasetError(f"{path} holds {found:,} images, not the {total:,} of its name")
    return splits[0], splits[1]


# Readers with one signature: (folder, source, seed) → (training split, test split)


def _mnist(folder: Path, source: Source, seed: int) -> tuple[Split, Split]:
    return formats.mnist(folder, source.train, source.test)


def _cifar10(folder: Path, source: Source, seed: int) -> tuple[Split, Split]:
    return formats.cifar10(folder, source.train, source.test)


def _cifar100(folder: Path, source: Source, seed: int) -> tuple[Split, Split]:
    return formats.cifar100(folder, source.train, source.test)


def _svhn(folder: Path, source: Source, seed: int) -> tuple[Split, Split]:
    return formats.svhn(folder, source.train, source.test)


def _gtsrb(folder: Path, source: Source, seed: int) -> tuple[Split, Split]:
    return folders.gtsrb(folder, source.train, source.test, classes=source.classes, size=SIZE)


def _facescrub(folder: Path, source: Source, seed: int) -> tuple[Split, Split]:
    return folders.facescrub(folder, seed, people=source.classes, size=SIZE)


_IDX_LAYOUT = (
    "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, "
    "with .gz or without"
)
_NATURAL = ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255))

SOURCES = {
    "cifar10": Source(
        title="CIFAR-10",
        classes=10,
        train=50_000,
        test=10_000,
        mean=_NATURAL[0],
        std=_NATURAL[1],
        home="https://www.cs.toronto.edu/~kriz/cifar.html (binary version)",
        layout="data_batch_1.bin to data_batch_5.bin and test_batch.bin, or the folder cifar-10-batches-bin with them",
        read=_cifar10,
        balanced=True,
    ),
    "cifar100": Source(
        title="CIFAR-100",
        classes=100,
        train=50_000,
        test=10_000,
        mean=_NATURAL[0],
        std=_NATURAL[1],
        home="https://www.cs.toronto.edu/~kriz/cifar.html (binary version)",
        layout="train.bin and test.bin, or the folder cifar-100-binary with them",
        read=_cifar100,
        balanced=True,
    ),
    "mnist": Source(
        title="MNIST",
        classes=10,
        train=60_000,
        test=10_000,
        mean=(0.1,),
        std=(0.2752,),
        home="http://yann.lecun.com/exdb/mnist/",
        layout=_IDX_LAYOUT,
        read=_mnist,
        enlarge=pad,
    ),
    "svhn": Source(
        title="SVHN",
        classes=10,
        train=73_257,
        test=26_032,
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.198, 0.201, 0.197),
        home="http://ufldl.stanford.edu/housenumbers/ (format 2)",
        layout="train_32x32.mat and test_32x32.mat",
        read=_svhn,
    ),
    "fashion_mnist": Source(
        title="Fashion-MNIST",
        classes=10,
        train=60_000,
        test=10_000,
        mean=(0.2190,),
        std=(0.3318,),
        home="https://github.com/zalandoresearch/fashion-mnist",
        layout=_IDX_LAYOUT,
        read=_mnist,
        enlarge=pad,
        balanced=True,
    ),
    "gtsrb": Source(
        title="GTSRB",
        classes=43,
        train=39_209,
        test=12_630,
        mean=(0.3398, 0.3117, 0.3210),
        std=(0.2755, 0.2647, 0.2712),
        home="https://benchmark.ini.rub.de/gtsrb_dataset.html (final training and test sets)",
        layout="GTSRB/Final_Training/Images/NNNNN with GT-NNNNN.csv, GTSRB/Final_Test/Images and GT-final_test.csv",
        read=_gtsrb,
    ),
    "facescrub": Source(
        title="FaceScrub",
        classes=100,
        train=0,
        test=0,
        mean=(0.5163, 0.5569, 0.4695),
        std=(0.2307, 0.2272, 0.2479),
        home="http://vintage.winklerbros.net/facescrub.html",
        layout="a folder for each person with .png or .jpg pictures of the face, cropped",
        read=_facescrub,
    ),
    "notmnist": Source(
        title="notMNIST",
        classes=10,
        train=60_000,
        test=10_000,
        mean=(0.4254,),
        std=(0.4501,),
        home="https://github.com/davidflanagan/notMNIST-to-MNIST",
        layout=_IDX_LAYOUT,
        read=_mnist,
        enlarge=resize,
        balanced=True,
    ),
}
"""Data sets by name, which is also the name of the folder, in the order of Serrà et al."""
