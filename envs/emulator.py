"""The emulator: one console with a cartridge in it, and the shelf where consoles wait for their next use."""

from __future__ import annotations

from collections import OrderedDict

from ale_py import ALEInterface, LoggerMode, roms

from leap_dist.envs.games import require

NOOP, FIRE = 0, 1
SHELF_SIZE = 256
"""Consoles kept at most, of 0.8 MB each."""

_shelf: OrderedDict[str, list[Emulator]] = OrderedDict()  # by game, the one played last at the end


class Emulator:
    """One game, ready to play. Every episode starts from the same state, whatever was played before.

    Resetting would not do: after some play it leads to other states than at first, in about 15 games.
    """

    def __init__(self, game: str) -> None:
        ALEInterface.setLoggerMode(LoggerMode.Error)  # no banner for every console
        self.ale = ALEInterface()
        self.ale.setInt("random_seed", 0)  # else the clock's: the state after a reset depends on it in some games
        self.ale.setInt("frame_skip", 1)  # whoever plays counts frames, pools them,
        self.ale.setFloat("repeat_action_probability", 0.0)  # repeats actions
        self.ale.setInt("max_num_frames_per_episode", 0)  # and cuts episodes off
        path = roms.get_rom_path(game)
        assert path is not None, game
        self.ale.loadROM(path)
        self.ale.reset_game()
        self._start = self.ale.cloneState()
        self.ale.act(NOOP)  # the first restoring has to come after a frame, too: else Qbert and Tetris go another way
        self.act, self.over, self.lives = self.ale.act, self.ale.game_over, self.ale.lives
        self.screen = self.ale.getScreen

    def restart(self) -> None:
        """Starts an episode. Two frames must be emulated before the screen is looked at.

        The screen is no part of the state, and in five games the first frame does not fill it: remains of what was
        played before would show.
        """
        self.ale.restoreState(self._start)


def take(game: str, count: int) -> list[Emulator]:
    """`count` emulators from the shelf, new ones where it has none left: 0.1 s each.

    Raises ValueError for a game that does not exist or cannot be loaded.
    """
    require(game)
    shelved = _shelf.get(game, [])
    return [shelved.pop() if shelved else Emulator(game) for _ in range(count)]


def clear() -> None:
    """Empties the shelf: the next environments get new consoles."""
    _shelf.clear()


def put_back(game: str, emulators: list[Emulator]) -> None:
    """Shelves emulators of a game. Where the shelf is full, the games not played for longest go."""
    _shelf.setdefault(game, []).extend(emulators)
    _shelf.move_to_end(game)
    while sum(map(len, _shelf.values())) > SHELF_SIZE:
        _shelf.popitem(last=False)
