"""The fixed sequence of tasks."""

from __future__ import annotations

from collections import Counter

import pytest

from leap_dist.protocol.task_queue import TaskQueue, task

GAMES = ("a", "b", "c", "d")


def test_with_replacement_every_draw_is_from_all_games():
    tasks = [task(i, GAMES, seed=1, steps=10, replace=True) for i in range(400)]
    counts = Counter(t.game for t in tasks)
    assert all(60 < counts[game] < 140 for game in GAMES)
    assert any(len({t.game for t in tasks[i : i + 4]}) < 4 for i in range(0, 40, 4)), "not each once in a pass"
    assert len({t.seed for t in tasks}) == 400
    assert [t.game for t in tasks] != [task(i, GAMES, seed=2, steps=10, replace=True).game for i in range(400)]


@pytest.mark.parametrize("replace", [False, True])
def test_a_visit_counts_the_draws_of_its_game_before(replace):
    seen: Counter[str] = Counter()
    for i in range(60):
        drawn = task(i, GAMES, seed=3, steps=10, replace=replace)
        assert drawn.visit == seen[drawn.game]
        seen[drawn.game] += 1


def test_the_queue_keeps_games_from_those_that_they_failed_on_while_there_are_others():
    queue = TaskQueue(GAMES, set(), seed=3, steps=10)
    tasks = [task(i, GAMES, seed=3, steps=10) for i in range(12)]
    first, second = tasks[0].game, tasks[1].game
    assert queue.draw(avoid={first, second}) == tasks[2]
    assert queue.waiting == [0, 1], "put off, not lost"
    assert queue.draw() == tasks[0]
    assert queue.draw(avoid=set(GAMES)) == tasks[1], "nothing else is left: the usual order"
    assert [queue.draw().index for _ in range(9)] == list(range(3, 12)), "each once"
    assert queue.draw(limit=12, avoid=set(GAMES)) is None


@pytest.mark.parametrize("replace", [False, True])
def test_the_queue_hands_out_the_sequence(replace):
    queue = TaskQueue(GAMES, set(), seed=3, steps=10, replace=replace)
    assert [queue.draw() for _ in range(9)] == [task(i, GAMES, seed=3, steps=10, replace=replace) for i in range(9)]
    queue.give_back(4)
    assert queue.draw() == task(4, GAMES, seed=3, steps=10, replace=replace)
