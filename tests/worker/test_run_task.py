"""The worker's loop, with a learner that is a line of arithmetic and a server that is a list."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from protocol import Clock, config
from pull_forward_oracle import pull_forward_with_shifts
from torch import nn

from leap_dist.leap import meta_learners
from leap_dist.leap.learner import Progress
from leap_dist.nn.actor_critic import initialization
from leap_dist.nn.flat_vector import Manifest, flatten
from leap_dist.protocol.messages import Ack, Lease, Task
from leap_dist.worker import run_task
from leap_dist.worker.start import Start, make_learner


class Quadratic:
    """f(θ) = ½‖θ‖², plain gradient descent with rate 0.1. 20 agent steps an update."""

    descent = 0.1
    steps_per_update = 20
    done = False

    def __init__(self, tape: list[str], clock: Clock, seconds: float) -> None:
        self.encoder = nn.Linear(2, 1, bias=False)
        self.shared, self.local = dict(self.encoder.named_parameters()), {}
        self.tape, self.clock, self.seconds = tape, clock, seconds
        with torch.no_grad():
            self.encoder.weight.copy_(torch.tensor([[3.0, 4.0]]))

    def backward(self):
        self.tape.append("backward")
        self.clock.now += self.seconds
        self.encoder.zero_grad()
        loss = 0.5 * self.encoder.weight.square().sum()
        loss.backward()
        return loss.detach()

    def backward_held_out(self):
        return self.backward()

    def step(self):
        self.tape.append("step")
        with torch.no_grad():
            self.encoder.weight.sub_(0.1 * self.encoder.weight.grad)

    def evaluate(self):
        self.tape.append("evaluate")
        return 0.5 * self.encoder.weight.detach().square().sum()

    def progress(self):
        return Progress((1.0, 2.0), {"loss": 0.5})

    def interim(self, beat):
        return {}

    def conclude(self, beat):
        return {}

    def close(self):
        self.tape.append("close")


class Server:
    wait = 0.0
    """Seconds that it tells workers to stay away."""

    def __init__(self, tape: list[str], answers: Sequence[bool] = (), snapshots: Sequence[tuple] = ()) -> None:
        self.tape, self.answers, self.received = tape, list(answers), []
        self.snapshots = list(snapshots)
        """What it answers in turn."""

    def push(self, contribution):
        self.tape.append("final" if contribution.final else "push")
        self.received.append(contribution)
        return self.answer(durable=contribution.final)

    def renew(self, lease_id, incarnation, steps):
        self.tape.append("renew")
        return self.answer()

    def snapshot(self):
        self.tape.append("snapshot")
        version, vector = self.snapshots.pop(0)
        return version, np.array(vector, np.float32)

    def answer(self, durable=False):
        return Ack(True, durable, "", self.answers.pop(0) if self.answers else True, 0, self.wait)


LEASE = Lease("l", Task(0, "pong", 0, 1, 100), "w0", "i0", 0, 60.0)


def play(monkeypatch, *, answers=(), seconds=0.0, notice=None, **settings):
    """`notice`: (update during which it is given, seconds that it leaves)."""
    tape: list[str] = []
    clock, server = Clock(), Server(tape, answers)
    made = []

    def make(*_):
        made.append(Quadratic(tape, clock, seconds))
        return made[-1]

    monkeypatch.setattr(run_task, "make_learner", make)
    run = config(agent__envs=4, agent__unroll=5, **{"task_steps": 100, **settings})
    given = run_task.PreemptionNotice(clock)
    if notice is not None:
        step = Quadratic.step

        def step_and_notice(self):
            step(self)
            if tape.count("step") == notice[0]:
                given.give(notice[1])

        monkeypatch.setattr(Quadratic, "step", step_and_notice)
    start = Start(np.zeros(2, np.float32))
    ack = run_task.run_task(LEASE, start, run, server, clock=clock, notice=given)
    return tape, server.received, ack, made[0]


@pytest.mark.parametrize("on_lost", ["retry", "keep"])
def test_a_worker_that_has_to_leave_ends_its_task_where_there_is_time(monkeypatch, on_lost):
    settings = {"server__on_lost": on_lost, "worker__heartbeat_seconds": 1000.0, "server__lease_seconds": 3000.0}
    tape, received, ack, _ = play(monkeypatch, seconds=10.0, notice=(2, 30.0), **settings)
    assert tape.count("step") == 5, "three updates of ten seconds fit into thirty"
    assert ack.durable
    assert received[-1].final


@pytest.mark.parametrize(("on_lost", "sent"), [("retry", []), ("keep", [(False, 2, 40)])])
def test_else_it_hands_it_over_at_once_and_its_path_so_far_where_that_counts(monkeypatch, on_lost, sent):
    settings = {"server__on_lost": on_lost, "worker__heartbeat_seconds": 1000.0, "server__lease_seconds": 3000.0}
    tape, received, ack, _ = play(monkeypatch, seconds=10.0, notice=(2, 29.0), **settings)
    assert tape.count("step") == 2
    assert ack is None
    assert [(c.final, c.updates, c.steps) for c in received] == sent
    assert tape[-1] == "close"


def test_one_that_falls_behind_hands_over_on_the_way(monkeypatch):
    backward = Quadratic.backward

    def slower_and_slower(self):
        self.seconds += 10.0
        return backward(self)

    monkeypatch.setattr(Quadratic, "backward", slower_and_slower)
    settings = {"worker__heartbeat_seconds": 1000.0, "server__lease_seconds": 3000.0}
    tape, _, ack, _ = play(monkeypatch, notice=(1, 41.0), **settings)  # 10 s an update so far, then 20, 30 …
    assert ack is None
    assert tape.count("step") == 2


def test_the_order_of_things(monkeypatch):
    tape, received, ack, _ = play(monkeypatch, worker__push_interval=40)
    assert tape == [
        "backward", "step",
        "backward", "step", "push",
        "backward", "step",
        "backward", "step", "push",
        "backward", "step", "final",
        "close",
    ]  # fmt: skip
    assert [(c.seq, c.final, c.updates, c.steps) for c in received] == [
        (1, False, 2, 40),
        (2, False, 4, 80),
        (3, True, 5, 100),
    ]
    assert [len(c.curve) for c in received] == [1, 2, 3]
    assert (received[0].curve[0].score, received[0].curve[0].episodes) == (1.5, 2)
    assert ack is not None
    assert ack.durable


def test_contributions_are_cumulative_prefixes_of_the_path(monkeypatch):
    """θ_i = 0.9^i θ_0, so f and every segment are known in closed form."""
    _, received, _, learner = play(monkeypatch, worker__push_interval=40, server__on_lost="keep")
    start = np.array([3.0, 4.0])
    for contribution in received:
        expected = np.zeros(2)
        for i in range(contribution.updates - 1):  # K observations make K − 1 segments
            theta, following = 0.9**i * start, 0.9 ** (i + 1) * start
            change = abs(0.5 * following @ following - 0.5 * theta @ theta)
            expected += change * theta - (following - theta)
        np.testing.assert_allclose(contribution.vector, expected, rtol=1e-5)
        assert contribution.manifest == Manifest.of(learner.shared).digest


def test_the_final_loss_closes_the_last_segment(monkeypatch):
    tape, received, _, _ = play(monkeypatch, worker__push_interval=1000, leap__final_loss=True, leap__loss_weight=0)
    assert tape[-3:] == ["evaluate", "final", "close"]
    np.testing.assert_allclose(received[-1].vector, np.array([3.0, 4.0]) * (1 - 0.9**4), rtol=1e-5)
    assert (received[-1].updates, received[-1].steps) == (5, 100), "the last rollout of the budget only measures"


def test_the_lease_is_renewed_when_nothing_is_pushed_for_a_while(monkeypatch):
    tape, _, _, _ = play(monkeypatch, worker__push_interval=1000, worker__heartbeat_seconds=2.0, seconds=1.1)
    assert [event for event in tape if event in ("renew", "final")] == ["renew", "renew", "final"]


@pytest.mark.parametrize(("wait", "pushed"), [(0.0, [2, 4, 6, 8]), (3.0, [2, 5, 8]), (7.0, [2, 9]), (7.5, [2])])
def test_a_worker_stays_away_for_as_long_as_it_is_told(monkeypatch, wait, pushed):
    """A push is due after every second update; one that has to wait is made up for as soon as it may be."""
    monkeypatch.setattr(Server, "wait", wait)
    choices = {"worker__push_interval": 40, "worker__heartbeat_seconds": 6.6, "task_steps": 200}
    _, received, ack, _ = play(monkeypatch, **choices, seconds=1.0)
    assert [c.updates for c in received] == [*pushed, 10], "the end waits for nothing"
    assert ack.durable


@pytest.mark.parametrize(
    ("wait", "seconds", "renewed"),
    [(0.0, 1.0, [*range(1, 10)]), (0.5, 1.0, [*range(1, 10)]), (2.5, 1.0, [1, 4, 7]), (100.0, 4.0, [1, 5, 9])],
)
def test_a_renewal_waits_too_but_never_for_longer_than_a_quarter_of_the_lease(monkeypatch, wait, seconds, renewed):
    monkeypatch.setattr(Server, "wait", wait)
    choices = {"worker__push_interval": 1000, "worker__heartbeat_seconds": 0.9, "task_steps": 200}
    tape, received, _, _ = play(monkeypatch, **choices, seconds=seconds)
    assert [tape[:i].count("backward") for i, event in enumerate(tape) if event == "renew"] == renewed
    assert len(received) == 1


def test_the_lease_is_renewed_while_held_back_rollouts_are_played(monkeypatch):
    """Enough of them may take longer than a lease lasts."""
    settings = {"meta_learner": "fomaml", "fomaml__rollouts": 4, "worker__push_interval": 1000}
    tape, _, _, _ = play(monkeypatch, worker__heartbeat_seconds=2.0, seconds=1.1, **settings)
    assert tape == [
        "backward", "step",
        "backward", "renew", "backward",
        "backward", "renew", "backward", "final",
        "close",
    ]  # fmt: skip


def test_fomaml_does_not_care_whether_backward_adds_to_the_gradient_or_replaces_it(monkeypatch):
    """Quadratic's replaces it, and its step leaves it. ∇f(θ) = θ."""
    _, received, _, _ = play(monkeypatch, meta_learner="fomaml", fomaml__rollouts=3)
    np.testing.assert_allclose(received[-1].vector, 0.9**2 * np.array([3.0, 4.0]), rtol=1e-6)


@pytest.mark.parametrize("interval", [40, 1000])
def test_a_worker_that_lost_its_lease_stops_training(monkeypatch, interval):
    tape, _, ack, _ = play(
        monkeypatch, answers=[False], worker__push_interval=interval, worker__heartbeat_seconds=2.0, seconds=1.1
    )
    assert ack is None
    assert tape[-2:] == ["push" if interval == 40 else "renew", "close"]
    assert tape.count("backward") == 2


@pytest.mark.parametrize(
    "settings", [{}, {"mode": "sync"}, {"mode": "fedasync", "meta_learner": "reptile"}, {"meta_learner": "fomaml"}]
)
def test_what_nobody_reads_is_not_sent(monkeypatch, settings):
    """The numbers that say how the path goes are, and the end of it is whole."""
    choices = {"worker__push_interval": 40, "fomaml__rollouts": 2, **settings}
    _, received, _, _ = play(monkeypatch, **choices)
    _, whole, _, _ = play(monkeypatch, **choices, server__on_lost="keep")
    assert [(c.vector.size, c.start) for c in received[:-1]] == [(0, None)] * 2
    assert [c.vector.size for c in whole] == [2] * 3
    assert [c.header() for c in received] == [c.header() for c in whole]
    assert np.array_equal(received[-1].vector, whole[-1].vector)


@pytest.mark.parametrize(("wire", "kind"), [("int16", np.int16), ("int8", np.int8)])
def test_contributions_are_packed_where_that_is_asked_for(monkeypatch, wire, kind):
    choices = {"worker__push_interval": 40, "server__on_lost": "keep"}
    _, received, _, _ = play(monkeypatch, **choices, worker__wire=wire)
    _, exact, _, _ = play(monkeypatch, **choices)
    for one, other in zip(received, exact, strict=True):
        assert one.packed.codes.dtype == kind
        assert np.array_equal(one.vector, other.quantized(8 * np.dtype(kind).itemsize).vector)
        np.testing.assert_allclose(one.vector, other.vector, atol=np.abs(other.vector).max() / 254 * 1.01)
    _, received, _, _ = play(monkeypatch, worker__push_interval=40, worker__wire=wire)
    assert [c.vector.size for c in received] == [0, 0, 2]


def test_what_is_not_finite_is_sent_so_that_the_server_ends_the_task(monkeypatch):
    def broken(self):
        with torch.no_grad():
            self.encoder.weight.mul_(np.inf)

    monkeypatch.setattr(Quadratic, "step", broken)
    _, received, _, _ = play(monkeypatch, worker__push_interval=40, meta_learner="reptile")
    assert [c.vector.size for c in received] == [2, 2, 2]
    assert not np.isfinite(received[0].vector).any()


@pytest.mark.parametrize("interval", [20, 25, 50, 99, 100])
def test_no_partial_push_comes_directly_before_the_final_one(monkeypatch, interval):
    tape, received, _, _ = play(monkeypatch, worker__push_interval=interval)
    assert tape[-3:] == ["step", "final", "close"]
    # Whenever the steps have passed a multiple of the interval, 20 at a time.
    pushed = {20: [20, 40, 60, 80], 25: [40, 60, 80], 50: [60], 99: [], 100: []}[interval]
    assert [c.steps for c in received] == [*pushed, 100]


def test_the_learner_is_closed_when_it_breaks(monkeypatch):
    def broken(self):
        raise RuntimeError("emulator")

    monkeypatch.setattr(Quadratic, "backward", broken)
    tape: list[str] = []
    monkeypatch.setattr(run_task, "make_learner", lambda *_: Quadratic(tape, Clock(), 0.0))
    with pytest.raises(RuntimeError, match="emulator"):
        run_task.run_task(LEASE, Start(np.zeros(2, np.float32)), config(), Server(tape))
    assert tape == ["close"]


# --- trajectory shifting -------------------------------------------------------------------------------------------

PHI = np.array([3.0, 4.0], np.float32)
"""Where Quadratic starts."""


def spy_on_shifts(monkeypatch, tape: list[str], seen) -> None:
    """Puts what the meta-learner hears on the tape, and its shifts to `seen`."""
    make = meta_learners.make

    def spied(*arguments):
        watch = make(*arguments)
        observe, shift = watch.observe, watch.shift

        def note_shift(amounts):
            tape.append("shift")
            seen(flatten(amounts).numpy())
            shift(amounts)

        watch.observe = lambda loss: (tape.append("observe"), observe(loss))
        watch.shift = note_shift
        return watch

    monkeypatch.setattr(meta_learners, "make", spied)


def follow(monkeypatch, snapshots, *, answers=(), seconds=0.0, **settings):
    """A task in mode stream, from version 2, with a push after each of its five updates."""
    tape: list[str] = []
    clock, server = Clock(), Server(tape, answers, snapshots)
    learner = Quadratic(tape, clock, seconds)
    learner.path = []
    backward = learner.backward

    def recorded():
        learner.path.append(flatten(learner.shared.values()).numpy())
        return backward()

    learner.backward = recorded
    shifts: list[np.ndarray] = []
    spy_on_shifts(monkeypatch, tape, shifts.append)
    monkeypatch.setattr(run_task, "make_learner", lambda *_: learner)
    settings = {"meta__shift": "increments", "meta__max_shift": 10.0, "worker__push_interval": 20, **settings}
    run = config(agent__envs=4, agent__unroll=5, task_steps=100, mode="stream", **settings)
    lease = Lease("l", Task(0, "pong", 0, 1, 100), "w0", "i0", 2, 60.0)
    ack = run_task.run_task(lease, Start(PHI.copy()), run, server, clock=clock)
    return SimpleNamespace(tape=tape, received=server.received, shifts=shifts, path=learner.path, ack=ack)


def test_a_shift_comes_after_the_push_and_before_the_next_rollout_but_not_after_the_end(monkeypatch):
    seen = follow(monkeypatch, [(3, [3.5, 4.0]), (4, [3.5, 5.0])], worker__push_interval=40)
    update = ["backward", "observe", "step"]
    follows = ["push", "snapshot", "shift"]
    assert seen.tape == [*update, *update, *follows, *update, *update, *follows, *update, "final", "close"]


def test_a_running_task_moves_by_what_phi_has_moved_since_it_was_last_heard_of(monkeypatch):
    seen = follow(monkeypatch, [(3, [3.5, 4.0]), (3, [3.5, 4.0]), (7, [3.5, 3.0]), (7, [3.5, 3.0])])
    assert seen.tape.count("snapshot") == 4
    assert [shift.tolist() for shift in seen.shifts] == [[0.5, 0.0], [0.0, -1.0]]
    following = seen.tape.index("shift"), len(seen.tape) - 1 - seen.tape[::-1].index("shift")
    assert [seen.tape[:i].count("backward") for i in following] == [1, 3], "not where the version stood still"
    assert [c.base_version for c in seen.received] == [2, 3, 3, 7, 7]

    expected, point = [], PHI.astype(np.float64)
    for shift in ([0.5, 0.0], [0.0, 0.0], [0.0, -1.0], [0.0, 0.0], None):
        expected.append(point)
        point = 0.9 * point + (0 if shift is None else np.array(shift))
    np.testing.assert_allclose(seen.path, expected, rtol=1e-6)


@pytest.mark.parametrize("meta_learner", ["leap", "reptile", "none"])
def test_what_a_shifted_task_pushes_is_the_path_without_the_shifts(monkeypatch, meta_learner):
    snapshots = [(3, [3.5, 4.0]), (3, [3.5, 4.0]), (7, [3.5, 3.0]), (7, [3.5, 3.0])]
    seen = follow(monkeypatch, snapshots, meta_learner=meta_learner)
    losses = [0.5 * theta @ theta for theta in seen.path]
    shifts = {0: [seen.shifts[0]], 2: [seen.shifts[1]]}
    steps = -0.1 * np.array(seen.path)
    for i, contribution in enumerate(seen.received):
        path = pull_forward_with_shifts(seen.path[: i + 1], losses[: i + 1], seen.path, shifts)
        # Start minus end has the last step too, whose segment no loss has closed yet.
        vector = {"leap": path.gradient, "reptile": -steps[: i + 1].sum(0), "none": []}[meta_learner]
        np.testing.assert_allclose(contribution.vector, vector, rtol=1e-5, atol=1e-6)
        assert (contribution.path.energy, contribution.path.length) == pytest.approx((path.energy, path.length))


def test_a_large_shift_is_cut_relative_to_the_parameters(monkeypatch):
    """After one update ‖θ‖ = 4.5. The rest of a shift that was cut is forgone, not made up for with the next one."""
    snapshots = [(3, [303.0, 404.0]), (4, [303.0, 404.03125]), (5, [303.0, 404.03125]), (6, [0.0, 0.0])]
    seen = follow(monkeypatch, snapshots, meta__max_shift=0.01)
    np.testing.assert_allclose(seen.shifts[0], 0.01 * 4.5 * np.array([0.6, 0.8]), rtol=1e-6)
    moved = 0.9 * PHI + seen.shifts[0]
    np.testing.assert_allclose(seen.path[1], moved, rtol=1e-6)
    assert seen.shifts[1].tolist() == [0.0, 0.03125], "small enough: exactly as it is"
    assert len(seen.shifts) == 3, "a version that changed nothing moves nothing"
    largest = 0.01 * np.linalg.norm(0.9 * seen.path[3])
    assert np.linalg.norm(seen.shifts[2]) == pytest.approx(largest)
    assert seen.shifts[2] @ [-303.0, -404.03125] > 0
    assert [c.base_version for c in seen.received] == [2, 3, 4, 5, 6]


def test_without_meta_shift_phi_is_not_asked_for(monkeypatch):
    seen = follow(monkeypatch, [], meta__shift="no")
    assert seen.tape.count("push") == 4
    assert "snapshot" not in seen.tape
    assert {c.base_version for c in seen.received} == {2}


def test_a_renewed_lease_brings_no_shift(monkeypatch):
    seen = follow(monkeypatch, [], seconds=1.1, worker__push_interval=1000)
    assert "renew" in seen.tape
    assert "snapshot" not in seen.tape


def test_a_worker_that_lost_its_lease_does_not_follow(monkeypatch):
    seen = follow(monkeypatch, [], answers=[False])
    assert seen.ack is None
    assert seen.tape[-2:] == ["push", "close"]


def test_a_shift_right_before_the_final_loss_drops_that_segments_loss_part(monkeypatch):
    seen = follow(monkeypatch, [(3 + i, PHI + i) for i in range(4)], leap__final_loss=True)
    assert seen.tape[-6:] == ["push", "snapshot", "shift", "evaluate", "final", "close"]
    before, final = seen.received[-2:]
    last_step = -0.1 * seen.path[-1]
    np.testing.assert_allclose(final.vector - before.vector, -last_step, rtol=1e-4)
    assert final.path.energy - before.path.energy == pytest.approx(last_step @ last_step, rel=1e-5)


@pytest.mark.emulator
def test_a_shift_moves_the_encoder_and_leaves_head_and_optimizer_as_they_are(monkeypatch):
    """The real learner."""
    manifest, phi = initialization(4, 0)
    amount = np.random.default_rng(0).normal(scale=1e-3, size=manifest.size).astype(np.float32)
    run = config(
        mode="stream",
        meta__shift="increments",
        meta__max_shift=1.0,
        agent__envs=1,
        task_steps=20,
        worker__push_interval=10,
    )
    learners, states = [], []
    make = make_learner

    def state():
        learner = learners[0]
        optimizer = [part.clone() for part in learner._optimizer._form._sums]
        assert all(p.grad is None for p in learner._model.parameters())
        return flatten(learner.shared.values()), flatten(learner.local.values()), flatten(optimizer)

    class Watching(Server):
        def snapshot(self):
            states.append(state())
            return super().snapshot()

    monkeypatch.setattr(run_task, "make_learner", lambda *arguments: learners.append(make(*arguments)) or learners[0])
    spy_on_shifts(monkeypatch, [], lambda shift: states.append((*state(), shift)))
    server = Watching([], snapshots=[(1, phi + amount)])
    run_task.run_task(LEASE, Start(phi), run, server)
    (shared, local, optimizer), (shared_after, local_after, optimizer_after, shift) = states
    assert np.array_equal(shift, (phi + amount) - phi)
    assert torch.equal(shared_after, shared + torch.from_numpy(shift))
    assert torch.equal(local_after, local)
    assert torch.equal(optimizer_after, optimizer)
    assert optimizer.any()
    assert local.any()


# --- what the endpoint correction needs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sent"),
    [
        ({}, False),
        ({"mode": "stream", "meta__shift": "increments"}, False),
        ({"meta_learner": "reptile"}, False),
        ({"mode": "fedasync", "meta_learner": "reptile"}, True),
        ({"mode": "async", "meta__endpoint_correction": 0.5}, True),
    ],
)
def test_phi_at_the_lease_is_sent_along_where_the_server_corrects_for_it(monkeypatch, settings, sent):
    tape: list[str] = []
    run = config(
        agent__envs=4, agent__unroll=5, task_steps=60, worker__push_interval=20, server__on_lost="keep", **settings
    )
    monkeypatch.setattr(run_task, "make_learner", lambda *_: Quadratic(tape, Clock(), 0.0))
    server = Server(tape, snapshots=[(1, PHI + 1), (2, PHI + 2)])
    run_task.run_task(LEASE, Start(PHI.copy()), run, server)
    assert [c.final for c in server.received] == [False, False, True]
    for contribution in server.received:
        assert (contribution.start is not None) == sent
        if sent:
            assert contribution.start.dtype == np.float32
            assert np.array_equal(contribution.start, PHI)


def test_the_lease_is_renewed_while_an_evaluation_is_concluded(monkeypatch):
    """What takes long at the end, a look at all images, says so in between."""
    tape, clock = [], Clock()
    learner = Quadratic(tape, clock, 0.0)

    def conclude(beat):
        for _ in range(10):
            clock.now += 1.0
            beat()
        return {"test_error": 0.25}

    learner.conclude = conclude  # type: ignore[method-assign]
    monkeypatch.setattr(run_task, "make_learner", lambda *_: learner)
    server = Server(tape)
    run = config(
        agent__envs=4, agent__unroll=5, task_steps=60, worker__heartbeat_seconds=3.0, worker__push_interval=1_000
    )
    start = Start(np.array([3.0, 4.0], np.float32), evaluation=True)
    run_task.run_task(LEASE, start, run, server, clock=clock)
    assert [entry for entry in tape if entry == "renew"] == ["renew"] * 2, "after more than three seconds, twice in ten"
    assert [point.means.get("test_error") for point in server.received[-1].curve][-2] == 0.25
