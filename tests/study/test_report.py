"""Reports of supervised tasks: of a study of several meta-learners, and of a plain evaluation."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from leap_dist.config.loading import ConfigError
from leap_dist.config.registry import DATA_SETS
from leap_dist.evaluation import statistics
from leap_dist.evaluation.early_stopping import History, Measurement
from leap_dist.evaluation.report import build as evaluation_report
from leap_dist.evaluation.report import figures as evaluation_figures
from leap_dist.evaluation.report.build import ERROR_COLUMNS
from leap_dist.evaluation.report.figures import draw_curves, panels
from leap_dist.evaluation.results import Difference, by_game, points_of
from leap_dist.evaluation.results import compute as compare
from leap_dist.evaluation.results import difference as difference_of
from leap_dist.evaluation.runs import RunResult, load_all, path_of, save
from leap_dist.evaluation.scoring import ERRORS, POINTS, Row
from leap_dist.storage import run_directory
from leap_dist.storage.ledger import PAGE_BYTES, Ledger
from leap_dist.study import figures, published, report
from leap_dist.study.results import Results, compute, curve_over_seeds, evolution, load_evolution, load_validation
from leap_dist.study.spec import ARMS, Study, evaluation_of, training_of
from leap_dist.testing import failpoints

FEW = 200
"""Bootstrap samples."""
OMNIGLOT = Study("omniglot", ("leap", "none"), ("4", "20"), (0, 1), {"leap": {"meta.learning_rate": 0.1}}, 6, 2, 8)
MULTI_CV = Study("multi-cv", ("leap", "finetune-multi", "none"), ("mnist", "svhn"), (0, 1), {}, 6, 2, 8)


def run(
    arm: str,
    game: str,
    seed: int = 0,
    test: float = 0.1,
    train: float = 0.05,
    errors: tuple[float, ...] = (1.0, 0.5, 0.5, 0.0),
    batch: int = 2,
) -> RunResult:
    """A trained classifier: the errors of its batches, and as trained."""
    ended = batch * np.arange(1, len(errors) + 1)
    last = {"steps": int(ended[-1]), "loss": 0.2, "error": errors[-1], "test_error": test, "test_loss": 0.3}
    curve = ({"steps": batch, "loss": 3.0, "error": errors[0]}, {**last, "train_error": train})
    return RunResult(arm, game, seed, int(ended[-1]), 1.5, ended, np.array(errors), curve)


def write(out: Path, runs: list[RunResult]) -> Path:
    for each in runs:
        save(out, each, {})
    return out


def omniglot(out: Path, study: Study = OMNIGLOT) -> Path:
    """Test errors in %: leap 1, 3 and 2, 6 on the alphabets of the seeds, twice that with 20; none 10 more each."""
    study.write(out)
    for group in study.groups:
        factor = 2 if group == "20" else 1
        for seed in study.seeds:
            games = (("greek", 1), ("latin", 3)) if seed == 0 else (("korean", 2), ("latin", 6))
            runs = [
                run(arm, game, seed, (factor * percent + more) / 100)
                for arm, more in (("leap", 0), ("none", 10))
                if arm in study.arms
                for game, percent in games
            ]
            write(evaluation_of(out, group, seed), runs)
    return out


def multi_cv(out: Path) -> Path:
    MULTI_CV.write(out)
    for seed in MULTI_CV.seeds:
        for group, level in (("mnist", 1), ("svhn", 10)):
            runs = [
                run(arm, group, seed, level * (place + 1 + seed) / 100, level / 1000)
                for place, arm in enumerate(MULTI_CV.arms)
            ]
            write(evaluation_of(out, group, seed), runs)
    return out


def line(version: int, losses: tuple[float, ...], steps: int = 8, updates: int = 4, **more: Any) -> dict[str, Any]:
    """Of a ledger, about a task that has ended."""
    points = len(losses)
    return {
        **dict.fromkeys(("task", "seq", "staleness", "total_steps"), 1),
        **dict.fromkeys(("weight", "norm", "clip", "update_norm", "agreement"), 1.0),
        "version_before": version,
        "version_after": version + 1,
        "game": "greek",
        "lease": "000001-00000000",
        "final": True,
        "steps": steps,
        "updates": updates,
        "path": dict.fromkeys(("energy", "length", "loss_term_norm", "path_term_norm", "cosine"), 1.0),
        "curve": [
            {"steps": steps * (place + 1) // points, "episodes": 2, "score": 0.5, "means": {"loss": loss, "error": 0.5}}
            for place, loss in enumerate(losses)
        ],
        **more,
    }


def meta_trained(out: Path, group: str, seed: int, lines: list[dict[str, Any]]) -> Path:
    folder = training_of(out, group, seed, "leap")
    folder.mkdir(parents=True)
    Ledger(folder / "ledger.jsonl").append(0, lines)
    return folder / "ledger.jsonl"


def tables(out: Path, name: str = "table.md") -> dict[str, list[list[str]]]:
    """By heading: the rows of the table below it, the first being its header."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for text in (out / name).read_text().splitlines():
        if text.startswith("#"):
            heading = text.lstrip("# ")
        elif text.startswith("| ") and "---" not in text:
            found.setdefault(heading, []).append([cell.strip() for cell in text.strip("|").split(" | ")])
    return found


def results_json(out: Path) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    data: dict[str, Any] = json.loads((out / "results.json").read_text(), parse_constant=refuse)
    return data


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def results_of(out: Path, study: Study = OMNIGLOT, **more: Any) -> Results:
    rows, warnings = report.load(out, study)
    return compute(study, rows, warnings=tuple(warnings), repetitions=FEW, **more)


def scored(run: RunResult, group: str = "", seed: int | None = None) -> Row:
    (row,), warnings = ERRORS.score_all([run], group, seed)
    assert warnings == []
    return row


def difference(ours: list[Row], theirs: list[Row]) -> Difference:
    return difference_of(ours, theirs, ERRORS, lambda row: row.seed, by_game, FEW)


@pytest.fixture
def one_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip rendering, which takes most of the time of a report, in tests that are not about pictures."""
    for module in (figures, evaluation_figures):
        monkeypatch.setattr(module, "png", lambda figure: b"one pixel")


# Scores -----------------------------------------------------------------------------------------------------------


def test_the_area_is_the_authors():
    def area_under(curve: np.ndarray) -> float:
        return sum((x + y) / 2 for x, y in itertools.pairwise(curve.tolist())) / len(curve)

    assert statistics.trapezoids(np.array([1.0, 0.5, 0.5, 0.0])) == (0.75 + 0.5 + 0.25) / 4
    assert math.isnan(statistics.trapezoids(np.array([])))
    for points in (1, 2, 3, 100):
        curve = np.random.default_rng(points).random(points)
        assert statistics.trapezoids(curve) == pytest.approx(area_under(curve), abs=1e-15)


def test_a_run_is_measured_by_hand():
    found = scored(run("leap", "greek", 3, 0.25, 0.125), "20", 1)
    assert (found.group, found.seed, found.run.seed, found.run.arm, found.run.game) == ("20", 1, 3, "leap", "greek")
    assert (*found.values.values(), found.test_loss) == (0.25, 0.125, 0.375, 0.3)
    np.testing.assert_array_equal(found.curve.at, [2, 4, 6, 8])
    np.testing.assert_array_equal(found.curve.values, [1, 0.5, 0.5, 0])
    assert scored(run("leap", "greek", 3)).seed == 3


@pytest.mark.parametrize(
    "wrong",
    [
        RunResult("a", "pong", 0, 9, 1.0, np.array([3]), np.array([1.0]), ()),
        RunResult("a", "pong", 0, 9, 1.0, np.array([3]), np.array([1.0]), ({"steps": 3, "loss": 1.0},)),
        run("a", "greek", test=math.nan),
        run("a", "greek", train=1.5),
        run("a", "greek", errors=(21.0,)),
        run("a", "greek", errors=(-1.0,)),
        run("a", "greek", batch=0),
        RunResult("a", "greek", 0, 9, 1.0, np.array([]), np.array([]), run("a", "greek").curve),
    ],
)
def test_what_is_no_trained_classifier_is_left_out_by_name(wrong: RunResult):
    rows, warnings = ERRORS.score_all([run("a", "latin"), wrong])
    assert [row.run.game for row in rows] == ["latin"]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"left out: a/{wrong.game}/0 has no ")


def test_a_diverged_loss_is_no_reason_to_leave_a_run_out():
    diverged = run("leap", "greek")
    diverged.curve[-1]["test_loss"] = math.nan
    assert math.isnan(scored(diverged).test_loss)


def test_stretches_of_a_curve_are_even_or_grow_and_keep_every_batch():
    short = scored(run("a", "greek", errors=tuple(np.linspace(1, 0, 120)))).curve
    assert (len(short.at), short.logarithmic, short.end) == (POINTS, False, 240)
    assert short.values[0] == pytest.approx(np.linspace(1, 0, 120)[:2].mean())
    errors = np.linspace(1, 0, 5000)
    long = scored(run("a", "greek", errors=tuple(errors))).curve
    assert long.logarithmic
    assert len(long.at) == POINTS
    lengths = np.diff(np.concatenate([[1], long.at]))  # examples from one stretch's middle to the next
    assert 10 < lengths[1] < 40
    assert (np.diff(lengths) > -3).all()  # they grow, but for rounding to whole batches
    assert lengths[-1] > 10 * lengths[1]
    assert 9000 < long.at[-1] < long.end == 10_000
    assert long.values[-1] == pytest.approx(1 - (long.at[-1] / 2 - 1) / 4999)


def test_a_run_that_ended_early_keeps_its_last_error():
    both = [scored(run("a", "greek", errors=e)) for e in ((1.0, 0.2), (1.0, 0.6, 0.6, 0.4))]
    points = points_of(both, ERRORS)
    assert (points.at[0], points.at[-1], len(points.at)) == (2, 8, POINTS)
    assert both[0].at(points)[-1] == 0.2
    assert compare(both, ERRORS, repetitions=FEW).cells["greek"]["a"].curve.point[-1] == pytest.approx(0.3)


def test_a_curve_over_seeds_has_their_deviation():
    runs = [run("a", "greek", 0, errors=(1.0, 0.2)), run("a", "latin", 0, errors=(1.0, 0.4))]
    runs += [run("a", "greek", 1, errors=(1.0, 0.5))]
    outcomes = [scored(each) for each in runs]
    band = curve_over_seeds(outcomes, points_of(outcomes, ERRORS))
    assert band.point[-1] == pytest.approx((0.3 + 0.5) / 2)  # a seed's value is its tasks' mean
    assert band.high[-1] - band.point[-1] == pytest.approx(math.sqrt(0.02))
    alone = curve_over_seeds(outcomes[:2], points_of(outcomes, ERRORS))
    np.testing.assert_array_equal(alone.low, alone.high)


# The paper's numbers ----------------------------------------------------------------------------------------------


def test_published_numbers_are_the_papers():
    assert set(published.OMNIGLOT) == set(ARMS)
    assert len(published.PRETRAINING) == 16
    for arm, errors in {  # of 4, 10, 20 and 30 tasks
        "leap": [4.0, 2.8, 2.6, 2.1],
        "finetune-multi": [4.7, 4.0, 3.9, 3.6],
        "reptile": [7.2, 5.7, 4.7, 4.6],
        "fomaml": [8.6, 9.2, 9.4, 8.7],
        "finetune-single": [10.9, 13.7, 21.6, 43.6],
        "none": [17.9, 16.1, 16.6, 16.1],
    }.items():
        assert [published.OMNIGLOT[arm][tasks] for tasks in ("4", "10", "20", "30")] == errors
    assert published.OMNIGLOT["leap"]["1"] == 8.7
    assert published.OMNIGLOT["fomaml"]["16"] == 9.1
    assert set(published.MULTI_CV) == set(DATA_SETS)
    assert published.MULTI_CV["facescrub"]["finetune-multi"] == (32.7, 0.0, 13.2)
    assert published.MULTI_CV["cifar100"]["leap"] == (52.0, 30.5, 43.4)
    assert published.MULTI_CV["gtsrb"]["none"] == (3.6, 0.0, 2.4)
    for errors in (published.OMNIGLOT, *published.MULTI_CV.values()):
        assert errors["multitask"] == errors["finetune-multi"], "the authors' finetuning is joint"


# study.json -------------------------------------------------------------------------------------------------------


def test_a_study_is_read_as_it_was_written(tmp_path: Path):
    for study in (OMNIGLOT, MULTI_CV):
        study.write(tmp_path / "new/folder")
        assert Study.read(tmp_path / "new/folder") == study


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": 2}, "newer"),
        ({"format": "1"}, "study.format"),
        ({"tasks": "images"}, "images"),
        ({"arms": ["leap", "adam"]}, "adam"),
        ({"arms": ["leap", "leap"]}, "twice"),
        ({"arms": []}, "missing"),
        ({"groups": ["../x"]}, "not a group"),
        ({"groups": ["4", "04"]}, "not a group"),
        ({"groups": [4]}, "wrong type"),
        ({"seeds": [-1]}, "out of range"),
        ({"seeds": [True]}, "bool"),
        ({"settings": {"sgd": {}}}, "sgd"),
        ({"settings": {"leap": 0.1}}, "wrong type"),
        ({"meta_updates": 0}, "out of range"),
        ({"task_steps": 2**70}, "too large"),
    ],
)
def test_what_is_no_study_is_refused_on_one_line(tmp_path: Path, change: dict[str, Any], why: str):
    OMNIGLOT.write(tmp_path)
    content = json.loads((tmp_path / "study.json").read_text())
    (tmp_path / "study.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ConfigError, match=why) as caught:
        Study.read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', "null"])
@pytest.mark.usefixtures("one_pixel")
def test_a_damaged_file_is_refused_on_one_line(tmp_path: Path, text: str):
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(ConfigError, match=r"study\.json is not the file of a study, or is damaged") as caught:
        report.build(tmp_path)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]


def test_a_study_that_would_be_refused_is_not_written(tmp_path: Path):
    with pytest.raises(ValueError, match="not a group"):
        Study("multi-cv", ("leap",), ("4",), (0,), {}, 1, 1, 1).write(tmp_path)
    assert list(tmp_path.iterdir()) == []


# Omniglot ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_pixel")
def test_tables_of_omniglot_by_hand(tmp_path: Path):
    """Leap with 4 alphabets: seeds' means 2 and 4, so 3 ± √2; with 20 twice that."""
    meta_trained(omniglot(tmp_path), "20", 0, [line(0, (3.0, 1.0))])
    assert report.build(tmp_path, FEW) == []
    found = tables(tmp_path)
    assert found["Test error (%)"] == [
        ["arm", "4", "20"],
        ["leap", "3.00 ± 1.41 (4)", "6.00 ± 2.83 (4)"],
        ["none", "13.00 ± 1.41 (4)", "16.00 ± 2.83 (4)"],
    ]
    assert found["Area under the training-error curve (0–100)"][1] == ["leap", *["37.50 ± 0.00 (4)"] * 2]
    assert found["Test error (%) beside the paper"] == [
        ["arm", "4: here", "4: paper", "20: here", "20: paper"],
        ["leap", "3.00 ± 1.41", "4.0", "6.00 ± 2.83", "2.6"],
        ["none", "13.00 ± 1.41", "17.9", "16.00 ± 2.83", "16.6"],
    ]
    assert found["Error on the training images (%) beside the paper"][1] == [
        "leap",
        *("5.00 ± 0.00", "4.0"),
        *("5.00 ± 0.00", "2.6"),
    ]
    assert found["leap minus another arm"][1] == ["4", "none", "-10.00", "+0.00", "+0.00", "2 of 2", "4"]
    assert found["Settings of each arm"][1] == ["leap", "meta.learning_rate 0.1"]
    assert "6 meta-updates of 2 tasks, 8 examples each; seeds 0, 1." in (tmp_path / "table.md").read_text()


@pytest.mark.usefixtures("one_pixel")
def test_validation_errors_of_each_run_are_shown_at_their_meta_updates(tmp_path: Path):
    omniglot(tmp_path)
    measured(tmp_path, 0, {2: 0.5, 4: 0.3}, "done")
    measured(tmp_path, 1, {2: 0.4}, "done")
    damaged = training_of(tmp_path, "20", 0, "leap")
    damaged.mkdir(parents=True)
    (damaged / "validation.json").write_text("{")
    warnings = report.build(tmp_path, FEW)
    assert [warning for warning in warnings if "validation errors are left out" in warning]
    heading = "Error on the validation alphabets during meta-training (%)"
    assert tables(tmp_path)[heading] == [["arm", "2", "4"], ["leap", "45.0 (2)", "35.0 (2)"]]
    assert "With 4 pretraining alphabets" in (tmp_path / "table.md").read_text()
    assert results_json(tmp_path)["validation"] == {"4": {"leap": {"2": [0.5, 0.4], "4": [0.3, 0.4]}}}
    assert (tmp_path / "figures" / "validation.png").exists()


def measured(out: Path, seed: int, errors: dict[int, float], state: str) -> None:
    """Write the validation errors of a run of leap with 4 alphabets, which is in this state."""
    folder = training_of(out, "4", seed, "leap")
    folder.mkdir(parents=True)
    (folder / "init.safetensors").write_bytes(b"")
    history = History([])
    for meta_updates, error in errors.items():
        history.add(folder, Measurement(meta_updates, error))
    run_directory.write_summary(folder, {"state": state, "tasks_wanted": 100})


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        # The second run was stopped after one measurement; without its error, the mean would jump from 0.4 to 0.5.
        ([({2: 0.6, 4: 0.5, 6: 0.5}, "done"), ({2: 0.2}, "done")], {2: [0.6, 0.2], 4: [0.5, 0.2], 6: [0.5, 0.2]}),
        ([({2: 0.6, 4: 0.5}, "done"), ({2: 0.2}, "running")], {2: [0.6], 4: [0.5]}),
        ([({2: 0.6, 4: 0.5}, "died"), ({2: 0.2}, "running")], {2: [0.6, 0.2]}),
    ],
)
def test_all_points_of_a_validation_curve_have_the_same_seeds(tmp_path: Path, runs, expected):
    OMNIGLOT.write(tmp_path)
    for seed, (errors, state) in enumerate(runs):
        measured(tmp_path, seed, errors, state)
    assert load_validation(tmp_path, OMNIGLOT) == ({"4": {"leap": expected}}, [])


def test_training_curves_of_a_long_run_go_to_its_end(tmp_path: Path):
    """A ledger of more than one page."""
    many = [line(version, (3.0, 1.0)) for version in range(2500)]
    meta_trained(omniglot(tmp_path), "20", 0, many)
    assert training_of(tmp_path, "20", 0, "leap").joinpath("ledger.jsonl").stat().st_size > PAGE_BYTES
    found, _ = load_evolution(tmp_path, OMNIGLOT)
    assert found is not None
    assert (found.tasks, found.stretches[-1].last) == (2500, 2500)


@pytest.mark.usefixtures("one_pixel")
def test_the_picture_of_validation_errors_has_their_means():
    found = {"4": {"leap": {2: [0.5, 0.3], 4: [0.3, 0.3]}}, "20": {"leap": {2: [0.2]}, "none": {}}}
    results = compute(OMNIGLOT, [], validation=found)
    left, right = figures.error_during_meta_training(results).axes
    (drawn,) = left.lines
    assert list(drawn.get_xdata()) == [2, 4]
    assert list(drawn.get_ydata()) == pytest.approx([40, 30])
    assert right.get_title() == "validation alphabets, 20 pretraining alphabets"


@pytest.mark.usefixtures("one_pixel")
def test_csv_and_json_have_every_number(tmp_path: Path):
    omniglot(tmp_path)
    report.build(tmp_path, FEW)
    found = rows(tmp_path)
    assert tuple(found[0]) == tuple(report.COLUMNS)
    assert len(found) == 16
    assert [found[1][name] for name in report.COLUMNS] == [
        *("4", "0", "leap", "latin", "0.03", "0.05", "0.375", "0.3", "1.5"),
    ]
    assert [row["group"] for row in found] == ["4"] * 8 + ["20"] * 8
    data = results_json(tmp_path)
    value = data["cells"]["4"]["leap"]["values"]["test_error"]
    assert value["over_seeds"]["by_seed"] == {"0": 0.02, "1": 0.04}
    assert value["over_seeds"]["deviation"] == pytest.approx(math.sqrt(2) / 100)
    # The counts of greek, korean and latin in a resample, by the alphabets of each seed; both seeds have latin.
    drawn = np.random.default_rng(statistics.SEED).multinomial(3, [1 / 3] * 3, FEW)
    of_seeds = [(drawn[:, [0, 2]], [0.01, 0.03]), (drawn[:, [1, 2]], [0.02, 0.06])]
    means = [
        np.mean([np.average(errors, weights=counts[i] if counts[i].any() else None) for counts, errors in of_seeds])
        for i in range(FEW)
    ]
    expected = {"point": 0.03, **dict(zip(("low", "high"), np.percentile(means, (2.5, 97.5)), strict=True))}
    assert value["interval"] == pytest.approx(expected)
    assert data["study"]["arms"] == ["leap", "none"]
    assert data["bootstrap"] == {"repetitions": FEW, "level": 0.95, "seed": statistics.SEED}


def outcome(arm: str, seed: int, game: str, error: float) -> Row:
    return scored(run(arm, game, seed, error), "4", seed)


def test_differences_are_of_pairs_alone():
    ours = [outcome("leap", 0, "greek", 0.1), outcome("leap", 0, "latin", 0.2), outcome("leap", 1, "greek", 0.3)]
    theirs = [outcome("none", 1, "greek", 0.2), outcome("none", 0, "greek", 0.5), outcome("none", 1, "korean", 0.9)]
    found = difference(ours, theirs)
    assert found.pairs == 2
    assert found.by_seed == pytest.approx({0: -0.4, 1: 0.1})
    assert found.intervals["test_error"] == pytest.approx((-0.15, -0.15, -0.15))  # one pair per seed: no width
    assert difference(ours, theirs[2:]) == Difference({}, {}, 0, 0)


def test_a_seed_with_the_same_alphabets_makes_no_interval_narrower():
    """It adds no alphabet, so it tells nothing more about how results vary with the alphabet."""
    games, errors = ("greek", "latin", "korean", "braille"), (0.1, 0.3, 0.2, 0.7)
    ours, theirs = (
        [outcome(arm, seed, *one) for seed in (0, 1) for one in zip(games, errors_of, strict=True)]
        for arm, errors_of in (("leap", errors), ("none", (0.2,) * 4))
    )
    one, both = (difference(ours[:count], theirs[:count]).intervals["test_error"] for count in (4, 8))
    assert one.low < one.high
    assert both == pytest.approx(one)


def test_an_interval_tells_noise_from_effect():
    noise = np.random.default_rng(0).normal(0, 0.02, 10)
    ours = [outcome("leap", 0, f"a{place}", 0.3) for place in range(10)]
    close = [outcome("none", 0, f"a{place}", 0.3 + more - noise.mean()) for place, more in enumerate(noise)]
    worse = [outcome("none", 0, f"a{place}", 0.35 + more) for place, more in enumerate(noise)]
    intervals = [difference(ours, theirs).intervals for theirs in (close, worse)]
    assert intervals[0]["test_error"].low < 0 < intervals[0]["test_error"].high
    assert intervals[1]["test_error"].high < 0


@pytest.mark.usefixtures("one_pixel")
def test_one_seed_has_no_deviation_and_says_so(tmp_path: Path):
    study = Study("omniglot", ("leap",), ("4",), (1,), {}, 6, 2, 8)
    warnings = report.build(omniglot(tmp_path, study), FEW)
    assert any("only one seed" in warning for warning in warnings)
    assert tables(tmp_path)["Test error (%)"][1] == ["leap", "4.00 (2)"]
    assert "leap minus another arm" not in tables(tmp_path)
    assert results_json(tmp_path)["cells"]["4"]["leap"]["values"]["auc"]["over_seeds"]["deviation"] is None


@pytest.mark.usefixtures("one_pixel")
def test_a_group_that_the_paper_has_not_is_not_beside_it(tmp_path: Path):
    study = Study("omniglot", ("leap", "none"), ("3", "4"), (0, 1), {}, 6, 2, 8)
    report.build(omniglot(tmp_path, study), FEW)
    assert tables(tmp_path)["Test error (%) beside the paper"][0] == ["arm", "4: here", "4: paper"]
    study = Study("omniglot", ("leap", "none"), ("3",), (0, 1), {}, 6, 2, 8)
    report.build(omniglot(tmp_path / "b", study), FEW)
    assert "Test error (%) beside the paper" not in tables(tmp_path / "b")


@pytest.mark.usefixtures("one_pixel")
def test_without_leap_nothing_is_compared_with_it(tmp_path: Path):
    study = Study("omniglot", ("reptile", "none"), ("4",), (0, 1), {}, 6, 2, 8)
    assert "2 of 4 initializations have no test runs yet" in report.build(omniglot(tmp_path, study), FEW)[0]
    assert "leap minus another arm" not in tables(tmp_path)


# A study in progress ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_pixel")
def test_what_is_missing_is_named_and_the_rest_shown(tmp_path: Path):
    omniglot(tmp_path)
    damaged = path_of(evaluation_of(tmp_path, "4", 0), "leap", "greek", 0)
    damaged.write_text("{")
    for game in ("korean", "latin"):
        path_of(evaluation_of(tmp_path, "20", 1), "none", game, 1).unlink()
    write(evaluation_of(tmp_path, "4", 1), [run("reptile", "latin", 1)])
    (evaluation_of(tmp_path, "20", 0) / "arms.json").write_text("[")
    warnings = report.build(tmp_path, FEW)
    assert [warning.split(": ")[:2] for warning in warnings] == [
        ["4/seed0/test", "left out"],
        ["4/seed1/test", "left out, because the study does not name them"],
        ["20/seed0/test", "arms.json is left out"],
        ["no meta-update of leap yet", "how its training curves evolve is not shown"],
        ["1 of 8 initializations have no test runs yet", "20/seed1 none"],
        ["runs missing for some held-out alphabets, so that means cover fewer of them", "4/seed0/leap greek"],
    ]
    found = tables(tmp_path)["Test error (%)"]
    assert found[1:] == [["leap", "3.50 ± 0.71 (3)", "6.00 ± 2.83 (4)"], ["none", "13.00 ± 1.41 (4)", "14.00 (2)"]]
    assert all(f"- {warning}" in (tmp_path / "table.md").read_text() for warning in warnings[4:])
    assert results_json(tmp_path)["warnings"] == warnings
    assert len(rows(tmp_path)) == 13


@pytest.mark.usefixtures("one_pixel")
def test_a_group_without_any_run_has_no_numbers(tmp_path: Path):
    study = Study("omniglot", ("leap", "none"), ("4", "10", "20"), (0, 1), {}, 6, 2, 8)
    omniglot(tmp_path)
    study.write(tmp_path)
    warnings = report.build(tmp_path, FEW)
    assert warnings[-1] == ("4 of 12 initializations have no test runs yet: 10/seed0 all arms; 10/seed1 all arms")
    assert [row[2] for row in tables(tmp_path)["Test error (%)"]] == ["10", "–", "–"]


@pytest.mark.usefixtures("one_pixel")
def test_a_study_that_has_only_been_trained_shows_that(tmp_path: Path):
    OMNIGLOT.write(tmp_path)
    meta_trained(tmp_path, "4", 1, [line(0, (3.0, 1.0)), line(1, (2.0, 0.5))])
    report.build(tmp_path, FEW)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"figure3.png"}
    assert tables(tmp_path)["Test error (%)"][1] == ["leap", "–", "–"]
    assert rows(tmp_path) == []
    assert results_json(tmp_path)["evolution"]["group"] == "4"


@pytest.mark.usefixtures("one_pixel")
def test_without_anything_there_is_no_report(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no study"):
        report.build(tmp_path / "nothing")
    OMNIGLOT.write(tmp_path)
    with pytest.raises(ConfigError, match="no results of the study"):
        report.build(tmp_path)
    write(evaluation_of(tmp_path, "4", 0), [run("leap", "greek")])
    path_of(evaluation_of(tmp_path, "4", 0), "leap", "greek", 0).write_text("{")
    with pytest.raises(ConfigError, match=r"no results of the study .*leap/greek/0\.json") as caught:
        report.build(tmp_path)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"study.json", "4"}


@pytest.mark.usefixtures("one_pixel")
def test_a_full_disk_leaves_the_old_report(tmp_path: Path):
    report.build(omniglot(tmp_path), FEW)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    write(evaluation_of(tmp_path, "4", 0), [run("leap", "futurama")])
    failpoints.arm("study-report.written=full@4")
    try:
        with pytest.raises(OSError, match="No space left"):
            report.build(tmp_path, FEW)
    finally:
        failpoints.arm("")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_the_same_runs_give_the_same_report(tmp_path: Path):
    for name in ("a", "b"):
        report.build(omniglot(tmp_path / name), FEW)
    report.build(tmp_path / "b", FEW)
    for name in ("table.md", "results.csv", "results.json", "figures/figure3.png", "figures/test_error.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


# Multi-CV ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_pixel")
def test_the_table_of_multi_cv_by_hand(tmp_path: Path):
    assert report.build(multi_cv(tmp_path), FEW) == []
    header, *found = tables(tmp_path)["Test error, train error and area under the training-error curve"]
    assert header == ["held out", "arm", "test %", "paper", "train %", "paper", "AUC", "paper", "runs"]
    none = "± 0.00"
    assert found[0] == ["mnist", "leap", "1.50 ± 0.71", "0.7", f"0.10 {none}", "0.1", f"37.50 {none}", "0.6", "2"]
    assert found[5] == ["svhn", "none", "35.00 ± 7.07", "10.3", f"1.00 {none}", "6.9", f"37.50 {none}", "11.5", "2"]
    assert len(found) == 6
    compared = [row[:3] + row[5:] for row in tables(tmp_path)["leap minus another arm"][1:]]
    assert compared == [
        ["mnist", "finetune-multi", "-1.00", "2 of 2", "2"],
        ["mnist", "none", "-2.00", "2 of 2", "2"],
        ["svhn", "finetune-multi", "-10.00", "2 of 2", "2"],
        ["svhn", "none", "-20.00", "2 of 2", "2"],
        ["all of them", "finetune-multi", "-5.50", "2 of 2", "4"],
        ["all of them", "none", "-11.00", "2 of 2", "4"],
    ]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"curves.png"}


@pytest.mark.usefixtures("one_pixel")
def test_what_was_not_held_out_does_not_count(tmp_path: Path):
    multi_cv(tmp_path)
    write(evaluation_of(tmp_path, "mnist", 0), [run("leap", "svhn")])
    assert report.build(tmp_path, FEW) == ["mnist/seed0/test: left out, because they were not held out: svhn"]
    assert results_json(tmp_path)["cells"]["mnist"]["leap"]["runs"] == 2


def test_seeds_are_resampled_within_a_data_set(tmp_path: Path):
    multi_cv(tmp_path)
    found = results_of(tmp_path, MULTI_CV).cells["svhn"]["leap"].values["test_error"]
    rng = np.random.default_rng(statistics.SEED)
    assert found.interval == statistics.interval(statistics.mean, [np.array([0.1, 0.2])], rng, FEW)
    assert found.interval.low < found.interval.high


# Meta-training ----------------------------------------------------------------------------------------------------


def test_training_curves_are_means_over_the_tasks_of_a_stretch():
    lines = [line(0, (4.0, 2.0)), line(0, (2.0, 1.0)), line(1, (1.0, 0.5)), line(2, (0.5, 0.25)), line(3, (0.3, 0.1))]
    found = evolution([*lines, line(9, (9.0,), final=False)], "20", stretches=2)
    assert found is not None
    assert (found.group, found.tasks) == ("20", 5)
    first, second = found.stretches
    assert (first.first, first.last, second.first, second.last) == (1, 2, 3, 4)
    np.testing.assert_allclose(first.loss, [7 / 3, 3.5 / 3])
    np.testing.assert_allclose(second.loss, [0.4, 0.175])
    np.testing.assert_array_equal(first.updates, [1, 3])  # 4 updates: the means of the first and of the last two


def test_stretches_cover_every_meta_update_once():
    found = evolution([line(version, (1.0 + version,)) for version in range(7)], "4", stretches=3)
    assert found is not None
    assert [(s.first, s.last) for s in found.stretches] == [(1, 3), (4, 5), (6, 7)]
    assert [float(s.loss[0]) for s in found.stretches] == [2.0, 4.5, 6.5]
    few = evolution([line(0, (1.0,)), line(1, (2.0,))], "4", stretches=12)
    assert few is not None
    assert [(s.first, s.last) for s in few.stretches] == [(1, 1), (2, 2)]


def test_a_task_that_ended_early_counts_as_far_as_it_went():
    found = evolution([line(0, (4.0, 2.0, 1.0, 1.0)), line(0, (2.0, 0.0), steps=4, updates=2)], "4")
    assert found is not None
    np.testing.assert_allclose(found.stretches[0].loss, [3.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    "useless",
    [
        line(0, ()),
        line(0, (math.nan,)),
        line(0, (1.0,), updates=0),
        line(0, (1.0,), updates="4"),
        line(0, (1.0,), curve=[{"steps": 1, "episodes": 0, "score": None, "means": {"entropy": 1.0}}]),
    ],
)
def test_lines_that_say_too_little_are_passed_over(useless: dict[str, Any]):
    assert evolution([useless], "4") is None
    found = evolution([useless, line(0, (1.0,))], "4")
    assert found is not None
    assert found.tasks == 1


def test_the_largest_group_that_was_trained_is_shown_over_all_seeds(tmp_path: Path):
    omniglot(tmp_path)
    meta_trained(tmp_path, "4", 0, [line(0, (9.0,))])
    assert load_evolution(tmp_path, OMNIGLOT)[0] == evolution([line(0, (9.0,))], "4")
    meta_trained(tmp_path, "20", 0, [line(0, (2.0,))])
    ledger = meta_trained(tmp_path, "20", 1, [line(0, (4.0,))])
    with ledger.open("a") as file:
        file.write("{damaged\n")
    found, warnings = load_evolution(tmp_path, OMNIGLOT)
    assert found is not None
    assert (found.group, found.tasks, float(found.stretches[0].loss[0])) == ("20", 2, 3.0)
    assert warnings == []
    ledger.unlink()
    ledger.mkdir()
    found, warnings = load_evolution(tmp_path, OMNIGLOT)
    assert found is not None
    assert found.tasks == 1
    assert warnings[0].startswith("20/seed1/leap/ledger.jsonl is left out")


# Pictures ---------------------------------------------------------------------------------------------------------


def texts(figure: Figure) -> set[str]:
    return {text.get_text() for text in figure.findobj(Text)}


def test_figure_3_has_the_papers_panels(tmp_path: Path):
    lines = [line(version, (3.0 / (1 + version), 1.0 / (1 + version))) for version in range(4)]
    results = results_of(omniglot(tmp_path), evolution=evolution(lines, "20"))
    figure = figures.figure3(results)
    left, right, bar = figure.axes
    assert (left.get_xlabel(), left.get_ylabel(), bar.get_ylabel()) == ("inner step", "training loss", "meta-update")
    assert "20 alphabets" in left.get_title()
    for version, drawn in enumerate(left.lines):
        np.testing.assert_allclose(drawn.get_ydata(), [3.0 / (1 + version), 1.0 / (1 + version)])
    colours = [to_rgb(drawn.get_color()) for drawn in left.lines]
    assert colours[0][2] > 0.5 > colours[0][0]  # blue at the beginning
    assert colours[-1][0] > 0.5 > colours[-1][2]  # red at the end
    reds = [red for red, _, _ in colours]
    assert len(reds) == 4
    assert reds == sorted(reds)
    assert [drawn.get_ydata().tolist() for drawn in right.lines] == [[37.5, 37.5]] * 2
    assert [drawn.get_xdata().tolist() for drawn in right.lines] == [[4, 20]] * 2
    assert len(right.collections) == 2
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["leap", "none"]


def test_figure_3_without_meta_training_says_so(tmp_path: Path):
    assert "no meta-update of leap yet" in texts(figures.figure3(results_of(omniglot(tmp_path))))


def test_errors_are_drawn_beside_the_papers(tmp_path: Path):
    (axes,) = figures.error_by_pretraining(results_of(omniglot(tmp_path))).axes
    papers, ours = axes.lines[:2], axes.lines[2:]
    assert papers[0].get_ydata().tolist() == list(published.OMNIGLOT["leap"].values())
    assert papers[0].get_xdata().tolist() == [1, *range(2, 31, 2)]
    assert papers[0].get_linestyle() == "--"
    assert papers[0].get_color() == ours[0].get_color()
    np.testing.assert_allclose(ours[0].get_ydata(), [3, 6])
    np.testing.assert_allclose(ours[1].get_ydata(), [13, 16])
    shading = axes.collections[0].get_paths()[0].vertices
    assert shading[:, 1].min() == pytest.approx(3 - math.sqrt(2))
    assert shading[:, 1].max() == pytest.approx(6 + math.sqrt(8))
    assert axes.get_yscale() == "log"


def test_an_error_of_zero_is_drawn_too(tmp_path: Path):
    study = Study("omniglot", ("leap",), ("4",), (0,), {}, 6, 2, 8)
    study.write(tmp_path)
    write(evaluation_of(tmp_path, "4", 0), [run("leap", "greek", test=0.0)])
    (axes,) = figures.error_by_pretraining(results_of(tmp_path, study)).axes
    assert axes.lines[-1].get_ydata().tolist() == [0]
    assert axes.get_yscale() == "linear"
    assert axes.get_ylim()[0] <= 0


def test_meta_learners_look_the_same_everywhere_and_are_told_apart_without_colours():
    looks = [figures.style_of_arm(arm) for arm in ARMS]
    assert len({look["color"] for look in looks}) == len(ARMS)
    assert len({str(look["linestyle"]) for look in looks[:5]}) == 5
    assert len({figures._marked(arm)["marker"] for arm in ARMS}) == len(ARMS)


def test_curves_have_a_panel_per_group(tmp_path: Path):
    results = results_of(multi_cv(tmp_path), MULTI_CV)
    figure = draw_curves(figures.panels(results), figures.styles(results), ERRORS.metric)
    assert [axes.get_title() for axes in figure.axes] == ["held out: mnist", "held out: svhn"]
    for axes in figure.axes:
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("examples", "training error (%)")
        assert [to_hex(drawn.get_color()) for drawn in axes.lines] == [
            to_hex(figures.style_of_arm(arm)["color"]) for arm in MULTI_CV.arms
        ]
        assert (axes.lines[0].get_ydata()[0], axes.lines[0].get_ydata()[-1]) == (100, 0)


def test_long_curves_are_over_a_logarithm():
    errors = tuple(np.linspace(1, 0, 3000))
    outcomes = [scored(run("leap", "mnist", seed, errors=errors)) for seed in (0, 1)]
    points = points_of(outcomes, ERRORS)
    panel = figures.Panel("mnist", "training error (%)", points, {"leap": curve_over_seeds(outcomes, points)})
    (axes,) = draw_curves([panel], {"leap": figures.style_of_arm("leap")}, ERRORS.metric).axes
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "examples (log scale)"
    assert axes.get_xlim()[1] == pytest.approx(6000)


@pytest.mark.parametrize("build", [omniglot, multi_cv])
def test_pictures_are_whole_pngs(tmp_path: Path, build: Any):
    report.build(build(tmp_path), FEW)
    pictures = list((tmp_path / "figures").iterdir())
    text = (tmp_path / "table.md").read_text()
    assert len(pictures) == text.count("](figures/")
    for path in pictures:
        assert f"](figures/{path.name})" in text
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            image.load()
            assert image.format == "PNG"
            pixels = np.asarray(image.convert("RGB")).astype(int)
        assert int((pixels.max(axis=2) - pixels.min(axis=2) > 60).sum()) > 50  # coloured


# A plain evaluation -----------------------------------------------------------------------------------------------


def evaluate(out: Path, repetitions: int) -> list[str]:
    return evaluation_report.build(out, ERRORS, repetitions)


def evaluated(out: Path) -> Path:
    """Test errors in %: mine 10 and 30 on greek, 20 and 20 on latin; from scratch 5 more each."""
    levels = (("greek", (10, 30)), ("latin", (20, 20)))
    runs = [
        run(arm, game, seed, (percent + more) / 100, errors=(1.0, 0.5, 0.5, more / 100))
        for arm, more in (("mine", 0), ("scratch", 5))
        for game, of_seeds in levels
        for seed, percent in enumerate(of_seeds)
    ]
    return write(out, runs)


@pytest.mark.usefixtures("one_pixel")
def test_an_evaluation_by_hand(tmp_path: Path):
    assert evaluate(evaluated(tmp_path), FEW) == []
    found = tables(tmp_path, "report.md")
    assert [cell.split(" ")[0] for cell in found["Over all tasks"][1]] == ["mine", "20.00", "5.00", "37.50", "4"]
    assert [cell.split(" ")[0] for cell in found["Over all tasks"][2]] == ["scratch", "25.00", "5.00", "38.12", "4"]
    assert found["Difference from scratch"][1] == ["mine", "-5.00", "+0.00", "-0.62", "4"]
    greek, latin = found["Test error (%)"][1:]
    assert (greek[0], latin) == ("greek", ["latin", "20.00", "25.00", "2"])
    assert greek[1].startswith("20.00 ")
    data = results_json(tmp_path)
    rng = np.random.default_rng(statistics.SEED)
    of_games = [np.array([0.1, 0.3]), np.array([0.2, 0.2])]
    wanted = statistics.interval(statistics.mean, of_games, rng, FEW)
    assert data["overall"]["mine"]["intervals"]["test_error"] == wanted._asdict()
    assert (data["baseline"], data["counted"]) == ("scratch", ["greek", "latin"])
    assert tuple(rows(tmp_path)[0]) == tuple(ERROR_COLUMNS)
    assert len(rows(tmp_path)) == 8
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "report.md", "results.csv", "results.json", "figures"}
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["curves.png"]


@pytest.mark.usefixtures("one_pixel")
def test_tasks_that_an_arm_lacks_are_shown_but_not_counted(tmp_path: Path):
    write(evaluated(tmp_path), [run("mine", "korean", 0, 0.9)])
    path_of(tmp_path, "scratch", "latin", 1).unlink()
    arms = [{"label": "later"}, {"label": "scratch", "source": "a random one"}, {"label": "mine"}]
    (tmp_path / "arms.json").write_text(json.dumps({"arms": arms}))
    warnings = evaluate(tmp_path, FEW)
    assert warnings == [
        "no run yet of later",
        "incomplete: missing runs (4): scratch/korean seed 0, 1; scratch/latin seed 1; mine/korean seed 1",
        "left out of the means over all tasks, because an arm has no run there: korean",
    ]
    found = tables(tmp_path, "report.md")
    assert found["Over all tasks"][2][0] == "mine"
    assert found["Over all tasks"][2][1].startswith("20.00 ")
    assert found["Test error (%)"][2] == ["korean", "–", "90.00", "0 / 1"]
    assert found["Difference from scratch"][1][-1] == "3"
    assert found["Initializations"][2][:2] == ["scratch", "a random one"]


@pytest.mark.usefixtures("one_pixel")
def test_arms_without_a_common_task_are_not_compared(tmp_path: Path):
    warnings = evaluate(write(tmp_path, [run("mine", "greek"), run("scratch", "latin")]), FEW)
    assert warnings[1] == "left out of the means over all tasks, because an arm has no run there: greek, latin"
    assert "nothing can be compared" in (tmp_path / "report.md").read_text()
    assert results_json(tmp_path)["overall"] == {}


@pytest.mark.usefixtures("one_pixel")
def test_one_arm_has_nothing_to_be_compared_with(tmp_path: Path):
    evaluate(write(tmp_path, [run("mine", "greek")]), FEW)
    text = (tmp_path / "report.md").read_text()
    assert "## Less" not in text
    assert "only one seed" in text


@pytest.mark.usefixtures("one_pixel")
def test_an_evaluation_of_games_is_not_one_of_classifiers(tmp_path: Path):
    game = RunResult("mine", "pong", 0, 9, 1.0, np.array([3]), np.array([-21.0]), ({"steps": 3, "loss": 1.0},))
    with pytest.raises(ConfigError, match="no run of a supervised task; left out: mine/pong/0 has no error") as caught:
        evaluate(write(tmp_path, [game]), FEW)
    assert "\n" not in str(caught.value)
    write(tmp_path, [run("mine", "greek")])
    assert "left out: mine/pong/0 has no error of a trained classifier" in evaluate(tmp_path, FEW)


def test_curves_of_an_evaluation_are_means_with_intervals(tmp_path: Path):
    rows, _ = ERRORS.score_all(load_all(evaluated(tmp_path))[0])
    found = panels(compare(rows, ERRORS, repetitions=FEW))
    assert [panel.title for panel in found] == ["greek", "latin", "mean of all tasks"]
    assert list(found[2].curves) == ["mine", "scratch"]
    assert found[2].curves["scratch"].point[-1] == pytest.approx(0.05)


def test_runs_that_end_early_are_compared_at_equal_lengths_too(tmp_path: Path):
    study = Study("multi-cv", ("leap", "none"), ("mnist",), (0,), {}, 6, 2, 8, games=("mnist", "svhn"))
    study.write(tmp_path)
    long = dataclasses.replace(
        run("leap", "mnist"),
        ended=np.array([2, 4, 6, 8]),
        returns=np.array([0.8, 0.6, 0.0, 0.0]),
        curve=(
            {"steps": 4, "test_error": 0.5},
            {"steps": 6, "test_error": 0.4},
            {"steps": 8, "test_error": 0.1, "train_error": 0.0},
        ),
    )
    short = dataclasses.replace(
        long,
        arm="none",
        ended=np.array([2, 4, 6]),
        returns=np.array([0.9, 0.9, 0.3]),
        curve=({"steps": 4, "test_error": 0.75}, {"steps": 6, "test_error": 0.7, "train_error": 0.2}),
    )
    write(evaluation_of(tmp_path, "mnist", 0), [long, short])
    report.build(tmp_path, FEW)
    assert tables(tmp_path)["At equal numbers of examples"] == [
        ["held out", "arm", "test %", "after examples", "AUC", "over examples"],
        ["mnist", "leap", "40.00", "6", f"{100 * (0.7 + 0.3) / 3:.2f}", "6"],
        ["mnist", "none", "70.00", "6", f"{100 * (0.9 + 0.6) / 3:.2f}", "6"],
    ]
    dataclasses.replace(study, seeds=(0, 1)).write(tmp_path)
    other = [dataclasses.replace(one, returns=one.returns + 0.1) for one in (long, short)]
    write(evaluation_of(tmp_path, "mnist", 1), other)
    report.build(tmp_path, FEW)
    _, leap, none = tables(tmp_path)["At equal numbers of examples"]
    assert leap == ["mnist", "leap", "40.00 ± 0.00", "6", "36.67 ± 4.71", "6"]
    assert none == ["mnist", "none", "70.00 ± 0.00", "6", "53.33 ± 4.71", "6"]
    shutil.rmtree(evaluation_of(tmp_path, "mnist", 1).parent)
    study.write(tmp_path)
    write(evaluation_of(tmp_path, "mnist", 0), [long, dataclasses.replace(long, arm="none")])
    report.build(tmp_path, FEW)
    assert "At equal numbers of examples" not in tables(tmp_path)


def test_errors_within_a_test_are_a_table_of_their_own(tmp_path: Path):
    study = Study("omniglot", ("leap", "none"), ("4",), (0,), {}, 6, 2, 8)
    study.write(tmp_path)
    runs = []
    for arm, offset in (("leap", 0.0), ("none", 0.2)):
        for game, error, more in (("greek", 0.4, {}), ("latin", 0.2, {"steps": 6, "test_error": 0.9})):
            whole = run(arm, game, 0, error / 2 + offset)
            between = ({"steps": 4, "test_error": error + offset}, *([more] if more else []))
            runs.append(dataclasses.replace(whole, curve=(whole.curve[0], *between, whole.curve[1])))
    write(evaluation_of(tmp_path, "4", 0), runs)
    report.build(tmp_path, FEW)
    assert tables(tmp_path)["Test error (%) by length of the test"] == [
        ["pretraining alphabets", "arm", "4", "8"],
        ["4", "leap", "30.0", "15.0"],
        ["4", "none", "50.0", "35.0"],
    ], "6 is left out, because only some runs were tested there"
    omniglot(tmp_path / "usual")
    report.build(tmp_path / "usual", FEW)
    assert "Test error (%) by length of the test" not in tables(tmp_path / "usual")
