"""The supervised learner: its network, gradient, batches and tests, and all that a worker does with it."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from protocol import config, grant, ledger
from pull_forward_oracle import pull_forward
from torch import Tensor, nn
from torch.nn import functional as F
from toy_images import CLASSES, SETTINGS, SIDE, WORKER, classifier, dataset

from leap_dist.config.settings import Config
from leap_dist.evaluation.statistics import trapezoids as area_under
from leap_dist.leap.learner import Learner
from leap_dist.nn.convnet import NETWORKS, ConvNet, initialization, initialize
from leap_dist.nn.flat_vector import Manifest, flatten
from leap_dist.protocol.messages import Ack, Contribution, Lease, Task
from leap_dist.server.meta_server import MetaServer
from leap_dist.tasks.images.classifier import Classifier, Curve, Score
from leap_dist.tasks.images.examples import BatchSampler, Dataset, Examples, ImageStore, Seeds, maps_for_test
from leap_dist.worker import run_task as worker
from leap_dist.worker.run_task import run_task
from leap_dist.worker.start import Start

ARMS = ("leap", "reptile", "fomaml", "finetune-multi", "finetune-single", "none")
AUGMENTATIONS = ("none", "affine", "rotations", "turned")
MODEL = initialization(1, SIDE, CLASSES, 0, "model")[1]
ENCODER = initialization(1, SIDE, CLASSES, 0, "encoder")[1]


def train(learner: Classifier, updates: int) -> list[float]:
    losses = []
    for _ in range(updates):
        losses.append(learner.backward().item())
        learner.step()
    return losses


def parameters(learner: Classifier) -> np.ndarray:
    return flatten(learner._model.parameters()).numpy()


def buffers(learner: Classifier) -> np.ndarray:
    return flatten(learner._model.buffers()).numpy()


def watch_batches(learner: Classifier) -> list[tuple[Tensor, Tensor]]:
    """(images (N, C, S, S), labels) of every batch from now on."""
    batches: list[tuple[Tensor, Tensor]] = []
    take = learner._train.take

    def watched(*arguments: Any) -> tuple[Tensor, Tensor]:
        batches.append(take(*arguments))
        return batches[-1]

    learner._train.take = watched
    return batches


# --- the network and its gradient ----------------------------------------------------------------------------------


def slow_logits(parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """The network of the paper in the order of the authors' code, from sums and products alone."""
    hidden = images
    for number in range(1, 5):
        weight, bias = parameters[f"block{number}.conv.weight"], parameters[f"block{number}.conv.bias"]
        _, _, height, width = hidden.shape
        framed = F.pad(hidden, (1, 1, 1, 1))
        convolved = bias.view(1, -1, 1, 1).expand(len(images), -1, height, width)
        for row in range(3):
            for column in range(3):
                part = framed[:, :, row : row + height, column : column + width]
                convolved = convolved + torch.einsum("nchw,fc->nfhw", part, weight[:, :, row, column])
        height, width = height // 2 * 2, width // 2 * 2
        quarters = [convolved[:, :, i:height:2, j:width:2] for i in range(2) for j in range(2)]
        pooled = torch.stack(quarters).amax(0)
        mean = pooled.mean((0, 2, 3), keepdim=True)
        variance = (pooled - mean).square().mean((0, 2, 3), keepdim=True)
        normal = (pooled - mean) / (variance + 1e-5).sqrt()
        scale, shift = (parameters[f"block{number}.norm.{name}"].view(1, -1, 1, 1) for name in ("weight", "bias"))
        hidden = (normal * scale + shift).clamp(min=0)
    return hidden.flatten(1) @ parameters["head.weight"].T + parameters["head.bias"]


@pytest.mark.parametrize("channels", [1, 3])
def test_loss_and_gradient_are_those_of_a_slow_float64_implementation(channels):
    data = replace(dataset(channels=channels), mean=(0.4,) * channels, std=tuple(np.linspace(0.2, 0.3, channels)))
    learner = classifier(data, initialization(channels, SIDE, CLASSES, 0, "model")[1], scope="model")
    train(learner, 2)
    exact = {name: p.detach().double().requires_grad_() for name, p in learner.shared.items()}
    batches = watch_batches(learner)
    found = learner.backward()
    images, labels = batches[0]
    deviation = torch.tensor(data.std, dtype=torch.float64).view(1, -1, 1, 1)
    logits = slow_logits(exact, (images.double() / 255 - 0.4) / deviation)
    loss = (logits.exp().sum(1).log() - logits[torch.arange(len(labels)), labels]).mean()
    loss.backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in learner.shared.items():
        expected = exact[name].grad
        if ".conv.bias" in name:  # batch norm takes it away again
            assert expected.norm() < 1e-12
            assert not parameter.grad.any()
        else:
            assert expected.norm() > 1e-3
            assert (parameter.grad.double() - expected).norm() < 1e-4 * expected.norm(), name


def plain_network(channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number in range(4):
        conv = nn.Conv2d(64 if number else channels, 64, 3, padding=1)
        conv.bias.requires_grad_(False)  # batch norm takes it away: its gradient is nothing but rounding
        layers += [conv, nn.MaxPool2d(2), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, CLASSES)).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [1, 3])
def test_training_is_bit_for_bit_that_of_an_ordinary_torch_program(channels):
    vector = initialization(channels, SIDE, CLASSES, 0, "model")[1]
    learner = classifier(dataset(channels=channels), vector, scope="model")
    batches = watch_batches(learner)
    plain = plain_network(channels)
    nn.utils.vector_to_parameters(torch.from_numpy(vector), plain.parameters())
    plain.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(5):
        found = learner.backward()
        images, labels = batches[-1]
        loss = F.cross_entropy(plain(images.float() * (1 / 255)), labels)
        optimizer.zero_grad()
        loss.backward()
        assert found.item() == loss.item()
        for mine, theirs in zip(learner._model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine.grad, torch.zeros(64) if theirs.grad is None else theirs.grad)
        learner.step()
        optimizer.step()
    assert np.array_equal(parameters(learner), flatten(plain.parameters()).numpy())
    assert np.array_equal(buffers(learner), flatten(plain.buffers()).numpy())


def test_everything_is_laid_out_channels_last():
    """Speed hangs on it, and torch guesses where there is but one channel."""
    learner = classifier(dataset(), MODEL, scope="model")
    strides = []
    for block in (learner._model.block1, learner._model.block2):
        block.conv.register_forward_hook(lambda _module, _inputs, output: strides.append(output.stride()))
    learner.backward()
    assert strides == [(64 * 256, 1, 64 * 16, 64), (64 * 64, 1, 64 * 8, 64)]
    gradient = learner._model.block2.conv.weight.grad
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("side", "features"), [(28, 64), (32, 256)])
def test_the_sizes_of_the_paper(side, features):
    model = ConvNet(1, side, 20)
    assert model.head.in_features == features
    assert model(torch.zeros(2, 1, side, side)).shape == (2, 20)
    assert sum(p.numel() for p in model.parameters()) == 640 + 3 * 36_928 + 4 * 128 + (features + 1) * 20


# --- training ------------------------------------------------------------------------------------------------------


def test_it_is_a_learner():
    methods = [name for name, _ in inspect.getmembers(Learner, inspect.isfunction) if not name.startswith("_")]
    for name in methods:
        wanted = inspect.signature(getattr(Learner, name), eval_str=True)
        assert inspect.signature(getattr(Classifier, name), eval_str=True) == wanted
    assert classifier(dataset(), ENCODER).steps_per_update == 8
    assert classifier(dataset(), ENCODER).descent == SETTINGS.learning_rate


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_learns(precision):
    learner = classifier(dataset(noise=0.3), ENCODER, worker=replace(WORKER, precision=precision))
    assert learner.test().error >= 0.5, "a guess is wrong three times out of four"
    train(learner, 70)  # after 30 the averages for the test still remember where they began
    assert learner.curve().errors[-5:].max() == 0
    assert learner.test().error <= 0.1
    assert all(p.dtype == torch.float32 for p in learner.shared.values())


def test_low_precision_is_near_and_not_the_same():
    exact, low = (
        classifier(dataset(), ENCODER, worker=replace(WORKER, precision=name)) for name in ("float32", "bfloat16")
    )
    losses = exact.backward().item(), low.backward().item()
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    gradients = [flatten(p.grad for p in learner.shared.values()) for learner in (exact, low)]
    assert F.cosine_similarity(*gradients, dim=0) > 0.95


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_the_seed_determines_everything(augmentation):
    settings = replace(SETTINGS, augmentation=augmentation)
    runs = []
    for seed in (5, 5, 6):
        learner = classifier(dataset(), ENCODER, seed=seed, settings=settings)
        losses = train(learner, 4)
        runs.append((losses, parameters(learner).tolist(), buffers(learner).tolist(), learner.test()))
    assert runs[0] == runs[1]
    assert all(a != b for a, b in zip(runs[0][:3], runs[2][:3], strict=True))


def test_augmentation_changes_pictures_and_nothing_else():
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name in AUGMENTATIONS:
        learner = classifier(dataset(), ENCODER, settings=replace(SETTINGS, augmentation=name))
        batches = watch_batches(learner)
        train(learner, 2)
        seen[name] = batches[1]
    assert all(torch.equal(labels, seen["none"][1]) for _, labels in seen.values())
    pictures = [images for images, _ in seen.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])


def test_a_turned_task_is_turned_as_a_whole():
    data = dataset(noise=0.0)  # images of a class are the same
    learner = classifier(data, ENCODER, settings=replace(SETTINGS, augmentation="turned"))
    batches = watch_batches(learner)
    train(learner, 5)
    pictures = {
        (label, image.numpy().tobytes())
        for images, labels in batches
        for image, label in zip(images, labels.tolist(), strict=True)
    }
    assert len(pictures) == CLASSES
    held_out, labels = learner._held_out.take(torch.arange(12), None)
    found = {(label, image.numpy().tobytes()) for image, label in zip(held_out, labels.tolist(), strict=True)}
    assert found == pictures


def test_every_image_comes_once_before_any_comes_again():
    data = dataset(each=5)  # 20 images in batches of 8
    learner = classifier(replace(data, train=Examples(numbered(20), data.train.labels)), ENCODER)
    batches = watch_batches(learner)
    train(learner, 5)
    order = [int(image[0, 0, 0]) for images, _ in batches for image in images]
    passes = order[:20], order[20:]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(20))
    assert passes[0] != passes[1]
    for images, labels in batches:
        assert labels.tolist() == [data.train.labels[int(image[0, 0, 0])] for image in images]


def test_a_batch_may_be_larger_than_the_data_set():
    data = dataset()
    few = replace(data, train=Examples(numbered(3), data.train.labels[:3]))
    learner = classifier(few, ENCODER)
    batches = watch_batches(learner)
    learner.backward()
    assert sorted(Counter(int(image[0, 0, 0]) for image in batches[0][0]).values()) == [2, 3, 3]


def numbered(count: int) -> np.ndarray:
    """Images that say which one they are, in every pixel."""
    return np.tile(np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1), (1, SIDE, SIDE, 1))


@pytest.mark.parametrize("augmentation", ["none", "affine", "turned"])
def test_grey_images_of_three_channels_are_kept_as_one(augmentation):
    """And arrays that must not be written to are no trouble."""
    grey = dataset()

    def shown(examples: Examples, *, copied: bool) -> Examples:
        view = np.broadcast_to(examples.images, (*examples.images.shape[:3], 3))
        return Examples(view.copy() if copied else view, examples.labels)

    learners = []
    for copied in (True, False):
        data = Dataset(shown(grey.train, copied=copied), shown(grey.test, copied=copied), CLASSES, mean=(0.4,))
        settings = replace(SETTINGS, augmentation=augmentation)
        learners.append(classifier(data, initialization(3, SIDE, CLASSES, 0)[1], settings=settings))
    assert [learner._train._images.shape[3] for learner in learners] == [3, 1]
    strides = []
    learners[1]._model.block1.conv.register_forward_hook(lambda _module, _in, out: strides.append(out.stride(1)))
    assert train(learners[0], 3) == train(learners[1], 3)
    assert learners[0].test() == learners[1].test()
    assert set(strides) == {1}, "channels last"


def test_a_step_needs_a_gradient():
    learner = classifier(dataset(), ENCODER)
    with pytest.raises(RuntimeError, match="call step after backward"):
        learner.step()


# --- what batch norm keeps -----------------------------------------------------------------------------------------


def test_averages_begin_anew_in_every_task():
    first = classifier(dataset(0), MODEL, scope="model")
    train(first, 3)
    learned = flatten(first.shared.values()).numpy()
    second = classifier(dataset(1), learned, scope="model")
    fresh = ConvNet(1, SIDE, CLASSES)
    assert np.array_equal(buffers(second), flatten(fresh.buffers()).numpy())
    assert not np.array_equal(buffers(first), buffers(second))
    assert not any("running" in name or "num_batches" in name for name in first.shared)


def test_the_last_loss_is_measured_as_in_training_and_leaves_no_trace():
    learner, other = (classifier(dataset(), ENCODER) for _ in range(2))
    for one in (learner, other):
        train(one, 3)
    before = parameters(learner), buffers(learner)
    loss = learner.evaluate()
    assert (loss.shape, loss.requires_grad) == ((), False)
    assert loss.item() == other.backward().item(), "of the batch that would have come next"
    assert all(np.array_equal(a, b) for a, b in zip(before, (parameters(learner), buffers(learner)), strict=True))
    assert all(p.grad is None for p in learner.shared.values())


def test_a_batch_may_span_two_epochs_and_every_image_comes_once_in_each() -> None:
    sampler = BatchSampler(10, replace(SETTINGS, batch=4), Seeds.of(3))
    drawn = torch.cat([sampler.next()[0] for _ in range(5)])
    for epoch in (drawn[:10], drawn[10:]):
        assert sorted(epoch.tolist()) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()


IN_ONE_ORDER = replace(SETTINGS, shuffle="task", batch=20)


def drawn(sampler: BatchSampler, batches: int) -> Tensor:
    return torch.cat([sampler.next()[0] for _ in range(batches)])


def test_all_visits_of_a_task_may_be_in_one_order_which_is_that_of_the_published_code() -> None:
    """Its sampler is `torch.randperm(iterations * batch_size) % len(data)`, at every visit of a task."""
    order = torch.Generator().manual_seed(Seeds.of(3).order)
    published = [torch.randperm(100 * 20, generator=order) % 300 for _ in range(2)]
    sampler = BatchSampler(300, IN_ONE_ORDER, Seeds.of(3), updates=100)
    found = drawn(sampler, 100)
    assert torch.equal(found, published[0])
    assert torch.equal(drawn(sampler, 100), published[1]), "what comes beyond the task begins another such order"
    assert set(Counter(found.tolist()).values()) == {6, 7}
    assert len(set(found[:300].tolist())) < 250, "an image comes back before all were seen"


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_in_a_task_of_one_epoch_both_orders_are_the_same(updates: int) -> None:
    whole = BatchSampler(60, IN_ONE_ORDER, Seeds.of(3), updates)
    epochs = BatchSampler(60, replace(IN_ONE_ORDER, shuffle="epoch"), Seeds.of(3))
    assert torch.equal(drawn(whole, updates), drawn(epochs, updates))


def test_the_order_of_a_whole_task_needs_its_length() -> None:
    with pytest.raises(ValueError, match="needs the number of batches"):
        BatchSampler(300, IN_ONE_ORDER, Seeds.of(3))


@pytest.mark.parametrize(("epochs", "updates"), [(0, 9), (2, 6)])
def test_a_task_in_one_order_is_as_long_as_its_epochs_allow(epochs: int, updates: int) -> None:
    """24 images in batches of 8: two epochs end a task of nine batches after six."""
    settings = replace(SETTINGS, shuffle="task", epochs=epochs)
    limited = classifier(dataset(), ENCODER, settings=settings, updates=9)
    batches = watch_batches(limited)
    for _ in range(updates):
        assert not limited.done
        train(limited, 1)
    assert limited.done == bool(epochs)
    visits = Counter(image.numpy().tobytes() for images, _ in batches for image in images)
    assert set(visits.values()) == {updates * 8 // 24}, "every image equally often"


def test_held_out_batches_are_drawn_in_epochs_whatever_the_order_of_training() -> None:
    learners = [
        classifier(dataset(), ENCODER, settings=replace(SETTINGS, shuffle=shuffle), updates=40)
        for shuffle in ("epoch", "task")
    ]
    losses = [[learner.backward_held_out().item() for _ in range(3)] for learner in learners]
    assert losses[0] == losses[1]


def test_held_out_images_are_judged_by_the_averages_over_training():
    data = dataset()
    learner = classifier(data, ENCODER)
    train(learner, 3)
    reference = ConvNet(1, SIDE, CLASSES)
    reference.load_state_dict(learner._model.state_dict())
    reference.eval()
    images = torch.from_numpy(data.test.images).permute(0, 3, 1, 2)
    labels = torch.from_numpy(data.test.labels)
    logits = reference(images.float() / 255)
    score = learner.test()
    assert score.error == (logits.argmax(1) != labels).double().mean().item()
    assert score.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_held_out_images_are_augmented_by_the_tasks_seed():
    settings = replace(SETTINGS, augmentation="affine")
    one, same, other = (maps_for_test(12, settings, Seeds.of(seed)) for seed in (1, 1, 2))
    assert one is not None
    assert one.shape == (12, 2, 3)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert maps_for_test(12, SETTINGS, Seeds.of(1)) is None


def test_errors_are_measured_on_images_augmented_alike(monkeypatch):
    seen = []
    take = ImageStore.take
    monkeypatch.setattr(ImageStore, "take", lambda self, index, maps: seen.append(maps) or take(self, index, maps))
    for augmentation in ("affine", "none"):
        learner = classifier(dataset(), ENCODER, settings=replace(SETTINGS, augmentation=augmentation))
        beats: list[int] = []
        found = learner.conclude(lambda beats=beats: beats.append(1))
        assert set(found) == {"test_error", "test_loss", "train_error"}
        assert len(beats) == 2, "once for each part of at most 500 images"
    assert [maps is None for maps in seen] == [False, False, True, True]
    assert [len(maps) for maps in seen[:2]] == [12, 24], "held-out and training images"


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_a_test_changes_nothing(augmentation, monkeypatch):
    settings = replace(SETTINGS, augmentation=augmentation)
    tested, other = (classifier(dataset(), ENCODER, settings=settings) for _ in range(2))
    train(tested, 2)
    train(other, 2)
    score = tested.test()
    assert tested.test() == score
    monkeypatch.setattr("leap_dist.tasks.images.classifier.HELD_OUT_BATCH", 5)
    assert tuple(tested.test()) == pytest.approx(tuple(score), rel=1e-5), "however many at once"
    assert train(tested, 2) == train(other, 2)
    assert np.array_equal(buffers(tested), buffers(other))
    assert np.array_equal(tested.curve().losses, other.curve().losses)


# --- what is shared ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["encoder", "convolutions", "model"])
def test_shared_is_what_the_scope_says_and_starts_from_phi(scope):
    manifest, vector = initialization(1, SIDE, CLASSES, 3, scope)
    learner = classifier(dataset(), vector, scope=scope)
    assert Manifest.of(learner.shared) == manifest
    assert np.array_equal(flatten(learner.shared.values()).numpy(), vector)
    head = {"head.weight", "head.bias"}
    assert set(learner.local) == (set() if scope == "model" else head)
    assert {*learner.shared, *learner.local} == {name for name, _ in learner._model.named_parameters()}
    before = {name: p.detach().clone() for name, p in {**learner.shared, **learner.local}.items()}
    train(learner, 1)
    for name, parameter in {**learner.shared, **learner.local}.items():
        assert torch.equal(parameter, before[name]) == (".conv.bias" in name), f"{name} trains"


def test_a_head_is_the_tasks_own_or_lasts():
    def head(**settings: Any) -> np.ndarray:
        return flatten(classifier(dataset(), ENCODER, **settings).local.values()).numpy()

    assert not np.array_equal(head(seed=1), head(seed=2))
    assert np.array_equal(head(seed=1, head_seed=9), head(seed=2, head_seed=9))
    change = np.linspace(0, 1, head().size, dtype=np.float32)
    np.testing.assert_array_equal(head(head_seed=9, head_change=change), head(head_seed=9) + change)


def test_an_initialization_is_as_pytorch_would_draw_it():
    manifest, vector = initialization(1, 28, 20, 7, "model")
    assert np.array_equal(vector, initialization(1, 28, 20, 7, "model")[1])
    assert not np.array_equal(vector, initialization(1, 28, 20, 8, "model")[1])
    encoder, shorter = initialization(1, 28, 20, 7)
    assert np.array_equal(vector[: encoder.size], shorter)
    parts = manifest.split(vector)
    for name, inputs in [("block1.conv", 9), ("block3.conv", 576), ("head", 64)]:
        for part in (parts[f"{name}.weight"], parts[f"{name}.bias"]):
            assert abs(part).max() == pytest.approx(1 / math.sqrt(inputs), rel=0.1)
            assert abs(part).max() <= 1 / math.sqrt(inputs)
    assert (parts["block2.norm.weight"] == 1).all()
    assert (parts["block2.norm.bias"] == 0).all()


# --- what it reports -----------------------------------------------------------------------------------------------


def test_progress_and_curve_tell_of_every_batch():
    learner = classifier(dataset(), ENCODER)
    errors = []
    passed = F.cross_entropy

    def spy(logits: Tensor, labels: Tensor) -> Tensor:
        errors.append((logits.argmax(1) != labels).double().mean().item())
        return passed(logits, labels)

    assert learner.progress().scores == ()
    assert learner.progress().means == {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "cross_entropy", spy)
        losses = train(learner, 3)
        first = learner.progress()
        losses += train(learner, 1)
        losses.append(learner.evaluate().item())
    second = learner.progress()
    assert first.scores + second.scores == tuple(errors)
    assert (first.ended, second.ended) == ((8, 16, 24), (32, 40))
    assert first.means == {"loss": pytest.approx(np.mean(losses[:3])), "error": pytest.approx(np.mean(errors[:3]))}
    curve = learner.curve()
    assert isinstance(curve, Curve)
    np.testing.assert_array_equal(curve.losses, np.array(losses))
    np.testing.assert_array_equal(curve.errors, np.array(errors))
    assert learner.progress().scores == ()


def test_the_area_under_a_curve_is_the_authors():
    assert area_under(np.array([4.0, 2.0, 1.0])) == pytest.approx((3.0 + 1.5) / 3)
    assert area_under(np.full(100, 0.5)) == pytest.approx(0.5 * 99 / 100)
    assert area_under(np.array([1.0])) == 0.0


def test_pictures_are_shown_as_they_are_learned_from():
    learner = classifier(dataset(channels=3), initialization(3, SIDE, CLASSES, 0)[1])
    batches = watch_batches(learner)
    train(learner, 1)
    pictures: list[np.ndarray] = []
    learner.show(pictures.append)
    train(learner, 2)
    learner.close()
    assert [picture.shape for picture in pictures] == [(3, SIDE, SIDE)] * 2
    for picture, (images, _) in zip(pictures, batches[1:], strict=True):
        assert picture.dtype == np.uint8
        assert np.array_equal(picture, images[0].numpy())


# --- in a worker's hands -------------------------------------------------------------------------------------------

LEASE = Lease("l", Task(0, "pong", 0, 11, 48), "w0", "i0", 0, 60.0)


class Inbox:
    """A server that takes everything."""

    def __init__(self) -> None:
        self.received: list[Contribution] = []

    def push(self, contribution: Contribution) -> Ack:
        self.received.append(contribution)
        return Ack(True, contribution.final, "", True, 0)

    def renew(self, *_: object) -> Ack:
        return Ack(True, False, "", True, 0)


class Recorded(Classifier):
    """Keeps its path."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.thetas = [self._point(self.shared)]
        self.locals = [self._point(self.local)]
        self.losses: list[float] = []
        self.gradients: list[np.ndarray] = []

    def _point(self, tensors: Mapping[str, Tensor]) -> np.ndarray:
        return flatten(tensors.values()).numpy() if tensors else np.empty(0, np.float32)

    def backward(self) -> Tensor:
        loss = super().backward()
        self.losses.append(loss.item())
        self.gradients.append(flatten(p.grad for p in self.shared.values()).numpy())
        return loss

    def backward_held_out(self) -> Tensor:
        loss = super().backward_held_out()
        self.losses.append(loss.item())
        self.gradients.append(flatten(p.grad for p in self.shared.values()).numpy())
        return loss

    def evaluate(self) -> Tensor:
        loss = super().evaluate()
        self.losses.append(loss.item())
        return loss

    def step(self) -> None:
        super().step()
        self.thetas.append(self._point(self.shared))
        self.locals.append(self._point(self.local))


def budget(meta_learner: str, updates: int = 6, **settings: Any) -> Config:
    """So many updates, held-back ones included; a step is an example."""
    return config(
        meta_learner=meta_learner,
        agent__envs=1,
        agent__unroll=SETTINGS.batch,
        task_steps=updates * SETTINGS.batch,
        **{"worker__push_interval": 10_000, **settings},
    )


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """From now on workers make classifiers, of a data set that the name of the game determines."""
    learners: list[Recorded] = []

    def make(settings: Config, lease: Lease, start: Start, _stopwatch: object, _beat: object) -> Recorded:
        learner = Recorded(
            dataset(len(lease.task.game)),
            start.vector,
            seed=lease.task.seed,
            settings=SETTINGS,
            worker=WORKER,
            scope=start.scope or settings.scope,
            head_seed=4 if settings.keeps_heads else None,
            head_change=start.head,
        )
        learners.append(learner)
        return learner

    monkeypatch.setattr(worker, "make_learner", make)
    return learners


def start_of(settings: Config) -> np.ndarray:
    return MODEL if settings.scope == "model" else ENCODER


@pytest.mark.parametrize("metric", ["energy", "length"])
@pytest.mark.parametrize("final_loss", [False, True])
def test_leap_over_it_is_the_oracles(made, metric, final_loss):
    settings = budget(
        "leap", leap__metric=metric, leap__final_loss=final_loss, worker__push_interval=24, server__on_lost="keep"
    )
    inbox = Inbox()
    run_task(LEASE, Start(ENCODER), settings, inbox)
    [learner] = made
    assert len(learner.losses) == 6
    for contribution in inbox.received:
        points = contribution.updates
        path = pull_forward(learner.thetas, learner.losses[:points], learner.gradients, metric=metric)
        error = np.linalg.norm(contribution.vector - path.gradient)
        assert error < 1e-5 * np.linalg.norm(path.gradient)
        assert contribution.path.energy == pytest.approx(path.energy, rel=1e-4)
        assert contribution.path.length == pytest.approx(path.length, rel=1e-4)
    assert [c.updates for c in inbox.received] == [3, 6]


@pytest.mark.parametrize("meta_learner", ARMS)
def test_every_meta_learner_gets_along_with_it(made, meta_learner):
    settings = budget(meta_learner, fomaml__rollouts=2)
    inbox = Inbox()
    run_task(LEASE, Start(start_of(settings)), settings, inbox)
    [learner], final = made, inbox.received[-1]
    trained = 4 if meta_learner == "fomaml" else 6
    assert len(learner.thetas) == trained + 1
    assert len(learner.losses) == 6
    assert final.steps == 48
    assert final.manifest == initialization(1, SIDE, CLASSES, 0, settings.scope)[0].digest
    moved = learner.thetas[0] - learner.thetas[-1]
    moved_head = learner.locals[0] - learner.locals[-1]
    expected = {
        "leap": lambda: pull_forward(learner.thetas, learner.losses, learner.gradients).gradient,
        "fomaml": lambda: (learner.gradients[-2] + learner.gradients[-1]) / 2,
        "finetune-multi": lambda: np.concatenate([moved, moved_head]),
        "none": lambda: np.empty(0),
    }.get(meta_learner, lambda: moved)()
    assert final.vector.shape == expected.shape
    np.testing.assert_allclose(final.vector, expected, rtol=1e-4, atol=1e-6)
    assert final.curve[-1].means.keys() == {"loss", "error"}


def test_an_evaluation_tells_of_every_single_update(made):
    inbox = Inbox()
    run_task(LEASE, Start(ENCODER, evaluation=True), budget("leap"), inbox)
    [learner] = made
    episodes = inbox.received[-1].episodes
    assert [episode.steps for episode in episodes] == [8, 16, 24, 32, 40, 48]
    assert [episode.score for episode in episodes] == learner.curve().errors.tolist()
    assert learner.test().error <= 1


@pytest.mark.parametrize("shift", ["increments", "trajectory"])
def test_an_evaluation_does_not_follow_phi_whatever_the_mode_of_the_run(made, shift):
    """This inbox has no snapshots, as the server of an evaluation has none."""
    streaming = budget("leap", mode="stream", meta__shift=shift, worker__push_interval=8)
    for settings in (streaming, budget("leap")):
        run_task(LEASE, Start(ENCODER, evaluation=True), settings, Inbox())
    shifted, plain = made
    assert np.array_equal(shifted.thetas[-1], plain.thetas[-1])


def test_one_task_leaves_nothing_behind_for_the_next(made):
    vectors = []
    for tasks in (["pong", "breakout"], ["breakout"]):
        for game in tasks:
            inbox = Inbox()
            run_task(replace(LEASE, task=replace(LEASE.task, game=game)), Start(ENCODER), budget("leap"), inbox)
        vectors.append(inbox.received[-1].vector)
    assert np.array_equal(*vectors)


@pytest.mark.parametrize("meta_learner", ["leap", "finetune-multi"])
def test_meta_training_through_the_real_server(made, tmp_path: Path, meta_learner):
    settings = budget(meta_learner, mode="sync", games=("pong", "breakout"), meta__batch_size=2, meta_updates=3)
    manifest, initial = initialization(1, SIDE, CLASSES, 0)
    server = MetaServer(settings, tmp_path, manifest=manifest, initial=initial)
    for _ in range(6):
        lease = grant(server)
        _, vector = server.snapshot()
        ack = run_task(lease, Start(vector, server.head(lease.task.game)), settings, server)
        assert ack is not None
        assert ack.durable, ack
    version, learned = server.snapshot()
    server.close()
    assert version == 3
    assert not np.array_equal(learned, initial)
    assert len(ledger(tmp_path)) == 6
    fresh, pretrained = (
        np.mean([np.mean(train(classifier(dataset(seed), start, seed=77), 6)) for seed in (4, 8)])
        for start in (initial, learned)
    )
    assert pretrained < fresh


def test_the_helpers_data_is_what_it_says():
    data = dataset()
    assert isinstance(data, Dataset)
    assert Counter(data.train.labels.tolist()) == dict.fromkeys(range(CLASSES), 6)
    assert data.test.images.shape == (12, SIDE, SIDE, 1)


# --- networks, patience in updates, tests in between -----------------------------------------------------------------


def test_the_networks_differ_in_order_and_scales_only():
    images = torch.randn(6, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    found = {}
    for network in NETWORKS:
        model = ConvNet(1, SIDE, CLASSES, network)
        initialize(model, torch.Generator().manual_seed(3))
        assert np.array_equal(
            initialization(1, SIDE, CLASSES, 3, "model", network)[1], flatten(model.parameters()).numpy()
        )
        expected = images
        for block in (model.block1, model.block2, model.block3, model.block4):
            expected = block.conv(expected)
            if network == "norm-pool":
                expected = F.max_pool2d(F.relu(block.norm(expected)), 2)
            else:
                expected = F.relu(block.norm(F.max_pool2d(expected, 2)))
        expected = model.head(expected.flatten(1))
        assert torch.allclose(model(images), expected, atol=1e-5)
        found[network] = model
    usual, authors = found["pool-norm"], found["authors"]
    assert torch.equal(usual.block2.conv.weight, authors.block2.conv.weight)
    assert torch.equal(usual.head.weight, authors.head.weight)
    assert set(usual.block1.norm.weight.tolist()) == {1.0}
    scales = torch.cat([getattr(authors, f"block{number}").norm.weight for number in (1, 2, 3, 4)])
    assert 0 <= scales.min() < 0.05
    assert 0.95 < scales.max() < 1
    assert abs(scales.mean() - 0.5) < 0.06
    assert not torch.equal(found["norm-pool"](images), usual(images))


def test_a_task_ends_after_so_many_updates_without_a_lower_validation_error(monkeypatch):
    errors = iter([0.5, 0.4, 0.45, 0.3, 0.3, 0.35, 0.4])
    data = replace(dataset(), validation=dataset(1).test)
    settings = replace(SETTINGS, patience_steps=5, validation_interval=2)
    learner = classifier(data, ENCODER, settings=settings)
    monkeypatch.setattr(learner, "_score", lambda store: Score(next(errors), 0.0))
    ended = []
    for update in range(1, 100):
        learner.backward()
        learner.step()
        if learner.done:
            break
        ended.append(update)
    # Measured after 2, 4, …: the lowest error comes at 8, and three measurements (5 / 2, rounded up) bring none lower.
    assert len(ended) + 1 == 14


def test_validation_images_are_another_set_than_test_images():
    data = replace(dataset(), validation=dataset(1).test)
    learner = classifier(data, ENCODER, settings=replace(SETTINGS, patience_steps=5))
    train(learner, 3)
    assert learner._validation is not None
    assert learner._score(learner._validation) != learner.test()


def test_an_evaluation_may_test_in_between():
    learner = classifier(dataset(), ENCODER, settings=replace(SETTINGS, test_interval=3))
    found = []
    for _ in range(7):
        learner.backward()
        learner.step()
        found.append(learner.interim(lambda: None))
        if found[-1]:
            assert found[-1] == {"test_error": learner.test().error, "test_loss": learner.test().loss}
    assert [bool(one) for one in found] == [False, False, True, False, False, True, False]
    assert classifier(dataset(), ENCODER).interim(lambda: None) == {}
