"""What is drawn from the files of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from event_files import line, point

from leap_dist.cli import results
from leap_dist.storage.ledger import PAGE_BYTES, Ledger
from leap_dist.telemetry import pictures


def test_an_evaluation_prints_each_note_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text('{"conclusion": "Nothing."}')
    monkeypatch.setattr(results, "_build", lambda build, out: ["before the plan", "of the report"])
    results.print_evaluation(tmp_path, told=["before the plan"])
    assert capsys.readouterr().err == "leap-dist: note: of the report\n"
    results.print_evaluation(tmp_path)
    assert capsys.readouterr().err.count("note: before the plan") == 1


def test_the_picture_of_a_long_run_goes_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger of more than one page."""
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(pictures, "_draw", lambda tasks, *_: drawn.update(tasks))
    monkeypatch.setattr(pictures, "_save", lambda *_: None)
    path = tmp_path / "ledger.jsonl"
    count = 1500
    Ledger(path).append(0, [line("pong", version, [point(100, 1.0)] * 5) for version in range(1, count + 1)])
    assert path.stat().st_size > PAGE_BYTES
    results.draw_progress(tmp_path, tmp_path / "progress.png", "demo")
    assert [task.version for task in drawn["pong"]] == list(range(1, count + 1))
