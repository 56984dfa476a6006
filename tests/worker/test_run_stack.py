"""Tasks in lockstep in one worker against the same tasks one after the other."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from protocol import Clock, config, ledger
from toy_images import CLASSES, SETTINGS, SIDE, WORKER, dataset

from leap_dist.config.loading import ConfigError, incompatibilities, resolve
from leap_dist.config.settings import Config
from leap_dist.leap.learner import Learner
from leap_dist.nn.convnet import initialization
from leap_dist.protocol.messages import Idle, Lease
from leap_dist.server.meta_server import MetaServer
from leap_dist.tasks.images import lockstep
from leap_dist.tasks.images.classifier import Classifier
from leap_dist.worker import run_stack as stacking
from leap_dist.worker import run_task as single
from leap_dist.worker.run_stack import run_stack
from leap_dist.worker.run_task import run_task
from leap_dist.worker.start import Start

UPDATES = 5
GAMES = ("pong", "breakout")
SEED_OF = {"pong": 3, "breakout": 4}
SHUFFLE_OF = {"pong": "epoch", "breakout": "task"}


def settings(meta_learner: str, **more: Any) -> Config:
    return config(
        meta_learner=meta_learner, mode="sync", games=GAMES, meta__batch_size=4, meta_updates=2, agent__envs=1,
        agent__unroll=8, task_steps=8 * UPDATES, worker__push_interval=16, fomaml__rollouts=2, **more,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def classifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learners of the toy data sets, whatever the game."""

    def make(config: Config, lease: Lease, start: Start, *_: object) -> Classifier:
        return Classifier(
            dataset(SEED_OF[lease.task.game]),
            start.vector,
            seed=lease.task.seed,
            settings=replace(SETTINGS, shuffle=SHUFFLE_OF[lease.task.game]),
            updates=UPDATES,
            worker=WORKER,
            scope=start.scope or config.scope,
            head_seed=9 if config.keeps_heads else None,
            head_change=start.head,
        )

    monkeypatch.setattr(single, "make_learner", make)
    monkeypatch.setattr(stacking, "make_learner", make)


def serve(run: Config, folder: Path) -> MetaServer:
    manifest, initial = initialization(1, SIDE, CLASSES, 0, run.scope)
    return MetaServer(run, folder, manifest=manifest, initial=initial)


def start_of(server: MetaServer, lease: Lease) -> Start:
    return Start(server.snapshot()[1], server.head(lease.task.game))


def leases(server: MetaServer, most: int) -> list[Lease]:
    answers = [server.lease(f"w0/{number}", f"i0/{number}") for number in range(most)]
    return [answer for answer in answers if isinstance(answer, Lease)]


def one_by_one(run: Config, folder: Path) -> MetaServer:
    server = serve(run, folder)
    while not isinstance(lease := server.lease("w0", "i0"), Idle):
        assert run_task(lease, start_of(server, lease), run, server).durable
    return server


def in_lockstep(run: Config, folder: Path, stack: int, *, on_cpu: bool) -> MetaServer:
    server, sizes = serve(run, folder), []
    together = functools.partial(lockstep.prepare, on_cpu=on_cpu)

    def counting(learners: Sequence[Learner]) -> None:
        sizes.append(len(learners))
        together(learners)

    while granted := leases(server, stack):
        given = [(lease, start_of(server, lease)) for lease in granted]
        acks = run_stack(given, run, server, fail, together=counting)
        assert all(acks[lease.id].durable for lease in granted)
    assert max(sizes) == min(stack, 4)
    return server


def fail(lease: Lease, error: Exception) -> None:
    raise error


def lines(folder: Path) -> list[dict[str, Any]]:
    """The ledger, without what names and times differ in."""
    return [
        {name: value for name, value in line.items() if name not in ("lease", "worker", "seconds")}
        for line in ledger(folder)
    ]


@pytest.mark.parametrize("meta_learner", ["leap", "reptile", "fomaml", "finetune-multi"])
@pytest.mark.parametrize("stack", [3, 4])
def test_on_a_cpu_a_stack_leaves_the_same_bits_and_the_same_ledger(tmp_path, meta_learner, stack):
    run = settings(meta_learner)
    alone = one_by_one(run, tmp_path / "alone")
    stacked = in_lockstep(run, tmp_path / "stacked", stack, on_cpu=False)
    assert (alone.version, stacked.version) == (2, 2)
    assert np.array_equal(alone.snapshot()[1], stacked.snapshot()[1])
    assert lines(tmp_path / "alone") == lines(tmp_path / "stacked")
    for game in GAMES if run.keeps_heads else ():
        assert np.array_equal(alone.head(game), stacked.head(game))


@pytest.mark.parametrize("meta_learner", ["leap", "fomaml", "finetune-multi"])
def test_computed_together_tasks_go_as_they_would_alone_up_to_rounding(tmp_path, meta_learner):
    """As in test_stacked: rounding may send a thousandth of a gradient another way, and more of the path after it."""
    run = replace(settings(meta_learner), task_steps=8 * 4, meta_updates=1)
    alone = one_by_one(run, tmp_path / "alone").snapshot()[1]
    stacked = in_lockstep(run, tmp_path / "stacked", 4, on_cpu=True).snapshot()[1]
    start = initialization(1, SIDE, CLASSES, 0, run.scope)[1]
    assert not np.array_equal(alone, stacked), "they are computed in another order"
    assert np.linalg.norm(alone - stacked) < 0.05 * np.linalg.norm(alone - start)
    for one, other in zip(ledger(tmp_path / "alone"), ledger(tmp_path / "stacked"), strict=True):
        assert (one["task"], one["updates"], one["steps"]) == (other["task"], other["updates"], other["steps"])


def test_what_is_prepared_is_the_next_gradient_and_averages_move_once():
    vector = initialization(1, SIDE, CLASSES, 0, "model")[1]
    alone, together = (
        [Classifier(dataset(s), vector, seed=s, settings=SETTINGS, worker=WORKER, scope="model") for s in (1, 2)]
        for _ in range(2)
    )
    lockstep.prepare(together, on_cpu=True)
    for one, other in zip(alone, together, strict=True):
        assert other.backward().item() == pytest.approx(one.backward().item(), rel=1e-5)
        for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
            assert np.allclose(mine.grad, theirs.grad, atol=1e-5)
        for mine, theirs in zip(one.model.buffers(), other.model.buffers(), strict=True):
            assert np.allclose(mine, theirs, atol=1e-6)
        assert other.progress().ended == one.progress().ended
    one, other = alone[0].backward(), together[0].backward()
    assert other.item() == pytest.approx(one.item(), rel=1e-4), "nothing is prepared: it computes its own"


def test_only_classifiers_of_the_same_kind_are_computed_together(monkeypatch):
    vector = initialization(1, SIDE, CLASSES, 0)[1]
    sizes: list[int] = []
    monkeypatch.setattr(lockstep, "_prepare_alike", lambda learners: sizes.append(len(learners)))

    def made(classes: int, **changes: Any) -> Classifier:
        given = replace(SETTINGS, **changes)
        return Classifier(dataset(1, classes=classes), vector, seed=1, settings=given, worker=WORKER)

    lockstep.prepare([made(4), made(5), made(4), made(4, batch=4)], on_cpu=True)
    assert sizes == [2]
    lockstep.prepare([made(4), made(4)])
    assert sizes == [2], "on a CPU it does not pay"


def test_a_task_that_raises_is_left_out_and_the_others_go_on(tmp_path):
    run = settings("leap")
    server = serve(run, tmp_path)
    granted = leases(server, 4)
    bad = granted[1].id
    failed: list[str] = []

    original = Classifier.step

    def step(self: Classifier) -> None:
        if self is victims[0]:
            raise RuntimeError("broken")
        original(self)

    victims: list[Classifier] = []
    make = stacking.make_learner

    def remember(config: Config, lease: Lease, *more: Any) -> Classifier:
        learner = make(config, lease, *more)
        if lease.id == bad:
            victims.append(learner)
        return learner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacking, "make_learner", remember)
        patch.setattr(Classifier, "step", step)

        def report(lease: Lease, error: Exception) -> None:
            failed.append(f"{lease.id}: {error}")
            server.fail(lease.id, lease.incarnation, str(error))

        acks = run_stack([(lease, start_of(server, lease)) for lease in granted], run, server, report)
    assert failed == [f"{bad}: broken"]
    assert bad not in acks
    assert all(acks[lease.id].durable for lease in granted if lease.id != bad)
    (again,) = leases(server, 1)
    assert again.task.index == granted[1].task.index, "it runs again"


def test_a_process_that_is_gone_gives_back_all_its_leases(tmp_path):
    server = serve(settings("leap"), tmp_path)
    granted = leases(server, 3)
    other = server.lease("w1", "i01")
    server.release("i0")
    assert [lease["id"] if "id" in lease else lease["lease"] for lease in server.status()["leases"]] == [other.id]
    assert {server._leases.outcome(lease.id) for lease in granted} == {"worker-lost"}


def test_a_stack_is_for_images():
    with pytest.raises(ConfigError, match=r"worker\.stack: 4 is for tasks with images, not atari"):
        resolve("smoke", {"worker.stack": 4})
    alone, stacked = resolve("smoke", {"tasks": "omniglot"}), resolve("smoke", {"tasks": "omniglot", "worker.stack": 4})
    assert stacked.max_staleness(3) == 4 * alone.max_staleness(3)
    assert incompatibilities(alone, stacked) == [], "it may change when a run is resumed"


def test_leases_are_renewed_while_the_learners_of_other_leases_are_made(tmp_path, monkeypatch):
    """Three learners of 3 s each, with a lease of 6 s."""
    run, clock = settings("leap", server__lease_seconds=6.0, worker__heartbeat_seconds=2.0), Clock()
    manifest, initial = initialization(1, SIDE, CLASSES, 0, run.scope)
    server = MetaServer(run, tmp_path, manifest=manifest, initial=initial, clock=clock)
    make = stacking.make_learner

    def slowly(*arguments: Any) -> Any:
        clock.advance(3.0, server)
        return make(*arguments)

    monkeypatch.setattr(stacking, "make_learner", slowly)
    granted = [(lease, start_of(server, lease)) for lease in leases(server, 3)]
    acks = run_stack(granted, run, server, lambda lease, error: pytest.fail(f"{lease.id}: {error}"), clock=clock)
    assert [ack.durable for ack in acks.values() if ack] == [True] * 3, list(server.alerts)
    assert server.status()["leases_lost"] == 0
