"""The choice between short meta-trainings, on runs and agents of which it is known."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from initialization_files import written

from benchmarks import candidates
from benchmarks.candidates import Health
from leap_dist.evaluation.runs import RunResult, save
from leap_dist.weights.initialization import read_initialization


def agent(arm: str, game: str, height: float, seed: int = 0) -> RunResult:
    """Return a run whose returns are all the same, so that its area is `height`."""
    ended = np.arange(1_000, 100_001, 1_000)
    return RunResult(arm, game, seed, 100_000, 1.0, ended, np.full(len(ended), height), ())


def line(version: int, game: str, dead: float, score: float) -> dict[str, object]:
    means = {"start/dead_units": dead, "start/effective_rank": 10 * dead}
    points = [{"episodes": 2, "score": score, "means": means}, {"episodes": 0, "score": 0.0, "means": {}}]
    return {"version_after": version, "game": game, "path": {"length": 1000 * dead}, "curve": points}


def test_a_run_with_dead_or_similar_units_is_dropped() -> None:
    start = Health(0.2, 20.0)
    for dead, rank, kept in ((0.5, 10.0, True), (0.51, 10.0, False), (0.5, 9.9, False)):
        assert Health(dead, rank).is_kept(start) == kept


def test_each_game_counts_relative_to_random_encoders() -> None:
    """The agent that is twice as good in a game of small scores is chosen, not the one with more points."""
    scratch = [agent("scratch", "pong", height, seed) for seed, height in enumerate((1.0, 3.0))]
    scratch += [agent("scratch", "qbert", 1_000.0), agent("scratch", "breakout", 5.0)]
    agents = [
        agent("a", "pong", 4.0),
        agent("a", "qbert", 1_000.0),
        agent("b", "pong", 2.0),
        agent("b", "qbert", 1_500.0),
    ]
    areas = candidates.relative_areas([*agents, agent("scratch", "pong", 99.0)], scratch)
    assert areas == {"a": {"pong": 2.0, "qbert": 1.0}, "b": {"pong": 1.0, "qbert": 1.5}}
    assert candidates.choose({"a": True, "b": True}, areas) == "a"
    assert candidates.choose({"a": False, "b": True}, areas) == "b"
    assert candidates.choose({"a": False, "b": False}, areas) is None
    assert candidates.choose({"a": True, "c": True}, areas) is None, "the agents of c are missing"


def test_a_row_of_the_history_has_the_means_of_a_meta_update() -> None:
    lines = [line(1, "pong", 0.1, 5.0), line(1, "qbert", 0.3, 7.0), line(2, "pong", 0.4, 6.0)]
    *_, first, second = candidates.history(lines).splitlines()
    assert first == "| 1 | 0.10, 0.30 | 2.0 | 200 | 5 | 7 |"
    assert second == "| 2 | 0.40, – | 4.0 | 400 | 6 | – |"


@pytest.mark.emulator
@pytest.mark.parametrize("shared", ["encoder", "convolutions"])
def test_the_choice_from_what_runs_and_agents_have_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shared: str
) -> None:
    """The run's φ is that of another seed, so it is as healthy as its φ_0, but not the same."""
    run = tmp_path / "first"
    written(run, games=["assault"], **{"meta.shared": shared})
    learned = read_initialization(run / "init.safetensors")
    start = candidates.start_of(run, learned)
    assert start.tensors.keys() == learned.tensors.keys()
    assert not np.array_equal(start.tensors["conv1.weight"], learned.tensors["conv1.weight"])
    for arm, folder in (("scratch", "scratch"), ("first", "agents")):
        save(tmp_path / folder, agent(arm, "assault", 4.0), {})
    command = ["candidates", str(run), "--scratch", str(tmp_path / "scratch")]
    monkeypatch.setattr(sys, "argv", command)
    candidates.main()
    out = capsys.readouterr().out
    assert "| yes | – | – |" in out
    assert "chosen" not in out
    monkeypatch.setattr(sys, "argv", [*command, "--agents", str(tmp_path / "agents")])
    candidates.main()
    out = capsys.readouterr().out
    assert "| yes | 1.00 | 1.00 |" in out
    assert out.endswith("chosen: first\n")
    monkeypatch.setattr(sys, "argv", ["candidates", str(tmp_path), *command[2:]])
    with pytest.raises(SystemExit):
        candidates.main()
    assert "No such file" in capsys.readouterr().err


def test_what_is_not_known_is_a_dash() -> None:
    table = candidates.verdict({"a": (Health(0.1, 9.0), Health(0.2, 8.0))}, {}, ["pong"])
    assert table.splitlines()[-1] == "| a | 0.10, 0.20 | 9.0, 8.0 | yes | – | – |"
    assert math.isnan(candidates._mean([]))
