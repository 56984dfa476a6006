"""How the order of a task's images affects the error on its training batches: epochs, or one order for the whole task.

    python -m benchmarks.image_order swap --data-dir data --seeds 3 --theirs parity/theirs
    python -m benchmarks.image_order swap --data-dir data --seeds 3 --init pretrained:leap-omniglot
    python -m benchmarks.image_order explain --data-dir data --theirs parity/theirs --arms leap=parity/ours

`swap` trains the same networks on the ten held-out alphabets of seed 0 with both values of `supervised.shuffle`; all
other settings are those of the preset `authors`. Networks are random, or start from `--init`, with which ink and
network are those of that file. Each takes 100 updates; a seed needs half a minute of one core. `--theirs` compares
both with the published code's test without pretraining.

`explain` looks for the trace of epochs in finished tests of both, which have drawn in epochs (ours) and in one order
for the whole task (the published code): the error in the last ten batches of an epoch of 15 minus the first five; and
how the error of a batch depends on how often its classes have come recently, with what follows for the mean
difference. The unpacked reference/omniglot/parity/results.tar.gz has such tests.

All errors are in percent. Means are over alphabets, after averaging over seeds, and so are their standard errors.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from benchmarks.published_omniglot import Learned as OneTest
from benchmarks.published_omniglot import ours_of, theirs_of
from leap_dist.config import loading
from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.evaluation import initializations
from leap_dist.protocol.messages import Lease, Task
from leap_dist.protocol.seeds import derived_seed
from leap_dist.tasks.images.classifier import Classifier
from leap_dist.tasks.images.examples import BatchSampler, Seeds
from leap_dist.tasks.images.family import Omniglot
from leap_dist.tasks.task import family_of
from leap_dist.worker.start import Start, make_learner

UPDATES = 100
EPOCH = 15
"""Batches in an epoch of 300 images."""
MEMORY = 5
"""Number of batches over which the frequency of classes is remembered (by a factor e)."""
BLOCKS = {"2 to 15": slice(1, EPOCH), "16 to 100": slice(EPOCH, UPDATES), "1 to 100": slice(0, UPDATES)}
Order = Literal["epoch", "task"]
ORDERS: tuple[Order, ...] = ("epoch", "task")


class Learned(NamedTuple):
    """What networks did on the alphabets, as means over seeds."""

    errors: np.ndarray
    """Error on each training batch in percent, (alphabets, updates)."""
    losses: np.ndarray
    """Mean cross-entropy of each training batch, (alphabets, updates)."""
    held_out: np.ndarray
    """Error on the held-out images after the last update in percent, (alphabets,)."""


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.image_order",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    swapped = commands.add_parser("swap", help="train with both orders", allow_abbrev=False)
    swapped.add_argument("--seeds", type=int, default=1, help="number of seeds, starting with 0")
    swapped.add_argument("--init", help="as of the command evaluate; without it, networks are random")
    swapped.add_argument("--theirs", type=Path, help="folder with tests of the published code")
    explained = commands.add_parser("explain", help="look for the trace of epochs", allow_abbrev=False)
    explained.add_argument("--theirs", type=Path, required=True, help="folder with tests of the published code")
    explained.add_argument(
        "--arms", required=True, nargs="+", metavar="ARM=FOLDER", help="arms and folders with tests of ours, seed 0"
    )
    for command in (swapped, explained):
        command.add_argument("--data-dir", required=True)
    given = parser.parse_args()
    try:
        if given.command == "swap":
            config, vector = settings(given.data_dir, given.init)
            swap(config, vector, range(given.seeds), given.theirs)
        else:
            pairs = [text.partition("=")[::2] for text in given.arms]
            explain(settings(given.data_dir)[0], given.theirs, [(arm, Path(folder)) for arm, folder in pairs])
    except (ConfigError, OSError, ValueError) as error:
        parser.error(str(error))


def settings(data_dir: str, init: str | None = None) -> tuple[Config, np.ndarray | None]:
    """Return the settings of the tests on the held-out alphabets of seed 0, and the parameters of `init`.

    Raises ConfigError if `init` is not the encoder of a network for Omniglot.
    """
    given: dict[str, Any] = {"tasks": "omniglot", "data_dir": data_dir, "games": ("held_out",), "meta_learner": "none"}
    given |= {"worker.precision": "float32", "worker.device": "cpu"}
    if init is None:
        return loading.resolve("authors", given), None
    _, (file,) = initializations.read([f"init={init}"])
    network = file.content.metadata["preprocessing"].get("network", "pool-norm")
    given |= {"supervised.network": network, "supervised.polarity": "white-ink"}
    config = loading.resolve("authors", given)
    initializations.arms(["init"], [file], config)  # raises ConfigError if they do not go together
    return config, file.content.vector(file.content.manifest)


def learn(config: Config, vector: np.ndarray | None, seeds: Sequence[int], order: Order) -> Learned:
    """Train as a study's tests with these seeds do, with the given order of images."""
    config = replace(config, supervised=replace(config.supervised, shuffle=order))
    runs = [[_run(config, name, seed, vector) for seed in seeds] for name in config.games]
    errors, losses, held_out = (np.array([[run[part] for run in of] for of in runs]).mean(1) for part in range(3))
    return Learned(100 * errors, losses, 100 * held_out)


def _run(config: Config, alphabet: str, seed: int, vector: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, float]:
    lease = _lease(alphabet, seed, UPDATES * config.steps_per_update)
    if vector is None:
        _, vector = family_of(config).initialization(config, lease.task.seed, "encoder")
    learner = make_learner(config, lease, Start(vector, scope="encoder", evaluation=True))
    assert isinstance(learner, Classifier)
    for _ in range(UPDATES):
        learner.backward()
        learner.step()
    curve = learner.curve()
    return curve.errors, curve.losses, learner.test().error


def _lease(alphabet: str, seed: int, steps: int) -> Lease:
    return Lease("order", Task(0, alphabet, 0, derived_seed(seed, alphabet), steps), "worker", "incarnation", 0, 60.0)


def swap(config: Config, vector: np.ndarray | None, seeds: Sequence[int], theirs: Path | None) -> None:
    """Train with both orders and print how the errors differ."""
    published = None if theirs is None else _published(config, theirs, "none")
    epoch, task = (learn(config, vector, seeds, order) for order in ORDERS)
    print("| training batches | epochs | whole task | epochs − whole task | … of the loss |\n|---|---|---|---|---|")
    for label, block in BLOCKS.items():
        one, other = (learned.errors[:, block].mean(1) for learned in (epoch, task))
        losses = (epoch.losses - task.losses)[:, block].mean(1)
        print(f"| {label} | {one.mean():.1f} | {other.mean():.1f} | {text(one - other)} | {text(losses, 4)} |")
    one, other = epoch.held_out, task.held_out
    print(f"| held-out images | {one.mean():.1f} | {other.mean():.1f} | {text(one - other)} | |")
    if published is None:
        return
    print("\n| training batches | epochs − published code | whole task − published code |\n|---|---|---|")
    for label, block in BLOCKS.items():
        cells = [text((learned.errors - published)[:, block].mean(1)) for learned in (epoch, task)]
        print(f"| {label} | {' | '.join(cells)} |")


def text(values: np.ndarray, digits: int = 2) -> str:
    """Return the mean of values and its standard error."""
    error = values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():+.{digits}f} ± {error:.{digits}f}".replace("-", "−")


def _published(config: Config, folder: Path, arm: str) -> np.ndarray:
    """Return the errors of the published code in percent, (alphabets, updates). Raises ValueError if there are none."""
    return _matrix(config, theirs_of(folder).get(arm, {}), f"--theirs: {folder} has no tests of {arm}")


def _matrix(config: Config, found: Mapping[str, OneTest], refusal: str) -> np.ndarray:
    if not set(found) >= set(config.games):
        raise ValueError(f"{refusal} on all of {', '.join(config.games)}")
    return 100 * np.array([found[name].curve[:UPDATES] for name in config.games])


# The trace of epochs in finished tests ------------------------------------------------------------------------------


def explain(config: Config, theirs: Path, arms: Sequence[tuple[str, Path]]) -> None:
    """Print the trace of epochs in the errors of arms, and the difference that recently frequent classes predict."""
    ours = [
        _matrix(config, ours_of(folder).get(arm, {}), f"--arms: {folder} has no tests of {arm}") for arm, folder in arms
    ]
    published = [_published(config, theirs, arm) for arm, _ in arms]
    print("| arm | last ten − first five batches of an epoch: ours | the published code |\n|---|---|---|")
    for (arm, _), one, other in zip(arms, ours, published, strict=True):
        print(f"| {arm} | {text(trace(one))} | {text(trace(other))} |")
    epochs = np.array([familiarity(_classes(config, name, 0, "epoch")) for name in config.games])
    whole = np.array([familiarity(_classes(config, name, seed, "task")) for name in config.games for seed in range(6)])
    shift = float(epochs[:, EPOCH:].mean() - whole[:, EPOCH:].mean())
    print(
        "\n| arm | effect of recently frequent classes | predicted, batches 16 to 100 | observed |\n|---|---|---|---|"
    )
    for (arm, _), one, other in zip(arms, ours, published, strict=True):
        slope, error = regression(one, epochs)
        cells = [f"{slope:+.1f} ± {error:.1f}", f"{slope * shift:+.2f} ± {abs(error * shift):.2f}"]
        print(f"| {arm} | {' | '.join(cells).replace('-', '−')} | {text((one - other)[:, EPOCH:].mean(1))} |")


def trace(curves: np.ndarray) -> np.ndarray:
    """Return how much higher errors (alphabets, updates) are in the last ten of an epoch's batches than in the first.

    Batches 16 to 90 count, which are five epochs, and the moving mean over 15 batches is subtracted before.
    """
    smooth = [np.convolve(np.pad(one, EPOCH // 2, mode="edge"), np.ones(EPOCH) / EPOCH, "valid") for one in curves]
    rest = (curves - np.array(smooth))[:, EPOCH : 6 * EPOCH].reshape(len(curves), 5, EPOCH)
    found: np.ndarray = rest[:, :, 5:].mean((1, 2)) - rest[:, :, :5].mean((1, 2))
    return found


def _classes(config: Config, alphabet: str, seed: int, order: Order) -> np.ndarray:
    """Return the classes of the batches that a test draws, (updates, batch)."""
    settings = replace(config.supervised, shuffle=order)
    lease = _lease(alphabet, seed, UPDATES * settings.batch)
    labels = Omniglot().dataset(config, lease).train.labels
    sampler = BatchSampler(len(labels), settings, Seeds.of(lease.task.seed), UPDATES)
    return np.array([labels[sampler.next()[0].numpy()] for _ in range(UPDATES)])


def familiarity(classes: np.ndarray) -> np.ndarray:
    """Return how often the classes of each batch have come recently, beyond the mean of all classes, (updates,).

    Args:
        classes: classes of the images of each batch, (updates, batch).
    """
    count = int(classes.max()) + 1
    recent, found = np.zeros(count), np.zeros(len(classes))
    for update, batch in enumerate(classes):
        found[update] = recent[batch].mean()
        recent = recent * np.exp(-1 / MEMORY) + np.bincount(batch, minlength=count) - len(batch) / count
    return found


def regression(curves: np.ndarray, covariate: np.ndarray) -> tuple[float, float]:
    """Return the slope of errors over a covariate, both (alphabets, updates), and its standard error.

    Batches from 16 on count. For each alphabet, a polynomial of degree 4 in time and the means at each position in an
    epoch are subtracted from both.
    """
    time = np.linspace(-1, 1, UPDATES - EPOCH)
    position = np.arange(EPOCH, UPDATES) % EPOCH
    nuisance = [
        *(time**power for power in range(5)),
        *((position == place).astype(float) for place in range(EPOCH - 1)),
    ]
    basis, _ = np.linalg.qr(np.stack(nuisance, axis=1))
    y, x = ((part - part @ basis @ basis.T).ravel() for part in (curves[:, EPOCH:], covariate[:, EPOCH:]))
    slope = x @ y / (x @ x)
    freedom = len(y) - 1 - len(curves) * basis.shape[1]
    residual = y - slope * x
    return float(slope), float((residual @ residual / freedom / (x @ x)) ** 0.5)


if __name__ == "__main__":
    main()
