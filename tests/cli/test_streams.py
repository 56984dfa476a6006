"""Standard output that is gone, full, closed or poor: the work goes on, and its exit code is that of the work."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from leap_dist.cli import console
from leap_dist.config.loading import resolve
from leap_dist.storage import run_directory
from leap_dist.telemetry.escaping import printable, printable_tree

ROOT = Path(__file__).parents[2]
SUMMARY: dict[str, Any] = {
    "state": "done", "preset": "smoke", "mode": "sync", "meta_learner": "leap", "updated": 1.0, "tasks": 4,
    "tasks_wanted": 4, "meta_updates": 2, "agent_steps": 5, "steps_per_second": 1.0, "wall_seconds": 2.0,
    "eta_seconds": None, "refused": {"stale": 1}, "contributions_applied": 4, "contributions_waiting": 0,
    "workers_alive": 1, "workers_wanted": 2, "restarts": 0, "server_restarts": 0, "leases_lost": 0, "duplicates": 0,
    "clipped": 0, "all_zero": 0, "checkpoint_age": 1.0, "quarantined": ["pong"], "quarantined_workers": [],
    "alerts": ["φ × 2"], "workers": [{"name": "w0", "state": "running"}],
    "leases": [{"worker": "w0", "game": "pong", "steps": 3, "steps_wanted": 9, "seconds": 1.0, "silent_seconds": 0.1,
                "curve": [{"score": 1.0}]}],
}  # fmt: skip
TRACES = ("Traceback", "Exception ignored", "BrokenPipe", "Error:")


@pytest.fixture
def run_dir(tmp_path):
    run_directory.prepare(tmp_path / "run", resolve("smoke"))
    run_directory.write_summary(tmp_path / "run", SUMMARY)
    return tmp_path / "run"


def shell(line: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """What a line of bash does, in which `leap` is the program and $1, $2 ... are the arguments."""
    program = f'leap() {{ {sys.executable} {ROOT / "launch.py"} "$@"; }}\n'
    return subprocess.run(
        ["bash", "-c", program + line, "bash", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "sink",
    ["| true; exit ${PIPESTATUS[0]}", "| head -1; exit ${PIPESTATUS[0]}", "> /dev/full", ">&-", "> /dev/null <&-"],
)
@pytest.mark.parametrize("command", ["status --run-dir", "train --help"])
def test_output_that_cannot_be_written_changes_nothing(run_dir, command, sink):
    done = shell(f'leap {command} "$1" {sink}', str(run_dir))
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""


@pytest.mark.parametrize("sink", ["2>&-", "2> /dev/full", ">&- 2>&- <&-"])
def test_an_error_that_cannot_be_shown_keeps_its_exit_code(sink):
    done = shell(f"leap trian {sink}")
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


@pytest.mark.parametrize(
    "terminal",
    [
        {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "COLUMNS": "40"},
        {"COLUMNS": "40", "NO_COLOR": "1"},
        {"COLUMNS": "1", "TERM": "dumb"},
        {"TERM": "nonsense", "COLUMNS": "x"},
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["status --run-dir", "train --help"])
def test_poor_terminals_get_plain_text(run_dir, command, terminal):
    done = shell(f'leap {command} "$1"', str(run_dir), **terminal)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout
    if terminal.get("PYTHONIOENCODING") == "ascii":
        assert done.stdout.isascii()
    assert b"\x1b" not in done.stdout


def test_control_characters_of_files_do_not_reach_the_terminal(tmp_path, run_dir):
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\r\n"
    poisoned = json.loads(json.dumps(SUMMARY).replace('"pong"', '"X"').replace('"w0"', '"X"').replace('"X"', "null"))

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poison(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [poison(inner) for inner in value]
        return evil if value is None else value

    poisoned = poison(poisoned) | {
        "eta_seconds": None,
        "preset": evil,
        "state": evil,
        "alerts": [evil],
        "waiting": evil,
    }
    poisoned["refused"] = {evil: 1}
    run_directory.write_summary(run_dir, poisoned)
    for command in ("status --run-dir", "status --json --run-dir"):
        done = shell(f'leap {command} "$1"', str(run_dir))
        assert done.returncode == 0, done.stderr
        assert b"evil" in done.stdout
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", done.stdout.decode()), done.stdout


def test_control_characters_in_errors_are_escaped(tmp_path, run_dir):
    (run_dir / "config.yaml").write_text('games: ["\\e]0;owned\\a"]\npreset: "smoke"\n')
    (run_dir / "manifest.json").write_text(json.dumps({"packages": {"torch": "\x1b[31m1"}}))
    for command in ("train --resume --run-dir", "plot --run-dir"):
        done = shell(f'leap {command} "$1"', str(run_dir))
        assert done.returncode in (0, 2)
        assert b"\x1b" not in done.stdout + done.stderr
    (tmp_path / "c.yaml").write_text('"\\e[31m": 1')
    done = shell('leap train --config "$1"', str(tmp_path / "c.yaml"))
    assert done.stderr == b"launch.py: error: \\x1b[31m: no such setting\n"


def test_text_is_escaped_and_stays_readable():
    assert printable("plain, φ × 2, 日本") == "plain, φ × 2, 日本"
    assert printable("a\x1b[0m\tb\nc\x9bd\u202ee\ud800") == "a\\x1b[0m b c\\x9bd\\u202ee\\ud800"
    assert printable_tree({"\x1b": ["\x07", 1, None, {"a": "b"}]}) == {"\\x1b": ["\\x07", 1, None, {"a": "b"}]}


def test_a_stream_that_fails_once_is_silent_from_then_on(monkeypatch):
    """Whatever writes: the live table, warnings, a library."""
    read, write = os.pipe()
    os.close(read)
    stream = io.TextIOWrapper(io.FileIO(write, "w"), write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    with console.safe_streams():
        for _ in range(3):
            print("x" * 10_000, flush=True)
        assert sys.stdout.fileno() == write
        assert not sys.stdout.isatty()
    assert sys.stdout is stream
    stream.close()
