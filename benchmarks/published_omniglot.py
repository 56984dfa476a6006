"""Run the authors' published Omniglot code beside ours, on the same images, and compare their curves.

    git clone https://github.com/amzn/metalearn-leap CHECKOUT
    python -m benchmarks.published_omniglot prepare --seed 0 --data-dir data --out parity/seed0
    python -m benchmarks.published_omniglot run CHECKOUT --images parity/seed0 --arm leap --seed 0 --meta-updates 100
    python launch.py study --preset authors --tasks omniglot … --out studies/parity
    python -m benchmarks.published_omniglot compare --theirs parity/seed0 --ours studies/parity/20/seed0/test

`prepare` writes the drawings that a run of ours with this seed sees, in the folders and files that the published code
expects: 28 × 28 pixels, 20 characters of each alphabet, black ink on white. The published code divides a shuffled list
of alphabets; folders are numbered so that it trains on, validates on and tests on the same alphabets as ours.

`run` executes the published `src/omniglot/main.py` in a process of its own, which needs `torchvision` beside this
project's packages. What a version of PyTorch older than ours did differently is set before the script starts
(`adapt`); the checkout itself is not changed. `--scales ones` leaves out the one change that affects results.

`compare` shows the error of every arm on the training batches while it learns a test alphabet, and on the held-out
images afterwards, with the standard error of the difference over alphabets.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import random
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from leap_dist.config.loading import ConfigError
from leap_dist.config.registry import ALPHABETS, normalize, partition
from leap_dist.datasets import omniglot
from leap_dist.evaluation.runs import load_all

PUBLISHED_SEED = 8879
"""Default of the published script: it shuffles the list of alphabets, which `prepare` anticipates."""
ARMS = {"leap": "leap", "ft": "finetune-multi", "no": "none", "reptile": "reptile", "fomaml": "fomaml"}
"""Names of the arms in the published code, and in ours."""
IMAGES = "omniglot-py/images_resized"


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.published_omniglot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    prepared = commands.add_parser("prepare", help="write the images", allow_abbrev=False)
    prepared.add_argument("--seed", type=int, default=0, help="seed of our run")
    prepared.add_argument("--pretraining", type=int, default=20, help="number of alphabets to train on")
    prepared.add_argument("--data-dir", type=Path, required=True)
    prepared.add_argument("--out", type=Path, required=True, help="a new folder")
    running = commands.add_parser("run", help="run an arm of the published code", allow_abbrev=False)
    running.add_argument("checkout", type=Path, help="clone of the published repository")
    running.add_argument("--images", type=Path, required=True, help="what prepare has written")
    running.add_argument("--arm", choices=ARMS, required=True)
    running.add_argument("--seed", type=int, default=0, help="of weights, batches and maps; not of alphabets")
    running.add_argument("--meta-updates", type=int, default=100)
    running.add_argument("--scales", choices=["drawn", "ones"], default="drawn", help="initial scales of batch norm")
    compared = commands.add_parser("compare", help="compare the results", allow_abbrev=False)
    compared.add_argument("--theirs", type=Path, required=True, nargs="+", help="folders of prepare, after run")
    compared.add_argument("--ours", type=Path, required=True, nargs="+", help="folders of tests of our studies")
    given = parser.parse_args()
    try:
        if given.command == "prepare":
            prepare(given.data_dir, given.seed, given.pretraining, given.out)
        elif given.command == "run":
            check(given.checkout, given.images)
        else:
            compare(given.theirs, given.ours)
    except (ConfigError, OSError, ValueError) as error:
        parser.error(str(error))
    if given.command == "run":
        run(given.checkout, given.images, given.arm, given.seed, given.meta_updates, given.scales == "drawn")


# Images ---------------------------------------------------------------------------------------------------------------


def prepare(data_dir: Path, seed: int, pretraining: int, out: Path) -> None:
    """Write images and alphabets.json for the published code.

    Raises FileExistsError if `out` has images, ValueError for a number of alphabets that does not exist, and
    ConfigError if the data is missing or damaged.
    """
    if (out / IMAGES).exists():
        raise FileExistsError(f"--out: {out} has images already")
    found = omniglot.find(data_dir, "nearest")
    divided = partition(ALPHABETS, pretraining, seed)
    published = {normalize(name): name for name in found.alphabets}
    parts = {"training": divided.pretraining, "test": divided.held_out, "validation": divided.validation}
    order = [name for part in parts.values() for name in part]
    folders = dict(zip(order, _numbered(order), strict=True))
    for name, folder in folders.items():
        data = found.task(published[name], seed, first=True)
        for character in range(data.classes):
            place = out / IMAGES / folder / f"character{character:02d}"
            place.mkdir(parents=True)
            drawings = np.concatenate([s.images[s.labels == character, ..., 0] for s in (data.test, data.train)])
            for number, drawing in enumerate(drawings):  # the first five are held out
                Image.fromarray(255 - drawing).save(place / f"{number:02d}.png")
    (out / "alphabets.json").write_text(json.dumps(parts, indent=1))
    print(f"{out}: {len(order)} alphabets of {omniglot.CLASSES} characters")


def _numbered(order: Sequence[str]) -> list[str]:
    """Return names of folders that the published code's shuffle brings into the order of `order`."""
    positions = list(range(len(order)))
    random.Random(PUBLISHED_SEED).shuffle(positions)
    names = [""] * len(order)
    for place, position in enumerate(positions):
        names[place] = f"{position:02d}-{order[place]}"
    return names


# The published code ---------------------------------------------------------------------------------------------------


def check(checkout: Path, images: Path) -> None:
    """Raise FileNotFoundError if the published code, its images or `torchvision` are missing."""
    if not (checkout / "src" / "omniglot" / "main.py").is_file():
        raise FileNotFoundError(f"{checkout} is not a clone of the published repository: no src/omniglot/main.py")
    if not (images / "alphabets.json").is_file():
        raise FileNotFoundError(f"--images: {images} has not been written by prepare: no alphabets.json")
    if importlib.util.find_spec("torchvision") is None:
        raise FileNotFoundError("the published code needs torchvision, which is not installed")


def run(checkout: Path, images: Path, arm: str, seed: int, meta_updates: int, drawn_scales: bool) -> None:
    """Execute the published script for one arm. Its logs are written below `images`/logs/ARM."""
    source = checkout / "src"
    sys.path[:0] = [str(source / "omniglot"), str(source / "leap"), str(source / "maml")]
    adapt(drawn_scales=drawn_scales)
    import torch

    torch.set_num_threads(1)
    script = source / "omniglot" / "main.py"
    sys.argv = [str(script), "--root", str(images), "--log_dir", str(images / "logs"), "--suffix", f"seed{seed}"]
    sys.argv += ["--meta_model", arm, "--num_pretrain", str(_pretraining(images)), "--no_cuda"]
    sys.argv += ["--meta_train_steps", str(meta_updates), "--test_ival", str(meta_updates), "--overwrite"]
    seeded = functools.partial(torch.manual_seed, seed)  # `--seed` would also shuffle the alphabets in another way
    torch.manual_seed = lambda _: seeded()  # type: ignore[assignment]
    runpy.run_path(str(script), run_name="__main__")


def _pretraining(images: Path) -> int:
    return len(json.loads((images / "alphabets.json").read_text())["training"])


def adapt(*, drawn_scales: bool) -> None:
    """Let PyTorch and torchvision behave as their versions of 2018 did, where the published code relies on it.

    - Batch norm draws its scales γ from [0, 1) (PyTorch 0.4), if `drawn_scales`.
    - `zero_grad` sets gradients to zero instead of removing them.
    - `torch.load` accepts whole models.
    - Leap's loss is detached: results are the same, but PyTorch would keep the graphs of all steps in memory.
    - Images are read once instead of at every visit, and lists of files are sorted.
    """
    torch: Any = importlib.import_module("torch")
    reader: Any = importlib.import_module("torchvision.datasets.omniglot")
    utils: Any = importlib.import_module("torchvision.datasets.utils")
    nn, leap = torch.nn, importlib.import_module("leap").Leap  # the published package
    norm, load, update, zero = (
        nn.BatchNorm2d.reset_parameters,
        torch.load,
        leap.update,
        torch.optim.Optimizer.zero_grad,
    )

    def reset_parameters(layer: Any) -> None:
        norm(layer)
        if drawn_scales:
            nn.init.uniform_(layer.weight)

    def detached(meta: Any, loss: Any, *rest: Any, **more: Any) -> None:
        update(meta, loss.detach(), *rest, **more)

    def in_order(function: Callable[..., list[str]]) -> Callable[..., list[str]]:
        return lambda *given, **more: sorted(function(*given, **more))

    @functools.cache
    def read(path: str) -> Image.Image:
        with Image.open(path) as image:
            return image.convert("L")

    nn.BatchNorm2d.reset_parameters = reset_parameters
    torch.load = functools.partial(load, weights_only=False)
    torch.optim.Optimizer.zero_grad = lambda optimizer, set_to_none=False: zero(optimizer, set_to_none)
    leap.update = detached
    reader.Omniglot.loader = staticmethod(read)
    utils.list_dir, utils.list_files = in_order(utils.list_dir), in_order(utils.list_files)


# Comparison -----------------------------------------------------------------------------------------------------------


class Learned(NamedTuple):
    """What one arm did on one test alphabet."""

    curve: np.ndarray
    """Error on the training batch at each step, (steps,)."""
    held_out: float
    """Error on the held-out images after the last step."""


def theirs_of(folder: Path) -> dict[str, dict[str, Learned]]:
    """Return the results of the published code, by our names of arms and alphabets. Arms without a test are left out.

    Raises FileNotFoundError if `folder` is not what `prepare` and `run` have written, and ValueError if an arm was run
    with several seeds, which are no pairs of one study of ours.
    """
    names = json.loads((folder / "alphabets.json").read_text())["test"]
    found: dict[str, dict[str, Learned]] = {}
    for arm, name in ARMS.items():
        for last in sorted((folder / "logs" / arm).glob(f"seed*/results_{len(names) - 1}_test_val.log")):
            logs = last.parent
            if name in found:
                raise ValueError(f"{logs.parent} has runs of several seeds; leave one")
            curves = [_accuracies(logs / f"results_{number}_test_train.log") for number in range(len(names))]
            tests = [_accuracies(logs / f"results_{number}_test_val.log") for number in range(len(names))]
            found[name] = {
                alphabet: Learned(1 - curve, float(1 - test.mean()))
                for alphabet, curve, test in zip(names, curves, tests, strict=True)
            }
    return found


def _accuracies(log: Path) -> np.ndarray:
    """Return the accuracies of the batches in the last line of a published log."""
    return np.array([float(value) for value in log.read_text().splitlines()[-1].split(",")[5].split(";")[:-1]])


def ours_of(folder: Path) -> dict[str, dict[str, Learned]]:
    """Return the results of our tests, by arm and alphabet. Raises ValueError if a run is damaged."""
    runs, damaged = load_all(folder)
    if damaged:
        raise ValueError(damaged[0])
    found: dict[str, dict[str, Learned]] = {}
    for run in runs:
        found.setdefault(run.arm, {})[run.game] = Learned(run.returns, run.curve[-1]["test_error"])
    return found


def compare(theirs: Sequence[Path], ours: Sequence[Path]) -> None:
    """Print the table: percent of errors of both, and the difference with its standard error over alphabets.

    Raises FileNotFoundError or ValueError if there is nothing to compare.
    """
    published = [theirs_of(folder) for folder in theirs]
    own = [ours_of(folder) for folder in ours]
    if len(published) != len(own):
        raise ValueError(f"--theirs has {len(published)} folders and --ours {len(own)}; give one of each for a seed")
    if not any(seen.keys() & mine.keys() for seen, mine in zip(published, own, strict=True)):
        raise ValueError("no arm has been tested by both: run the published code and our study first")
    print("| arm | error (%) | theirs | ours | difference, in standard errors |\n|---|---|---|---|---|")
    for arm in ARMS.values():
        pairs = [
            (seen[arm][alphabet], mine[arm][alphabet])
            for seen, mine in zip(published, own, strict=True)
            for alphabet in seen.get(arm, {})
            if arm in mine
        ]
        for label, value in (_MEASURES if pairs else {}).items():
            a, b = (np.array([100 * value(pair[side]) for pair in pairs]) for side in (0, 1))
            error = float((b - a).std(ddof=1) / np.sqrt(len(a)))
            mean = float((b - a).mean())
            ratio = f"({mean / error:+.1f})" if error else "(–)"
            cells = f"{a.mean():.1f} | {b.mean():.1f} | {mean:+.1f} ± {error:.1f} {ratio}"
            print(f"| {arm} | {label} | {cells} |")


def _batches(first: int, last: int) -> Callable[[Learned], float]:
    return lambda learned: float(learned.curve[first:last].mean())


_MEASURES: dict[str, Callable[[Learned], float]] = {
    "training batches 1 to 5": _batches(0, 5),
    "6 to 25": _batches(5, 25),
    "26 to 50": _batches(25, 50),
    "51 to 75": _batches(50, 75),
    "76 to 100": _batches(75, 100),
    "1 to 100": _batches(0, 100),
    "held-out images": lambda learned: learned.held_out,
}


if __name__ == "__main__":
    main()
