"""Decode and check a folder of data sets before any training: `python -m leap_dist.datasets DIR`."""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

from leap_dist.config.loading import ConfigError
from leap_dist.datasets import multicv, omniglot


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each data set that has a folder. Return 2 if there is none, or if one is refused, else 0."""
    parser = argparse.ArgumentParser(prog="python -m leap_dist.datasets", description=__doc__)
    parser.add_argument("data_dir", type=Path, help="directory with a folder for each data set")
    data_dir = Path(os.path.expanduser(parser.parse_args(arguments).data_dir))
    names = [name for name in ("omniglot", *multicv.SOURCES) if (data_dir / name).is_dir()]
    if not names:
        known = ", ".join(("omniglot", *multicv.SOURCES))
        print(f"data_dir: {data_dir} has no folder named after any of {known}", file=sys.stderr)
        return 2
    refused = False
    for name in names:
        started = time.process_time()
        try:
            found = _describe(data_dir, name)
        except ConfigError as error:
            print(error, file=sys.stderr)
            refused = True
            continue
        print(f"{found}; {time.process_time() - started:.1f} s of processor time")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"memory at most: {peak:,.0f} MiB")
    return 2 if refused else 0


def _describe(data_dir: Path, name: str) -> str:
    """Return a line with the number of images and their size in memory. Raises ConfigError."""
    if name == "omniglot":
        drawings = omniglot.find(data_dir).drawings
        size = sum(images.nbytes for images in drawings.values())
        return (
            f"omniglot: {len(drawings)} alphabets, {sum(map(len, drawings.values())):,} characters, {_mebibytes(size)}"
        )
    found = multicv.find(data_dir, name)
    size = sum(_bytes_in_memory(split.images) for split in (found.train, found.test))
    part = f" ({found.part})" if found.part else ""
    return f"{found.name}{part}: {len(found.train):,} + {len(found.test):,} images, {_mebibytes(size)}"


def _bytes_in_memory(images: np.ndarray) -> int:
    """Return the bytes of an array in memory, where axes with stride 0 take none."""
    return images.itemsize * int(np.prod([n for n, step in zip(images.shape, images.strides, strict=True) if step]))


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
