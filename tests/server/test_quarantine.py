"""Who is blamed for failures: the game, the worker, or nobody."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leap_dist.server.admission import BURST_SECONDS, RateLimiter
from leap_dist.server.quarantine import GAME_DEATHS, GAME_FAILURES, WORKER_GAMES, Quarantine

GAMES = [f"game{i}" for i in range(6)]


class Story:
    """Failures and successes one after the other, each of a lease granted after the one before."""

    def __init__(self) -> None:
        self.quarantine = Quarantine()
        self.now = 0.0

    def fail(self, game: str, worker: str, *, died: bool = False) -> str:
        self.now += 1
        return self.quarantine.fail(game, worker, "why", granted=self.now - 0.5, now=self.now, died=died)


@pytest.mark.parametrize(("died", "limit"), [(False, GAME_FAILURES), (True, GAME_DEATHS)])
def test_a_game_that_fails_in_a_row_on_whatever_workers_is_left_out(died, limit):
    story = Story()
    news = [story.fail("pong", f"w{i}", died=died) for i in range(limit + 2)]
    assert [bool(text) for text in news] == [False] * (limit - 1) + [True] + [False] * 2, "said once"
    assert news[limit - 1] == f"pong is quarantined after {limit} failures in a row; the last one: why"
    assert story.quarantine.games == {"pong"}
    assert story.quarantine.workers == set()


def test_any_success_of_the_game_ends_the_row():
    story = Story()
    for _ in range(5):
        for _ in range(GAME_FAILURES - 1):
            story.fail("pong", "w0")
        story.quarantine.succeed("pong", "w1")
    assert story.quarantine.games == set()


def test_a_worker_on_which_one_game_after_the_other_fails_is_left_out_and_the_games_are_cleared():
    story = Story()
    story.fail("game0", "bad")
    story.fail("game0", "good")
    assert not story.fail("game1", "bad")
    assert story.fail("game2", "bad").startswith("bad is quarantined: game0, game1, game2 failed on it")
    assert story.quarantine.workers == {"bad"}
    assert not story.fail("game0", "good"), "one of its two failures was the worker's"
    assert story.fail("game0", "good")
    assert story.quarantine.games == {"game0"}


def test_a_worker_that_has_a_success_in_between_stays():
    story = Story()
    for game in GAMES:
        story.fail(game, "w0")
        story.quarantine.succeed("other", "w0")
    assert story.quarantine.workers == set()


def test_deaths_are_not_held_against_the_worker_whose_place_others_take():
    story = Story()
    for game in GAMES:
        story.fail(game, "w0", died=True)
    assert story.quarantine.workers == set()


def test_what_fails_at_the_same_time_counts_once():
    """Sixty-four workers fall silent together: the network, and no game, is to blame."""
    quarantine = Quarantine()
    for worker in range(64):
        assert not quarantine.fail(GAMES[worker % 6], f"w{worker}", "silent", granted=1.0, now=60.0 + worker)
    assert quarantine.games == quarantine.workers == set()
    assert quarantine.state()["in_a_row"] == dict.fromkeys(GAMES, 1)


@given(st.lists(st.tuples(st.sampled_from(GAMES), st.sampled_from(["w0", "w1"]), st.sampled_from("fds"))))
def test_nobody_is_left_out_for_less_than_the_limit_and_the_state_survives_a_restart(events):
    story = Story()
    failures, deaths, failed_on = Counter(), Counter(), {"w0": set(), "w1": set()}
    games, workers = set(), set()  # that have reached a limit at some time
    for game, worker, kind in events:
        if kind == "s":
            story.quarantine.succeed(game, worker)
            failures[game] = deaths[game] = 0
            failed_on[worker].clear()
        else:
            story.fail(game, worker, died=kind == "d")
            (deaths if kind == "d" else failures)[game] += 1
            if kind == "f":
                failed_on[worker].add(game)
        games |= {name for name in GAMES if failures[name] >= GAME_FAILURES or deaths[name] >= GAME_DEATHS}
        workers |= {name for name, failed in failed_on.items() if len(failed) >= WORKER_GAMES}
        assert story.quarantine.games <= games, "what a worker was blamed for counts for less, never for more"
        assert story.quarantine.workers == workers
        again = Quarantine()
        again.restore(story.quarantine.state())
        assert again.state() == story.quarantine.state()


def test_a_flood_is_turned_away_and_the_rate_is_let_through():
    now = 0.0
    intake = RateLimiter(10.0, lambda: now)
    taken = sum(intake.admit() for _ in range(1000))
    assert taken == 10 * BURST_SECONDS
    taken = 0
    for _ in range(1000):  # ten times as many as allowed, for ten seconds
        now += 0.01
        taken += intake.admit()
    assert taken == pytest.approx(100, abs=1)
    assert intake.wait(4) == 1.0
    assert intake.wait(250) == 25.0
