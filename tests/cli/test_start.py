"""How the program starts: its three entries, its name in messages, and what it does not import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import leap_dist

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "ray", "matplotlib", "tensorboard", "gymnasium", "ale_py"}
MEDIUM = {"numpy", "fsspec", "rich"}


def ended(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("entry", "name"),
    [(["launch.py"], "launch.py"), (["-m", "leap_dist"], "leap-dist"), ([str(ROOT / "launch.py")], "launch.py")],
)
def test_every_entry_runs_the_same_commands_under_its_own_name(entry, name):
    done = ended(sys.executable, *entry, "trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{name}: error: trian: no such command; did you mean train?\n"


def test_the_console_script_is_the_same_entry():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'leap-dist = "leap_dist.cli.entry:run"' in text


def test_version_and_examples_name_the_program_that_was_called():
    assert ended(sys.executable, "-m", "leap_dist", "--version").stdout == f"leap-dist {leap_dist.__version__}\n"
    assert "\n  leap-dist train " in ended(sys.executable, "-m", "leap_dist", "--help").stdout
    assert "\n  python launch.py train " in ended(sys.executable, "launch.py", "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["evaluate", "--help"], 0),
        (["trian"], 2),
        (["train", "--workres", "2"], 2),
        (["train", "--workers", "many"], 2),
        (["train", "--games", "breakot"], 2),
        (["train", "--tasks", "omniglot", "--games", "grek"], 2),
        (["train", "--mode", "fedasync"], 2),
        (["train", "--config", "nowhere.yaml"], 2),
        (["train", "--resume", "--run-dir", "nowhere"], 2),
        (["evaluate", "--init", "scratch", "--seeds", "0"], 2),
        (["evaluate", "--init", "scratch", "--agent.envs", "0"], 2),
        (["evaluate", "--init", "nowhere"], 2),
        (["evaluate", "--init", "scratch", "--games", "pogn"], 2),
        (["study", "--tasks", "omniglot", "--out", "x", "--arms", "lepa"], 2),
        (["export", "nowhere", "--to", "sb3", "--out", "x"], 2),
        (["export", "nowhere", "--to", "sb4", "--out", "x"], 2),
        (["status", "--run-dir", "nowhere"], 2),
        (["plot", "--run-dir", "nowhere"], 2),
        (["games"], 0),
        (["presets"], 0),
        (["weights"], 0),
    ],
    ids=str,
)
def test_help_and_mistakes_are_answered_without_slow_imports(tmp_path, arguments, code):
    assert imported(tmp_path, arguments) == (set(), code)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["evaluate", "--help-all"], 0),
        (["status", "--help"], 0),
        (["trian"], 2),
        (["train", "--workres", "2"], 2),
        (["train", "--workers", "many"], 2),
        (["games"], 0),
        (["presets"], 0),
    ],
    ids=str,
)
def test_help_and_mistakes_in_flags_import_next_to_nothing(tmp_path, arguments, code):
    assert imported(tmp_path, arguments, HEAVY | MEDIUM) == (set(), code)


def imported(tmp_path: Path, arguments: list[str], of: set[str] = HEAVY) -> tuple[set[str], int]:
    """Which of some packages a command imports, and its exit code."""
    program = (
        "import sys\n"
        "from leap_dist.cli.main import main\n"
        "try:\n"
        f"    code = main({arguments!r})\n"
        "except SystemExit as ended:\n"
        "    code = ended.code\n"
        f"print(*{of!r} & set(sys.modules), code, file=sys.stderr)\n"
    )
    done = ended(sys.executable, "-c", program, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []
    *names, code = done.stderr.splitlines()[-1].split()
    return set(names), int(code)
