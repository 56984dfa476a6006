"""The nearest valid name to one that is not."""

from __future__ import annotations

import pytest

from leap_dist.config.loading import fields
from leap_dist.config.validation import did_you_mean, nearest, similarity

NAMES = [name for name, *_ in fields()]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("agent.lr", "agent.learning_rate"),
        ("meta.lr", "meta.learning_rate"),
        ("supervised.lr", "supervised.learning_rate"),
        ("agent.learning-rat", "agent.learning_rate"),
        ("agnet.envs", "agent.envs"),
        ("AGENT.ENVS", "agent.envs"),
        ("wrokers", "workers"),
        ("num_workers", "workers"),
        ("n-envs", "agent.envs"),
        ("batch_size", "meta.batch_size"),
        ("epochs", "supervised.epochs"),
        ("agent.entropy", "agent.entropy_cost"),
        ("metric", "leap.metric"),
        ("modes", "mode"),
        ("gpu", "worker.gpus"),
    ],
)
def test_a_mistyped_or_abbreviated_setting_finds_the_right_one(word, expected):
    assert nearest(word, NAMES) == [expected]
    assert did_you_mean(word, NAMES) == f"; did you mean {expected}?"


@pytest.mark.parametrize("word", ["", "x", "xyzzy", "agent.gamma", "-", ".", "no\nsuch", "é" * 500])
def test_a_name_that_is_near_nothing_gets_no_suggestion(word):
    assert did_you_mean(word, NAMES) == ""


def test_a_name_is_its_own_nearest():
    assert all(nearest(name, NAMES) == [name] for name in NAMES)
    assert similarity("agent.envs", "agent.envs") == 1.0
