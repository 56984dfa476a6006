"""What an installation puts where, and that it works in a directory that has an `envs` and a `launch.py` of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from initialization_files import written

ROOT = Path(__file__).parents[2]
PACKAGE = ("leap_dist", "envs")
"""Directories of the checkout that make up the installed package."""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command without the checkout on its path, and return what it prints. It has to succeed."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sources() -> set[str]:
    """Every file of the package in the checkout, named as it should be installed; caches are no part of it."""
    found = set()
    for folder in PACKAGE:
        for path in (ROOT / folder).rglob("*"):  # does not follow the link leap_dist/envs
            if path.is_file() and "__pycache__" not in path.parts:
                found.add(path.relative_to(ROOT).as_posix())
    return {name if name.startswith("leap_dist/") else f"leap_dist/{name}" for name in found}


def files(folder: Path) -> set[str]:
    return {
        path.relative_to(folder.parent).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


class Installed(NamedTuple):
    """An environment into which a wheel was installed."""

    python: Path
    site: Path
    """Its site-packages."""
    sdist: Path


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """A fresh environment that has the dependencies of the tests' own, and the wheel.

    The wheel is built from the unpacked sdist, so that it shows what is missing there. Nothing is downloaded.
    """
    folder = tmp_path_factory.mktemp("installation")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in (*PACKAGE, "pyproject.toml", "README.md", "LICENSE", "launch.py"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, checkout / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, checkout / name)
    build = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
    run(sys.executable, "-c", build, "build_sdist", folder, cwd=checkout)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    run(sys.executable, "-c", build, "build_wheel", folder, cwd=unpacked)
    (wheel,) = folder.glob("*.whl")

    run(sys.executable, "-m", "venv", "--without-pip", folder / "fresh", cwd=folder)
    python = folder / "fresh" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--disable-pip-version-check", "--no-compile", wheel, cwd=folder)
    return Installed(python, site, sdist)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A user's directory, whose `envs` and `launch.py` have nothing to do with this project."""
    folder = tmp_path / "elsewhere"
    (folder / "envs").mkdir(parents=True)
    for name in ("envs/__init__.py", "envs/games.py", "launch.py"):
        (folder / name).write_text("raise SystemExit('this file belongs to somebody else')\n")
    return folder


def test_a_wheel_brings_one_package_with_all_its_files_and_nothing_else(installed: Installed) -> None:
    names = {path.name for path in installed.site.iterdir()} - {"dependencies.pth", "__pycache__"}
    assert {name for name in names if not name.endswith(".dist-info")} == {"leap_dist"}
    package = installed.site / "leap_dist"
    assert files(package) == sources()
    assert not any(path.is_symlink() for path in [package, *package.rglob("*")])
    for name in ("py.typed", "envs/atari57_scores.json", "weights/templates/sb3/usage.md"):
        assert (package / name).is_file(), name
    (licence,) = installed.site.glob("*.dist-info/licenses/LICENSE")
    assert licence.read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_a_source_archive_brings_nothing_but_the_package_and_how_to_build_it(installed: Installed) -> None:
    with tarfile.open(installed.sdist) as archive:
        top = {Path(name).parts[1] for name in archive.getnames() if len(Path(name).parts) > 1}
    assert {name for name in top if not name.endswith(".egg-info")} == {
        "LICENSE", "PKG-INFO", "README.md", "leap_dist", "pyproject.toml", "setup.cfg"
    }  # fmt: skip


PROGRAM = """
import sys, leap_dist, leap_dist.envs.games
from pathlib import Path
assert not {"envs", "launch"} & set(sys.modules), "somebody else's files"
assert Path(leap_dist.envs.games.__file__).is_relative_to(sys.argv[1]), leap_dist.envs.games.__file__
assert leap_dist.load_encoder(sys.argv[2]).preprocessing
print(len(leap_dist.envs.games.SETS["seed24"]))
"""


def test_the_library_works_beside_somebody_else_s_envs_and_launch(
    installed: Installed, elsewhere: Path, tmp_path: Path
) -> None:
    (elsewhere / "program.py").write_text(PROGRAM)
    initialization = written(tmp_path / "run")
    assert run(installed.python, "program.py", installed.site, initialization, cwd=elsewhere) == "24\n"


@pytest.mark.parametrize("entry", [["bin/leap-dist"], ["bin/python", "-m", "leap_dist"]], ids=["script", "module"])
def test_the_command_works_beside_somebody_else_s_envs_and_launch(
    installed: Installed, elsewhere: Path, entry: Sequence[str]
) -> None:
    program, *arguments = entry
    command = [installed.python.parents[1] / program, *arguments]
    assert "leap-dist train" in run(*command, "--help", cwd=elsewhere)
    assert "--meta.batch-size" in run(*command, "train", "--help", cwd=elsewhere)


@pytest.mark.parametrize("where", ["installed", pytest.param("checkout", marks=pytest.mark.slow)])
def test_a_type_checker_finds_the_environments_under_the_same_name(
    installed: Installed, elsewhere: Path, where: str
) -> None:
    (elsewhere / "program.py").write_text("from leap_dist.envs import games\nwrong: int = games.available()\n")
    mypy = [sys.executable, "-m", "mypy", "--strict", "--follow-imports", "silent"]
    mypy += ["--cache-dir", elsewhere / "cache", "program.py"]
    more = {"MYPYPATH": str(ROOT)} if where == "checkout" else {}
    python = installed.python if where == "installed" else sys.executable
    done = subprocess.run(
        [*map(str, mypy), "--python-executable", str(python)],
        cwd=elsewhere, env={**os.environ, **more}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    (line, summary) = done.stdout.splitlines()
    assert line.startswith('program.py:2: error: Incompatible types in assignment (expression has type "'), done.stdout
    assert line.endswith('variable has type "int")  [assignment]')
    assert summary.startswith("Found 1 error in 1 file")
