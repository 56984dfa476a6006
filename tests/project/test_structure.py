"""The rules of docs/architecture.md: imports go downwards, Ray stays in one package, files stay short."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [ROOT / "launch.py", *ROOT.glob("leap_dist/**/*.py"), *ROOT.glob("leap_dist/envs/*.py")]
    if "templates" not in path.parts  # they are copied to other programs, and import nothing of ours
}
PACKAGES = [
    "testing",
    "envs",
    "config",
    "datasets",
    "nn",
    "protocol",
    "leap",
    "tasks",
    "storage",
    "server",
    "worker",
    "telemetry",
    "weights",
    "evaluation",
    "driver",
    "study",
    "api",
    "cli",
]
"""The floors of the house, from the ground up: a package imports only from the packages below it."""

LONGEST = 400
"""Lines of a file, at most."""


def package_of(module: str) -> str:
    """The package that a module is in; "" for the three that are in none."""
    below = module.split(".")[1:2]
    return below[0] if below and below != ["__main__"] else ""


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def ours(name: str) -> set[str]:
    """The modules of this project that a module imports."""
    return (imported(MODULES[name]) & set(MODULES)) - {name}


def test_every_package_has_its_floor():
    assert {package_of(name) for name in MODULES} - {""} == set(PACKAGES)
    flat = {name for name in MODULES if name.count(".") == 1 and MODULES[name].name != "__init__.py"}
    assert len(flat) <= 5


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_downwards_only(name):
    if package_of(name) == "":
        return  # the entries and the package itself import from everywhere
    allowed = {"", *PACKAGES[: PACKAGES.index(package_of(name)) + 1]}
    assert {package_of(other) for other in ours(name)} <= allowed


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_the_driver_imports_ray(name):
    uses_ray = any(module.split(".")[0] == "ray" for module in imported(MODULES[name]))
    assert not uses_ray or package_of(name) == "driver"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_reads_pickles(name):
    assert not imported(MODULES[name]) & {"pickle", "torch.load", "joblib", "shelve", "dill"}
    assert "torch.load(" not in MODULES[name].read_text()
    assert "allow_pickle" not in MODULES[name].read_text()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_stay_short(name):
    assert len(MODULES[name].read_text().splitlines()) <= LONGEST


def test_nothing_is_imported_in_a_circle():
    graph = {name: ours(name) for name in MODULES}
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    done: set[str] = set()
    while ready := [name for name in graph if name not in done and graph[name] - packages <= done]:
        done.update(ready)
    assert done == set(graph)


def test_every_row_of_the_fault_matrix_names_tests_that_there_are():
    tests: dict[str, list[str]] = {}  # by file name; files of two packages may share theirs
    for path in ROOT.glob("tests/**/test_*.py"):
        tests.setdefault(path.stem, []).extend(re.findall(r"^def test_(\w+)\(", path.read_text(), re.MULTILINE))
    rows = re.findall(
        r"^\| (\d[\d, ]*) \|[^|]*\|[^|]*\|([^|]*)\|$", (ROOT / "docs/reliability.md").read_text(), re.MULTILINE
    )
    numbers = sorted(int(number) for row, _ in rows for number in row.split(","))
    assert numbers == list(range(1, max(34, len(numbers)) + 1))
    for row, cell in rows:
        module = ""
        named = [name for name in re.findall("`([^`]*)`", cell) if not name.startswith("python ")]
        assert named or cell.strip() == "the same", row
        for name in named:
            module, _, wanted = name.rpartition(": ") if ": " in name or name in tests else (module, "", name)
            module = module or wanted
            if wanted in tests:  # the whole file
                continue
            pattern = ".*".join(re.escape(part) for part in wanted.split("…"))
            assert any(re.fullmatch(pattern, test) for test in tests[module]), (row, name)


def test_tests_mirror_the_packages_and_never_import_each_other():
    folders = {path.parent.relative_to(ROOT / "tests").parts[0] for path in ROOT.glob("tests/*/**/test_*.py")}
    assert folders <= {*PACKAGES, "benchmarks", "project"}
    for path in ROOT.glob("tests/**/*.py"):
        names = {name.split(".")[-1] for name in imported(path)}
        assert not {name for name in names if name.startswith("test_") or name == "conftest"}, path


def section_of_architecture(title: str) -> str:
    """The text of a section of docs/architecture.md, without its heading."""
    text = (ROOT / "docs/architecture.md").read_text()
    return re.split(r"^## ", text.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def test_the_main_path_reads_in_one_sitting():
    files = re.findall(r"^\| \d+ \| `([^`]+)` \|", section_of_architecture("The main path"), re.MULTILINE)
    assert len(files) == 10
    assert sum(len((ROOT / file).read_text().splitlines()) for file in files) < 1_800


def test_the_glossary_stays_short():
    rows = [line for line in section_of_architecture("Glossary").splitlines() if line.startswith("| ")]
    assert len(rows) - 1 <= 25  # the first is the table's head
