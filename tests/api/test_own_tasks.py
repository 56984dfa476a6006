"""docs/own-tasks.md: its programs run as they stand, and train what they say."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import gymnasium
import in_process_driver
import numpy as np
import pytest

import leap_dist
from leap_dist.config.loading import ConfigError, resolve
from leap_dist.datasets import own
from leap_dist.tasks.task import family_of

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/own-tasks.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty directory, without Ray, with tasks that take a second."""
    in_process_driver.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    made = dict(gymnasium.registry)
    train, evaluate = leap_dist.train, leap_dist.evaluate

    def shorter(config: dict[str, Any], **more: Any) -> leap_dist.Run:
        images = config["tasks"] == "images"
        steps = {"task_steps": 640, "worker.device": "cpu"} if images else {"task_steps": 400, "agent.envs": 2}
        return train({**config, **steps, "meta_updates": 1}, progress=False, **more)

    def fewer(inits: Any, config: dict[str, Any]) -> leap_dist.Report:
        return evaluate(inits, {**config, "task_steps": 400}, seeds=1, progress=False)

    monkeypatch.setattr(leap_dist, "train", shorter, raising=False)
    monkeypatch.setattr(leap_dist, "evaluate", fewer, raising=False)
    yield
    sys.modules.pop("docs.examples.catch", None)
    gymnasium.registry.clear()
    gymnasium.registry.update(made)


def test_the_environment_of_the_page_is_the_example():
    assert BLOCKS[0].strip() == (ROOT / "docs" / "examples" / "catch.py").read_text().strip()


def test_an_environment_of_one_s_own_takes_less_than_sixty_lines(short, tmp_path):
    module, program = BLOCKS[:2]
    assert len([line for line in (module + program).splitlines() if line.strip()]) < 60
    (tmp_path / "docs" / "examples").mkdir(parents=True)
    (tmp_path / "docs" / "examples" / "catch.py").write_text(module)
    names: dict[str, Any] = {}
    exec(compile(program, "own-tasks.md", "exec"), names)
    assert names["run"].outcome == names["report"].outcome == "done"
    assert {task.game for update in names["run"].meta_updates() for task in update.tasks} <= {
        "catch10_v0", "catch12_v0", "catch14_v0"
    }  # fmt: skip
    assert {(run.arm, run.game) for run in names["report"].runs()} == {
        ("leap", "catch16_v0"),
        ("scratch", "catch16_v0"),
    }


def test_a_data_set_of_one_s_own_takes_less_than_sixty_lines(short):
    write, program = BLOCKS[2:]
    assert len([line for line in (write + program).splitlines() if line.strip()]) < 60
    names: dict[str, Any] = {}
    exec(compile(write + program, "own-tasks.md", "exec"), names)
    assert {task.game for update in names["run"].meta_updates() for task in update.tasks} == {"stripes", "blocks"}
    assert names["network"].head.out_features == 5


def arrays(**other: Any) -> dict[str, Any]:
    random = np.random.default_rng(0)
    found = {}
    for part, count in (("train", 6), ("test", 3)):
        found[f"{part}_images"] = random.integers(0, 255, (count, 20, 24, 3), np.uint8)
        found[f"{part}_labels"] = np.arange(count) % 3
    return {**found, **other}


def test_images_are_resized_and_their_brightness_is_measured(tmp_path):
    np.savez(tmp_path / "Some-Things.npz", **arrays())
    found = own.find(tmp_path, "some_things")
    assert found.train.images.shape == (6, 32, 32, 3)
    assert found.test.labels.tolist() == [0, 1, 2]
    assert found.classes == 3
    assert found.mean == pytest.approx(tuple((found.train.images / 255).mean((0, 1, 2))))
    gray = arrays(train_images=np.full((6, 32, 32), 9, np.uint8), test_images=np.full((3, 32, 32, 1), 7, np.uint8))
    np.savez(tmp_path / "gray.npz", **gray)
    found = own.find(tmp_path, "gray")
    assert np.all(found.train.images == 9)
    assert np.all(found.test.images == 7)
    assert found.std == (1e-3, 1e-3, 1e-3)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"train_images": np.zeros((6, 20, 24, 3), np.float32)},
            r"train_images is float32 .*; it must hold",
        ),
        ({"test_labels": np.array([0, 1])}, r"test_labels is int64 \(2,\) for 3 images"),
        ({"train_labels": np.array([0, 1, 2, 3, 5, 5])}, "has training images of class 5, but none of 4"),
        ({"test_labels": np.array([0, 1, 3])}, "test images of class 3, but no training images"),
        ({"train_labels": np.array([0, 1, 2, -1, 1, 2])}, "train_labels has -1 to 2"),
        ({"train_images": np.array([None] * 6)}, "Object arrays cannot be loaded"),
    ],
)
def test_a_file_with_something_else_is_refused(tmp_path, other, message):
    np.savez(tmp_path / "wrong.npz", **arrays(**other))
    with pytest.raises(ConfigError, match=message):
        own.find(tmp_path, "wrong")


def damaged(path: Path, kind: str) -> None:
    """As an interrupted copy, a wrong suffix, or a bad disk leaves it."""
    np.savez_compressed(path, **arrays())
    content = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "one array":
        with path.open("wb") as file:
            np.save(file, arrays()["train_images"])
    elif kind == "encrypted":
        flagged = re.sub(rb"(PK\x01\x02.{4}).", lambda found: found[1] + b"\x01", content, flags=re.DOTALL)
        path.write_bytes(flagged)
    else:
        place = int(kind)
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])


@pytest.mark.parametrize("kind", ["empty", "one array", "encrypted", *map(str, range(150, 240, 5))])
def test_damaged_files_are_refused_in_one_line(tmp_path, kind):
    damaged(tmp_path / "fruits.npz", kind)
    with pytest.raises(ConfigError, match=r"data_dir: .*fruits.npz cannot be used: "):
        own.find(tmp_path, "fruits")


def test_files_whose_names_mean_the_same_are_refused(tmp_path):
    for name in ("данные1", "выборка1", "Fruits", "fruits"):
        np.savez(tmp_path / f"{name}.npz", **arrays())
    with pytest.raises(ConfigError, match=r"data_dir: fruits may be Fruits.npz or fruits.npz, because only letters"):
        own.find(tmp_path, "fruits")
    with pytest.raises(ConfigError, match=r"data_dir: 1 may be выборка1.npz or данные1.npz"):
        own.find(tmp_path, "1")


def test_names_of_which_only_other_letters_differ_are_refused():
    names = {"preset": "quick", "tasks": "images", "games": ["данные1", "выборка1"]}
    with pytest.raises(ConfigError, match="games: 'данные1' and 'выборка1' are the same name, because only letters"):
        leap_dist.train(names)
    assert resolve("quick", {"tasks": "images", "games": ("a-b", "A_b", "c")}).games == ("a_b", "c")


def test_a_class_that_cannot_be_divided_is_refused_before_anything_starts(tmp_path):
    """One image cannot be in both the training and the validation images."""
    images = {"train_images": np.zeros((5, 20, 24, 3), np.uint8), "train_labels": np.array([0, 0, 1, 1, 2])}
    np.savez(tmp_path / "few.npz", **arrays(**images))
    settings = {"preset": "quick", "tasks": "images", "games": ["few"], "data_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match="data_dir: few cannot be used: class 2 has a single image, which cannot be"):
        leap_dist.train({**settings, "supervised.patience": 2}, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["missing", "broken", "fine"])
def test_a_run_checks_its_files_before_it_starts(tmp_path, name):
    """The line says once where the fault is."""
    np.savez(tmp_path / "fine.npz", **arrays())
    (tmp_path / "broken.npz").write_bytes((tmp_path / "fine.npz").read_bytes()[:-30])
    config = resolve("quick", {"tasks": "images", "games": (name,), "data_dir": str(tmp_path)})
    if name == "fine":
        family_of(config).check(config)
        return
    with pytest.raises(ConfigError) as caught:
        family_of(config).check(config)
    assert str(caught.value).count("data_dir: ") == str(caught.value).count(name) == 1


def test_files_that_are_missing_or_no_archives_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ConfigError, match=r"text.npz cannot be used"):
        own.find(tmp_path, "text")
    np.savez(tmp_path / "part.npz", train_images=arrays()["train_images"])
    with pytest.raises(ConfigError, match=r"part.npz cannot be used"):
        own.find(tmp_path, "part")
    with pytest.raises(ConfigError, match=r"there is no txet.npz in .*; did you mean text\?"):
        own.find(tmp_path, "txet")
    with pytest.raises(ConfigError, match="tasks images"):
        leap_dist.train({"preset": "fast", "tasks": "images", "games": ["text"], "data_dir": str(tmp_path)})
