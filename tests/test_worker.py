"""The worker's loop, with a learner that is a line of arithmetic and a server that is a list."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from protocol import Clock, config
from torch import nn

from leap_dist import worker
from leap_dist.contribution import Ack, Lease, Task
from leap_dist.learners import Progress
from leap_dist.models import Manifest


class Quadratic:
    """f(θ) = ½‖θ‖², plain gradient descent with rate 0.1. 20 agent steps an update."""

    steps_per_update = 20

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

    def step(self):
        self.tape.append("step")
        with torch.no_grad():
            self.encoder.weight.sub_(0.1 * self.encoder.weight.grad)

    def evaluate(self):
        self.tape.append("evaluate")
        return 0.5 * self.encoder.weight.detach().square().sum()

    def progress(self):
        return Progress((1.0, 2.0), {"loss": 0.5})

    def close(self):
        self.tape.append("close")


class Server:
    def __init__(self, tape: list[str], answers: list[bool]) -> None:
        self.tape, self.answers, self.received = tape, answers, []

    def push(self, contribution):
        self.tape.append("final" if contribution.final else "push")
        self.received.append(contribution)
        return self.answer(durable=contribution.final)

    def renew(self, lease_id, incarnation, steps):
        self.tape.append("renew")
        return self.answer()

    def answer(self, durable=False):
        return Ack(True, durable, "", self.answers.pop(0) if self.answers else True, 0)


LEASE = Lease("l", Task(0, "pong", 0, 1, 100), "w0", "i0", 0, 60.0)


def play(monkeypatch, *, answers=(), seconds=0.0, **settings):
    tape: list[str] = []
    clock, server = Clock(), Server(tape, list(answers))
    made = []

    def make(*_):
        made.append(Quadratic(tape, clock, seconds))
        return made[-1]

    monkeypatch.setattr(worker, "make_learner", make)
    run = config(agent__envs=4, agent__unroll=5, task_steps=100, **settings)
    ack = worker.run_task(LEASE, worker.Start(np.zeros(2, np.float32)), run, server, clock=clock)
    return tape, server.received, ack, made[0]


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
    _, received, _, learner = play(monkeypatch, worker__push_interval=40)
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


@pytest.mark.parametrize("interval", [40, 1000])
def test_a_worker_that_lost_its_lease_stops_training(monkeypatch, interval):
    tape, _, ack, _ = play(
        monkeypatch, answers=[False], worker__push_interval=interval, worker__heartbeat_seconds=2.0, seconds=1.1
    )
    assert ack is None
    assert tape[-2:] == ["push" if interval == 40 else "renew", "close"]
    assert tape.count("backward") == 2


def test_the_learner_is_closed_when_it_breaks(monkeypatch):
    def broken(self):
        raise RuntimeError("emulator")

    monkeypatch.setattr(Quadratic, "backward", broken)
    tape: list[str] = []
    monkeypatch.setattr(worker, "make_learner", lambda *_: Quadratic(tape, Clock(), 0.0))
    with pytest.raises(RuntimeError, match="emulator"):
        worker.run_task(LEASE, worker.Start(np.zeros(2, np.float32)), config(), Server(tape, []))
    assert tape == ["close"]
