"""The published Omniglot code beside ours: which images it gets, and how the results are compared."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.published_omniglot import ARMS, IMAGES, PUBLISHED_SEED, _numbered, compare, main, prepare
from leap_dist.config.registry import ALPHABETS, partition
from leap_dist.datasets import omniglot
from leap_dist.evaluation.runs import RunResult, save


def test_the_published_shuffle_brings_the_alphabets_into_our_order() -> None:
    order = [f"alphabet{number}" for number in range(40)]
    folders = sorted(_numbered(order))
    random.Random(PUBLISHED_SEED).shuffle(folders)
    assert [folder.partition("-")[2] for folder in folders] == order


def test_the_published_code_gets_the_images_of_a_run_with_the_first_five_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    shapes = (rng.random((2, 20, 20, 28, 28)) < 0.1).astype(np.uint8) * 255
    drawn = omniglot.Omniglot({name: shapes[number % 2] for number, name in enumerate(ALPHABETS)})
    monkeypatch.setattr(omniglot, "find", lambda folder, resampling: drawn)
    prepare(tmp_path, seed=3, pretraining=1, out=tmp_path / "out")
    parts = json.loads((tmp_path / "out" / "alphabets.json").read_text())
    assert parts["training"] == list(partition(ALPHABETS, 1, 3).pretraining)
    (name,) = parts["training"]
    (folder,) = (tmp_path / "out" / IMAGES).glob(f"*-{name}")
    task = drawn.task(name, 3, first=True)
    for part, first in ((task.test, 0), (task.train, 5)):
        for character in range(20):
            for number, image in enumerate(part.images[part.labels == character, ..., 0], first):
                with Image.open(folder / f"character{character:02d}" / f"{number:02d}.png") as found:
                    assert np.array_equal(255 - np.asarray(found), image), "black ink on white paper"


def published(folder: Path, arm: str, errors: dict[str, float]) -> None:
    """Write logs in the published form: a line for each test, whose last field has the accuracies."""
    folder.joinpath("alphabets.json").write_text(json.dumps({"test": list(errors)}))
    logs = folder / "logs" / arm / "seed0"
    logs.mkdir(parents=True)
    for number, error in enumerate(errors.values()):
        for part, batches in (("train", 100), ("val", 5)):
            line = f"1,0.5,0.5,0.5,{'0.5;' * batches},{f'{1 - error:f};' * batches}\n"
            (logs / f"results_{number}_test_{part}.log").write_text("0,1,1,1,1;,0;\n" + line)


def own(folder: Path, arm: str, errors: dict[str, float]) -> None:
    """Write the runs of an evaluation."""
    for alphabet, error in errors.items():
        curve = ({"steps": 2000, "test_error": error},)
        errors_of_batches = np.full(100, error)
        save(folder, RunResult(arm, alphabet, 0, 2000, 1.0, np.arange(20, 2020, 20), errors_of_batches, curve), {})


@pytest.mark.parametrize("arm", ["leap", "ft", "no"])
def test_a_difference_is_paired_by_alphabet_and_given_in_its_standard_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arm: str
) -> None:
    (theirs := tmp_path / "theirs").mkdir()
    published(theirs, arm, {"greek": 0.1, "latin": 0.5})
    own(tmp_path / "ours", ARMS[arm], {"latin": 0.52, "greek": 0.14})  # differences of 2 and 4 points
    compare([theirs], [tmp_path / "ours"])
    lines = capsys.readouterr().out.splitlines()
    assert f"| {ARMS[arm]} | held-out images | 30.0 | 33.0 | +3.0 ± 1.0 (+3.0) |" in lines
    assert f"| {ARMS[arm]} | training batches 1 to 5 | 30.0 | 33.0 | +3.0 ± 1.0 (+3.0) |" in lines
    assert len(lines) == 2 + 7


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["run", "nowhere", "--images", "x", "--arm", "ft"], "nowhere is not a clone of the published repository"),
        (["prepare", "--data-dir", "nowhere", "--out", "x"], "data_dir: nowhere/omniglot is not a folder"),
        (["compare", "--theirs", "nowhere", "--ours", "x"], "nowhere/alphabets.json"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["published_omniglot", *given])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_comparison_of_nothing_is_refused(tmp_path: Path) -> None:
    (theirs := tmp_path / "theirs").mkdir()
    published(theirs, "leap", {"greek": 0.1})
    own(tmp_path / "ours", "none", {"greek": 0.1})
    with pytest.raises(ValueError, match="no arm has been tested by both"):
        compare([theirs], [tmp_path / "ours"])
    with pytest.raises(ValueError, match="--theirs has 1 folders and --ours 2"):
        compare([theirs], [tmp_path / "ours"] * 2)


def test_runs_that_cannot_be_paired_or_read_are_refused(tmp_path: Path) -> None:
    (theirs := tmp_path / "theirs").mkdir()
    published(theirs, "leap", {"greek": 0.1})
    own(tmp_path / "ours", "leap", {"greek": 0.1})
    path = tmp_path / "ours" / "runs" / "leap" / "greek" / "0.json"
    path.write_text(path.read_text().replace("0.1", "0.2", 1))
    with pytest.raises(ValueError, match="its checksum does not match"):
        compare([theirs], [tmp_path / "ours"])
    logs = theirs / "logs" / "leap"
    shutil.copytree(logs / "seed0", logs / "seed1")
    with pytest.raises(ValueError, match="has runs of several seeds; leave one"):
        compare([theirs], [tmp_path / "ours"])
