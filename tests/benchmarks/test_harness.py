"""What all benchmarks share: the order of the arms, ratios within a repetition, goals, and both ways to print."""

from __future__ import annotations

import json

import pytest

from benchmarks.harness import Report, interleaved


def test_arms_take_turns_and_every_other_round_runs_backwards(capsys):
    order: list[str] = []

    def arm(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = interleaved({name: lambda name=name: arm(name) for name in "abc"}, 2, warmup=True)
    assert order == [*"cba", *"abc", *"cba"]
    assert found == {"a": [4.0, 9.0], "b": [5.0, 8.0], "c": [6.0, 7.0]}, "the warm-up does not count"
    assert capsys.readouterr().out == "", "stdout is for the result"


def report() -> Report:
    made = Report("A title", {"envs": 16})
    made.add("fast", "steps/s", [10.0, 30.0, 20.0])
    made.ratio("fast / slow", [10.0, 30.0, 20.0], [5.0, 10.0, 5.0], target=3.5)
    made.ratio("share", [0.01, 0.02, 0.03], [1.0, 1.0, 1.0], target=0.02, at_most=True)
    made.notes.append("a note")
    return made


def test_ratios_are_taken_within_a_repetition_and_goals_compared_with_their_median():
    plain = report().plain()
    assert plain["figures"]["fast"] == {
        "unit": "steps/s",
        "median": 20.0,
        "lowest": 10.0,
        "highest": 30.0,
        "samples": [10.0, 30.0, 20.0],
    }
    assert plain["ratios"]["fast / slow"]["samples"] == [2.0, 3.0, 4.0]
    assert plain["ratios"]["fast / slow"]["met"] is False
    assert plain["ratios"]["share"]["met"] is True
    assert plain["ratios"]["share"]["median"] == 0.02
    with pytest.raises(ValueError):
        report().ratio("unequal", [1.0], [1.0, 2.0])


def test_one_json_object_or_one_table(capsys):
    report().show(as_json=True)
    assert json.loads(capsys.readouterr().out)["settings"] == {"envs": 16}
    report().show(as_json=False)
    text = capsys.readouterr().out
    for wanted in ("A title", "envs 16", "fast", "steps/s", "at least 3.5: NO", "at most 0.02: yes", "a note", "cores"):
        assert wanted in text
