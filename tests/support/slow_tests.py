"""Pytest hooks that end each session with its ten slowest tests, and with every test over the limit of the fast suite.

Seconds of processor time stand beside those of the clock: on a busy machine they tell a slow test from one that waited.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

LIMIT = 5.0
"""Seconds that a test may take without the marker `slow`."""

SHOWN = 10


def _cpu_seconds() -> float:
    """Processor time of this process and of the children that it has waited for."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.stash[_STARTED] = _cpu_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "teardown":
        report.user_properties.append(("cpu_seconds", _cpu_seconds() - item.stash[_STARTED]))
    return report


_STARTED = pytest.StashKey[float]()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the slowest tests, with setup and teardown."""
    clock: dict[str, float] = {}
    cpu: dict[str, float] = {}
    slow: set[str] = set()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if not isinstance(report, pytest.TestReport):
                continue
            clock[report.nodeid] = clock.get(report.nodeid, 0.0) + report.duration
            used = dict(report.user_properties).get("cpu_seconds", 0.0)  # the last of a test's three reports has it
            cpu[report.nodeid] = max(used, cpu.get(report.nodeid, 0.0))
            if "slow" in report.keywords:
                slow.add(report.nodeid)
    ordered = sorted(clock, key=lambda name: -clock[name])
    over = [name for name in ordered[SHOWN:] if clock[name] > LIMIT and name not in slow]
    if not ordered or clock[ordered[0]] < 1:
        return
    terminalreporter.section("slowest tests: seconds by the clock, seconds of processor time")
    for name in ordered[:SHOWN] + over:
        mark = f"  over {LIMIT:g} s" if clock[name] > LIMIT and name not in slow else ""
        terminalreporter.line(f"{clock[name]:7.1f} {cpu[name]:7.1f}  {name}{mark}")
    terminalreporter.line(
        f"{len(clock)} tests, {sum(clock.values()):.0f} s by the clock, {sum(cpu.values()):.0f} s CPU"
    )
