"""`leap_dist.train` as a program calls it. The driver is replaced by one in this process, without Ray."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import in_process_driver
import pytest
from toy_data_sets import write_part

import leap_dist
from leap_dist import Callback, LiveRun, MetaUpdate, TaskResult
from leap_dist.api import errors
from leap_dist.config.loading import resolve
from leap_dist.driver import driver
from leap_dist.storage.run_directory import load_config


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_part(folder, "cifar10")
    write_part(folder, "mnist", seed=1)
    return folder


@pytest.fixture
def settings(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Three meta-updates of two tasks of twelve batches of five images."""
    in_process_driver.install(monkeypatch)
    return {
        "preset": "smoke",
        "tasks": "multi-cv",
        "games": ("mnist", "cifar10"),
        "data_dir": str(data_dir),
        "task_steps": 60,
        "meta_updates": 3,
        "supervised": {"batch": 5, "epochs": 0, "patience": 0},
        "worker.device": "cpu",
        "worker.precision": "float32",
    }


EMPTY: dict[str, Any] = {
    "wall_seconds": 0.0, "push_ms": {}, "update_ms": {}, "refused": {}, "workers": [], "meta_updates": 0,
    "agreement_between_games": {"games": [], "cosines": []},
}  # fmt: skip
"""What TensorBoard needs of a summary."""


class Tape(Callback):
    """Writes down what happens."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.tasks: list[TaskResult] = []
        self.updates: list[MetaUpdate] = []

    def on_start(self, run: LiveRun) -> None:
        self.events.append("start")

    def on_task_end(self, run: LiveRun, task: TaskResult) -> None:
        self.events.append("task")
        self.tasks.append(task)

    def on_meta_update(self, run: LiveRun, update: MetaUpdate) -> None:
        self.events.append(f"update {update.version}")
        self.updates.append(update)

    def on_end(self, run: LiveRun, outcome: str) -> None:
        self.events.append(outcome)


def test_a_run_calls_back_in_order_and_is_what_the_ledger_says(settings, tmp_path):
    tape = Tape()
    run = leap_dist.train(settings, run_dir=tmp_path / "run", callbacks=[tape], progress=False)
    one = ["task", "task"]
    assert tape.events == ["start", *one, "update 1", *one, "update 2", *one, "update 3", "done"]
    assert run.outcome == run.summary["state"] == "done"
    assert run.meta_updates() == tape.updates
    lines = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert [task.path_length for task in tape.tasks] == [line["path"]["length"] for line in lines]
    assert [task.game for task in tape.tasks] == [line["game"] for line in lines]
    assert all(0 <= task.score <= 1 for task in tape.tasks if task.score is not None)
    assert tape.updates[-1].agent_steps == 6 * 60
    assert tape.updates[0].path_length == pytest.approx(sum(task.path_length for task in tape.tasks[:2]) / 2)
    assert run.initialization.metadata["version"] == 3


def test_a_callback_stops_the_run_and_resuming_reports_only_what_is_new(settings, tmp_path):
    class First(Tape):
        def on_meta_update(self, run: LiveRun, update: MetaUpdate) -> None:
            super().on_meta_update(run, update)
            run.stop()

    first, rest = First(), Tape()
    run = leap_dist.train(settings, run_dir=tmp_path / "run", callbacks=[first], progress=False)
    assert (run.outcome, run.summary["state"]) == ("stopped", "interrupted")
    assert first.events == ["start", "task", "task", "update 1", "stopped"]
    again = leap_dist.train(
        {"meta_updates": 4}, run_dir=tmp_path / "run", resume=True, callbacks=[rest], progress=False
    )
    assert again.outcome == "done"
    assert [update.version for update in rest.updates] == [2, 3, 4]
    assert [update.version for update in again.meta_updates()] == [1, 2, 3, 4]


@pytest.mark.parametrize("wanted", [3, 1])
def test_a_run_that_has_nothing_left_to_do_ends_at_once_and_stays_as_it_is(settings, tmp_path, monkeypatch, wanted):
    first = leap_dist.train(settings, run_dir=tmp_path / "run", progress=False)
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    monkeypatch.setattr(driver, "train", lambda *_, **__: pytest.fail("started"))
    tape = Tape()
    again = leap_dist.train(
        {"meta_updates": wanted}, run_dir=tmp_path / "run", resume=True, callbacks=[tape], progress=False
    )
    assert (again.outcome, again.summary, tape.events) == ("done", first.summary, ["start", "done"])
    assert {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")} == before


def test_a_changed_setting_is_saved_once_the_launch_works(settings, tmp_path, monkeypatch):
    leap_dist.train({**settings, "meta_updates": 1}, run_dir=tmp_path / "run", progress=False)

    def saved() -> int:
        return load_config(tmp_path / "run", {}).meta_updates

    with monkeypatch.context() as patch:
        patch.setattr(driver, "train", raising(leap_dist.ConfigError("address: no cluster")))
        with pytest.raises(leap_dist.ConfigError, match="no cluster"):
            leap_dist.train({"meta_updates": 2}, run_dir=tmp_path / "run", resume=True, progress=False)
    assert saved() == 1
    leap_dist.train({"meta_updates": 2}, run_dir=tmp_path / "run", resume=True, progress=False)
    assert saved() == 2


def raising(error: Exception) -> Any:
    """A function that raises an error, whatever it is called with."""

    def raise_it(*_: Any, **__: Any) -> None:
        raise error

    return raise_it


def test_what_a_callback_raises_is_raised_after_a_clean_stop(settings, tmp_path):
    class Pruned(Exception):
        pass

    class Faulty(Tape):
        def on_task_end(self, run: LiveRun, task: TaskResult) -> None:
            raise Pruned("no hope")

    faulty = Faulty()
    with pytest.raises(Pruned, match="no hope"):
        leap_dist.train(settings, run_dir=tmp_path / "run", callbacks=[faulty], progress=False)
    assert faulty.events == ["start", "failed"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["state"] == "interrupted"
    assert leap_dist.train(run_dir=tmp_path / "run", resume=True, progress=False).outcome == "done"


def test_an_exception_at_the_start_refuses_the_run_and_leaves_nothing(settings, tmp_path):
    class Refusing(Callback):
        def on_start(self, run: LiveRun) -> None:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        leap_dist.train(settings, run_dir=tmp_path / "run", callbacks=[Refusing()], progress=False)
    assert not (tmp_path / "run").exists()


def test_a_signal_is_an_exception_with_the_run(settings, tmp_path):
    class Signaling(Callback):
        def on_meta_update(self, run: LiveRun, update: MetaUpdate) -> None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(leap_dist.Interrupted) as caught:
        leap_dist.train(settings, run_dir=tmp_path / "run", callbacks=[Signaling()], progress=False)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert caught.value.result.summary["meta_updates"] == 1


def test_a_run_that_could_not_go_on_raises_its_reason(settings, tmp_path, monkeypatch):
    def fail(config: Any, run_dir: Path, record: Any, **more: Any) -> str:
        record([], {**EMPTY, "state": "failed", "alerts": ["the disk is on fire"]}, [], 0)
        return "failed"

    monkeypatch.setattr(driver, "train", fail)
    with pytest.raises(leap_dist.RunFailed, match="could not continue: the disk is on fire"):
        leap_dist.train(settings, run_dir=tmp_path / "run", progress=False)


def test_two_runs_in_two_threads_stop_on_their_own(settings, tmp_path):
    """Outside the main thread there are no signals, but callbacks may stop a run all the same."""
    outcomes: dict[int, str] = {}

    class Stopping(Callback):
        def on_meta_update(self, run: LiveRun, update: MetaUpdate) -> None:
            run.stop()

    def work(number: int) -> None:
        callbacks = [Stopping()] if number else []
        run = leap_dist.train(settings, run_dir=tmp_path / str(number), callbacks=callbacks, progress=False)
        outcomes[number] = run.outcome

    threads = [threading.Thread(target=work, args=[number]) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {0: "done", 1: "stopped"}


@pytest.mark.parametrize(
    ("config", "more", "message"),
    [
        ("qiuck", {}, "preset: no preset 'qiuck'; did you mean quick?"),
        ({"preset": "smoke", "meta": {"lr": 1.0}}, {}, "meta.lr: no such setting; did you mean meta.learning_rate?"),
        ({"games": "breakot"}, {}, "breakout"),
        ({"preset": "smoke"}, {"resume": True}, "resume: name the run with run_dir"),
        ("smoke", {"resume": True, "run_dir": "somewhere"}, "resume: a resumed run keeps its preset and config"),
        (None, {"resume": True, "run_dir": "nowhere"}, "nowhere holds no run"),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(tmp_path, monkeypatch, config, more, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(leap_dist.ConfigError) as caught:
        leap_dist.train(config, **more)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "run-dir: runs/x already holds a run; add --resume to continue it, or choose another directory",
            "run_dir: runs/x already holds a run; pass resume=True to continue it, or choose another directory",
        ),
        ("resume: x holds no run; leave --resume out", "resume: x holds no run; leave resume out"),
        (
            "worker.gpus: 2 requested, but there are 0; use --worker.device cpu or --task-steps 3",
            "worker.gpus: 2 requested, but there are 0; use worker.device cpu or task_steps 3",
        ),
        ("games: no game 'a--b'", "games: no game 'a--b'"),
    ],
)  # fmt: skip
def test_messages_name_arguments_and_not_flags(message, expected):
    with pytest.raises(leap_dist.ConfigError) as caught, errors.naming_arguments():
        raise leap_dist.ConfigError(message)
    assert str(caught.value) == expected


def test_a_run_that_exists_already_is_continued_with_an_argument(settings, tmp_path):
    run = leap_dist.train(settings, run_dir=tmp_path / "run", progress=False)
    assert repr(run) == f"Run(path='{tmp_path}/run', outcome='done', preset='smoke', meta_updates=3)"
    with pytest.raises(leap_dist.ConfigError, match=r"^run_dir: .* holds a run; pass resume=True to continue it, or"):
        leap_dist.train(settings, run_dir=tmp_path / "run", progress=False)


def test_wrong_types_are_named(tmp_path):
    with pytest.raises(TypeError, match=r"config: 3 is not a Config, the name of a preset, or a mapping"):
        leap_dist.train(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"callbacks: <function .* is not an instance of leap_dist.Callback"):
        leap_dist.train("smoke", run_dir=tmp_path / "run", callbacks=[lambda: None])  # type: ignore[list-item]
    assert not (tmp_path / "run").exists()


def test_a_run_is_continued_without_naming_its_preset_and_found_from_another_directory(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    leap_dist.train({**settings, "meta_updates": 1}, run_dir="run", progress=False)
    run = leap_dist.train({"meta_updates": 2}, run_dir="run", resume="auto", progress=False)
    assert (run.config.preset, run.summary["meta_updates"]) == ("smoke", 2)
    with pytest.raises(leap_dist.ConfigError, match="resume: the run has preset smoke, not paper"):
        leap_dist.train({"preset": "paper"}, run_dir="run", resume="auto", progress=False)
    monkeypatch.chdir("/")
    assert Path(run.path) == tmp_path / "run"
    assert len(run.meta_updates()) == run.initialization.metadata["version"] == 2


def test_a_config_object_gives_the_run_of_its_settings(settings, tmp_path, data_dir):
    flat = {"supervised.batch": 5, "supervised.epochs": 0, "supervised.patience": 0}
    values = {name: value for name, value in settings.items() if name not in ("preset", "supervised")}
    config = resolve("smoke", {**values, **flat})
    run = leap_dist.train(config, run_dir=tmp_path / "run", progress=False)
    assert run.config == config
    with pytest.raises(leap_dist.ConfigError, match="already holds a run"):
        leap_dist.train(config, run_dir=tmp_path / "run")


def test_progress_is_printed_only_if_wanted(settings, tmp_path, capsys):
    leap_dist.train(settings, run_dir=tmp_path / "quiet", progress=False)
    assert capsys.readouterr().out == ""
    leap_dist.train(settings, run_dir=tmp_path / "loud")
    assert "3 meta-updates" in capsys.readouterr().out
