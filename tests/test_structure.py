"""The rules of docs/architecture.md: imports go downwards, and Ray stays in the driver."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [ROOT / "launch.py", *ROOT.glob("leap_dist/**/*.py"), *ROOT.glob("envs/**/*.py")]
    if "exports" not in path.parts  # they are copied to other programs, and import nothing of ours
}
GROUND = (
    "leap",
    "quarantine",
    "intake",
    "pace",
    "models",
    "optimizers",
    "staleness",
    "contribution",
    "device",
    "stopwatch",
    "live_table",
    "report",
    "ray_token",
    "statistics",
    "transfer",
    "transfer.runs",
    "durations",
    "agreement",
    "transfer.page",
    "transfer.plain",
    "study",
    "study.published",
    "datasets",
    "datasets.bounded",
    "datasets.splits",
    "augmentation",
)
FLOORS = [
    ["envs", "envs.games", "envs.emulator", "envs.frames", "envs.atari"],
    [
        "leap_dist",
        "leap_dist.presets",
        "leap_dist.settings",
        "leap_dist.failpoints",
        "leap_dist.audit",
        "leap_dist.shapes",
        "leap_dist.run_lock",
        "leap_dist.labels",
    ],
    ["leap_dist.combinations", "leap_dist.files", "leap_dist.quantization", "leap_dist.catalogue", "leap_dist.measure"],
    ["leap_dist.config"],
    [f"leap_dist.{name}" for name in GROUND] + ["leap_dist.stop_signal"],
    [f"leap_dist.datasets.{name}" for name in ("idx", "cifar", "matlab", "pictures")],
    [f"leap_dist.datasets.{name}" for name in ("svhn", "gtsrb", "facescrub", "omniglot")],
    ["leap_dist.datasets.multicv"],
    ["leap_dist.datasets.__main__"],
    [
        "leap_dist.aggregation",
        "leap_dist.aggregator",
        "leap_dist.tasks",
        "leap_dist.leases",
        "leap_dist.learners",
        "leap_dist.recorder",
        "leap_dist.convnet",
        "leap_dist.redaction",
        "leap_dist.film",
        "leap_dist.telemetry.tags",
        "leap_dist.telemetry.heatmap",
        "leap_dist.telemetry.hyperparameters",
        "leap_dist.transfer.results",
        "leap_dist.transfer.canvas",
        "leap_dist.study.spec",
        "leap_dist.study.measures",
    ],
    ["leap_dist.storage"],
    ["leap_dist.remote_lock"],
    ["leap_dist.mirror"],
    [
        "leap_dist.checkpoint",
        "leap_dist.journal",
        "leap_dist.weights",
        "leap_dist.learners.rollout",
        "leap_dist.learners.examples",
        "leap_dist.telemetry.projection",
        "leap_dist.transfer.text",
        "leap_dist.transfer.figures",
        "leap_dist.transfer.tensorboard",
        "leap_dist.study.output",
    ],
    [
        "leap_dist.transfer.report",
        "leap_dist.learners.a2c",
        "leap_dist.learners.classification",
        "leap_dist.export",
        "leap_dist.meta_learners",
        "leap_dist.progress",
        "leap_dist.run_directory",
        "leap_dist.telemetry",
        "leap_dist.study.meta_training",
    ],
    ["leap_dist.families"],
    ["leap_dist.worker", "leap_dist.meta_state", "leap_dist.working_copy", "leap_dist.study.results"],
    ["leap_dist.study.progress"],
    ["leap_dist.examination"],
    [
        "leap_dist.server",
        "leap_dist.reading",
        "leap_dist.learners.stacked",
        "leap_dist.study.figures",
        "leap_dist.study.text",
    ],
    ["leap_dist.arms", "leap_dist.study.report", "leap_dist.study.evaluation", "leap_dist.command_line"],
    ["leap_dist.evaluation"],
    ["leap_dist.driver.actors", "leap_dist.driver.access", "leap_dist.driver.nodes"],
    ["leap_dist.driver.room", "leap_dist.driver.preflight", "leap_dist.driver.aggregators"],
    ["leap_dist.driver.pool"],
    ["leap_dist.driver.control"],
    ["leap_dist.driver"],
    ["leap_dist.launching"],
    ["leap_dist.study.plan"],
    ["leap_dist.study.run"],
    ["launch"],
]
"""From the ground up; a module may import from floors below its own, and on the ground floor of `envs` among itself."""


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_every_module_has_its_floor():
    assert sorted(name for floor in FLOORS for name in floor) == sorted(MODULES)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_downwards_only(name):
    floor = next(i for i, names in enumerate(FLOORS) if name in names)
    below = {module for names in FLOORS[:floor] for module in names}
    allowed = below | (set(FLOORS[0]) if floor == 0 else set())
    found = imported(MODULES[name]) & set(MODULES)
    assert found - allowed == set()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_the_driver_imports_ray(name):
    uses_ray = any(module.split(".")[0] == "ray" for module in imported(MODULES[name]))
    assert uses_ray == name.startswith("leap_dist.driver")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_reads_pickles(name):
    assert not imported(MODULES[name]) & {"pickle", "torch.load", "joblib", "shelve", "dill"}
    assert "torch.load(" not in MODULES[name].read_text()
    assert "allow_pickle" not in MODULES[name].read_text()


def test_nothing_is_imported_in_a_circle():
    graph = {name: imported(path) & set(MODULES) - {name} for name, path in MODULES.items()}
    done: set[str] = set()
    while ready := [name for name in graph if name not in done and graph[name] <= done | {"leap_dist", "envs"}]:
        done.update(ready)
    assert done == set(graph)


def test_every_row_of_the_fault_matrix_names_tests_that_there_are():
    tests = {
        path.stem: re.findall(r"^def test_(\w+)\(", path.read_text(), re.MULTILINE)
        for path in ROOT.glob("tests/test_*.py")
    }
    rows = re.findall(
        r"^\| (\d[\d, ]*) \|[^|]*\|[^|]*\|([^|]*)\|$", (ROOT / "docs/reliability.md").read_text(), re.MULTILINE
    )
    assert sorted(int(number) for row, _ in rows for number in row.split(",")) == list(range(1, 35))
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
