"""Pinned packages: every package of an installation has a version, for each of PyTorch's builds."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BUILDS = {"cpu": "cpu", "cuda12": "cu126"}
"""PyTorch's builds besides PyPI's, by constraints file, with their tags."""
BOUNDED = {"cuda-toolkit", "cuda-bindings"}
"""Packages whose versions follow from torch's build. CUDA 12 and 13 share these names, so no pin serves both."""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(*names: str) -> dict[str, str]:
    """The versions that these files name."""
    found = {}
    for name in names:
        for line in (ROOT / name).read_text().splitlines():
            if match := re.match(r"([\w.-]+)(?:\[[\w,]+\])?==([\w.+]+)$", line):
                found[canonical(match[1])] = match[2]
    return found


def test_what_is_installed_into_one_environment_is_resolved_together() -> None:
    """pip replaces what is there without a word where a later file asks for another version of it."""
    for later, earlier in (("-extras", "-dev"), ("-dev", "")):
        assert f"-r requirements{earlier}.txt" in (ROOT / f"requirements{later}.txt").read_text().splitlines()


@pytest.mark.parametrize(("build", "tag"), BUILDS.items())
def test_a_build_is_the_pinned_release_of_torch_and_agrees_with_the_other_constraints(build: str, tag: str) -> None:
    special = pins(f"constraints-{build}.txt")
    assert special.pop("torch") == f"{pins('requirements.txt')['torch']}+{tag}"
    common = pins("constraints.txt")
    assert not special.keys() & common.keys(), "pip has to fulfil both files"
    assert not BOUNDED & common.keys()
    cluster = (ROOT / "cluster" / "README.md").read_text()
    assert all(f"`{name}`" in cluster for name in BOUNDED), "the page does not say that everything is pinned"
    # CUDA's libraries have names of their own for each release of CUDA but the newest.
    assert all(name in BOUNDED or name.endswith("-cu12") for name in special)


@pytest.mark.parametrize("page", ["README.md", "cluster/README.md", "docs/faq.md"])
def test_pages_name_the_cuda_that_the_ordinary_installation_brings_and_what_it_needs(page: str) -> None:
    """CUDA 13 needs a driver of branch 580, and dropped GPUs before Turing."""
    text = " ".join((ROOT / page).read_text().split())
    release, cuda = pins("requirements.txt")["torch"], pins("constraints.txt")["nvidia-cuda-runtime"]
    assert cuda.startswith("13.")
    assert re.search(
        rf"CUDA {cuda.partition('.')[0]}\b.{{,60}} driver 580 or newer .{{,20}}compute capability 7\.5 or higher", text
    )
    assert page == "docs/faq.md" or f"torch {release.rpartition('.')[0]}" in text


def resolved(folder: Path, *arguments: str, **more: str) -> dict[str, str]:
    """Versions that pip would install, by name. Nothing is installed, and only the packages' metadata are read."""
    made = [sys.executable, "-m", "virtualenv", "--quiet", folder / "environment"]  # with a pip of today
    subprocess.run(made, check=True, capture_output=True, timeout=120)
    environment = {name: value for name, value in os.environ.items() if name != "PIP_FIND_LINKS"}
    command = [
        folder / "environment" / "bin" / "pip", "install", "--dry-run", "--ignore-installed", "--only-binary", ":all:",
        "--use-feature", "fast-deps", "--report", folder / "report.json", "-r", "requirements.txt", *arguments,
    ]  # fmt: skip
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **more}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    unreachable = "Failed to establish a new connection|Temporary failure in name resolution|Network is unreachable"
    if done.returncode and re.search(unreachable, done.stdout + done.stderr):
        pytest.skip("the package index cannot be reached: this test needs the network")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return {canonical(one["metadata"]["name"]): one["metadata"]["version"] for one in report["install"]}


def is_cuda(name: str) -> bool:
    return name.startswith(("nvidia-", "cuda-")) or name == "triton"


linux = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="the builds are those for Linux on x86-64"
)


@linux
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_package_of_the_ordinary_installation_is_pinned_also_those_of_cuda(tmp_path: Path) -> None:
    found, wanted = resolved(tmp_path), pins("requirements.txt", "constraints.txt")
    assert {name: version for name, version in found.items() if name not in wanted}.keys() <= BOUNDED
    assert {name: found[name] for name in found.keys() & wanted.keys()} == {
        name: wanted[name] for name in found.keys() & wanted.keys()
    }
    assert {name for name in wanted if is_cuda(name)} <= found.keys(), "no pin of a library that torch no longer needs"


@linux
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("build", "tag"), BUILDS.items())
def test_the_other_builds_resolve_and_every_package_is_pinned(build: str, tag: str, tmp_path: Path) -> None:
    root, links = os.environ.get("LEAP_TORCH_INDEX", ""), os.environ.get("PIP_FIND_LINKS", "")
    source = {"PIP_EXTRA_INDEX_URL": f"{root}/{tag}"} if root else {"PIP_FIND_LINKS": links}
    if not root and not any([*Path(folder).glob(f"torch-*+{tag}-*")] for folder in links.split()):
        pytest.skip(f"torch+{tag} is in PyTorch's own index only: name its root, without the tag, in LEAP_TORCH_INDEX")
    constraints = f"constraints-{build}.txt"
    found, wanted = resolved(tmp_path, "-c", constraints, **source), pins("requirements.txt", "constraints.txt")
    wanted |= pins(constraints)
    assert found == {name: wanted.get(name) for name in found}
    assert found["torch"].endswith(f"+{tag}")
    assert {name for name in found if is_cuda(name)} == (
        set()
        if build == "cpu"
        else {name for name in pins(constraints) if is_cuda(name)} | {"triton", "cuda-pathfinder"}
    )
