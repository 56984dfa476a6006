"""Compare the speed of one worker on Omniglot-shaped data with the method of the authors' published code.

    python -m benchmarks.supervised
    python -m benchmarks.supervised --repeats 10 --updates 50
    python -m benchmarks.supervised --stacked 20 --device cuda     tasks in lockstep against one after the other

Rates are inner steps per second. An inner step has a batch of 20 images 28 × 28, loss and gradient, the meta-gradient
(length metric, the authors' default) and gradient descent. The arms take turns within every repetition:

    authors' loop    the network as the authors build it, with torch's memory layout, optimizer and error count; every
                     step clones the whole state with its gradients. Batches are prepared in advance at no cost
    ours, float32    the worker's learner and meta-learner; batches are drawn and converted from bytes
    ours, bfloat16   the same in the low precision that a worker chooses if the processor supports it
    affine           ours, float32, with each image rotated, shifted and scaled

On a CPU, all arms run on one thread and are timed by its CPU time, which equals the undisturbed elapsed time because
nothing waits. On a GPU, elapsed time is measured.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.harness import Report, interleaved, parser
from leap_dist.config.image_settings import SupervisedSettings
from leap_dist.config.loading import resolve
from leap_dist.config.settings import LeapSettings, WorkerSettings
from leap_dist.leap import meta_learners
from leap_dist.nn.convnet import initialization
from leap_dist.nn.device import prepare
from leap_dist.tasks.images.augmentation import DISTRIBUTIONS, draw_maps, transform
from leap_dist.tasks.images.classifier import Classifier
from leap_dist.tasks.images.examples import Dataset, Examples
from leap_dist.tasks.images.stacked import Stack

SIDE, CLASSES, BATCH = 28, 20, 20
WARM_UP = 5
"""Number of initial updates that are not measured."""


def main() -> None:
    """Run the benchmark and print the report."""
    command = parser(__doc__, repeats=5)
    command.add_argument("--updates", type=int, default=40, help="updates per arm and repetition")
    command.add_argument("--stacked", type=int, default=0, metavar="B", help="measure B tasks in lockstep instead")
    command.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device of the tasks in lockstep")
    given = command.parse_args()
    prepare(given.device, 1, 0)
    report = Report(
        "One worker on Omniglot's shapes" if not given.stacked else f"{given.stacked} tasks at once",
        {"batch": BATCH, "images": f"{SIDE}×{SIDE}", "updates": given.updates, "device": given.device},
    )
    if given.stacked:
        in_lockstep(given.stacked, given.device, given.updates, given.repeats, report)
    else:
        loops(given.updates, given.repeats, report)
        leap_shares(given.updates, given.repeats, report)
        augmentation(given.repeats, report)
    report.show(given.json)


def loops(updates: int, repeats: int, report: Report) -> None:
    """Measure whole inner steps."""
    arms = {
        "authors' loop": AuthorsLoop(data(0), start()).step,
        "ours, float32": ours("float32"),
        "ours, bfloat16": ours("bfloat16"),
        "ours, float32, affine": ours("float32", augmentation="affine"),
    }
    samples = interleaved({name: rate_of(step, updates) for name, step in arms.items()}, repeats, warmup=True)
    for name, values in samples.items():
        report.add(name, "inner steps/s", values)
    authors = samples["authors' loop"]
    report.ratio("ours, float32 / authors' loop", samples["ours, float32"], authors, target=1.3)
    report.ratio("ours, bfloat16 / authors' loop", samples["ours, bfloat16"], authors, target=1.3)
    report.ratio("affine / as they are", samples["ours, float32, affine"], samples["ours, float32"])


def leap_shares(updates: int, repeats: int, report: Report) -> None:
    """Measure the share of the inner step that accumulating the meta-gradient takes."""
    for precision in ("float32", "bfloat16"):
        for metric in ("energy", "length"):
            learner = learner_of(precision)
            watch = watcher(learner, metric)
            shares = []
            for _ in range(repeats):
                watching = training = 0.0
                for _ in range(updates):
                    started = time.process_time()
                    loss = learner.backward()
                    observed = time.process_time()
                    watch.observe(loss)
                    done = time.process_time()
                    learner.step()
                    watching += done - observed
                    training += time.process_time() - done + observed - started
                shares.append(watching / (watching + training))
            name = f"Leap's share, {metric}, {precision}"
            report.ratio(name, shares, [1.0] * repeats, target=0.02, at_most=True)
    authors, shares = AuthorsLoop(data(0), start()), []
    for _ in range(repeats):
        authors.accumulating, started = 0.0, time.process_time()
        for _ in range(updates):
            authors.step()
        shares.append(authors.accumulating / (time.process_time() - started))
    report.ratio("… length, float32, the authors' way", shares, [1.0] * repeats)


def augmentation(repeats: int, report: Report) -> None:
    """Measure a batch of affine images transformed together, and one by one with PIL as torchvision does."""
    images = data(0).train.images
    together = torch.from_numpy(images)
    pictures = [Image.fromarray(image[..., 0]) for image in images]
    generator, index = torch.Generator().manual_seed(0), torch.arange(BATCH)

    def maps() -> Tensor:
        return draw_maps(DISTRIBUTIONS["affine"], BATCH, generator)

    def one_by_one() -> None:
        for number, affine in zip(index.tolist(), (SIDE * maps()).view(BATCH, 6).tolist(), strict=True):
            picture = pictures[number].transform((SIDE, SIDE), Image.Transform.AFFINE, affine)
            torch.from_numpy(np.array(picture)).float().div(255)

    samples = interleaved(
        {
            "a batch of affine images": rate_of(lambda: transform(together, index, maps()), 200),
            "… one by one (PIL)": rate_of(one_by_one, 200),
        },
        repeats,
        warmup=True,
    )
    for name, values in samples.items():
        report.add(name, "batches/s", values)


def in_lockstep(tasks: int, device: str, updates: int, repeats: int, report: Report) -> None:
    """Measure a meta-batch with its tasks in lockstep and one after the other."""
    sets, worker = [data(seed) for seed in range(tasks)], WorkerSettings(device=device, precision="float32")
    clock = time.perf_counter if device == "cuda" else time.process_time

    def stack() -> float:
        started = clock()
        made = Stack(
            sets,
            start(),
            seeds=range(tasks),
            settings=SupervisedSettings(batch=BATCH),
            worker=worker,
            leap=LeapSettings(metric="length"),
        )
        made.train(updates)
        return tasks * updates / (clock() - started)

    def one_after_the_other() -> float:
        started = clock()
        for seed, images in enumerate(sets):
            learner = learner_of("float32", device=device, seed=seed, images=images)
            watch = watcher(learner)
            for _ in range(updates):
                watch.observe(learner.backward())
                learner.step()
            watch.report()
            learner.test()
        return tasks * updates / (clock() - started)

    arms = {"in lockstep": stack, "one after the other": one_after_the_other}
    samples = interleaved(arms, repeats, warmup=True)
    for name, values in samples.items():
        report.add(name, "inner steps/s", values)
    target = 10.0 if device == "cuda" else None
    report.ratio("in lockstep / one after the other", *samples.values(), target=target)


class AuthorsLoop:
    """One inner step with the method of the authors' published code (src/leap, src/omniglot), reimplemented.

    Each step puts the model into training mode, reads back its loss and errors, and first clones the whole state,
    including buffers and gradients. Each segment is weighted by its inverse length and added, parameter by parameter,
    to the gradient of a state dictionary that holds φ.
    """

    def __init__(self, images: Dataset, vector: np.ndarray, *, rate: float = 0.1) -> None:
        layers: list[nn.Module] = []
        for number in range(4):
            convolution = nn.Conv2d(64 if number else 1, 64, 3, padding=1)
            layers += [convolution, nn.MaxPool2d(2), nn.BatchNorm2d(64), nn.ReLU()]
        self.model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, images.classes)).train()
        nn.utils.vector_to_parameters(torch.from_numpy(vector.copy()), self.model.parameters())
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=rate)
        self._criterion = nn.CrossEntropyLoss()
        self.pulls = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}
        self._before: tuple[Tensor, OrderedDict[str, Tensor]] | None = None
        self.accumulating = 0.0
        """Total seconds spent on accumulating the meta-gradient."""
        self.losses: list[float] = []
        self.errors: list[float] = []
        self.batches = itertools.cycle(prepared(images))

    def step(self) -> None:
        """Compute loss and gradient, accumulate the meta-gradient, and take one gradient-descent step."""
        images, labels = next(self.batches)
        prediction = self.model(images)
        loss = self._criterion(prediction, labels)
        self.losses.append(loss.item())
        self.errors.append(1 - (prediction.data.max(1)[1] == labels).sum().item() / len(labels))
        loss.backward()
        started = time.process_time()
        self._accumulate(loss)
        self.accumulating += time.process_time() - started
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _accumulate(self, loss: Tensor) -> None:
        now = loss.clone(), whole_clone(self.model)
        if self._before is not None:
            (loss_before, before), state = self._before, now[1]
            change = now[0] - loss_before
            if change > 0:
                change = -change
            squared = change * change
            for name in self.pulls:
                difference = state[name].detach().view(-1) - before[name].detach().view(-1)
                squared = squared + torch.dot(difference, difference)
            norm = squared.sqrt()
            for name, total in self.pulls.items():
                slope = before[name].grad
                assert slope is not None
                pull = before[name].detach() - state[name].detach()
                pull += (-change * slope).detach()
                total.add_(pull.div_(norm.detach()))
        self._before = now


def whole_clone(model: nn.Module) -> OrderedDict[str, Tensor]:
    """Return a clone of every entry of the state, each with its gradient if it has one."""
    copies = OrderedDict()
    for name, entry in model.state_dict(keep_vars=True).items():
        copy = entry.detach().clone()
        copy.requires_grad = entry.requires_grad
        if entry.grad is not None:
            copy.grad = entry.grad.detach().clone()
        copies[name] = copy
    return copies


def prepared(images: Dataset, count: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Return float batches (N, 1, S, S) in torch's default layout."""
    pixels = torch.from_numpy(images.train.images).permute(0, 3, 1, 2).contiguous().float() / 255
    labels = torch.from_numpy(images.train.labels)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(len(labels), (BATCH,), generator=generator) for _ in range(count)]
    return [(pixels[index], labels[index]) for index in drawn]


def data(seed: int) -> Dataset:
    """Return twenty classes of noise strokes as sparse as ink, with 15 training and 5 held-out images each."""
    random = np.random.default_rng(seed)

    def examples(each: int) -> Examples:
        labels = np.repeat(np.arange(CLASSES), each)
        ink = random.random((len(labels), SIDE, SIDE, 1)) < 0.1
        return Examples(np.where(ink, 0, 255).astype(np.uint8), labels)

    return Dataset(examples(15), examples(5), CLASSES)


def start() -> np.ndarray:
    """Return φ₀, which for Omniglot includes the head."""
    return initialization(1, SIDE, CLASSES, 0, "model")[1]


def learner_of(
    precision: str,
    *,
    augmentation: str = "none",
    device: str = "cpu",
    seed: int = 1,
    images: Dataset | None = None,
) -> Classifier:
    """Return a learner at the start of a task."""
    settings = replace(SupervisedSettings(batch=BATCH), augmentation=augmentation)
    worker = replace(WorkerSettings(device=device), precision=precision)
    return Classifier(images or data(0), start(), seed=seed, settings=settings, worker=worker, scope="model")


def watcher(learner: Classifier, metric: str = "length") -> meta_learners.MetaLearner:
    """Return the worker's meta-learner for `learner`."""
    return meta_learners.make(resolve("smoke", {"meta_learner": "leap", "leap.metric": metric}), learner)


def ours(precision: str, *, augmentation: str = "none") -> Callable[[], None]:
    """Return a function that runs one inner step of a worker."""
    learner = learner_of(precision, augmentation=augmentation)
    watch = watcher(learner)

    def step() -> None:
        watch.observe(learner.backward())
        learner.step()

    return step


def rate_of(step: Callable[[], object], updates: int) -> Callable[[], float]:
    """Return an arm that measures calls per CPU second."""

    def measure() -> float:
        for _ in range(WARM_UP):
            step()
        started = time.process_time()
        for _ in range(updates):
            step()
        return updates / (time.process_time() - started)

    return measure


if __name__ == "__main__":
    main()
