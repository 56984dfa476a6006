"""A short trial before a run: how many agent steps per second one worker makes on this machine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from leap_dist.config.settings import Config
from leap_dist.protocol.messages import Lease, Task
from leap_dist.tasks.task import family_of
from leap_dist.worker.start import Start, make_learner

SECONDS = 0.5
"""Length of a trial, without the time to start its environments."""
MOST_ENVIRONMENTS = 8
"""Number of environments in a trial, because each takes a tenth of a second to start."""


def steps_per_second(
    config: Config, *, seconds: float = SECONDS, clock: Callable[[], float] = time.perf_counter
) -> float | None:
    """Train a few unrolls of the first game, as one worker would, and return the agent steps per second.

    Games differ by up to a factor of three. Returns None if a short trial would say little: image tasks load their
    data first, and a GPU prepares its graphs.
    """
    if config.is_supervised or config.worker.gpus or (config.worker.device != "cpu" and torch.cuda.is_available()):
        return None
    agent = dataclasses.replace(config.agent, envs=min(MOST_ENVIRONMENTS, config.agent.envs))
    config = dataclasses.replace(config, agent=agent)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.worker.threads)
    try:
        return _rate(config, seconds, clock)
    finally:
        torch.set_num_threads(threads)


def _rate(config: Config, seconds: float, clock: Callable[[], float]) -> float:
    _, vector = family_of(config).initialization(config, 0, config.scope)
    task = Task(0, config.games[0], 0, seed=0, steps=config.task_steps)
    learner = make_learner(config, Lease("trial", task, "trial", "trial", 0, 60.0), Start(vector))

    def update() -> int:
        learner.backward()
        learner.step()
        return learner.steps_per_update

    try:
        update()  # prepares memory and kernels, and is not counted
        started, steps = clock(), update()
        while clock() - started < seconds:
            steps += update()
        return steps / max(clock() - started, 1e-9)
    finally:
        learner.close()
