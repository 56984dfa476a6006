"""Speed of one worker's whole loop (emulator, acting, update, Leap) on one thread, beside bare emulation.

    python -m benchmarks.worker                      the games and settings of the quick preset
    python -m benchmarks.worker --preset paper --games pong --repeats 5

Every repetition measures all figures of a game one after the other, so that they share the machine's mood; the table
shows medians and, for the loop, the range. Rates are agent steps per second (four ALE frames each).
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable

import ale_py
import numpy as np
import torch
from ale_py import roms

from envs import atari
from leap_dist.config import resolve
from leap_dist.leap import PullForward
from leap_dist.learners.a2c import A2C
from leap_dist.models import initialization
from leap_dist.settings import Config


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--games", nargs="+", default=[])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--updates", type=int, default=60, help="per repetition")
    arguments = parser.parse_args()
    config = resolve(arguments.preset, {"games": arguments.games} if arguments.games else {})
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    print(f"preset {config.preset}, {arguments.repeats} × {arguments.updates} updates, {os.cpu_count()} processors")
    print(f"{'game':<16}{'bare ALE':>10}{'emulator':>10}{'whole loop':>12}{'range':>14}{'of bare':>9}{'Leap':>7}")
    for game in config.games:
        rows = np.array([measure(game, config, arguments.updates) for _ in range(arguments.repeats)])
        bare, emulator, loop, leap = (statistics.median(column) for column in rows.T)
        span = f"{rows[:, 2].min():,.0f}–{rows[:, 2].max():,.0f}"
        print(f"{game:<16}{bare:>10,.0f}{emulator:>10,.0f}{loop:>12,.0f}{span:>14}{loop / bare:>9.0%}{leap:>7.1%}")
    print(f"largest resident memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:,.0f} MiB")


def measure(game: str, config: Config, updates: int) -> tuple[float, float, float, float]:
    """Agent steps/s of bare emulation, of the vector environment and of the whole loop; Leap's share of the loop."""
    learner = A2C(
        game,
        initialization(atari.channels(config.atari.frames), 0)[1],
        seed=1,
        agent=config.agent,
        settings=config.atari,
        worker=config.worker,
    )
    pull = PullForward(learner.shared.values())
    in_leap = 0.0

    def update() -> None:
        nonlocal in_leap
        loss = learner.backward()
        started = time.perf_counter()
        pull.observe(loss)
        in_leap += time.perf_counter() - started
        learner.step()

    steps = learner.steps_per_update
    seconds, in_leap = timed(update, 5), 0.0
    seconds = timed(update, updates)
    learner.close()
    emulator = emulator_only(game, config)
    rounds = updates * config.agent.unroll // 2
    return (
        bare_rate(game),
        rounds * config.agent.envs / timed(emulator, rounds),
        updates * steps / seconds,
        in_leap / seconds,
    )


def emulator_only(game: str, config: Config) -> Callable[[], object]:
    """One step of the vector environment with random actions."""
    env = atari.make(game, config.agent.envs, frames=config.atari.frames)
    env.reset(seed=np.arange(config.agent.envs))
    random, actions = np.random.default_rng(0), atari.actions(env)
    return lambda: env.step(random.integers(0, actions, config.agent.envs))


def bare_rate(game: str, steps: int = 2000) -> float:
    """Agent steps/s of one emulator with random actions, four frames each, without preprocessing."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale = ale_py.ALEInterface()
    ale.loadROM(roms.get_rom_path(game))
    actions, random = ale.getMinimalActionSet(), np.random.default_rng(0)

    def step() -> None:
        action = actions[random.integers(len(actions))]
        for _ in range(4):
            ale.act(action)
        if ale.game_over():
            ale.reset_game()

    return steps / timed(step, steps)


def timed(call: Callable[[], object], count: int) -> float:
    """Seconds that `count` calls take."""
    started = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
