"""`leap_dist.evaluate` as a program calls it. The driver is replaced by one in this process, without Ray."""

from __future__ import annotations

import base64
import json
import re
import signal
from pathlib import Path
from typing import Any

import in_process_driver
import numpy as np
import pytest
from toy_data_sets import write_part

import leap_dist
from leap_dist import Callback, LiveRun


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a finished run on mnist, beside the data."""
    folder = tmp_path_factory.mktemp("trained")
    write_part(folder / "data", "cifar10")
    write_part(folder / "data", "mnist", seed=1)
    with pytest.MonkeyPatch.context() as patch:
        in_process_driver.install(patch)
        settings = {
            "preset": "smoke", "tasks": "multi-cv", "games": ("mnist",), "data_dir": str(folder / "data"),
            "task_steps": 60, "meta_updates": 1, "supervised": {"batch": 5, "epochs": 0, "patience": 0},
            "worker.device": "cpu", "worker.precision": "float32",
        }  # fmt: skip
        leap_dist.train(settings, run_dir=folder / "run", progress=False)
    return folder / "run"


class Tape(Callback):
    def __init__(self, stop_after: int = 1000) -> None:
        self.events: list[str] = []
        self.stop_after = stop_after

    def on_start(self, run: LiveRun) -> None:
        self.events.append("start")

    def on_report(self, run: LiveRun) -> None:
        if run.summary["tasks"] >= self.stop_after:
            run.stop()

    def on_end(self, run: LiveRun, outcome: str) -> None:
        self.events.append(outcome)


def test_an_evaluation_stops_continues_and_reports(trained, tmp_path, monkeypatch):
    in_process_driver.install(monkeypatch)
    arms, settings = {"leap": trained, "scratch": "scratch"}, {"games": ["cifar10"], "task_steps": 60}
    out, tape = tmp_path / "out", Tape(stop_after=1)
    part = leap_dist.evaluate(arms, settings, seeds=2, out=out, callbacks=[tape], progress=False)
    assert part.outcome == "stopped"
    assert tape.events == ["start", "stopped"]
    assert len(part.runs()) == 1
    report = leap_dist.evaluate(arms, settings, seeds=2, out=out, progress=False)
    assert report.outcome == "done"
    assert sorted(run.name for run in report.runs()) == [
        "leap/cifar10/0", "leap/cifar10/1", "scratch/cifar10/0", "scratch/cifar10/1"
    ]  # fmt: skip
    assert report.numbers == json.loads((out / "results.json").read_text())
    assert report.numbers["arms"] == ["leap", "scratch"]
    assert report.markdown == (out / "report.md").read_text()
    assert repr(report) == f"Report(path='{out}', outcome='done', arms=['leap', 'scratch'])"
    again = leap_dist.evaluate(arms, settings, seeds=2, out=out, progress=False)  # there is nothing left to do
    assert again.numbers == report.numbers


@pytest.mark.parametrize(
    ("inits", "more", "message"),
    [
        ([], {}, "inits: name at least one initialization, or scratch"),
        (["nowhere"], {}, "init: .*nowhere cannot be read"),
        (["scratch"], {"seeds": 0}, "seeds: 0 is not between 1 and 1,000"),
        (["scratch"], {"config": {"meta.learning_rate": 1}}, "meta.learning_rate: does not apply to evaluations"),
        (["scratch"], {"config": {"telemetry.gif_interval": 3}}, "telemetry.gif_interval: does not apply to eval"),
        (["scratch"], {"config": {"server.on-lost": "keep"}}, "server.on_lost: does not apply to evaluations"),
        (["scratch"], {"config": {"init": "runs/mine"}}, "init: does not apply to evaluations"),
        (["scratch"], {"config": {"agent.env": 3}}, r"agent.env: no such setting; did you mean agent.envs\?"),
        (["scratch", "scratch"], {}, "two initializations have the label 'scratch'"),
        (["scratch"], {"config": {"games": ["pnog"]}}, "no game 'pnog'"),
        (["scratch"], {"config": {"agent": {"envs": 4}, "agent.envs": 8}}, "agent.envs: given twice"),
        (["scratch"], {"seeds": 2.0}, "seeds: 2.0 is not a whole number"),
        (["scratch"], {"game_steps": {"pong": "800000"}}, "game_steps: pong: '800000' is not a whole number"),
        (["scratch"], {"game_steps": {"pong": 8e5}}, "game_steps: pong: 800000.0 is not a whole number"),
        (["scratch"], {"out": "s3://bucket/reports"}, "out: must be a path on this machine, not a URL"),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(tmp_path, monkeypatch, inits, more, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(leap_dist.ConfigError, match=message):
        leap_dist.evaluate(inits, **more)
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_numpy_are_whole_numbers(trained, tmp_path, monkeypatch):
    in_process_driver.install(monkeypatch)
    settings, more = {"games": ["cifar10"], "task_steps": 60}, {"game_steps": {"cifar10": np.int64(30)}}
    report = leap_dist.evaluate([trained], settings, seeds=np.int64(1), out=tmp_path / "out", progress=False, **more)
    assert [run.budget for run in report.runs()] == [30]


def test_a_report_is_found_from_another_directory_and_shows_its_pictures_in_a_notebook(trained, tmp_path, monkeypatch):
    in_process_driver.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    report = leap_dist.evaluate(
        [trained, "scratch"], {"games": ["mnist"], "task_steps": 60}, seeds=1, out="out", progress=False
    )
    monkeypatch.chdir("/")
    assert len(report.runs()) == 2
    links = re.findall(r"!\[[^]]*\]\(([^)]*)\)", report._repr_markdown_())
    pictures = [base64.b64decode(link.removeprefix("data:image/png;base64,")) for link in links]
    assert pictures == [
        path.read_bytes() for link in re.findall(r"figures/\w+\.png", report.markdown) for path in [report.path / link]
    ]
    assert len(pictures) >= 1
    assert "run was meta-trained on mnist, which is therefore not held out for it" in report.warnings
    assert "not held out for it" in report.markdown


def test_without_a_finished_run_a_notebook_shows_one_line(tmp_path):
    report = leap_dist.Report(tmp_path, leap_dist.Config(), "stopped", {}, ())
    assert report._repr_markdown_() == f"There is no finished run in {tmp_path} yet."


def test_a_signal_is_an_exception_with_the_report(trained, tmp_path, monkeypatch):
    class Signaling(Callback):
        def on_report(self, run: LiveRun) -> None:
            if not run.stopped and run.summary["state"] == "running":
                signal.raise_signal(signal.SIGINT)

    in_process_driver.install(monkeypatch)
    settings: dict[str, Any] = {"games": ["cifar10"], "task_steps": 60}
    with pytest.raises(leap_dist.Interrupted) as caught:
        leap_dist.evaluate(
            ["scratch", f"leap={trained}"], settings, seeds=1, out=tmp_path / "out",
            callbacks=[Signaling()], progress=False,
        )  # fmt: skip
    assert len(caught.value.result.runs()) == 1
