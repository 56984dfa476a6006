"""The Atari emulator with one game loaded, and a pool of emulators to reuse."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from ale_py import ALEInterface, ALEState, LoggerMode, roms

from leap_dist.envs.games import require

NOOP, FIRE = 0, 1
POOL_SIZE = 256
"""Largest number of idle emulators to keep, of 0.8 MB each, unless a task needs more."""

_pool: OrderedDict[str, list[Emulator]] = OrderedDict()  # idle emulators by game, the game played last at the end
_needed = 0  # by the task that needs most


class Emulator:
    """An emulator with one game loaded. Every episode starts from the same state, whatever was played before.

    ALE's own reset does not ensure that: in about 15 games its result depends on what was played.
    """

    def __init__(self, game: str) -> None:
        ALEInterface.setLoggerMode(LoggerMode.Error)  # no banner for every emulator
        self.ale = ALEInterface()
        self.ale.setInt("random_seed", 0)  # the default is the clock, and some games' initial state depends on it
        self.ale.setInt("frame_skip", 1)  # atari_vector skips and pools frames,
        self.ale.setFloat("repeat_action_probability", 0.0)  # repeats actions
        self.ale.setInt("max_num_frames_per_episode", 0)  # and truncates episodes
        path = roms.get_rom_path(game)
        assert path is not None, game
        self.ale.loadROM(path)
        self.ale.reset_game()
        self._start = self.ale.cloneState()
        self.ale.act(NOOP)  # without a frame before the first restore, Qbert and Tetris behave differently
        self.act, self.over, self.lives = self.ale.act, self.ale.game_over, self.ale.lives
        self.screen = self.ale.getScreen

    def restart(self) -> None:
        """Start an episode. Two frames must be emulated before the screen is read.

        The screen is not a part of the restored state, and in five games the first frame does not fill it, so pixels of
        an earlier episode would remain.
        """
        self.ale.restoreState(self._start)

    def state(self) -> bytes:
        """Return the state of the machine, 14 kB, including the emulator's random numbers but not the screen."""
        state: bytes = self.ale.cloneSystemState().serialize()
        return state

    def load_state(self, state: bytes) -> None:
        """Continue from a state. Two frames must be emulated before the screen is read, as after `restart`."""
        self.ale.restoreSystemState(ALEState(state))


def take(game: str, count: int, beat: Callable[[], None] = lambda: None) -> list[Emulator]:
    """Take `count` emulators of a game from the pool, or make new ones, which takes 0.1 s each.

    Calls `beat` before each. Raises ValueError for a game that does not exist or cannot be loaded, and whatever `beat`
    raises.
    """
    require(game)
    idle, taken = _pool.get(game, []), []
    for _ in range(count):
        beat()
        taken.append(idle.pop() if idle else Emulator(game))
    return taken


def keep(count: int) -> None:
    """Let the pool hold at least `count` emulators from now on, because one task uses so many."""
    global _needed
    _needed = max(_needed, count)


def clear() -> None:
    """Empty the pool, so that the next environments get new emulators."""
    _pool.clear()


def put_back(game: str, emulators: list[Emulator]) -> None:
    """Return emulators of a game to the pool. If it is full, discard those of the games not played for longest."""
    _pool.setdefault(game, []).extend(emulators)
    _pool.move_to_end(game)
    while sum(map(len, _pool.values())) > max(POOL_SIZE, _needed):
        _pool.popitem(last=False)
