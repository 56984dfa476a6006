"""Short runs in every mode whose server is killed and started again, to be compared with undisturbed ones."""

from __future__ import annotations

import numpy as np
from protocol import MODES, Worker, ledger, serve

from leap_dist.protocol.messages import Ack, Idle


class Killed(BaseException):
    """Stands in for SIGKILL: nothing catches it."""


def parts(task) -> int:
    """How many pushes a task makes in a stream."""
    return 2 + task.index % 2


STREAM = {"meta_updates": 1, "meta__batch_size": 3, **MODES["stream"]}
ONE_BY_ONE = {"meta_updates": 2, "meta__batch_size": 2}
IN_BATCHES = {"meta_updates": 3, "meta__batch_size": 2}
HEADS = {"meta_learner": "finetune-multi"}
RUNS = {
    "sync": {**MODES["sync"], **IN_BATCHES},
    "buffered": {**MODES["buffered"], **IN_BATCHES},
    "async": {**MODES["async"], **ONE_BY_ONE, "meta__optimizer": "adam"},
    "fedasync": {**MODES["fedasync"], **ONE_BY_ONE},
    "async-stale": {**MODES["async"], **ONE_BY_ONE, "meta__max_staleness": 1},
    "delayed-nesterov": {**MODES["delayed-nesterov"], **ONE_BY_ONE},
    "stream": {**STREAM, "meta__optimizer": "adam"},
    "buffered-heads": {**MODES["buffered"], **ONE_BY_ONE, **HEADS},
    "stream-heads": {**STREAM, **HEADS},
    "stream-int8": {**STREAM, "worker__wire": "int8"},
}
"""Short, because the time of a kill at every write goes with the square of their length."""


def team(settings, session=""):
    """Two workers in a stream, where the order of pushes tells; three elsewhere, so that batches get stale."""
    if settings.mode == "stream":
        return [Worker(settings, f"w{i}{session}", parts) for i in range(2)]
    if settings.meta.max_staleness == 1:  # what the first one does comes too late
        return [Worker(settings, name + session, lambda task, n=n: n) for name, n in (("slow", 5), ("a", 1), ("b", 2))]
    return [Worker(settings, f"w{i}{session}", lambda task: 1 + task.index % 2) for i in range(3)]


def play(run_dir, config_, start=serve):
    """Workers in turn, to the end; when the server is killed, `start` makes a new one and the workers go on.

    A push that got no answer is sent again, as a worker does. Returns the server, and what was acknowledged, by
    task and seq.
    """
    server, acknowledged, turn = None, set(), 0
    workers, idle = team(config_), set()
    while len(idle) < len(workers):
        worker = workers[turn % len(workers)]
        pushed = worker.todo[:1]
        try:
            server = server or start(run_dir, config_)
            answer = worker.step(server)
        except Killed:
            if server is not None:
                server.close()
            server = None
            continue
        turn += 1
        if isinstance(answer, Ack) and (answer.durable or answer.reason == "duplicate"):
            acknowledged.update((int(one.lease.split("-")[0]), one.seq) for one in pushed)
        if answer == Idle(finished=True):
            idle.add(worker.name)
    return server, acknowledged


def assert_same_end(server, run_dir, undisturbed, undisturbed_dir, where=""):
    """φ, heads and ledger, bit for bit."""
    assert np.array_equal(server.snapshot()[1], undisturbed.snapshot()[1]), where
    assert ledger(run_dir) == ledger(undisturbed_dir), where
    for game in undisturbed._config.games:
        mine, other = server.head(game), undisturbed.head(game)
        assert (mine is None) == (other is None), where
        assert mine is None or np.array_equal(mine, other), where
