"""What each meta-learner returns: first on paths that can be computed by hand, then on the real emulator and server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from a2c_learners import seen
from protocol import config, grant, ledger
from pull_forward_oracle import pull_forward
from torch import Tensor, nn
from trajectories import make_net, train, watched

from leap_dist.config.loading import resolve
from leap_dist.config.settings import Config
from leap_dist.leap import meta_learners
from leap_dist.leap.learner import Progress
from leap_dist.nn.actor_critic import initialization
from leap_dist.nn.flat_vector import Manifest, flatten
from leap_dist.protocol.messages import Ack, Contribution, Lease, Task
from leap_dist.server.meta_server import MetaServer
from leap_dist.tasks.atari.a2c import A2C
from leap_dist.worker import run_task as worker
from leap_dist.worker.run_task import run_task
from leap_dist.worker.start import Start, make_learner

ARMS = ("leap", "reptile", "fomaml", "finetune-multi", "finetune-single", "none")


class Inbox:
    """A server that takes everything."""

    def __init__(self) -> None:
        self.received: list[Contribution] = []

    def push(self, contribution: Contribution) -> Ack:
        self.received.append(contribution)
        return Ack(True, contribution.final, "", True, 0)

    def renew(self, *_: object) -> Ack:
        return Ack(True, False, "", True, 0)


# --- paths known in every number -----------------------------------------------------------------------------------


class Noisy:
    """f_k(θ, h) = ½‖θ − c_k‖² + ½‖h − b_k‖², with new targets c_k and b_k in each rollout k; SGD with momentum.

    So ∇f_k(θ) = θ − c_k. As A2C's, `backward` adds to what is in `.grad`, and `step` drops it.
    """

    descent = None
    steps_per_update = 10

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self.shared = {"a": self._draw(3), "b": self._draw(2, 2)}
        self.local = {"head": self._draw(2)}
        self._parameters = [*self.shared.values(), *self.local.values()]
        self._optimizer = torch.optim.SGD(self._parameters, lr=0.1, momentum=0.9)
        self.start = self.point()
        self.thetas: list[np.ndarray] = []
        self.losses: list[float] = []
        self.gradients: list[np.ndarray] = []
        """Of the shared parameters, in each rollout."""
        self.points = [self.start]
        """Shared and local, after each step."""

    def _draw(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=self._random))

    def point(self) -> np.ndarray:
        return flatten([*self.shared.values(), *self.local.values()]).numpy()

    def _loss(self) -> Tensor:
        targets = [torch.randn(p.shape, generator=self._random) for p in self._parameters]
        self.thetas.append(flatten(self.shared.values()).numpy())
        shared = flatten(self.shared.values()) - flatten(targets[: len(self.shared)])
        self.gradients.append(shared.numpy())
        loss = sum(0.5 * (p - c).square().sum() for p, c in zip(self._parameters, targets, strict=True))
        self.losses.append(loss.item())
        return loss

    def backward(self) -> Tensor:
        loss = self._loss()
        loss.backward()
        return loss.detach()

    done = False

    def backward_held_out(self) -> Tensor:
        return self.backward()

    def interim(self, beat: object) -> dict[str, float]:
        return {}

    def conclude(self, beat: object) -> dict[str, float]:
        return {}

    def step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.points.append(self.point())

    def evaluate(self) -> Tensor:
        return self._loss().detach()

    def progress(self) -> Progress:
        return Progress((), {})

    def close(self) -> None:
        pass


def small(meta_learner: str, rollouts: int, **settings: Any) -> Config:
    """Tasks of `rollouts` rollouts, 5 steps in 2 environments each."""
    given = {"agent__envs": 2, "agent__unroll": 5, "task_steps": 10 * rollouts, "fomaml__rollouts": 3, **settings}
    return config(meta_learner=meta_learner, worker__device="cpu", worker__precision="float32", **given)


def play(monkeypatch: pytest.MonkeyPatch, settings: Config, *, seed: int = 0) -> tuple[list[Contribution], Noisy]:
    """A whole task of `Noisy`."""
    learner, inbox = Noisy(seed), Inbox()
    monkeypatch.setattr(worker, "make_learner", lambda *_: learner)
    run_task(LEASE, Start(flatten(learner.shared.values()).numpy()), settings, inbox)
    return inbox.received, learner


LEASE = Lease("l", Task(0, "pong", 0, 5, 0), "w0", "i0", 0, 60.0)
SHARED = 7  # numbers that Noisy shares, of nine


@pytest.mark.parametrize("meta_learner", ["reptile", "finetune-multi", "finetune-single"])
def test_start_minus_end_after_every_push(monkeypatch, meta_learner):
    """With the head where the game's head persists; and each push reaches from the start of the path."""
    received, learner = play(monkeypatch, small(meta_learner, 6, worker__push_interval=10, server__on_lost="keep"))
    assert [c.updates for c in received] == [1, 2, 3, 4, 5, 6]
    size = 9 if meta_learner == "finetune-multi" else SHARED
    for contribution in received:
        assert contribution.vector.dtype == np.float32
        expected = learner.start - learner.points[contribution.updates]
        assert np.array_equal(contribution.vector, expected[:size])


def test_only_leap_with_its_final_loss_and_fomaml_hold_rollouts_back():
    for final_loss, expected in ((False, 0), (True, 1)):
        found = {name: small(name, 6, leap__final_loss=final_loss).held_back for name in ARMS}
        assert found == {**dict.fromkeys(ARMS, 0), "leap": expected, "fomaml": 3}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rollouts", [2, 7])
def test_law_6_leap_without_the_loss_and_with_its_last_segment_is_reptile(monkeypatch, rollouts, seed):
    """Bit for bit. Closing the last segment takes one rollout of the budget."""
    closed = small("leap", rollouts + 1, leap__loss_weight=0, leap__final_loss=True)
    received, learner = play(monkeypatch, closed, seed=seed)
    expected, reptile = play(monkeypatch, small("reptile", rollouts, leap__loss_weight=0), seed=seed)
    assert len(learner.points) == len(reptile.points) == rollouts + 1
    assert np.array_equal(received[-1].vector, expected[-1].vector)
    open_ended, _ = play(monkeypatch, small("leap", rollouts, leap__loss_weight=0), seed=seed)
    assert not np.array_equal(open_ended[-1].vector, expected[-1].vector), "the control: its last segment is dropped"


def test_fomaml_returns_the_mean_gradient_of_fresh_rollouts_at_the_end_of_the_path(monkeypatch):
    received, learner = play(monkeypatch, small("fomaml", 7, worker__push_interval=1000))
    assert len(learner.points) == 5, "seven rollouts, of which three are held back"
    assert len(learner.gradients) == 7
    assert all(np.array_equal(theta, learner.points[-1][:SHARED]) for theta in learner.thetas[4:])
    np.testing.assert_allclose(received[-1].vector, np.mean(learner.gradients[4:], axis=0), rtol=1e-5, atol=1e-6)
    assert np.linalg.norm(received[-1].vector - np.mean(learner.gradients[3:], axis=0)) > 0.1, "or it proves little"


def test_before_its_end_fomaml_returns_the_gradient_of_the_last_rollout(monkeypatch):
    """And then the mean of those at θ_K so far."""
    received, learner = play(monkeypatch, small("fomaml", 7, worker__push_interval=10, server__on_lost="keep"))
    assert [c.updates for c in received] == [1, 2, 3, 4, 5, 6, 7]
    for i, contribution in enumerate(received):
        expected = np.mean(learner.gradients[min(i, 4) : i + 1], axis=0)
        np.testing.assert_allclose(contribution.vector, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rollouts", [1, 3])
def test_the_first_fresh_loss_closes_the_path_of_fomaml(monkeypatch, rollouts):
    received, learner = play(monkeypatch, small("fomaml", 4 + rollouts, fomaml__rollouts=rollouts))
    path = pull_forward(learner.thetas, learner.losses[:5], learner.gradients)
    found = received[-1].path
    assert (found.energy, found.length) == pytest.approx((path.energy, path.length))
    norms = np.linalg.norm(path.loss_term), np.linalg.norm(path.path_term)
    assert (found.loss_term_norm, found.path_term_norm) == pytest.approx(norms)


def test_no_meta_learning_returns_nothing_but_the_statistics(monkeypatch):
    received, learner = play(monkeypatch, small("none", 6, worker__push_interval=10))
    for contribution in received:
        assert contribution.vector.shape == (0,)
        assert contribution.vector.dtype == np.float32
        assert contribution.manifest == Manifest.of(learner.shared).digest
        path = pull_forward(learner.thetas, learner.losses[: contribution.updates], learner.gradients)
        assert (contribution.path.energy, contribution.path.length) == pytest.approx((path.energy, path.length))


@pytest.mark.parametrize(
    "loss", [{}, {"leap__loss_weight": 0.3, "leap__stabilize": False, "leap__loss_smoothing": 0.5}]
)
def test_every_meta_learner_measures_the_same_path_in_the_same_way(monkeypatch, loss):
    """fomaml too, as far as it trains."""
    paths = {}
    for meta_learner in ARMS:
        rollouts = 9 if meta_learner == "fomaml" else 6
        received, _ = play(monkeypatch, small(meta_learner, rollouts, worker__push_interval=10, **loss))
        paths[meta_learner] = [contribution.path for contribution in received[:5]]
    assert all(found == paths["leap"] for found in paths.values())
    # Of the length metric, energy and length are the same; the weights of its terms differ.
    received, _ = play(monkeypatch, small("leap", 6, leap__metric="length", worker__push_interval=10, **loss))
    for found, expected in zip(received[1:5], paths["leap"][1:], strict=True):
        assert (found.path.energy, found.path.length) == (expected.energy, expected.length)
        assert found.path.path_term_norm != expected.path_term_norm


def test_what_leaps_gradient_leaves_out_of_the_loss_is_part_of_its_path(monkeypatch):
    """So arms can be compared whose presets differ in it, as those of `fast` do."""
    paths, terms = [], []
    for more in ({}, {"leap__loss_warmup": 0.5}, {"leap__loss_smoothing": 0.9}):
        received, _ = play(monkeypatch, small("leap", 6, worker__push_interval=10, **more))
        paths.append([(one.path.energy, one.path.length) for one in received])
        terms.append(received[-1].path.loss_term_norm)
    assert paths[0] == paths[1] == paths[2]
    assert len(set(terms)) == 3, "the control"


def test_the_length_metric_is_leaps_alone(monkeypatch):
    """Reptile's statistics stay comparable whatever leap.metric is."""
    energy, _ = play(monkeypatch, small("reptile", 4))
    length, _ = play(monkeypatch, small("reptile", 4, leap__metric="length"))
    assert energy[-1].path == length[-1].path


@pytest.mark.parametrize("meta_learner", ARMS)
def test_a_report_belongs_to_its_reader_and_reading_changes_nothing(monkeypatch, meta_learner):
    results = []
    for reads in (0, 2):
        learner, settings = Noisy(1), small(meta_learner, 8)
        watch = meta_learners.make(settings, learner)
        for _ in range(4):
            watch.observe(learner.backward())
            learner.step()
            for _ in range(reads):
                watch.report()[0].fill_(torch.nan)
        for _ in range(settings.held_back):
            watch.observe_held_back()
            for _ in range(reads):
                watch.report()[0].fill_(torch.nan)
        watch.finish()
        for _ in range(reads):
            watch.report()[0].fill_(torch.nan)
        results.append((watch.report()[0].tolist(), watch.report()[1]))
    assert results[0] == results[1]


@pytest.mark.parametrize("meta_learner", ["reptile", "finetune-multi", "finetune-single"])
def test_start_minus_end_leaves_shifts_out(meta_learner):
    net = make_net(0, torch.float32)
    watch = meta_learners.make(resolve("paper", {"meta_learner": meta_learner}), watched(net))
    moved = [torch.full_like(p, 0.25) for p in net.encoder.parameters()]

    def shift(i: int) -> None:
        if i in (1, 2):
            with torch.no_grad():
                for parameter, amount in zip(net.encoder.parameters(), moved, strict=True):
                    parameter += amount
            watch.shift(moved)

    start, start_of_head = flatten(net.encoder.parameters()), flatten(net.head.parameters())
    train(net, watch, updates=4, after_step=shift)
    watch.finish()
    expected = start + 2 * flatten(moved) - flatten(net.encoder.parameters())
    vector, _ = watch.report()
    if meta_learner == "finetune-multi":
        assert torch.equal(vector[len(start) :], start_of_head - flatten(net.head.parameters())), "not shifted"
        vector = vector[: len(start)]
    torch.testing.assert_close(vector, expected, rtol=0, atol=1e-6)
    assert expected.norm() > 1e-3


# --- the real learner ----------------------------------------------------------------------------------------------


def quick(meta_learner: str, rollouts: int, **settings: Any) -> Config:
    """`small` with as many steps in a single environment: to start one takes longer than to train these tasks."""
    return small(meta_learner, rollouts, **{"agent__envs": 1, "agent__unroll": 10, "atari__noop_max": 0, **settings})


class Played(SimpleNamespace):
    """A learner that was trained, with what it started from, and counts."""

    learner: A2C
    shared: np.ndarray
    local: np.ndarray
    env_steps: int
    updates: int


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[Played]:
    """Every learner that a worker makes."""
    made: list[Played] = []
    make = make_learner

    def watching(*arguments: Any) -> A2C:
        learner = make(*arguments)
        one = Played(learner=learner, env_steps=0, updates=0, **parameters(learner))
        made.append(one)
        count(one, "env_steps", learner._env, "step")
        count(one, "updates", learner, "step")
        return learner

    monkeypatch.setattr(worker, "make_learner", watching)
    return made


def count(one: Played, counter: str, owner: object, method: str) -> None:
    real: Callable[..., Any] = getattr(owner, method)

    def counted(*arguments: Any) -> Any:
        setattr(one, counter, getattr(one, counter) + 1)
        return real(*arguments)

    setattr(owner, method, counted)


def parameters(learner: A2C) -> dict[str, np.ndarray]:
    return {"shared": flatten(learner.shared.values()).numpy(), "local": flatten_or_nothing(learner.local)}


def flatten_or_nothing(tensors: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, np.float32), *(p.detach().numpy().ravel() for p in tensors.values())])


def train_alone(settings: Config) -> Contribution:
    """The final contribution of a task of Pong, always the same one."""
    inbox = Inbox()
    run_task(LEASE, Start(initialization(4, 0, settings.scope)[1]), settings, inbox)
    return inbox.received[-1]


def test_every_meta_learner_spends_the_same_agent_steps_on_a_task(played):
    """Held-back rollouts are inside the budget, or arms could not be compared at equal steps."""
    held_back = {"fomaml": 3, "closed": 1}
    found = {}
    for name in (*ARMS, "closed"):
        settings = quick("leap" if name == "closed" else name, 6, leap__final_loss=name == "closed", task_steps=69)
        contribution = found[name] = train_alone(settings)
        one = played[-1]
        assert (contribution.updates, contribution.steps) == (6, 60), "whole rollouts, of 69 steps"
        assert one.env_steps == 6 * 10
        assert one.updates == 6 - held_back.get(name, 0)
    # The same task with the same heads is the same trajectory.
    assert found["leap"].path == found["reptile"].path == found["none"].path
    assert found["leap"].path.energy > 0


def test_law_6_on_the_real_learner(played):
    closed = train_alone(small("leap", 5, leap__loss_weight=0, leap__final_loss=True))
    reptile = train_alone(small("reptile", 4))
    end = parameters(played[-1].learner)["shared"]
    assert np.array_equal(reptile.vector, played[-1].shared - end)
    assert np.array_equal(closed.vector, reptile.vector)
    assert np.linalg.norm(closed.vector) > 0


def test_fomaml_on_the_real_learner_against_gradients_taken_one_by_one(played):
    contribution = train_alone(small("fomaml", 5, fomaml__rollouts=3))
    theta = played[0].learner
    assert played[0].updates == 2

    settings = small("fomaml", 5)
    learner = make_learner(settings, LEASE, Start(initialization(4, 0)[1]))
    for _ in range(2):
        learner.backward()
        learner.step()
    gradients, observations = [], []
    for _ in range(3):
        for parameter in learner.shared.values():
            parameter.grad = None
        learner.backward()
        gradients.append(flatten(parameter.grad for parameter in learner.shared.values()).double())
        observations.append(seen(learner))
    learner.close()

    expected = torch.stack(gradients).mean(0).numpy()
    assert np.linalg.norm(contribution.vector - expected) <= 1e-5 * np.linalg.norm(expected)
    assert len({g.norm().item() for g in gradients}) == 3, "fresh rollouts differ"
    assert not np.array_equal(observations[0], observations[1]), "the environments move on"
    after, copy = parameters(theta), parameters(learner)
    assert np.array_equal(after["shared"], copy["shared"]), "the parameters stand still"
    assert np.array_equal(after["local"], copy["local"])
    assert np.array_equal(seen(theta), observations[-1])


# --- the real learner and the real server --------------------------------------------------------------------------


def serve(run_dir: Path, settings: Config) -> MetaServer:
    manifest, initial = initialization(4, settings.seed, settings.scope)
    return MetaServer(settings, run_dir, manifest=manifest, initial=initial)


def train_next(server: MetaServer, settings: Config) -> str:
    """One task from lease to meta-update. Returns its game."""
    lease = grant(server)
    start = Start(server.snapshot()[1], server.head(lease.task.game))
    ack = run_task(lease, start, settings, server)
    assert ack is not None
    assert ack.durable
    return lease.task.game


@pytest.mark.parametrize(("mode", "games", "pushes"), [("buffered", "pong freeway", 1), ("stream", "freeway", 3)])
def test_the_next_task_of_a_game_starts_from_the_head_that_was_trained(tmp_path, played, mode, games, pushes):
    """While the encoder is everybody's mean, each game has its head to itself."""
    count = len(games.split())
    settings = quick("finetune-multi", 6, mode=mode, games=games, meta__batch_size=count, worker__push_interval=20)
    server = serve(tmp_path, settings)
    ends: dict[str, np.ndarray] = {}
    beginnings: dict[str, np.ndarray] = {}
    for task in range(2 * count):
        phi = server.snapshot()[1]
        game = train_next(server, settings)
        one = played[-1]
        assert np.array_equal(one.shared, phi)
        if task < count:
            beginnings[game] = one.local
        else:
            np.testing.assert_allclose(one.local, ends[game], rtol=0, atol=1e-6)
            assert np.linalg.norm(one.local - beginnings[game]) > 1e-3
        ends[game] = parameters(one.learner)["local"]
    assert len(ends) == count
    for game, end in ends.items():
        np.testing.assert_allclose(beginnings[game] + server.head(game), end, rtol=0, atol=1e-6)
    assert server.status()["contributions_applied"] == 2 * count * pushes


def test_one_head_for_all_games_travels_in_phi(tmp_path, played):
    settings = quick("finetune-single", 6, games="pong freeway", meta__batch_size=1)
    server = serve(tmp_path, settings)
    manifest, initial = initialization(4, 0, "model")
    games = [train_next(server, settings)]
    phi = server.snapshot()[1]
    end = parameters(played[0].learner)["shared"]
    np.testing.assert_allclose(phi, end, rtol=0, atol=1e-6, err_msg="φ plus the mean change, of one task")
    assert Manifest.of(played[0].learner.shared) == manifest
    assert {"policy.weight", "policy.bias", "value.weight", "value.bias"} < set(manifest.names)
    assert played[0].local.size == 0

    before, after = manifest.split(initial), manifest.split(phi)
    moved = (before["policy.weight"] != after["policy.weight"]).any(axis=1)
    legal = {"pong": [0, 1, 3, 4, 11, 12], "freeway": [0, 2, 5]}  # the controller's numbers of their buttons
    assert np.flatnonzero(moved).tolist() == legal[games[0]]
    assert not np.array_equal(before["value.weight"], after["value.weight"])

    games.append(train_next(server, settings))
    assert sorted(games) == ["freeway", "pong"]
    assert np.array_equal(played[1].shared, phi), "the other game's task starts with the same head"
    assert server.version == 2


def test_without_meta_learning_phi_stays_as_it_is_and_the_paths_are_recorded(tmp_path, played):
    settings = quick("none", 6, games="pong freeway", meta__batch_size=1)
    server = serve(tmp_path, settings)
    initial = server.snapshot()[1]
    for _ in range(2):
        train_next(server, settings)
    version, phi = server.snapshot()
    assert version == 2
    assert np.array_equal(phi, initial)
    assert all(np.array_equal(one.shared, initial) for one in played)
    lines = ledger(tmp_path)
    assert [line["steps"] for line in lines] == [60, 60]
    assert all(line["path"]["energy"] > 0 and line["norm"] == line["update_norm"] == 0 for line in lines)


def test_where_convolutions_are_shared_the_linear_layer_does_not_outlive_its_task(tmp_path, played):
    settings = quick("leap", 4, games="freeway", meta__batch_size=1, meta__shared="convolutions")
    server = serve(tmp_path, settings)
    initial = server.snapshot()[1]
    for _ in range(2):
        train_next(server, settings)
    first = played[0].learner
    assert tuple(first.shared) == ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias")
    assert len(server.snapshot()[1]) == len(initial) == 8 * 8 * 4 * 16 + 16 + 4 * 4 * 16 * 32 + 32
    assert not np.array_equal(played[1].shared, initial), "the convolutions have learned"
    linear = slice(0, first.local["linear.weight"].numel())
    for start in (played[0].local, parameters(first)["local"]):
        assert np.linalg.norm((played[1].local - start)[linear]) > 1, "fresh, not what the first task left behind"


@pytest.mark.parametrize("shift", [True, False])
def test_a_task_that_follows_the_server_does_not_grow_stale(tmp_path, played, shift):
    """Its own pushes move φ, too."""
    settings = quick("reptile", 6, mode="stream", games="freeway", meta__shift=shift, worker__push_interval=20)
    server = serve(tmp_path, settings)
    train_next(server, settings)
    lines = ledger(tmp_path)
    assert [line["base_version"] for line in lines] == ([0, 1, 2] if shift else [0, 0, 0])
    assert [line["staleness"] for line in lines] == ([0, 0, 0] if shift else [0, 1, 2])
    assert not server.status()["refused"]
