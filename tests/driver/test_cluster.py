"""What Ray ships to the cluster's nodes. No cluster is started here."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

from leap_dist.driver import cluster


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive that Ray makes of `py_modules`, in the way that upload_package_if_needed makes it."""
    archive = tmp_path_factory.mktemp("shipped") / "code.zip"
    create_package(str(cluster.CODE), archive, include_gitignore=True, include_parent_dir=True)
    return archive


def test_the_environments_are_shipped_as_files_of_the_package(shipped: Path) -> None:
    with zipfile.ZipFile(shipped) as archive:
        names = set(archive.namelist())
        assert {name.partition("/")[0] for name in names} == {"leap_dist"}
        assert archive.read("leap_dist/envs/games.py") == (cluster.CODE.parent / "envs" / "games.py").read_bytes()
    for path in (cluster.CODE.parent / "envs").iterdir():
        assert path.name == "__pycache__" or f"leap_dist/envs/{path.name}" in names


def test_the_shipped_code_works_without_a_checkout(shipped: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(shipped) as archive:
        archive.extractall(tmp_path)
    script = (
        "from leap_dist.driver import actors; from leap_dist.envs import games; print(actors.__file__, *games.SETS)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    file, *sets = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    assert sets == ["seed24", "camera25"]
