"""The documentation as a site, and the pages whose numbers and programs must be true."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

import leap_dist
from leap_dist.config.loading import resolve

ROOT = Path(__file__).parents[2]


def settings() -> dict[str, Any]:
    text = re.sub(r"!!python/\S+", "", (ROOT / "mkdocs.yml").read_text())  # names of functions
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages(part)]


def test_the_site_has_every_page_once_and_warns_of_nothing():
    listed = pages(settings()["nav"])
    there = {path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("docs/*.ipynb"))}
    there |= {"README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "cluster/README.md", "tests/README.md"}
    assert sorted(listed) == sorted(there)
    assert settings()["strict"] is True, "a warning fails the build"


def test_the_reference_has_every_public_name_where_it_is():
    named = re.findall(r"^::: (\S+)$", (ROOT / "docs/reference.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(f"{module}.{name}" for name, module in leap_dist._LIBRARY.items())


def test_the_page_on_cost_has_the_presets_numbers():
    """Tasks and agent steps are those of the presets; times and prices follow from the rates in the tables."""
    text = (ROOT / "docs/cost.md").read_text()
    steps = {}
    for preset, tasks, each, total in re.findall(r"^\| `([\w-]+)` \| ([\d,]+) × ([\d,]+) \| ([\d,]+) \|$", text, re.M):
        config = resolve(preset)
        found = [int(number.replace(",", "")) for number in (tasks, each, total)]
        assert found == [config.total_tasks, config.task_steps, config.total_tasks * config.task_steps], preset
        steps[preset] = found[2]
    assert steps.keys() == {"quick", "fast", "paper", "paper-5m", "paper-async"}
    cores, gpu = (int(rate.replace(",", "")) for rate in re.findall(r"^\| [^|]+ \| ([\d,]+) \| ", text, re.M)[:2])
    assert (cores, gpu) == (3_219, 27_939)
    row = re.search(r"^\| `fast` \| ([\d.]+) days \| \\?\$(\d+) \| (\d+) hours \| \\?\$(\d+) \|$", text, re.M)
    assert row
    seconds, on_gpu = steps["fast"] / cores, steps["fast"] / gpu
    assert float(row[1]) == round(seconds / 86_400, 1)
    assert int(row[2]) == round(2 * seconds / 3600 * 0.05)
    assert int(row[3]) == round(on_gpu / 3600)
    assert int(row[4]) == round(on_gpu / 3600 * 3)


def test_the_notebook_is_one_and_has_no_outputs():
    notebook = json.loads((ROOT / "docs/notebook.ipynb").read_text())
    assert notebook["nbformat"] == 4
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            compile("".join(cell["source"]), cell["id"], "exec")
