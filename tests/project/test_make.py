"""The commands of a contributor: what `make help` lists, and that hooks and CI check the same things."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def make(*arguments: str) -> str:
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_help_is_the_default_and_explains_every_target():
    text = make()
    assert text == make("help")
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = dict(re.findall(r"^  ([a-z-]+) +(\S.*)$", text, re.MULTILINE))
    assert listed.keys() == set(targets.split())
    assert all(len(words.split()) > 2 for words in listed.values())


def test_hooks_check_what_ci_checks():
    commands = re.findall(r"^\.venv/bin/((?:ruff|mypy).*)$", make("--dry-run", "check"), re.MULTILINE)
    hooks = [hook for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
             for hook in repo["hooks"]]  # fmt: skip
    assert all(hook["language"] == "system" for hook in hooks), "nothing is downloaded"
    entries = [hook["entry"].removeprefix(".venv/bin/").replace(" --force-exclude", "") for hook in hooks]
    assert sorted(entries) == sorted(command.removesuffix(" .") for command in commands)


def test_ci_runs_the_tests_that_make_runs():
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"
    fast, ray = (re.findall(r'-m "([^"]*)"', make("--dry-run", name)) for name in ("test-fast", "test-ray"))
    assert (fast, ray) == (["not ray and not slow"], ["ray and not slow"])
    full = re.findall(r"-m (\"[^\"]*\"|\S+) --hypothesis-profile full", make("--dry-run", "test-all"))
    assert full == ['"not ray"', "ray"], "every test is run by one of the two"


@pytest.mark.parametrize("target", [".venv/installed", ".venv/installed-dev", ".venv/installed-extras"])
def test_without_a_driver_the_build_for_cpus_is_installed_from_the_index_that_is_named(target: str) -> None:
    """PyTorch's index is not written down here, and pip's own settings may provide either build."""
    cpu = "-c constraints-cpu.txt --extra-index-url URL"
    hint = "TORCH_INDEX=URL installs PyTorch's build for CPUs"
    for driver, index, is_cpu, is_hinted in (("", "URL", True, False), ("yes", "URL", False, False),
                                             ("", "", False, True), ("yes", "", False, False)):  # fmt: skip
        said = make("--dry-run", "--always-make", target, f"DRIVER={driver}", f"TORCH_INDEX={index}")
        installs = [line for line in said.splitlines() if "/pip install" in line]
        assert installs
        assert [line.endswith(cpu) for line in installs] == [is_cpu] * len(installs)
        assert all("extra-index-url" not in line for line in installs) != is_cpu
        assert (hint in said) == is_hinted


def test_what_is_imported_stays_compiled(monkeypatch):
    """The install leaves compiling to the first import, and many images forbid Python to keep what it compiles."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert "--no-compile" in make("--dry-run", "--always-make", ".venv/installed")
    assert make("--silent", "--eval", "shown: ; @echo [$$PYTHONDONTWRITEBYTECODE]", "shown").strip() == "[]"
