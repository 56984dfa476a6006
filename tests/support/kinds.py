"""Pytest hooks that give every test its kind: `unit`, `emulator` or `ray`; `slow` is said by the test itself.

tests/README.md says which kind is for what. No list of files is kept: a test whose fixtures launch the service is
`ray`, a test whose module imports the emulator (or that says so) is `emulator`, and every other one is `unit`. The rule
is checked while tests run: a `unit` test that starts an emulator or connects to Ray fails.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

LAUNCHING = {"environment", "launch", "undisturbed", "cluster"}
"""Fixtures of conftest.py that are for processes with a Ray of their own."""

PLAYING = {
    "a2c_learners",
    "ale_py",
    "leap_dist.envs.atari_vector",
    "leap_dist.envs.emulator",
    "leap_dist.tasks.atari",
}
"""Modules by whose import a test module is known to play games."""

DRIVER = Path(__file__).parents[1] / "driver"
"""Where the tests are that need Ray."""

FEWER = 3
"""By how much `make test` divides the examples of property tests; `make test-all` has them all."""

FEWEST = 10
"""Examples to which no property test is cut down."""


def complete() -> bool:
    """Return whether this session is `make test-all`, which leaves out nothing."""
    return hypothesis.settings.get_current_profile_name() == "full"


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """Return the names of all modules, and of what is taken from them, that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(found)


def plays(path: Path) -> bool:
    return any(name == module or name.startswith(f"{module}.") for name in imported(path) for module in PLAYING)


def kind(item: pytest.Item) -> str:
    if item.get_closest_marker("ray") or LAUNCHING & set(getattr(item, "fixturenames", ())):
        return "ray"
    return "emulator" if item.get_closest_marker("emulator") or plays(item.path) else "unit"


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(kind(item))
        if kind(item) == "ray" and item.path.parent != DRIVER:
            raise pytest.UsageError(f"{item.nodeid} needs Ray: it belongs in tests/driver, where `make test-ray` looks")
        test = getattr(item, "obj", None)
        if {"joined", "hosts"} & set(getattr(item, "fixturenames", ())):  # a cluster that a whole file shares
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        if not complete() and hypothesis.is_hypothesis_test(test):
            _reduce(test)
    items[:] = _ordered(items)


def _ordered(items: list[pytest.Item]) -> list[pytest.Item]:
    """Put the tests that need the undisturbed run last, but for the first of them.

    One process then makes that run while the others have something else to do.
    """
    need = [item for item in items if "undisturbed" in getattr(item, "fixturenames", ())]
    return need[:1] + [item for item in items if item not in need] + need[1:]


def _reduce(test: object) -> None:
    """Divide the examples that the test asks for with a decorator of its own.

    Hypothesis has no public way to change them once the decorator has run.
    """
    function = getattr(test, "__func__", test)
    wanted = getattr(function, "_hypothesis_internal_use_settings", None)
    if wanted is not None and not hasattr(function, "_reduced"):
        fewer = max(min(FEWEST, wanted.max_examples), wanted.max_examples // FEWER)
        function._hypothesis_internal_use_settings = hypothesis.settings(wanted, max_examples=fewer)
        function._reduced = True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that does what its kind does not."""
    if not item.get_closest_marker("unit"):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leap_dist.envs.emulator.Emulator.__init__", _refuse("emulator"))
        if "ray" in sys.modules:  # it takes a second to import
            patch.setattr("ray.init", _refuse("ray"))
        return (yield)


def _refuse(marker: str) -> object:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail(f"a test that is not marked `{marker}` does what only those may; see tests/README.md")

    return refuse
