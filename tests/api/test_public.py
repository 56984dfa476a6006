"""The public names of the package: light to import, complete, and typed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import leap_dist

ROOT = Path(__file__).parents[2]


def test_importing_the_package_imports_nothing_heavy():
    """Everything else is imported when a public name is first used."""
    code = "import sys, leap_dist; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "ray", "numpy", "yaml", "rich", "gymnasium", "tensorboard"} & set(done.stdout.split())


def test_type_checkers_and_programs_see_the_same_names():
    tree = ast.parse((ROOT / "leap_dist/__init__.py").read_text())
    declared = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == leap_dist._LIBRARY
    assert sorted(leap_dist._LIBRARY) == sorted(leap_dist.__all__)
    for name in leap_dist.__all__:
        assert getattr(leap_dist, name).__doc__, name


def test_the_type_checker_checks_a_program_that_uses_the_public_names():
    """What is in tests/api/typed_program.py is checked by `make types`, in the same pass as the package."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert settings["strict"]
    assert "tests/api/typed_program.py" in settings["files"]
    assert (ROOT / "leap_dist/py.typed").exists()
    program = (ROOT / "tests/api/typed_program.py").read_text()
    for name in ("train", "evaluate", "Callback", "MetaUpdate", "TaskResult", "LiveRun", "Report", "Run"):
        assert re.search(rf"\b{name}\b", program), name
