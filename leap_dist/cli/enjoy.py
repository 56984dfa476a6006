"""The command `enjoy`: watch an agent play, or record a video of it."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from leap_dist.cli import named_files
from leap_dist.config import loading
from leap_dist.config.loading import ConfigError
from leap_dist.config.plurals import counted
from leap_dist.config.validation import did_you_mean
from leap_dist.envs import games

if TYPE_CHECKING:  # slow to import
    import numpy as np

    from leap_dist.config.settings import Config
    from leap_dist.leap.learner import Learner
    from leap_dist.tasks.atari.play import Player

DEFAULT_STEPS = 20_000
"""Agent steps for which an agent is trained from an initialization before it plays."""
MOST_EPISODES = 10_000


class _Chosen(NamedTuple):
    """An agent to watch."""

    about: str
    """Text that tells the user which file or run the agent comes from."""
    game: str
    vector: np.ndarray
    scope: str
    config: Config


def enjoy(parsed: argparse.Namespace) -> int:
    """Let an agent play, print its returns, and show or record the play. Raises ConfigError."""
    _check(parsed)
    from leap_dist.storage import run_directory

    place = Path(parsed.init)
    if run_directory.holds_evaluation(place):
        chosen = _of_evaluation(parsed, place)
        _use_one_thread()
    else:
        chosen = _trained(parsed)
    print(f"{chosen.game}: {chosen.about}")
    from leap_dist.tasks.atari import film
    from leap_dist.tasks.atari.play import Player

    try:
        player = Player(chosen.game, chosen.vector, chosen.scope, chosen.config.atari, parsed.seed)
    except ValueError as error:
        raise ConfigError(f"init: the agent in {parsed.init} does not fit the game: {error}") from None
    rate = 60 / chosen.config.atari.frame_skip
    screens: list[np.ndarray] = []
    most = int(parsed.seconds * rate)
    try:
        _play(player, chosen.game, parsed.episodes, _viewer(parsed, screens, most, rate))
    finally:
        player.close()
    if parsed.out is not None:
        try:
            film.write(parsed.out, screens, rate)
        except OSError as error:
            raise ConfigError(f"out: {parsed.out} cannot be written: {error}") from None
        print(f"{parsed.out}: {len(screens) / rate:.0f} seconds of play")
    return 0


def _check(parsed: argparse.Namespace) -> None:
    """Check the flags before anything slow is imported. Raises ConfigError."""
    if not 1 <= parsed.episodes <= MOST_EPISODES:
        raise ConfigError(f"episodes: {parsed.episodes:,} is not between 1 and {MOST_EPISODES:,}")
    if not 0 <= parsed.seed < 2**31:
        raise ConfigError(f"seed: {parsed.seed:,} is not between 0 and {2**31 - 1:,}")
    if parsed.steps is not None and not 0 <= parsed.steps <= 10**9:
        raise ConfigError(f"steps: {parsed.steps:,} is not between 0 and 1,000,000,000")
    if not 1 <= parsed.seconds <= 600:
        raise ConfigError(f"seconds: {parsed.seconds:,} is not between 1 and 600")
    if parsed.game is not None:
        try:
            games.require(parsed.game)
        except ValueError as error:
            raise ConfigError(f"game: {error}") from None
    if parsed.out is not None:
        from leap_dist.tasks.atari import film

        if reason := film.can_write(parsed.out):
            raise ConfigError(f"out: {reason}")
        if not parsed.out.absolute().parent.is_dir():
            raise ConfigError(f"out: there is no directory {parsed.out.parent}; make it first")


def _of_evaluation(parsed: argparse.Namespace, out: Path) -> _Chosen:
    """Return an agent that an evaluation has kept. Raises ConfigError if there is none for that arm and game."""
    from leap_dist.evaluation import agents

    found = agents.names(out)
    if not found:
        raise ConfigError(f"init: {out} has no agents, because an earlier version made it; evaluate again")
    for name, place in (("arm", 0), ("game", 1)):
        known = sorted({str(agent[place]) for agent in found})
        wanted = getattr(parsed, name)
        if wanted is not None and wanted not in known:
            near = did_you_mean(wanted, known)
            raise ConfigError(f"{name}: {out} has no agent of {wanted[:80]!r}, only of {', '.join(known)}{near}")
        found = [agent for agent in found if wanted in (None, agent[place])]
    if not found:
        raise ConfigError(f"arm: {out} has no agent of {parsed.arm} on {parsed.game}")
    if parsed.steps is not None:
        raise ConfigError(f"steps: the agents of {out} are trained already; leave --steps out")
    values = loading.read_yaml(out / "config.yaml")
    config = loading.resolve(str(values.get("preset")), values)
    from leap_dist.evaluation import initializations

    described, _ = initializations.describe_arms(out)
    arm, game, seed = _first(found, [str(one["label"]) for one in described], config.games)
    _require_games(config.tasks, parsed.init)
    try:
        agent = agents.load(out, arm, game, seed)
    except OSError as error:
        raise ConfigError(f"init: the agent of {arm} on {game} cannot be read ({error.strerror})") from None
    about = f"the agent of {arm} with seed {seed}, after {agent.steps:,} agent steps"
    return _Chosen(about, game, agent.vector, agent.scope, config)


def _first(found: Sequence[tuple[str, str, int]], arms: Sequence[str], names: Sequence[str]) -> tuple[str, str, int]:
    """Return the agent of the first game and the first arm, in the order in which the evaluation named them."""

    def place(name: str, order: Sequence[str]) -> int:
        return order.index(name) if name in order else len(order)

    return min(found, key=lambda agent: (place(agent[1], names), place(agent[0], arms)))


def _trained(parsed: argparse.Namespace) -> _Chosen:
    """Train an agent from an initialization. Raises ConfigError if the initialization is not for games."""
    if parsed.arm is not None:
        raise ConfigError(f"arm: {parsed.init} is not an evaluation; leave --arm out")
    game = parsed.game or "breakout"
    named_files.require_all([parsed.init])
    from leap_dist.evaluation import initializations
    from leap_dist.protocol.messages import Lease, Task
    from leap_dist.worker.start import Start, make_learner

    labels, files = initializations.read([parsed.init])
    for file in files:
        _require_games(file.content.tasks, parsed.init)
    given = {"games": game, "worker.device": "cpu"}
    config = initializations.resolve(given, {}, initializations.settings(files, given, None if files else "fast"))
    (arm,) = initializations.arms(labels, files, config)
    vector = initializations.vectors([arm]).get(arm.label)
    if vector is None:
        from leap_dist.tasks.task import family_of

        _, vector = family_of(config).initialization(config, parsed.seed, arm.scope)
    steps = DEFAULT_STEPS if parsed.steps is None else parsed.steps
    task = Task(0, game, 0, seed=parsed.seed, steps=steps)
    _use_one_thread()
    learner = make_learner(config, Lease("enjoy", task, "enjoy", "enjoy", 0, 60.0), Start(vector, scope=arm.scope))
    try:
        _train(learner, steps)
        from leap_dist.nn.flat_vector import flatten

        final = flatten((*learner.shared.values(), *learner.local.values())).cpu().numpy()
    finally:
        learner.close()
    about = f"an agent trained for {steps:,} agent steps from {arm.label}"
    if not steps:
        about = f"an untrained agent, from {arm.label}"
    return _Chosen(about, game, final, arm.scope, config)


def _require_games(tasks: str, shown: str) -> None:
    if tasks != "atari":
        raise ConfigError(f"init: {shown} is for tasks {tasks}, but only agents of Atari games can play")


def _use_one_thread() -> None:
    """Compute in one thread. Beside other programs, several that wait for each other take many times as long."""
    from leap_dist.nn.device import prepare

    prepare("cpu", threads=1, gpu_share=0)


def _train(learner: Learner, steps: int) -> None:
    """Train a learner, and print its progress after each tenth of the steps."""
    done, told = 0, 0
    while done < steps:
        learner.backward()
        learner.step()
        done += learner.steps_per_update
        if 10 * done // steps > told:
            told = 10 * done // steps
            print(f"training the agent: {min(1, done / steps):.0%} of {steps:,} steps", flush=True)


def _viewer(
    parsed: argparse.Namespace, screens: list[np.ndarray], most: int, rate: float
) -> Callable[[np.ndarray], None] | None:
    """Return a function that records the screens or shows them on a terminal; None if nobody is watching."""
    if parsed.out is not None:

        def record(screen: np.ndarray) -> None:
            if len(screens) < most:
                screens.append(screen.copy())

        return record
    if not sys.stdout.isatty():
        return None
    from leap_dist.tasks.atari import film

    size = shutil.get_terminal_size()
    columns = max(20, min(size.columns, 80, 2 * size.lines))

    def show(screen: np.ndarray) -> None:
        sys.stdout.write(f"\x1b[H{film.for_terminal(screen, columns)}\n")
        sys.stdout.flush()
        time.sleep(1 / rate)

    sys.stdout.write("\x1b[2J")
    return show


def _play(player: Player, game: str, episodes: int, see: Callable[[np.ndarray], None] | None) -> None:
    """Play episodes, and print each return, then their mean and the scores of random play and of a person."""
    returns = []
    for number in range(1, episodes + 1):
        played = player.episode(see)
        returns.append(played.score)
        print(f"episode {number}: return {played.score:,.1f} in {played.steps:,} steps", flush=True)
    marks = games.reference_scores().get(game)
    beside = f"; random play {marks['random']:,.1f}, a person {marks['human']:,.1f}" if marks else ""
    print(f"mean return over {counted(len(returns), 'episode')}: {sum(returns) / len(returns):,.1f}{beside}")
