"""Measure the speed of one worker's loop on one thread, and compare it with the speed of its parts.

    python -m benchmarks.worker                         the games and settings of the quick preset
    python -m benchmarks.worker --preset paper --games pong breakout --repeats 5

Rates are agent steps per second (four ALE frames each). The arms take turns within every repetition:

    bare ALE         the emulator alone, without preprocessing
    ale-py vector    ale-py's own vector environment, with the same preprocessing, on one thread
    emulator         this project's vector environment
    learner          acting and updating on recorded observations, without an emulator
    loop             emulator, acting, updating and Leap: the whole loop of a worker
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import ale_py
import numpy as np
import torch
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv

from benchmarks.harness import Report, interleaved, parser
from leap_dist.config.loading import resolve
from leap_dist.config.settings import Config
from leap_dist.envs import atari_vector
from leap_dist.leap.pull_forward import PullForward
from leap_dist.nn.actor_critic import initialization
from leap_dist.nn.device import prepare
from leap_dist.tasks.atari.a2c import A2C


def main() -> None:
    """Run the benchmark and print the report."""
    command = parser(__doc__, repeats=5)
    command.add_argument("--preset", default="quick")
    command.add_argument("--games", nargs="+", default=[])
    command.add_argument("--updates", type=int, default=60, help="updates per arm and repetition")
    command.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    given = command.parse_args()
    settings = {"games": given.games, "worker.precision": given.precision, "worker.device": "cpu"}
    config = resolve(given.preset, {name: value for name, value in settings.items() if value})
    prepare("cpu", 1, 0)
    agent = config.agent
    report = Report(
        "One worker's loop, one thread",
        {"preset": config.preset, "envs": agent.envs, "unroll": agent.unroll, "frames": config.atari.frames,
         "precision": config.worker.precision, "updates": given.updates},
    )  # fmt: skip
    for game in config.games:
        measure(game, config, given.updates, given.repeats, report)
    report.show(given.json)


def measure(game: str, config: Config, updates: int, repeats: int, report: Report) -> None:
    """Measure all figures of one game."""
    steps = config.agent.envs * config.agent.unroll
    real, recorded = learner_of(game, config), learner_of(game, config)
    replace_emulator(recorded)
    pull = PullForward(real.shared.values())
    rounds = updates * config.agent.unroll // 2

    def loop() -> None:
        loss = real.backward()
        pull.observe(loss)
        real.step()

    def learner() -> None:
        recorded.backward()
        recorded.step()

    ours, theirs = emulator(game, config), ale_vector(game, config)
    samples = interleaved(
        {
            "bare ALE": lambda: bare_rate(game),
            "ale-py vector": lambda: rounds * config.agent.envs / timed(theirs, rounds),
            "emulator": lambda: rounds * config.agent.envs / timed(ours, rounds),
            "learner": lambda: updates * steps / timed(learner, updates),
            "loop": lambda: updates * steps / timed(loop, updates),
        },
        repeats,
        warmup=True,
    )
    for name, values in samples.items():
        report.add(f"{game}: {name}", "agent steps/s", values)
    bound = [1 / (1 / e + 1 / n) for e, n in zip(samples["emulator"], samples["learner"], strict=True)]
    report.ratio(f"{game}: loop / bound of its parts", samples["loop"], bound, target=0.9)
    report.ratio(f"{game}: emulator / ale-py vector", samples["emulator"], samples["ale-py vector"])
    report.ratio(f"{game}: emulator / bare ALE", samples["emulator"], samples["bare ALE"])
    leap_shares(game, real, updates, repeats, report)
    real.close()
    recorded.close()


def leap_shares(game: str, learner: A2C, updates: int, repeats: int, report: Report) -> None:
    """Measure the share of the loop that accumulating the meta-gradient takes, update by update in turn."""
    parameters = list(learner.shared.values())
    watchers: dict[str, Callable[[torch.Tensor], None]] = {
        "energy": PullForward(parameters, metric="energy").observe,
        "length": PullForward(parameters, metric="length").observe,
        "energy, the authors' way": AuthorsWay(parameters, norm=False).observe,
        "length, the authors' way": AuthorsWay(parameters, norm=True).observe,
    }
    shares: dict[str, list[float]] = {name: [] for name in watchers}
    for _ in range(repeats):
        spent: dict[str, list[float]] = {name: [] for name in watchers}
        training = 0.0
        for _, (name, observe) in zip(range(updates), itertools.cycle(watchers.items()), strict=False):
            started = time.perf_counter()
            loss = learner.backward()
            observed = time.perf_counter()
            observe(loss)
            done = time.perf_counter()
            learner.step()
            training += time.perf_counter() - done + observed - started
            spent[name].append(done - observed)
        for name, seconds in spent.items():
            mean = sum(seconds) / len(seconds)
            shares[name].append(mean / (mean + training / updates))
    for name, values in shares.items():
        target = {"energy": 0.01, "length": 0.02}.get(name)
        report.ratio(f"{game}: Leap's share, {name}", values, [1.0] * repeats, target=target, at_most=True)


class AuthorsWay:
    """Accumulation with the method of the authors' published code, reimplemented; every step clones everything.

    It runs Algorithm 1 over clones of all parameters with their gradients. The loss change is given the sign of μ.
    """

    def __init__(self, parameters: list[torch.Tensor], *, norm: bool) -> None:
        self._parameters = parameters
        self._norm = norm
        self._total = [torch.zeros_like(p) for p in parameters]
        self._before: tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]] | None = None

    @torch.no_grad()
    def observe(self, loss: torch.Tensor) -> None:
        """Accumulate one step, as `PullForward.observe` does."""
        points = [p.detach().clone() for p in self._parameters]
        gradients = [p.grad.clone() for p in self._parameters if p.grad is not None]
        now = loss.clone(), points, gradients
        if self._before is not None:
            loss_before, points_before, gradients_before = self._before
            change = now[0] - loss_before
            if change > 0:
                change = -change
            length = change * change
            if self._norm:
                for point, before in zip(points, points_before, strict=True):
                    difference = point.view(-1) - before.view(-1)
                    length = length + torch.dot(difference, difference)
                length = length.sqrt()
            for total, point, before, gradient in zip(
                self._total, points, points_before, gradients_before, strict=True
            ):
                pull = before - point
                pull += -change * gradient
                if self._norm:
                    pull.div_(length)
                total.add_(pull)
        self._before = now


def learner_of(game: str, config: Config) -> A2C:
    """Return a learner in the middle of a task."""
    return A2C(
        game,
        initialization(atari_vector.channels(config.atari.frames), 0)[1],
        seed=1,
        agent=config.agent,
        settings=config.atari,
        worker=config.worker,
    )


def replace_emulator(learner: A2C) -> None:
    """Replace the environments' steps by an instant replay of their first ones."""
    random = np.random.default_rng(0)
    env = learner._env
    played = [env.step(random.integers(0, len(env.actions), env.count)) for _ in range(16)]
    again = itertools.cycle([step._replace(final=step.final[:0], truncated=step.truncated & False) for step in played])
    learner._env.step = lambda _: next(again)  # type: ignore[method-assign]


def emulator(game: str, config: Config) -> Callable[[], object]:
    """Return a function that steps this project's environments with random actions."""
    env = atari_vector.make(game, config.agent.envs, frames=config.atari.frames)
    env.reset(seed=0)
    actions = random_actions(len(env.actions), env.count)
    return lambda: env.step(next(actions))


def ale_vector(game: str, config: Config) -> Callable[[], object]:
    """Return a function that steps ale-py's environments with random actions."""
    gray, stack = {"gray4": (True, 4), "rgb1": (False, 1), "rgb4": (False, 4)}[config.atari.frames]
    env = AtariVectorEnv(game, config.agent.envs, num_threads=1, grayscale=gray, stack_num=stack, reward_clipping=False)
    env.reset(seed=0)
    actions = random_actions(int(env.single_action_space.n), config.agent.envs)  # type: ignore[attr-defined]
    return lambda: env.step(next(actions))


def random_actions(actions: int, count: int) -> Iterator[np.ndarray]:
    """Yield random actions endlessly; they are drawn in advance."""
    return itertools.cycle(np.random.default_rng(0).integers(0, actions, (512, count)))


def bare_rate(game: str, steps: int = 2000) -> float:
    """Return the agent steps/s of one emulator with random actions, four frames each."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale = ale_py.ALEInterface()
    ale.loadROM(roms.get_rom_path(game))
    actions, random = ale.getMinimalActionSet(), np.random.default_rng(0)
    drawn = iter(random.integers(0, len(actions), steps).tolist())

    def step() -> None:
        action = actions[next(drawn)]
        for _ in range(4):
            ale.act(action)
        if ale.game_over():
            ale.reset_game()

    return steps / timed(step, steps)


def timed(call: Callable[[], object], count: int) -> float:
    """Return the seconds that `count` calls take."""
    started = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
