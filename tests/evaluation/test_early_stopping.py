"""Early stopping of meta-training: what is measured when, which φ is kept, and what comes back after a crash."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leap_dist.config.loading import ConfigError, read_yaml, resolve, to_yaml
from leap_dist.config.registry import ALPHABETS, partition
from leap_dist.config.settings import Config
from leap_dist.driver import reporting
from leap_dist.evaluation import early_stopping, initializations
from leap_dist.evaluation.early_stopping import BEST, HISTORY, History, Measurement
from leap_dist.evaluation.runs import RunResult, save
from leap_dist.protocol.messages import Contribution, Idle
from leap_dist.server.meta_server import MetaServer
from leap_dist.storage import run_directory
from leap_dist.storage.atomic import CorruptFile
from leap_dist.storage.location import Run
from leap_dist.tasks.task import family_of
from leap_dist.weights.initialization import read_initialization

SETTINGS: dict[str, Any] = {
    "tasks": "omniglot",
    "meta_updates": 7,
    "early_stopping.interval": 2,
    "early_stopping.patience": 2,
    "supervised.pretraining": 20,
    "supervised.test_learning_rate": 0.01,
}


def config(**changes: Any) -> Config:
    return resolve("smoke", SETTINGS, {name.replace("__", "."): value for name, value in changes.items()})


def history(*errors: float) -> History:
    return History([Measurement(2 * (number + 1), error) for number, error in enumerate(errors)])


# --- the history -----------------------------------------------------------------------------------------------------


def test_phi_is_measured_at_intervals_and_at_the_end():
    assert list(early_stopping.ends(config(), history())) == [2, 4, 6, 7]
    assert list(early_stopping.ends(config(meta_updates=6), history())) == [2, 4, 6]
    assert list(early_stopping.ends(config(meta_updates=1), history())) == [1]
    assert list(early_stopping.ends(config(), history(0.5, 0.4))) == [6, 7]


@pytest.mark.parametrize(
    ("errors", "patience", "best", "over"),
    [
        ((), 2, None, False),
        ((0.5,), 1, 0, False),
        ((0.5, 0.5), 1, 0, True),
        ((0.5, 0.4, 0.45), 2, 1, False),
        ((0.5, 0.4, 0.45, 0.4), 2, 1, True),
        ((0.5, 0.4, 0.45, 0.39), 2, 3, False),
        ((0.5, 0.6, 0.7, 0.8), 0, 0, False),
    ],
)
def test_training_is_over_after_so_many_measurements_without_a_lower_error(errors, patience, best, over):
    found = history(*errors)
    assert found.best == (None if best is None else found.measurements[best])
    assert found.is_over(patience) is over
    assert found.describe(patience)["stopped"] is over


def test_the_best_phi_is_kept_and_the_history_comes_back(tmp_path: Path):
    found = History.read(tmp_path)
    for number, error in enumerate((0.5, 0.3, 0.4)):
        (tmp_path / "init.safetensors").write_bytes(bytes([number]))
        found.add(tmp_path, Measurement(number, error))
    assert (tmp_path / BEST).read_bytes() == b"\1"
    assert History.read(tmp_path).measurements == found.measurements


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"format": 1}', b"\xff"])
def test_a_damaged_history_is_named(tmp_path: Path, damage):
    (tmp_path / HISTORY).write_bytes(damage)
    with pytest.raises(CorruptFile, match=HISTORY):
        History.read(tmp_path)


def test_a_changed_history_is_noticed(tmp_path: Path):
    (tmp_path / "init.safetensors").write_bytes(b"")
    history().add(tmp_path, Measurement(2, 0.5))
    (tmp_path / HISTORY).write_text((tmp_path / HISTORY).read_text().replace("0.5", "0.1"))
    with pytest.raises(CorruptFile, match="checksum"):
        History.read(tmp_path)


# --- through a real server, without Ray ------------------------------------------------------------------------------


class Training:
    """Stands in for Ray: meta-updates by a real server, whose contributions are random, and tests with given errors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, errors: list[float]) -> None:
        self.errors = errors
        self.trained: list[int] = []
        self.tested: list[list[str]] = []
        monkeypatch.setattr(reporting, "_train", self.train)
        monkeypatch.setattr(reporting, "evaluate", self.evaluate)
        monkeypatch.setattr(reporting, "_session", lambda _: contextlib.nullcontext())

    def train(self, config: Config, run: Run, whole: Config, *_: Any) -> tuple[str, dict[str, Any]]:
        family = family_of(config)
        manifest, initial = family.initialization(config, config.seed, config.scope)
        server = MetaServer(
            config, run.folder, manifest=manifest, initial=initial, preprocessing=family.preprocessing(config)
        )
        while not isinstance(lease := server.lease("w0", "i0"), Idle):
            vector = np.random.default_rng(lease.task.index).normal(size=manifest.size).astype(np.float32)

            assert server.push(Contribution.whole(lease, manifest.digest, vector)).durable
        server.close()
        self.trained.append(server.version)
        tasks = {"tasks": server.status()["tasks"], "tasks_wanted": whole.total_tasks}
        return "done", {"state": "running", "wall_seconds": 0.0, **tasks}

    def evaluate(self, config: Config, runs: Any, out: Path, *, progress: bool, label: str) -> str:
        self.tested.append([run.game for run in runs])
        error = self.errors[len(self.tested) - 1]
        for number, run in enumerate(runs):
            offset = 0.01 * (number - (len(runs) - 1) / 2)
            last = {"steps": 20.0, "test_error": error + offset, "train_error": 0.0, "test_loss": 1.0}
            result = RunResult(run.arm.label, run.game, run.seed, 20, 1.0, np.array([20]), np.array([0.5]), (last,))
            save(out, result, run.identity(config))
        return "done"


def begin(folder: Path, config: Config) -> Run:
    run_directory.prepare(folder, config)
    return Run(folder)


def test_training_stops_and_evaluations_start_from_the_best_phi(tmp_path, monkeypatch):
    training = Training(monkeypatch, [0.5, 0.3, 0.4, 0.35])
    run = begin(tmp_path / "run", config())
    outcome, summary = reporting.train(config(), run)
    assert outcome == "done"
    assert training.trained == [2, 4, 6, 7]
    validation = partition(ALPHABETS, 20, 0).validation
    assert training.tested == [list(validation)] * 4
    assert summary["early_stopping"]["best"] == {"meta_updates": 4, "error": pytest.approx(0.3)}
    assert run_directory.read_summary(run.folder)["state"] == "done"
    best = read_initialization(run.folder / BEST)
    assert best.metadata["version"] == 4
    assert read_initialization(run.folder / "init.safetensors").metadata["version"] == 7
    labels, (file,) = initializations.read([str(run.folder)])
    assert (labels, file.content.metadata["version"]) == (["run"], 4)


def test_patience_ends_training_and_a_later_launch_agrees(tmp_path, monkeypatch):
    training = Training(monkeypatch, [0.3, 0.4, 0.35, 0.1])
    run = begin(tmp_path, config())
    _, summary = reporting.train(config(), run)
    assert training.trained == [2, 4, 6]
    assert summary["early_stopping"]["stopped"]
    again = Training(monkeypatch, [])
    _, later = reporting.train(config(), run)
    assert again.trained == [6], "only to say what there is"
    assert later["early_stopping"] == summary["early_stopping"]
    assert read_initialization(run.folder / BEST).metadata["version"] == 2


@pytest.mark.parametrize("point", ["validation.write", "validation.renamed", "init.write", "init.renamed"])
def test_what_a_crash_interrupts_is_measured_again_with_the_same_result(tmp_path, monkeypatch, point):
    errors = [0.5, 0.3, 0.4, 0.35]
    Training(monkeypatch, errors)
    undisturbed = begin(tmp_path / "undisturbed", config())
    _, expected = reporting.train(config(), undisturbed)

    first = Training(monkeypatch, errors)
    run = begin(tmp_path / "run", config())
    crashes = 0
    real = early_stopping.write_atomic

    def crashing(path: Path, content: bytes, kind: str) -> None:
        nonlocal crashes
        if len(first.tested) == 2 and kind == point.split(".")[0] and not crashes:
            crashes += 1
            if point.endswith("renamed"):
                real(path, content, kind)
            raise KeyboardInterrupt
        real(path, content, kind)

    monkeypatch.setattr(early_stopping, "write_atomic", crashing)
    with pytest.raises(KeyboardInterrupt):
        reporting.train(config(), run)
    assert crashes == 1
    second = Training(monkeypatch, errors[2:])
    _, summary = reporting.train(config(), run)
    assert len(second.tested) == 2, "the runs of the interrupted measurement are there already"
    assert summary["early_stopping"] == expected["early_stopping"]
    for name in (BEST, "init.safetensors"):
        assert (run.folder / name).read_bytes() == (undisturbed.folder / name).read_bytes()
    assert json.loads((run.folder / HISTORY).read_text()) == json.loads((undisturbed.folder / HISTORY).read_text())


def test_measurements_do_not_change_what_is_learned(tmp_path, monkeypatch):
    training = Training(monkeypatch, [0.5] * 4)
    plain, measured = begin(tmp_path / "plain", config()), begin(tmp_path / "measured", config())
    training.train(replace(config(), early_stopping=Config.early_stopping), plain, config())
    reporting.train(config(early_stopping__patience=0), measured)
    one, other = (read_initialization(run.folder / "init.safetensors") for run in (plain, measured))
    assert all(np.array_equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_a_measurement_is_an_evaluation_of_the_validation_alphabets_at_the_arms_own_rate(tmp_path, monkeypatch):
    Training(monkeypatch, [0.5] * 4)
    run = begin(tmp_path, config())
    reporting.train(config(), run)
    settings, runs, arm = early_stopping.evaluation(config(early_stopping__task_steps=400), run.folder)
    assert (settings.task_steps, settings.meta_learner, arm.learning_rate) == (400, "none", 0.01)
    assert not {one.game for one in runs} & set(config().games)
    assert runs[0].identity(settings)["learning_rate"] == 0.01


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    Training(monkeypatch, [0.5])
    run = begin(tmp_path / "run", config(meta_updates=1))
    reporting.train(config(meta_updates=1), run)
    return run.folder


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "stream", "meta__shift": "increments"},
        {"mode": "fedasync", "meta_learner": "reptile"},
        {"mode": "async", "meta_learner": "reptile", "meta__endpoint_correction": 0.5},
        {"meta_learner": "multitask"},
    ],
)
def test_the_settings_of_a_measurement_go_together_whatever_those_of_the_run(trained, settings):
    """They are written to the config.yaml of its folder."""
    found, _, _ = early_stopping.evaluation(config(**settings), trained)
    (trained / "measured.yaml").write_text(to_yaml(found))
    assert resolve("smoke", read_yaml(trained / "measured.yaml")) == found


@pytest.mark.parametrize(("test_epochs", "steps", "epochs", "wanted"), [(6, 0, 6, 600), (0, 0, 2, 200), (6, 80, 6, 80)])
def test_a_measurement_has_the_epochs_of_a_test(trained, test_epochs, steps, epochs, wanted):
    given = {"supervised__epochs": 2, "supervised__test_epochs": test_epochs, "early_stopping__task_steps": steps}
    found, runs, _ = early_stopping.evaluation(config(**given), trained)
    assert (found.supervised.epochs, found.task_steps, runs[0].steps) == (epochs, wanted, wanted)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": "multi-cv", "games": "mnist"}, "early_stopping.interval: 2 needs the validation alphabets of tasks"),
        ({"meta.schedule": "linear"}, "meta.schedule: linear needs a known end"),
        ({"early_stopping.task_steps": 10}, "early_stopping.task_steps: 10 is less than a batch of 20 examples"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve("smoke", SETTINGS, changes)


def test_a_run_at_a_url_is_refused(tmp_path):
    run = Run(tmp_path)
    run.remote = object()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"early_stopping.interval: 2 needs a run directory on disk"):
        reporting.train(config(), run)
