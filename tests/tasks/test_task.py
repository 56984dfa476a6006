"""Kinds of tasks behind the one server and the one worker's loop: data sets, from files to init.safetensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_data_sets import write_part

from leap_dist.config.loading import ConfigError, resolve
from leap_dist.config.settings import Config
from leap_dist.evaluation import initializations
from leap_dist.evaluation.initializations import Arm
from leap_dist.evaluation.runs import load_all, plan
from leap_dist.evaluation.server import EvaluationServer
from leap_dist.nn import convnet
from leap_dist.nn.flat_vector import Manifest, flatten, load_vector
from leap_dist.nn.profiling import Stopwatch
from leap_dist.protocol.messages import Ack, Contribution, Idle
from leap_dist.server.meta_server import MetaServer
from leap_dist.tasks.images import family
from leap_dist.tasks.images.classifier import Classifier
from leap_dist.tasks.starting_point import StartingPoint
from leap_dist.tasks.task import family_of
from leap_dist.weights.initialization import load_encoder, load_network, read_initialization
from leap_dist.weights.warm_start import initial_vector
from leap_dist.worker.heartbeat import no_heartbeat
from leap_dist.worker.run_task import run_task
from leap_dist.worker.start import Start, make_learner


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_part(folder, "cifar10")
    write_part(folder, "mnist", seed=1)
    write_part(folder, "gtsrb", train=2, test=1, seed=2)
    return folder


def small(data_dir: Path, **settings: Any) -> Config:
    """Twelve updates of five images."""
    given = {name.replace("__", "."): value for name, value in settings.items()}
    base = {
        "tasks": "multi-cv",
        "games": ("mnist", "cifar10"),
        "data_dir": str(data_dir),
        "task_steps": 60,
        "meta_updates": 2,
        "meta.batch_size": 2,
        "supervised.batch": 5,
        "supervised.epochs": 0,
        "supervised.patience": 0,
        "fomaml.rollouts": 2,
        "worker.device": "cpu",
        "worker.precision": "float32",
        "worker.push_interval": 1_000,
    }
    return resolve("smoke", base, given)


def server_of(config: Config, run_dir: Path) -> MetaServer:
    run_dir.mkdir(exist_ok=True)
    family = family_of(config)
    manifest, initial = family.initialization(config, config.seed, config.scope)
    preprocessing = family.preprocessing(config)
    return MetaServer(config, run_dir, manifest=manifest, initial=initial, preprocessing=preprocessing)


def work(server: Any, config: Config) -> list[Ack]:
    """Trains until there is nothing more to do."""
    answers = []
    while not isinstance(lease := server.lease("w0", "i0"), Idle):
        if isinstance(server, EvaluationServer):
            vector, scope, _ = server.start(lease)
            start = Start(vector, scope=scope, evaluation=True)
        else:
            start = Start(server.snapshot()[1], server.head(lease.task.game))
        ack = run_task(lease, start, config, server)
        assert ack is not None
        answers.append(ack)
    return answers


@pytest.mark.parametrize("mode", ["sync", "buffered", "async", "delayed-nesterov", "stream"])
@pytest.mark.parametrize("meta_learner", ["leap", "reptile", "finetune-multi"])
def test_every_mode_learns_data_sets_as_it_learns_games(data_dir, tmp_path, mode, meta_learner):
    settings = {"meta.optimizer": "sgd", "meta.learning_rate": 0.1} | (
        {"meta.momentum": 0.9, "meta.nesterov": True} if mode == "delayed-nesterov" else {}
    )
    config = small(data_dir, mode=mode, meta_learner=meta_learner, worker__push_interval=30, **settings)
    server = server_of(config, tmp_path)
    _, before = server.snapshot()
    assert all(ack.durable for ack in work(server, config))
    status = server.status()
    assert status["complete"]
    assert status["tasks"] == 4
    assert status["refused"] == {}
    assert not np.array_equal(server.snapshot()[1], before)
    lines, _ = server.ledger(0)
    finals = [line for line in lines if line["final"]]
    assert {line["game"] for line in finals} == {"mnist", "cifar10"}
    assert all(line["steps"] == 60 for line in finals)
    assert all(len(line["curve"]) == 12 for line in finals), (
        "a point for each of twelve updates, however rare reports are"
    )
    assert all(0 <= point["score"] == point["means"]["error"] <= 1 for line in finals for point in line["curve"])
    server.close()


def test_what_is_sent_for_a_task_is_what_the_learner_alone_computes(data_dir, tmp_path):
    """Reptile's φ − θ_K, from the learner stepped by hand."""
    config = small(data_dir, mode="async", meta_learner="reptile", meta_updates=1, meta__batch_size=1)
    received: list[Contribution] = []

    class Inbox:
        def push(self, contribution: Contribution) -> Ack:
            received.append(contribution)
            return Ack(True, contribution.final, "", True, 0)

        def renew(self, *_: object) -> Ack:
            return Ack(True, False, "", True, 0)

    server = server_of(config, tmp_path)
    lease = server.lease("w0", "i0")
    assert not isinstance(lease, Idle)
    _, vector = server.snapshot()
    run_task(lease, Start(vector), config, Inbox())  # type: ignore[arg-type]
    server.close()

    learner = make_learner(config, lease, Start(vector))
    assert isinstance(learner, Classifier)
    start = flatten(learner.shared.values())
    for _ in range(12):
        learner.backward()
        learner.step()
    assert np.array_equal(received[-1].vector, (start - flatten(learner.shared.values())).numpy())


def test_sync_does_not_depend_on_who_trains_what(data_dir, tmp_path):
    """Two workers that take turns, and one alone."""
    config, found = small(data_dir, mode="sync", meta__optimizer="sgd", meta__learning_rate=0.1), []
    for workers in (1, 2):
        server = server_of(config, tmp_path / str(workers))
        while True:
            leases = [server.lease(f"w{n}", f"i{n}") for n in range(workers)]
            granted = [lease for lease in leases if not isinstance(lease, Idle)]
            if not granted:
                break
            for lease in reversed(granted):
                run_task(lease, Start(server.snapshot()[1]), config, server)
        found.append(server.snapshot()[1].tobytes())
        server.close()
    assert found[0] == found[1]


def test_data_sets_keep_heads_of_their_own_number_of_classes(data_dir, tmp_path):
    config = small(data_dir, games=("mnist", "gtsrb"), meta_learner="finetune-multi", mode="sync")
    server = server_of(config, tmp_path)
    work(server, config)
    features = 64 * 2 * 2
    sizes = {game: len(server.head(game)) for game in config.games}  # type: ignore[arg-type]
    assert sizes == {"mnist": 10 * features + 10, "gtsrb": 43 * features + 43}
    server.close()


def test_epochs_end_a_task_and_what_fomaml_holds_back_comes_after(data_dir, tmp_path):
    """60 images of mnist: an epoch is twelve batches."""
    for meta_learner, extra in (("leap", 0), ("fomaml", 2)):
        config = small(
            data_dir, games=("mnist",), task_steps=10_000, supervised__epochs=2, meta_learner=meta_learner,
            meta_updates=1, meta__batch_size=1, mode="async",
        )  # fmt: skip
        server = server_of(config, tmp_path / meta_learner)
        work(server, config)
        (line,) = server.ledger(0)[0]
        assert line["updates"] == 24 + extra
        assert line["steps"] == 5 * line["updates"]
        server.close()


def test_a_task_ends_when_validation_has_no_more_to_gain(data_dir, monkeypatch):
    config = small(data_dir, games=("mnist",), supervised__patience=2, supervised__validation=0.34)
    kind = family_of(config)
    lease = _lease(config)
    learner = kind.learner(config, lease, _beginning(config), Stopwatch(), no_heartbeat)
    assert isinstance(learner, Classifier)
    assert learner._train.count == 40, "of six images of each class two are for validation"
    errors = iter([0.5, 0.4, 0.4, 0.45, 0.1])
    monkeypatch.setattr(Classifier, "_score", lambda *_: _Score(next(errors)))
    ends = []
    for update in range(1, 8 * 5):
        learner.backward()
        learner.step()
        if learner.done:
            ends.append(update)
            break
    assert ends == [8 * 4], "four epochs of eight batches: twice in a row no better than 0.4"


class _Score:
    def __init__(self, error: float) -> None:
        self.error = error


def _lease(config: Config) -> Any:
    from leap_dist.protocol.messages import Lease, Task

    return Lease("l", Task(0, config.games[0], 0, 5, config.task_steps), "w0", "i0", 0, 60.0)


def _beginning(config: Config) -> StartingPoint:
    _, vector = family_of(config).initialization(config, 0, config.scope)
    return StartingPoint(vector, config.scope, None, None)


def test_the_initialization_is_read_back_as_a_network(data_dir, tmp_path):
    config = small(data_dir, mode="sync", meta__optimizer="sgd", meta__learning_rate=0.1)
    server = server_of(config, tmp_path)
    work(server, config)
    vector = server.snapshot()[1]
    server.close()
    path = tmp_path / "init.safetensors"
    found = read_initialization(path)
    assert (found.tasks, found.scope, found.channels) == ("multi-cv", "encoder", 3)
    assert np.array_equal(found.vector(found.manifest), vector)
    with pytest.raises(ValueError, match="head_seed"):
        load_network(path)
    with pytest.raises(ValueError, match="tasks multi-cv, not for Atari"):
        load_encoder(path)
    network = load_network(path, classes=7, head_seed=0)
    shared, _ = network.parameters_of("encoder")
    assert np.array_equal(flatten(shared.values()).numpy(), vector)
    assert Manifest.of(shared) == found.manifest
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("kind", convnet.NETWORKS)
def test_a_network_is_read_back_with_the_order_of_its_layers(data_dir, tmp_path, kind):
    """All networks have the same shapes: only the description in the file tells them apart."""
    server_of(small(data_dir, supervised__network=kind), tmp_path).close()
    found = read_initialization(tmp_path / "init.safetensors")
    network, images = found.network(5, head_seed=0), torch.rand(4, 3, 32, 32)
    wanted = convnet.ConvNet(3, 32, 5, kind)
    load_vector(dict(wanted.named_parameters()), flatten(network.parameters()).numpy())
    assert torch.equal(network(images), wanted(images))
    other = convnet.ConvNet(3, 32, 5, "pool-norm" if kind == "norm-pool" else "norm-pool")
    load_vector(dict(other.named_parameters()), flatten(network.parameters()).numpy())
    assert not torch.equal(network(images), other(images))


@pytest.mark.parametrize(("kind", "wanted"), [("pool-norm", "authors"), ("authors", "pool-norm")])
def test_networks_that_compute_the_same_start_from_each_other(data_dir, tmp_path, kind, wanted):
    server_of(small(data_dir, supervised__network=kind), tmp_path).close()
    path = tmp_path / "init.safetensors"
    config = small(data_dir, supervised__network=wanted, init=str(path))
    found = initial_vector(config)
    assert found is not None
    assert np.array_equal(found, read_initialization(path).vector(read_initialization(path).manifest))
    assert initializations.arms(*initializations.read([str(path)]), config)[0].label == tmp_path.name


@pytest.mark.parametrize(("kind", "wanted"), [("norm-pool", "pool-norm"), ("pool-norm", "norm-pool")])
def test_a_network_of_another_order_is_no_arm_and_no_start(data_dir, tmp_path, kind, wanted):
    server_of(small(data_dir, supervised__network=kind), tmp_path).close()
    path = tmp_path / "init.safetensors"
    config = small(data_dir, supervised__network=wanted, init=str(path))
    refused = f"supervised.network: {wanted} is not what .* was trained with; use --supervised.network {kind}"
    with pytest.raises(ConfigError, match=refused):
        initial_vector(config)
    with pytest.raises(ConfigError, match=refused):
        initializations.arms(*initializations.read([str(path)]), config)
    assert initial_vector(small(data_dir, supervised__network=kind, init=str(path))) is not None


def test_an_evaluation_tests_what_was_held_out_and_starts_all_arms_alike(data_dir, tmp_path):
    config = replace(small(data_dir, games=("cifar10",), task_steps=300), meta_learner="none")
    _, vector = family_of(config).initialization(config, 3, "encoder")
    arms = [Arm("given", "somewhere", "encoder"), Arm("scratch", "scratch", "encoder")]
    runs = plan(arms, config, seeds=1)
    (tmp_path / "out").mkdir()
    server = EvaluationServer(config, runs, {"given": vector}, tmp_path / "out")
    work(server, config)
    assert server.finished
    server.close()
    found, warnings = load_all(tmp_path / "out")
    assert warnings == []
    assert [run.arm for run in found] == ["given", "scratch"]
    for run in found:
        assert run.ended.tolist() == list(range(5, 301, 5)), "every batch's error is told"
        last = run.curve[-1]
        assert last["steps"] == 300
        assert set(last) >= {"loss", "error", "test_error", "test_loss", "train_error"}
        assert "test_error" not in run.curve[0]
        assert 0 <= last["test_error"] <= 1
        assert last["train_error"] < 0.5, "patterns of their own are soon told apart"
    assert not np.array_equal(found[0].returns, found[1].returns)


def test_an_alphabet_is_the_same_at_every_visit_and_another_with_another_seed(monkeypatch):
    from leap_dist.datasets.omniglot import Omniglot

    drawings = np.random.default_rng(0).integers(0, 255, (30, 20, 28, 28), dtype=np.uint8)
    monkeypatch.setattr(family, "_omniglot", lambda *_: Omniglot({"Greek": drawings}))
    config = resolve("smoke", {"tasks": "omniglot", "games": ("greek",)})
    omniglot = family.Omniglot()
    one, again = omniglot.data(config, "greek"), omniglot.data(config, "greek")
    assert np.array_equal(one.train.images, again.train.images)
    other = omniglot.data(replace(config, seed=1), "greek")
    assert not np.array_equal(one.train.images, other.train.images)
    with pytest.raises(ConfigError, match="no alphabet latin"):
        omniglot.data(config, "latin")


def test_labels_may_be_drawn_anew_at_every_visit(monkeypatch):
    from leap_dist.datasets.omniglot import Omniglot
    from leap_dist.protocol.messages import Lease, Task

    drawings = np.random.default_rng(0).integers(0, 255, (30, 20, 28, 28), dtype=np.uint8)
    monkeypatch.setattr(family, "_omniglot", lambda *_: Omniglot({"Greek": drawings}))
    omniglot = family.Omniglot()
    fixed = resolve("smoke", {"tasks": "omniglot", "games": ("greek",)})
    drawn = resolve("smoke", {"tasks": "omniglot", "games": ("greek",), "supervised.labels": "drawn"})
    leases = [Lease("l", Task(0, "greek", 0, seed, 200), "w0", "i0", 0, 60.0) for seed in (1, 2)]
    one, other = (omniglot.task_data(drawn, lease) for lease in leases)
    assert np.array_equal(one.train.images, omniglot.task_data(fixed, leases[0]).train.images)
    assert not np.array_equal(one.train.labels, other.train.labels)
    assert np.array_equal(
        omniglot.task_data(fixed, leases[0]).train.labels, omniglot.task_data(fixed, leases[1]).train.labels
    )
    for label in range(20):  # a character is one class in both parts
        (before,) = set(omniglot.task_data(fixed, leases[0]).train.labels[one.train.labels == label])
        assert set(omniglot.task_data(fixed, leases[0]).test.labels[one.test.labels == label]) == {before}
    with pytest.raises(ConfigError, match="labels: drawn changes the classes for which finetune-multi keeps heads"):
        resolve("smoke", {"tasks": "omniglot", "supervised.labels": "drawn", "meta_learner": "finetune-multi"})


def test_missing_data_is_said_before_anything_starts_with_what_there_is(data_dir):
    config = small(data_dir, games=("mnist", "cifar10", "svhn"))
    with pytest.raises(ConfigError, match=r"svhn is not a folder.*There are folders of cifar10, mnist: choose with"):
        family_of(config).check(config)
    with pytest.raises(ConfigError, match="is not a folder"):
        family_of(config).check(replace(config, tasks="omniglot"))
    family_of(config).check(replace(config, games=("mnist",)))
