"""Trackers get what TensorBoard gets. Their packages are replaced by small fakes; the real ones run where installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import in_process_driver
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_data_sets import short_run

import leap_dist
from leap_dist.config.loading import ConfigError

KINDS = ("wandb", "mlflow", "trackio")


class Recorder:
    """What a tracker's package was told."""

    def __init__(self) -> None:
        self.runs: dict[str, list[tuple[dict[str, float], int | None]]] = {}
        self.settings: list[dict[str, Any]] = []
        self.projects: list[str] = []
        self.ended: list[Any] = []
        self.broken_after = 10**9

    def log(self, name: str, values: dict[str, float], step: int | None) -> None:
        if sum(map(len, self.runs.values())) >= self.broken_after:
            raise ConnectionError("https://user:secret@tracker.example is gone")
        self.runs[name].append((dict(values), step))

    def points(self) -> dict[str, list[tuple[int, float]]]:
        """By tag, the steps and values of the only run."""
        (logged,) = self.runs.values()
        found: dict[str, list[tuple[int, float]]] = {}
        for values, step in logged:
            axes = [int(value) for name, value in values.items() if name.startswith("axis/")]
            for name, value in values.items():
                if not name.startswith("axis/"):
                    found.setdefault(name, []).append((axes[0] if axes else step or 0, value))
        return found


def fake_wandb(recorder: Recorder) -> Any:
    def init(*, project: str, name: str, config: dict[str, Any], resume: str, id: str = "") -> Any:
        recorder.projects.append(project)
        recorder.settings.append(config)
        key = id or name
        recorder.runs.setdefault(key, [])
        return SimpleNamespace(
            define_metric=lambda name, step_metric=None: None,
            log=lambda values: recorder.log(key, values, None),
            finish=lambda exit_code=0: recorder.ended.append(exit_code),
        )

    return SimpleNamespace(init=init)


def fake_mlflow(recorder: Recorder) -> Any:
    current: list[str] = []
    tags: dict[str, str] = {}

    def search(experiments: list[str], filter_string: str, output_format: str) -> list[Any]:
        assert (experiments, output_format) == (["7"], "list")
        wanted = filter_string.split("'")[1]
        return [SimpleNamespace(info=SimpleNamespace(run_id=run)) for run, tag in tags.items() if tag == wanted]

    def start(run_id: str = "", run_name: str = "", tags_: Any = None, **more: Any) -> None:
        if not run_id:
            run_id = f"run-{len(tags)}"
            tags[run_id] = more["tags"]["leap_dist"]
            recorder.runs[run_id] = []
        current[:] = [run_id]

    def experiment(name: str) -> Any:
        recorder.projects.append(name)
        return SimpleNamespace(experiment_id="7")

    return SimpleNamespace(
        set_experiment=experiment,
        search_runs=search,
        start_run=start,
        log_params=recorder.settings.append,
        log_metrics=lambda values, step: recorder.log(current[0], values, step),
        end_run=lambda status: recorder.ended.append(int(status != "FINISHED")),
    )


@pytest.fixture
def recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, fake_wandb(found))
    monkeypatch.setitem(sys.modules, "mlflow", fake_mlflow(found))
    return found


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    in_process_driver.install(monkeypatch)
    return short_run(tmp_path / "data")


def written(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars in TensorBoard's files, by the tracker's names."""
    found = {}
    for folder in (run_dir / "tensorboard" / "server", run_dir / "tensorboard" / "game" / "mnist"):
        events = EventAccumulator(str(folder), {"scalars": 0}).Reload()
        prefix = "" if folder.name == "server" else "game/mnist/"
        for tag in events.Tags()["scalars"]:
            if tag.partition("/")[0] in ("meta", "meta_frames", "task", "ops"):
                found[prefix + tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_tracker_gets_each_point_of_tensorboard_once_also_over_two_launches(recorder, settings, tmp_path, kind):
    class Stop(leap_dist.Callback):
        def on_meta_update(self, run: leap_dist.LiveRun, update: leap_dist.MetaUpdate) -> None:
            run.stop()

    run_dir = tmp_path / "run"
    chosen = {**settings, "telemetry": {"tracker": kind, "project": "toys"}}
    leap_dist.train(chosen, run_dir=run_dir, callbacks=[Stop()], progress=False)
    run = leap_dist.train(run_dir=run_dir, resume=True, progress=False)
    assert run.summary["alerts"] == []
    assert len(recorder.runs) == 1, "both launches are one run of the tracker"
    assert recorder.projects == ["toys", "toys"]
    assert recorder.ended == [0, 0]
    assert recorder.settings[0]["meta.batch_size"] in (2, "2")
    points, expected = recorder.points(), written(run_dir)
    assert points.keys() == expected.keys()
    assert {"meta/loss", "meta_frames/path_length", "ops/steps_per_second", "game/mnist/task/loss"} < points.keys()
    for tag, values in expected.items():
        assert points[tag] == values, tag


@pytest.mark.parametrize("kind", KINDS)
def test_a_tracker_that_fails_gets_an_alert_and_training_goes_on(recorder, settings, tmp_path, kind):
    recorder.broken_after = 3
    run = leap_dist.train({**settings, "telemetry.tracker": kind}, run_dir=tmp_path / "run", progress=False)
    assert run.outcome == "done"
    (alert,) = run.summary["alerts"]
    assert alert.startswith(f"tracker {kind} receives no more values; training continues: ConnectionError:")
    assert "secret" not in alert
    assert written(tmp_path / "run")["meta/loss"][-1][0] == 2


def test_none_is_asked_by_default(recorder, settings, tmp_path):
    leap_dist.train(settings, run_dir=tmp_path / "run", progress=False)
    assert not recorder.runs


def test_a_missing_package_is_said_before_anything_starts(settings, tmp_path, monkeypatch):
    for kind in KINDS:
        monkeypatch.setitem(sys.modules, kind, None)
        with pytest.raises(ConfigError, match=rf"tracker: {kind} needs .*leap-dist\[{kind}\]"):
            leap_dist.train({**settings, "telemetry.tracker": kind}, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_real_wandb_writes_an_offline_run(settings, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="optional extra")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    run = leap_dist.train({**settings, "telemetry.tracker": "wandb"}, run_dir=tmp_path / "run", progress=False)
    assert run.summary["alerts"] == []
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_the_real_mlflow_has_the_curves(settings, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="optional extra")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    run = leap_dist.train({**settings, "telemetry.tracker": "mlflow"}, run_dir=tmp_path / "run", progress=False)
    assert run.summary["alerts"] == []
    (found,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "meta/loss")
    steps, values = zip(*written(tmp_path / "run")["meta/loss"], strict=True)
    assert [point.step for point in history] == list(steps)
    assert [point.value for point in history] == pytest.approx(values)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["state"] == "done"
