"""Files of runs: round trips, damage of every kind, and what a crash leaves."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leap_dist.config.loading import ConfigError, resolve
from leap_dist.evaluation.initializations import Arm, describe_arms
from leap_dist.evaluation.runs import RunResult, load, load_all, missing, plan, save
from leap_dist.storage.atomic import CorruptFile, NewerFormat, json_digest
from leap_dist.testing import failpoints

IDENTITY = {"budget": 1000, "init": {"sha256": "ab"}, "games": ["pong"]}


def run(arm: str = "leap", game: str = "pong", seed: int = 3, **changes: Any) -> RunResult:
    values: dict[str, Any] = {
        "budget": 1000,
        "seconds": 1.5,
        "ended": np.array([100, 100, 990]),
        "returns": np.array([-21.0, 0.1, 5.0]),
        "curve": ({"steps": 80, "loss": 0.5, "entropy": 1.0}, {"steps": 160.0, "loss": 0.25}),
    }
    return RunResult(arm=arm, game=game, seed=seed, **values | changes)


def place(out: Path, arm: str = "leap", game: str = "pong", seed: int = 3) -> Path:
    return out / "runs" / arm / game / f"{seed}.json"


def assert_equal(one: RunResult, other: RunResult) -> None:
    for field in dataclasses.fields(RunResult):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))
    assert one.ended.dtype == np.int64
    assert one.returns.dtype == np.float64


def test_a_result_that_is_older_than_a_setting_was_made_with_its_default(tmp_path: Path):
    config = resolve("smoke", {"tasks": "omniglot", "games": ("greek",)})
    (planned,) = plan([Arm("leap", "a", "model", "ab" * 32)], config, 1)
    identity = planned.identity(config)
    newer = ("supervised.rotations", "supervised.split", "supervised.shuffle")
    old = {name: value for name, value in identity.items() if name not in newer}
    save(tmp_path, run(game="greek", seed=0), old)
    assert missing([planned], config, tmp_path) == ([], [])
    other = resolve("smoke", {"tasks": "omniglot", "games": ("greek",), "supervised.rotations": 9})
    with pytest.raises(ConfigError, match=r"with supervised\.rotations 0, not 9"):
        missing([planned], other, tmp_path)


def test_arms_with_rates_of_their_own_are_told_apart_and_share_a_folder(tmp_path: Path):
    config = resolve("smoke", {"tasks": "omniglot", "games": ("greek",)})
    arms = [Arm("leap", "a", "model", "ab" * 32), Arm("tuned", "b", "encoder", "cd" * 32, learning_rate=0.01)]
    usual, own = plan(arms, config, 1)
    assert own.identity(config) == usual.identity(config) | {"init": "cd" * 32, "learning_rate": 0.01}
    for one in (usual, own):
        save(tmp_path, run(one.arm.label, "greek", 0), one.identity(config))
    assert missing([usual], config, tmp_path) == ([], []), "the other arm's rate is its own"
    assert missing([usual, own], config, tmp_path) == ([], [])
    changed = [own._replace(arm=dataclasses.replace(own.arm, learning_rate=0.5))]
    with pytest.raises(ConfigError, match=r"with learning_rate 0\.01, not 0\.5"):
        missing(changed, config, tmp_path)


@pytest.mark.parametrize("episodes", [3, 0])
def test_what_is_saved_is_loaded(tmp_path: Path, episodes: int):
    changes = {} if episodes else {"ended": np.array([], int), "returns": np.array([]), "curve": ()}
    saved = run("a.b_c+d-1", **changes)
    save(tmp_path, saved, IDENTITY)
    loaded, identity = load(place(tmp_path, "a.b_c+d-1"))
    assert_equal(loaded, saved)
    assert identity == IDENTITY
    save(tmp_path / "again", loaded, identity)
    assert place(tmp_path / "again", "a.b_c+d-1").read_bytes() == place(tmp_path, "a.b_c+d-1").read_bytes()


def test_the_file_is_the_agreed_one(tmp_path: Path):
    save(tmp_path, run(), IDENTITY)
    content = json.loads(place(tmp_path).read_text())
    digest = content.pop("sha256")
    assert digest == json_digest(content)
    assert content == {
        "format": 1,
        "arm": "leap",
        "game": "pong",
        "seed": 3,
        "budget": 1000,
        "seconds": 1.5,
        "identity": IDENTITY,
        "episodes": {"steps": [100, 100, 990], "returns": [-21.0, 0.1, 5.0]},
        "curve": [{"steps": 80, "loss": 0.5, "entropy": 1.0}, {"steps": 160.0, "loss": 0.25}],
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arm": "../up"}, "arm '../up'"),
        ({"arm": ""}, "arm ''"),
        ({"arm": "x" * 41}, "up to 39 letters"),
        ({"arm": ".hidden"}, "is not valid: a letter or digit"),
        ({"arm": "a\n"}, "arm 'a"),
        ({"game": "Pong/.."}, "is not the name of a game"),
        ({"seed": -1}, "out of range"),
        ({"budget": 0}, "out of range"),
        ({"seconds": float("nan")}, "out of range"),
        ({"ended": np.array([1, 2])}, "2 episodes ended, 3"),
        ({"ended": np.array([3, 2, 4])}, "do not ascend"),
        ({"ended": np.array([-1, 2, 4])}, "do not ascend"),
        ({"returns": np.array([0, np.inf, 1])}, "not a number"),
        ({"curve": ({"loss": 1.0},)}, "steps is missing"),
        ({"curve": ({"steps": 2.0}, {"steps": 1.0})}, "do not ascend"),
        ({"seed": True}, "seed is of a wrong type"),
    ],
)
def test_what_is_no_run_is_neither_saved_nor_loaded(tmp_path: Path, changes: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        save(tmp_path, dataclasses.replace(run(), **changes), {})
    assert not list(tmp_path.iterdir())
    save(tmp_path, run(), {})
    content = json.loads(place(tmp_path).read_text())
    del content["sha256"]
    plain = {name: list(value) if isinstance(value, np.ndarray | tuple) else value for name, value in changes.items()}
    for name, inner in (("ended", "steps"), ("returns", "returns")):
        if name in plain:
            content["episodes"][inner] = [float(x) if name == "returns" else int(x) for x in plain.pop(name)]
    content |= plain
    place(tmp_path).write_text(json.dumps(content | {"sha256": json_digest(content)}))
    with pytest.raises(CorruptFile, match=r"leap/pong/3\.json is not a run, or damaged") as caught:
        load(place(tmp_path))
    assert "\n" not in str(caught.value)


def test_every_flipped_byte_is_noticed(tmp_path: Path):
    save(tmp_path, run(), IDENTITY)
    data = place(tmp_path).read_bytes()
    wanted = run()
    for i in range(len(data)):
        place(tmp_path).write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        try:
            loaded, identity = load(place(tmp_path))
        except CorruptFile:
            continue
        assert_equal(loaded, wanted)  # as where a flip only changed an exponent's letter
        assert identity == IDENTITY


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format": 1', b"\xff\xfe", b"[" * 100_000, b'"run"'])
def test_what_is_no_file_of_ours_is_said_on_one_line(tmp_path: Path, content: bytes):
    place(tmp_path).parent.mkdir(parents=True)
    place(tmp_path).write_bytes(content)
    with pytest.raises(CorruptFile, match=r"leap/pong/3\.json is not a run") as caught:
        load(place(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_newer_format_is_refused_as_such(tmp_path: Path):
    save(tmp_path, run(), {})
    content = json.loads(place(tmp_path).read_text())
    place(tmp_path).write_text(json.dumps(content | {"format": 2, "sha256": ""}))
    with pytest.raises(NewerFormat, match="update leap-dist"):
        load(place(tmp_path))


def test_links_and_pipes_are_not_followed(tmp_path: Path):
    save(tmp_path, run(), {})
    place(tmp_path, seed=4).symlink_to(place(tmp_path))
    os.mkfifo(place(tmp_path, seed=5))
    for seed, said in ((4, "symbolic link"), (5, "not a regular file")):
        with pytest.raises(CorruptFile, match=said):
            load(place(tmp_path, seed=seed))


def test_all_runs_come_in_order_and_damage_is_named(tmp_path: Path):
    for arm, game, seed in [
        ("b", "pong", 10),
        ("b", "pong", 2),
        ("b", "boxing", 0),
        ("a", "pong", 0),
        ("c", "pong", 1),
    ]:
        save(tmp_path, run(arm, game, seed), {})
    runs, warnings = load_all(tmp_path)
    places = [("a", "pong", 0), ("b", "boxing", 0), ("b", "pong", 2), ("b", "pong", 10), ("c", "pong", 1)]
    assert [(r.arm, r.game, r.seed) for r in runs] == places
    assert warnings == []

    (tmp_path / "arms.json").write_text(json.dumps({"arms": [{"label": "c"}, {"label": "b", "version": 3}]}))
    place(tmp_path, "b", "pong", 2).write_text("{}")
    place(tmp_path, "a", "pong", 7).write_bytes(place(tmp_path, "a", "pong", 0).read_bytes())
    runs, warnings = load_all(tmp_path)
    places = [("c", "pong", 1), ("b", "boxing", 0), ("b", "pong", 10), ("a", "pong", 0)]
    assert [(r.arm, r.game, r.seed) for r in runs] == places
    assert len(warnings) == 2
    assert "a/pong/7.json holds another run: a/pong/0" in warnings[0]
    assert "b/pong/2.json is not a run" in warnings[1]


def test_without_runs_there_are_none(tmp_path: Path):
    assert load_all(tmp_path) == ([], [])


def test_arms_are_described_in_their_order(tmp_path: Path):
    assert describe_arms(tmp_path) == ([], [])
    arms = [{"label": "scratch", "version": None}, {"label": "leap", "version": 40}]
    (tmp_path / "arms.json").write_text(json.dumps({"arms": arms}))
    assert describe_arms(tmp_path) == (arms, [])


@pytest.mark.parametrize(
    "text", ["", "[]", '{"arms": [{}]}', '{"arms": [{"label": "a/b"}]}', '{"arms": [{"label": "a"}, {"label": "a"}]}']
)
def test_damaged_descriptions_are_left_out_and_named(tmp_path: Path, text: str):
    (tmp_path / "arms.json").write_text(text)
    described, warnings = describe_arms(tmp_path)
    assert described == []
    assert len(warnings) == 1
    assert warnings[0].startswith("arms.json is left out: ")


@pytest.mark.parametrize("point", ["write", "written"])
def test_a_full_disk_leaves_the_old_run(tmp_path: Path, point: str):
    save(tmp_path, run(), {})
    failpoints.arm(f"transfer-run.{point}=full")
    try:
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, run(seconds=99.0), {})
        assert failpoints.hits[f"transfer-run.{point}"] == 1
    finally:
        failpoints.arm("")
    assert load(place(tmp_path))[0].seconds == 1.5
    assert load_all(tmp_path)[1] == []
    assert [path.name for path in place(tmp_path).parent.iterdir()] == ["3.json"]
