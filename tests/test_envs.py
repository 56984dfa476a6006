"""Which games there are, and what the emulator hands out."""

from __future__ import annotations

import ale_py
import numpy as np
import pytest
from ale_py import roms

from envs import atari, games

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
    monkeypatch.setattr(atari, "AtariVectorEnv", lambda *args, **kwargs: loaded.append(args))
    with pytest.raises(ValueError, match=f"'{game}'.*two-player"):
        games.expand(("pong", game))
    with pytest.raises(ValueError, match=f"'{game}'.*two-player"):
        atari.make(game, 1)
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


def test_a_name_that_is_near_nothing_gets_no_suggestion():
    with pytest.raises(ValueError) as caught:
        games.expand(("zzzzzzzzzzzz",))
    assert str(caught.value) == "no game 'zzzzzzzzzzzz'"


@pytest.mark.parametrize("name", ["brakout", "seed24", ""])
def test_make_raises_valueerror_for_what_is_not_a_game(name):
    """A set is not a game either."""
    with pytest.raises(ValueError):
        atari.make(name, 1)


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


# --- the emulator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "shape", "channels"),
    [("gray4", (4, 84, 84), 4), ("rgb1", (1, 84, 84, 3), 3), ("rgb4", (4, 84, 84, 3), 12)],
)
def test_observations(frames, shape, channels):
    env = atari.make("pong", 1, frames=frames)
    observations, _ = env.reset(seed=np.array([3]))
    env.close()
    assert observations.shape == (1, *shape)
    assert observations.dtype == np.uint8
    moved = atari.as_channels(observations)
    assert moved.shape == (1, channels, 84, 84)
    assert moved.dtype == np.uint8
    assert atari.channels(frames) == channels
    for k in range(channels):
        stacked, colour = (k, None) if frames == "gray4" else divmod(k, 3)
        plane = observations[0, stacked] if colour is None else observations[0, stacked, :, :, colour]
        assert np.array_equal(moved[0, k], plane)
    if frames != "gray4":  # Pong's ground is brown: red, green and blue must come in that order
        assert moved[0, -3:, 42, 30].tolist() == [144, 72, 17]


@pytest.mark.parametrize(
    ("shape", "is_view"), [((2, 4, 5, 5), True), ((2, 1, 5, 5, 3), True), ((2, 4, 5, 5, 3), False)]
)
def test_channels_of_every_layout_element_by_element(shape, is_view):
    observations = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)
    moved = atari.as_channels(observations)
    for n, k, y, x in np.ndindex(*moved.shape):
        index = (n, k, y, x) if len(shape) == 4 else (n, k // 3, y, x, k % 3)
        assert moved[n, k, y, x] == observations[index]
    assert np.shares_memory(moved, observations) == is_view


def play(seeds: list[int], steps: int, **settings: object) -> list[tuple[np.ndarray, ...]]:
    """Observations, rewards and frame numbers after the reset and after every step of a fixed sequence of actions."""
    env = atari.make("carnival", len(seeds), **settings)
    observations, info = env.reset(seed=np.array(seeds))
    tape = [(observations, np.zeros(len(seeds), np.int32), info["episode_frame_number"])]
    actions = np.random.default_rng(0).integers(0, 6, steps)
    for action in actions:
        observations, rewards, _, _, info = env.step(np.full(len(seeds), action))
        assert info["env_id"].tolist() == list(range(len(seeds))), "results in the order of the environments"
        tape.append((observations, rewards, info["episode_frame_number"]))
    env.close()
    return tape


def test_seeds_are_reproducible_one_per_environment_and_rewards_are_raw():
    one, other = play([1, 2], 80), play([2, 1], 80, threads=2)
    for before, after in zip(one, other, strict=True):
        for a, b in zip(before, after, strict=True):
            assert np.array_equal(a[0], b[1])
            assert np.array_equal(a[1], b[0])
    assert not np.array_equal(one[0][0][0], one[0][0][1]), "another seed, another start"
    rewards = np.concatenate([step[1] for step in one])
    assert rewards.dtype == np.int32
    assert set(rewards.tolist()) >= {0, 20}, "a target is worth 20: neither clipped nor scaled"


def test_frame_skip_and_no_ops():
    tape = play([1, 2], 5, frame_skip=3, noop_max=0)
    frames = np.stack([step[2] for step in tape])
    assert (np.diff(frames, axis=0) == 3).all()
    assert np.array_equal(tape[0][0][0], tape[0][0][1]), "without no-ops every episode starts alike"


def test_sticky_actions_repeat_the_previous_action():
    """With certainty, here: then the emulator never gets to see any action but its first, which is no action."""
    ends = {}
    for sticky in (0.0, 1.0):
        env = atari.make("breakout", 2, sticky_actions=sticky, noop_max=0, fire_on_reset=False)
        env.reset(seed=np.array([1, 1]))
        for _ in range(5):
            observations, *_ = env.step(np.array([2, 3]))  # one paddle to the right, the other to the left
        env.close()
        ends[sticky] = observations
    assert not np.array_equal(ends[0.0][0], ends[0.0][1])
    assert np.array_equal(ends[1.0][0], ends[1.0][1])


@pytest.mark.parametrize("fire", [True, False])
def test_fire_on_reset_puts_the_ball_into_play(fire):
    env = atari.make("breakout", 1, noop_max=0, fire_on_reset=fire)
    first, _ = env.reset(seed=np.array([1]))
    for _ in range(8):
        observations, *_ = env.step(np.array([0]))
    env.close()
    assert np.array_equal(observations[0, -1], first[0, -1]) != fire


def test_the_last_two_frames_are_pooled(monkeypatch):
    """Sprites that flicker on alternate frames must stay visible: frame skip 4 with max over the last two."""
    asked = {}
    monkeypatch.setattr(atari, "AtariVectorEnv", lambda game, count, **settings: asked.update(settings))
    atari.make("pong", 1)
    assert asked["maxpool"] is True
    assert asked["frameskip"] == 4


def test_an_episode_cut_off_hands_over_its_last_observation_and_the_next_one_starts_in_the_same_step():
    env = atari.make("breakout", 1, max_episode_frames=100)
    before, _ = env.reset(seed=np.array([0]))
    for step in range(1, 61):
        observations, _, terminated, truncated, info = env.step(np.array([step % 4]))
        assert not terminated.any()
        assert truncated.all() == (step % 25 == 0), "100 frames are 25 steps of 4"
        last = info["final_obs"] if truncated.any() else observations
        assert np.array_equal(last[:, :3], before[:, 1:]), "the stack moves on by one frame"
        if truncated.any():
            assert not np.array_equal(observations[:, :3], before[:, 1:]), "the next episode's first observation"
        before = observations
    env.close()
