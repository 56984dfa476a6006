"""The benchmark of a run's start, on a stand-in for launch.py: what it measures, and that it ends the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import start

RUN = """
import json, os, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background may have it ignored
folder = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
summary = {"time_to_first_step": TIME, "start_seconds": {"ray": 0.002, "workers": 0.001}}
try:
    folder.mkdir()
    (folder / "part").write_text(json.dumps(summary))
    (folder / "part").rename(folder / "summary.json")
    if not FOREVER:
        sys.exit("the run could not start")
    time.sleep(60)
    pathlib.Path(OUT).write_text("was not interrupted")
except KeyboardInterrupt:
    pathlib.Path(OUT).write_text(str(os.environ.get("PYTHONDONTWRITEBYTECODE")))
"""


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, time: str, forever: bool) -> None:
    text = RUN.replace("TIME", time).replace("FOREVER", str(forever)).replace("OUT", repr(str(tmp_path / "ended")))
    (tmp_path / "launch.py").write_text(text)
    monkeypatch.setattr(start, "ROOT", tmp_path)
    (tmp_path / "folder").mkdir()


@pytest.mark.parametrize(("compiled", "keeps"), [(True, "None"), (False, "1")])
def test_the_run_is_interrupted_after_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool, keeps: str
) -> None:
    stand_in(tmp_path, monkeypatch, "0.003", forever=True)
    parts = start.start("quick", tmp_path / "folder", compiled=compiled)
    assert list(parts) == ["before Ray", "ray", "workers", "first step after the command"]
    assert sum(parts.values()) == pytest.approx(2 * parts["first step after the command"])
    assert parts["ray"] == 0.002
    assert (tmp_path / "ended").read_text() == keeps


def test_a_run_that_ends_before_its_first_step_shows_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "None", forever=False)
    with pytest.raises(RuntimeError, match="the run could not start"):
        start.start("quick", tmp_path / "folder", compiled=True)


def test_a_run_that_takes_too_long_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "None", forever=True)
    monkeypatch.setattr(start, "LONGEST", 1.0)
    with pytest.raises(RuntimeError):
        start.start("quick", tmp_path / "folder", compiled=True)
    ended = tmp_path / "ended"
    assert not ended.exists() or ended.read_text() != "was not interrupted"
