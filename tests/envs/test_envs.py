"""Which games there are, and what the emulator hands out."""

from __future__ import annotations

import gc
import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import NamedTuple

import ale_py
import numpy as np
import pytest
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode

from leap_dist.envs import atari_vector, emulator, games
from leap_dist.envs.preprocessing import ACROSS, GRAY, RGB, Frames, Palette, overlaps

HELD_OUT = {"breakout", "qbert", "space_invaders"}
CRASHING = ["combat", "joust", "maze_craze", "warlords"]


# --- games ---------------------------------------------------------------------------------------------------------


def test_the_sets_have_the_sizes_and_the_held_out_games_of_the_papers():
    assert len(games.ACTIONS_OF_27) == 27
    seed, camera = games.expand(("seed24",)), games.expand(("camera25",))
    assert (len(seed), len(camera)) == (24, 25)
    assert len(set(seed)) == 24
    assert set(games.ACTIONS_OF_27) - set(seed) == HELD_OUT
    assert set(games.ACTIONS_OF_27) - set(camera) == {"breakout", "space_invaders"}
    assert "pong" in seed, "figure 4: Pong is trained on, and evaluated too"


def test_what_is_trained_on_is_not_held_out_and_has_a_human_score():
    for name, held_out in games.HELD_OUT.items():
        assert not set(games.SETS[name]) & set(held_out)
    assert {*games.SETS["moving4"], *games.HELD_OUT["moving4"]} <= games.reference_scores().keys()


def test_the_27_games_have_as_many_minimal_actions_as_the_table_says():
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    found = {}
    for game in games.ACTIONS_OF_27:
        emulator = ale_py.ALEInterface()
        emulator.loadROM(roms.get_rom_path(game))
        found[game] = len(emulator.getMinimalActionSet())
    assert found == games.ACTIONS_OF_27
    assert max(found.values()) == 10, "the paper's limit"


def test_expand_replaces_sets_drops_repetitions_and_keeps_the_order():
    assert games.expand(("pong", "breakout", "pong")) == ("pong", "breakout")
    mixed = games.expand(("breakout", "seed24", "pong", "camera25"))
    assert mixed[0] == "breakout"
    assert mixed[1:25] == games.expand(("seed24",))
    assert mixed[25:] == ("qbert",)
    assert games.expand(()) == ()


@pytest.mark.parametrize("game", CRASHING)
def test_games_that_end_the_process_are_refused_without_being_loaded(monkeypatch, game):
    loaded = []
    monkeypatch.setattr(emulator, "Emulator", loaded.append)
    with pytest.raises(ValueError, match=f"'{game}'.*two-player"):
        games.expand(("pong", game))
    with pytest.raises(ValueError, match=f"'{game}'.*two-player"):
        atari_vector.make(game, 1)
    assert not loaded
    assert game not in games.available()
    assert game in roms.get_all_rom_ids(), "otherwise refusing it would mean nothing"


def test_every_other_rom_is_available():
    assert set(games.available()) == set(roms.get_all_rom_ids()) - set(CRASHING)
    assert {"kung_fu_master", "road_runner", "krull", "alien", "gravitar"} <= set(games.available())  # figure 4


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("brakout", "breakout"),
        ("PONG", "pong"),
        ("MsPacman", "ms_pacman"),
        ("space-invaders", "space_invaders"),
        ("sed24", "seed24"),
    ],
)
def test_an_unknown_game_is_answered_with_the_nearest_names(name, nearest):
    with pytest.raises(ValueError) as caught:
        games.expand((name,))
    head, _, near = str(caught.value).partition("; the nearest are ")
    assert head == f"no game {name!r}"
    assert nearest in near.split(", ")


def test_a_name_that_is_near_nothing_gets_no_suggestion_but_is_told_where_they_are():
    with pytest.raises(ValueError) as caught:
        games.expand(("zzzzzzzzzzzz",))
    assert str(caught.value) == "no game 'zzzzzzzzzzzz'; the command `games` lists all"


@pytest.mark.parametrize("name", ["brakout", "seed24", ""])
def test_make_raises_valueerror_for_what_is_not_a_game(name):
    """A set is not a game either."""
    with pytest.raises(ValueError):
        atari_vector.make(name, 1)


# --- scores --------------------------------------------------------------------------------------------------------


def test_human_normalized_scores_by_hand():
    assert games.human_normalized("pong", -20.7) == 0.0
    assert games.human_normalized("pong", 14.6) == 1.0
    assert games.human_normalized("breakout", 16.1) == pytest.approx(0.5)  # (16.1 − 1.7)/(30.5 − 1.7)
    assert games.human_normalized("breakout", 88.1) == pytest.approx(3.0)  # beyond human
    assert games.human_normalized("breakout", 0.0) == pytest.approx(-1.7 / 28.8)  # below random


def test_three_games_of_the_set_have_no_published_scores():
    missing = {game for game in games.ACTIONS_OF_27 if games.human_normalized(game, 0.0) is None}
    assert missing == {"air_raid", "carnival", "pooyan"}
    assert len(games.reference_scores()) == 57
    assert set(games.reference_scores()) <= set(games.available()), "scores must be found under the ROM's name"


# --- colors, pooling, resizing ------------------------------------------------------------------------------------


@cache
def area(size: int, into: int) -> np.ndarray:
    """(into, size): the share of each output pixel that each input pixel covers, by the lengths of their overlaps."""
    shares = np.zeros((into, size))
    for i, j in np.ndindex(into, size):
        left, right = i * size / into, (i + 1) * size / into
        shares[i, j] = max(0.0, min(right, j + 1) - max(left, j)) * into / size
    return shares


def resized(picture: np.ndarray) -> np.ndarray:
    """uint8 (height, 160) → (84, 84); halves, which float64 does not hit exactly, are brought back to halves."""
    means = area(len(picture), 84) @ picture @ area(160, 84).T
    return np.rint(np.round(means, 8)).astype(np.uint8)


@pytest.mark.parametrize(("size", "into"), [(5, 2), (40, 21), (210, 84), (125, 42), (84, 84)])
def test_overlaps_are_exact_shares(size, into):
    weights = overlaps(size, into)
    assert np.array_equal(weights, np.rint(weights)), "whole numbers: their sums are exact in any order"
    assert (weights.sum(1) == size).all()
    np.testing.assert_allclose(weights / size, area(size, into), atol=1e-7)


class Painted:
    """Stands in for an emulator: shows any picture, in colors of its own."""

    def __init__(self, height: int, brightest: int) -> None:
        rng = np.random.default_rng(height)
        self.colors = rng.integers(0, brightest, (4, 256), np.uint8, endpoint=True)
        self.picture = np.zeros((height, 160), np.uint8)
        self.asked = 0

    def getScreen(self) -> np.ndarray:
        return self.picture.copy()

    def getScreenGrayscale(self) -> np.ndarray:
        self.asked += 1
        return self.colors[0, self.picture]

    def getScreenRGB(self) -> np.ndarray:
        return self.colors[1:, self.picture].transpose(1, 2, 0)


def sprites(picture: np.ndarray, rng: np.random.Generator) -> None:
    """Paints over a few rectangles; indices are even."""
    for _ in range(rng.integers(0, 4)):
        y, x = rng.integers(0, len(picture)), rng.integers(0, 160)
        picture[y : y + rng.integers(1, 30), x : x + rng.integers(1, 20)] = 2 * rng.integers(0, 128)


@pytest.mark.parametrize("colors", [GRAY, RGB], ids=["gray", "rgb"])
@pytest.mark.parametrize("height", [210, 214, 220, 230, 250])
def test_frames_are_the_pooled_and_resized_colors_of_the_last_two_screens_whatever_came_before(height, colors):
    """Many indices show on a last-but-one screen only, when the palette has to have learnt them already."""
    rng = np.random.default_rng(0)
    shown = [Painted(height, 255) for _ in range(3)]  # 255 is a color too, though it marks what is unknown
    frames = Frames(3, height, colors, Palette())
    changed, images = 0, np.zeros(0)
    for step in range(8):
        pooled = np.zeros((3, colors.stop - colors.start, height, 160), np.uint8)
        for k in range(2):
            for n, ale in enumerate(shown):
                if step % 3 or n:  # now and then a screen stands still
                    sprites(ale.picture, rng)
                frames.screens[k][n][:] = ale.picture
                pooled[n] = np.maximum(pooled[n], ale.colors[colors][:, ale.picture])
            frames.update(k, shown)
        before, images = images, frames.images().copy()
        for n, c in np.ndindex(images.shape[:2]):
            assert np.array_equal(images[n, c], resized(pooled[n, c]))
        changed += not np.array_equal(images, before)
    assert changed > 5


def test_a_known_palette_asks_the_emulator_for_nothing():
    shown = Painted(210, 254)
    rng = np.random.default_rng(0)
    palette = Palette()
    shown.picture[:] = rng.integers(0, 256, shown.picture.shape)
    indices = shown.picture.tobytes()
    for _ in range(2):
        assert palette.convert(indices, RGB, [shown]) == shown.colors[1:, shown.picture].tobytes()
        assert shown.asked == 1


def test_only_tiles_that_changed_are_resized(monkeypatch):
    shown = Painted(210, 254)
    frames = Frames(1, 210, GRAY, Palette())
    tiles = []
    resize = frames._resize
    monkeypatch.setattr(frames, "_resize", lambda stale: (tiles.extend(stale.tolist()), resize(stale)))
    for y, x in [(0, 0), (7, 45), (209, 159)]:
        shown.picture[y, x] += 2
        for k in range(2):
            frames.screens[k][0][:] = shown.picture
            frames.update(k, [shown])
        frames.images()
    assert tiles == [*range(42 * ACROSS), 1 * ACROSS + 1, 42 * ACROSS - 1]


# --- the emulator --------------------------------------------------------------------------------------------------


class Slow:
    """One environment as its description reads: every frame through ALE's own palette, resized in float64.

    Starts from the state after one reset of its own emulator, which nothing else is played on.
    """

    def __init__(self, game, frames, seed, skip=4, noop_max=30, fire=True, sticky=0.0, limit=108_000, full=False):
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self.ale = ale_py.ALEInterface()
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.loadROM(roms.get_rom_path(game))
        self.ale.reset_game()
        self.beginning = self.ale.cloneState()
        self.actions = [*self.ale.getLegalActionSet()] if full else [*self.ale.getMinimalActionSet()]
        self.gray, self.skip, self.noop_max, self.fire = frames == "gray4", skip, noop_max, fire
        self.stack = 1 if frames == "rgb1" else 4
        self.sticky, self.limit, self.rng = sticky, limit, np.random.default_rng(seed)
        self.start()

    def frame(self, action: ale_py.Action) -> float:
        if self.sticky and self.rng.random() < self.sticky:
            action = self.previous
        self.previous = action
        return self.ale.act(action)

    def screen(self) -> np.ndarray:
        """(C, height, 160)."""
        return self.ale.getScreenGrayscale()[None] if self.gray else self.ale.getScreenRGB().transpose(2, 0, 1)

    def seen(self, screen: np.ndarray) -> None:
        self.stacked = [*self.stacked[1:], [resized(plane) for plane in screen]]

    def observation(self) -> np.ndarray:
        return np.concatenate(self.stacked)

    def start(self) -> None:
        self.ale.restoreState(self.beginning)
        self.previous, self.elapsed = ale_py.Action.NOOP, 0
        due = self.rng.integers(1, self.noop_max, endpoint=True) if self.noop_max else 0
        for k in range(max(2, due)):
            self.frame(ale_py.Action.FIRE if k == 0 and self.fire and ale_py.Action.FIRE in self.actions else 0)
            assert not self.ale.game_over()
        planes = len(self.screen())
        self.stacked = [np.zeros((planes, 84, 84), np.uint8)] * self.stack
        self.seen(self.screen())

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, int, list[np.ndarray]]:
        screens, reward = [], 0.0
        while len(screens) < self.skip and self.elapsed < self.limit and not self.ale.game_over():
            reward += self.frame(self.actions[action])
            screens.append(self.screen())
            self.elapsed += 1
        over = self.ale.game_over()
        truncated = self.elapsed == self.limit and not over
        self.seen(np.max(screens[-2:], axis=0))
        final = [self.observation()] if truncated else []
        if over or truncated:
            self.start()
        return self.observation(), reward, over, truncated, self.ale.lives(), final


@pytest.mark.parametrize(
    ("game", "frames", "settings", "steps"),
    [
        ("breakout", "gray4", {}, 220),  # fire, lives, the game's end
        ("amidar", "gray4", {"noop_max": 0}, 40),  # of the games whose first frame after a start shows remains
        ("asterix", "rgb4", {"frame_skip": 3, "max_episode_frames": 100}, 110),  # the last step has one frame
        ("pooyan", "rgb1", {"frame_skip": 1, "sticky_actions": 0.25, "max_episode_frames": 103}, 220),
        ("air_raid", "gray4", {"fire_on_reset": False, "sticky_actions": 0.9, "noop_max": 2}, 60),
        ("carnival", "gray4", {"full_actions": True, "frame_skip": 2, "max_episode_frames": 101}, 120),
    ],
)
def test_an_environment_does_what_a_slow_and_obvious_one_does(game, frames, settings, steps):
    short = {"frame_skip": "skip", "fire_on_reset": "fire", "sticky_actions": "sticky", "full_actions": "full"}
    short["max_episode_frames"] = "limit"
    slow = Slow(game, frames, 7, **{short.get(name, name): value for name, value in settings.items()})
    ends = 0
    with closing(atari_vector.make(game, 1, frames=frames, **settings)) as env:
        assert env.actions == [action.value for action in slow.actions]
        assert np.array_equal(env.reset(7), [slow.observation()])
        for action in np.random.default_rng(1).integers(0, len(env.actions), steps):
            step = env.step(np.array([action]))
            observation, reward, over, truncated, lives, final = slow.step(action)
            assert np.array_equal(step.observations, [observation])
            assert (step.rewards, step.terminated, step.truncated, step.lives) == (reward, over, truncated, lives)
            assert np.array_equal(step.final, np.reshape(final, (-1, *observation.shape)))
            assert np.array_equal(env.lives, step.lives)
            ends += over or truncated
    assert ends >= 1 or steps < 100


class Draws:
    """A generator whose draws are told in advance."""

    def __init__(self) -> None:
        self.due: list[int] = []

    def integers(self, low: int, high: int, endpoint: bool) -> int:
        assert endpoint
        return self.due.pop(0)


@pytest.mark.parametrize(
    ("game", "frames", "steps", "ends"),
    [
        ("breakout", "gray4", 200, True),  # fire
        ("asterix", "rgb1", 400, True),
        ("pong", "rgb4", 200, False),
        ("air_raid", "gray4", 150, False),  # 250 rows
        ("pooyan", "rgb1", 150, False),  # 220 rows
    ],
)
def test_an_environment_does_what_ales_own_vector_environment_does(monkeypatch, game, frames, steps, ends):
    """But for rounding, which there meets halves inexactly: 1 of 255, in less than 1 of 1000 pixels that have color.

    Told how many frames its episodes started with, ours follows; it never starts one from fewer than two.
    """
    oracle = AtariVectorEnv(
        game, 3, num_threads=1, repeat_action_probability=0.0, autoreset_mode=AutoresetMode.SAME_STEP,
        img_height=84, img_width=84, grayscale=frames == "gray4", stack_num=1 if frames == "rgb1" else 4,
        frameskip=4, maxpool=True, noop_max=30, use_fire_reset=True, reward_clipping=False,
    )  # fmt: skip
    actions, draws = np.random.default_rng(3), Draws()
    monkeypatch.setattr(np.random, "default_rng", lambda seed: draws)
    wrong = total = over = 0

    def compare(ours: np.ndarray, theirs: np.ndarray) -> None:
        nonlocal wrong, total
        planes = theirs if theirs.ndim == 4 else theirs.transpose(0, 1, 4, 2, 3).reshape(ours.shape)
        difference = np.abs(ours.astype(int) - planes)
        assert difference.max() <= 1
        wrong, total = wrong + np.count_nonzero(difference), total + np.count_nonzero(planes)

    with closing(oracle), closing(atari_vector.make(game, 3, frames=frames)) as env:
        env._emulators[0].restart()
        own = env._ales[0].getEpisodeFrameNumber()  # of the game's own start, which some need
        theirs, info = oracle.reset(seed=np.array([1, 2, 3]))
        draws.due = (info["episode_frame_number"] - own).tolist()
        assert min(draws.due) >= 2
        compare(env.reset(0), theirs)
        for _ in range(steps):
            chosen = actions.integers(0, len(env.actions), 3)
            theirs, rewards, terminated, _, info = oracle.step(chosen)
            draws.due = (info["episode_frame_number"][terminated] - own).tolist()
            assert min(draws.due, default=2) >= 2
            step = env.step(chosen)
            assert not draws.due
            compare(step.observations, theirs)
            assert np.array_equal(step.rewards, rewards)
            assert np.array_equal(step.terminated, terminated)
            assert not step.truncated.any()
            assert np.array_equal(step.lives, info["lives"])
            over += np.count_nonzero(terminated)
    assert wrong / total < 0.001
    assert over > 1 or not ends


def play(env: atari_vector.Atari, seed: int, steps: int) -> list[np.ndarray]:
    """Everything that a fixed sequence of actions gives."""
    tape = [env.reset(seed), env.lives]
    for actions in np.random.default_rng(0).integers(0, len(env.actions), (steps, env.count)):
        tape.extend(env.step(actions))
    return tape


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


@pytest.fixture
def empty_pool(monkeypatch) -> Iterator[None]:
    """And nothing learnt of any palette."""
    pool = emulator._pool.copy()
    emulator._pool.clear()
    monkeypatch.setattr(atari_vector, "palette", cache(lambda game: Palette()))
    yield
    emulator._pool.clear()
    emulator._pool.update(pool)


@pytest.mark.parametrize("game", ["qbert", "tetris"])
def test_what_was_played_before_leaves_no_trace(empty_pool, game):
    """The games where it would: the screen's remains after a start, and a reset that is not like the first one."""
    settings = {"frames": "rgb1", "noop_max": 0, "sticky_actions": 0.1, "max_episode_frames": 200}
    with closing(atari_vector.make(game, 2, **settings)) as env:
        cold = play(env, 5, 60)
        assert same(play(env, 5, 60), cold), "the same environment"
    with closing(atari_vector.make(game, 2)) as env:
        play(env, 8, 333)
    kept = list(emulator._pool[game])
    with closing(atari_vector.make(game, 2, **settings)) as env:
        assert set(env._emulators) == set(kept)
        assert same(play(env, 5, 60), cold), "another environment, with emulators from the pool"


@pytest.mark.parametrize("settings", [{}, {"noop_max": 0, "sticky_actions": 0.25}], ids=["no-ops", "sticky"])
def test_the_seed_determines_everything(settings):
    with closing(atari_vector.make("breakout", 2, **settings)) as env:
        tape = play(env, 1, 40)
        assert same(play(env, 1, 40), tape)
        assert not same(play(env, 2, 40), tape)
        actions = np.random.default_rng(0).integers(0, 4, 40)
        env.reset(1)
        assert any(not np.array_equal(*env.step(np.array([a, a])).observations) for a in actions), "drawn for each"


def test_the_pool_is_bounded_and_keeps_the_games_played_last(empty_pool, monkeypatch):
    monkeypatch.setattr(emulator, "POOL_SIZE", 5)
    monkeypatch.setattr(emulator, "_needed", 0)
    monkeypatch.setattr(emulator, "Emulator", lambda game: [game])
    first = emulator.take("pong", 2)
    emulator.put_back("pong", first)
    emulator.put_back("qbert", emulator.take("qbert", 3))
    again = emulator.take("pong", 2)
    assert sorted(map(id, again)) == sorted(map(id, first)), "kept, not new"
    emulator.put_back("pong", again)
    emulator.put_back("breakout", emulator.take("breakout", 1))
    assert {game: len(kept) for game, kept in emulator._pool.items()} == {"pong": 2, "breakout": 1}


def test_the_pool_holds_all_emulators_of_the_task_that_needs_most(empty_pool, monkeypatch):
    monkeypatch.setattr(emulator, "POOL_SIZE", 5)
    monkeypatch.setattr(emulator, "_needed", 0)
    monkeypatch.setattr(emulator, "Emulator", lambda game: [game])
    emulator.keep(6)
    emulator.keep(4)
    for _ in range(2):
        taken = {game: emulator.take(game, 3) for game in ("pong", "qbert")}
        for game, emulators in taken.items():
            emulator.put_back(game, emulators)
        assert {game: len(kept) for game, kept in emulator._pool.items()} == {"pong": 3, "qbert": 3}
    emulator.put_back("breakout", emulator.take("breakout", 1))
    assert sum(map(len, emulator._pool.values())) <= 6


class Executed(NamedTuple):
    """What an emulator was told, frame by frame, each episode after its restart."""

    episodes: list[list[int]]


def record(env: atari_vector.Atari, monkeypatch: pytest.MonkeyPatch) -> Executed:
    """The first environment's."""
    told = Executed([])
    first = env._emulators[0]
    act, restart = first.act, first.restart
    monkeypatch.setattr(first, "act", lambda action: (told.episodes[-1].append(action), act(action))[1])
    monkeypatch.setattr(first, "restart", lambda: (told.episodes.append([]), restart())[1])
    return told


@pytest.mark.parametrize(("game", "fire"), [("breakout", True), ("breakout", False), ("asterix", True)])
def test_episodes_start_with_fire_and_a_uniform_number_of_no_ops(monkeypatch, game, fire):
    with closing(atari_vector.make(game, 1, noop_max=6, fire_on_reset=fire)) as env:
        told = record(env, monkeypatch)
        for seed in range(1500):
            env.reset(seed)
    first = 1 if fire and game == "breakout" else 0  # Asterix has no such button
    assert all(episode == [first] + [0] * (len(episode) - 1) for episode in told.episodes)
    counts = Counter(map(len, told.episodes))
    assert set(counts) == {2, 3, 4, 5, 6}, "two where one was drawn"
    for frames, expected in {2: 500, 3: 250, 4: 250, 5: 250, 6: 250}.items():
        assert abs(counts[frames] - expected) < 90, counts  # 5 standard deviations


def test_a_game_that_ends_before_its_episode_starts_is_started_again(monkeypatch):
    with closing(atari_vector.make("breakout", 1, noop_max=0)) as env:
        told = record(env, monkeypatch)
        answers = iter([False, True])
        monkeypatch.setattr(env._emulators[0], "over", lambda: next(answers, False))
        env.reset(0)
    assert told.episodes == [[1, 0], [0, 0]]


def test_sticky_actions_repeat_frame_by_frame(monkeypatch):
    repeats = {}
    for sticky in (0.0, 0.25, 1.0):
        with closing(atari_vector.make("breakout", 1, sticky_actions=sticky, noop_max=0, fire_on_reset=False)) as env:
            told = record(env, monkeypatch)
            env.reset(0)
            for k in range(100):
                env.step(np.array([2 + k % 2]))  # right and left, four frames each
        executed = np.concatenate(told.episodes)[2:402]
        wanted = np.repeat([3 + k % 2 for k in range(100)], 4)
        repeats[sticky] = executed != wanted
        if sticky == 1.0:
            assert not executed.any(), "what came before the first action is no action"
    assert not repeats[0.0].any()
    # Of a step's frames the k-th still executes the step before with probability p^k.
    late = repeats[0.25].reshape(100, 4).mean(0)
    np.testing.assert_allclose(late, [0.25**k for k in range(1, 5)], atol=0.15)
    assert (np.diff(late) <= 0).all()


def test_an_episode_cut_off_hands_over_its_last_observation():
    with closing(atari_vector.make("breakout", 2, max_episode_frames=100, noop_max=0)) as env:
        before = env.reset(0)
        for k in range(1, 61):
            step = env.step(np.array([k % 4, 0]))
            assert not step.terminated.any()
            assert (step.truncated == (k % 25 == 0)).all(), "100 frames are 25 steps of 4"
            assert len(step.final) == step.truncated.sum()
            last = step.final if step.truncated.any() else step.observations
            assert np.array_equal(last[:, :3], before[:, 1:]), "the stack moves on by one frame"
            if step.truncated.any():
                assert not step.observations[:, :3].any(), "the next episode has only its first frame"
                assert step.observations[:, 3].any()
            before = step.observations.copy()
            step.observations[:] = 99  # they are the caller's
            step.final[:] = 99


def test_only_the_cut_off_hand_over_an_observation():
    with closing(atari_vector.make("breakout", 2, max_episode_frames=100)) as env:
        env.reset(0)
        env._elapsed[:] = 0, 40
        finals = [env.step(np.array([0, 0])).final for _ in range(25)]
    assert [len(final) for final in finals] == [0] * 14 + [1] + [0] * 9 + [1]


def test_a_game_that_is_over_at_the_limit_is_not_cut_off(monkeypatch):
    with closing(atari_vector.make("breakout", 1, max_episode_frames=100)) as env:
        env.reset(0)
        env._elapsed[:] = 99
        answers = iter([True])  # to the first question
        over = env._emulators[0].over
        monkeypatch.setattr(env._emulators[0], "over", lambda: next(answers, False) or over())
        step = env.step(np.array([0]))
    assert (step.terminated, step.truncated, len(step.final)) == (True, False, 0)


def test_shapes_and_types():
    for frames, planes in [("gray4", 4), ("rgb1", 3), ("rgb4", 12)]:
        with closing(atari_vector.make("pong", 2, frames=frames)) as env:
            assert atari_vector.channels(frames) == planes
            observations = env.reset(3)
            step = env.step(np.array([0, 1]))
        assert observations.shape == step.observations.shape == (2, planes, 84, 84)
        assert step.final.shape == (0, planes, 84, 84)
        assert observations.dtype == step.observations.dtype == step.final.dtype == np.uint8
        assert (step.rewards.dtype, step.terminated.dtype, step.truncated.dtype) == (np.float32, bool, bool)
        assert step.rewards.shape == step.terminated.shape == step.truncated.shape == step.lives.shape == (2,)
        if frames != "gray4":  # Pong's ground is brown: red, green and blue must come in that order
            assert observations[0, -3:, 42, 30].tolist() == [144, 72, 17]


def test_a_closed_environment_and_one_not_reset_refuse_to_be_stepped():
    env = atari_vector.make("pong", 1)
    with pytest.raises(RuntimeError, match="not reset"):
        env.step(np.array([0]))
    env.reset(0)
    for wrong in ([6], [-1], [0, 0]):
        with pytest.raises(ValueError, match="not 1 actions of 0 to 5"):
            env.step(np.array(wrong))
    env.close()
    env.close()
    assert sum(map(len, emulator._pool.values())) == len({id(e) for kept in emulator._pool.values() for e in kept})
    for call in (lambda: env.step(np.array([0])), lambda: env.reset(0)):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_memory_does_not_grow():
    def resident() -> float:
        """Now, in MiB; the largest ever would hide what grows after a larger test."""
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    def rounds(count: int) -> None:
        for seed in range(count):
            with closing(atari_vector.make("pong", 2, max_episode_frames=8)) as env:
                play(env, seed, 4)

    rounds(5)
    before = resident()
    rounds(60)  # 240 episodes
    assert resident() - before < 8
