"""Atari games: their names, the meta-training sets, and reference scores."""

from __future__ import annotations

import difflib
import json
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

# Two-player games: loading one ends the process (seen with ale-py 0.12.1), so they are refused by name.
CRASHING = ("combat", "joust", "maze_craze", "warlords")

# The games of the 60-game suite of 2018 that have at most ten minimal actions, with that number.
ACTIONS_OF_27 = {
    "air_raid": 6, "amidar": 10, "assault": 7, "asterix": 9, "atlantis": 4, "beam_rider": 9, "bowling": 6,
    "breakout": 4, "carnival": 6, "crazy_climber": 9, "demon_attack": 6, "enduro": 9, "freeway": 3, "gopher": 8,
    "ms_pacman": 9, "name_this_game": 6, "phoenix": 8, "pong": 6, "pooyan": 6, "qbert": 6, "skiing": 3,
    "space_invaders": 6, "time_pilot": 10, "tutankham": 8, "up_n_down": 6, "video_pinball": 9, "wizard_of_wor": 10,
}  # fmt: skip

HELD_OUT = {
    "seed24": ("breakout", "qbert", "space_invaders"),
    "camera25": ("breakout", "space_invaders"),
    "moving4": ("breakout", "qbert", "space_invaders", "crazy_climber", "video_pinball"),
}
"""Held-out games: the seed paper holds out three (it names two; Qbert is our third), the camera-ready version two.

Those of moving4 are the three, and two on which an agent improves within 500,000 steps (docs/learning.md).
"""

SETS = {
    **{name: tuple(game for game in ACTIONS_OF_27 if game not in HELD_OUT[name]) for name in ("seed24", "camera25")},
    "moving4": ("tutankham", "amidar", "assault", "demon_attack"),
}
"""Meta-training sets: those of both versions of the paper, and the games on which an agent improves within a task."""


@cache
def available() -> tuple[str, ...]:
    """Return the ROM names of all games that can be loaded.

    They are read from ale_py's list of ROMs. Importing ale_py would take longer than everything else that the command
    line needs the names for.
    """
    package = find_spec("ale_py")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("the package ale_py is not installed")
    hashes = json.loads((Path(package.origin).parent / "roms" / "md5.json").read_bytes())
    return tuple(sorted(name for file in hashes if (name := file.removesuffix(".bin")) not in CRASHING))


def expand(names: tuple[str, ...]) -> tuple[str, ...]:
    """Replace set names by their games and drop repetitions. Raises ValueError with the nearest names."""
    games: dict[str, None] = {}
    for name in names:
        for game in SETS.get(name, (name,)):
            require(game)
            games[game] = None
    return tuple(games)


def require(game: str) -> None:
    """Raise ValueError with the nearest names if there is no such game or it cannot be loaded."""
    if game in available():
        return
    if game in CRASHING:
        raise ValueError(f"{game!r} is a two-player game that crashes the emulator; it cannot be played")
    if game.lower() == "all":
        raise ValueError(f"no game {game!r}; sets of games are {', '.join(SETS)}; the command `games` lists them")
    near = difflib.get_close_matches(game.lower(), (*available(), *SETS), n=3, cutoff=0.4)
    hint = f"the nearest are {', '.join(near)}" if near else "the command `games` lists all"
    raise ValueError(f"no game {game[:80]!r}; {hint}")


@cache
def reference_scores() -> dict[str, dict[str, float]]:
    """Return the random and human scores of 57 games (DQN Zoo: 30 no-op starts, undiscounted returns)."""
    text = resources.files("leap_dist.envs").joinpath("atari57_scores.json").read_text()
    scores: dict[str, dict[str, float]] = json.loads(text)["scores"]
    return scores


def human_normalized(game: str, episode_return: float) -> float | None:
    """Return (return − random) / (human − random), or None if the game has no published scores."""
    score = reference_scores().get(game)
    if score is None:
        return None
    return (episode_return - score["random"]) / (score["human"] - score["random"])
