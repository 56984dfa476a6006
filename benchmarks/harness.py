"""Shared parts of all benchmarks: interleaved arms, a hardware description, and a report as a table or JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

Arm = Callable[[], float]
"""Function that measures once and returns the figure."""


def interleaved(arms: Mapping[str, Arm], repeats: int, *, warmup: bool = False) -> dict[str, list[float]]:
    """Measure every arm once per round, so that slow changes of the machine affect all arms alike.

    Every other round runs in reverse order, so that no arm always benefits from the one before it. `warmup` adds a
    first round that is not counted.
    """
    samples: dict[str, list[float]] = {name: [] for name in arms}
    for repetition in range(-1 if warmup else 0, repeats):
        for name in [*arms][:: -1 if repetition % 2 else 1]:
            figure = arms[name]()
            if repetition >= 0:
                samples[name].append(figure)
            progress(f"{name}: {figure:,.4g} ({'warm-up' if repetition < 0 else f'{repetition + 1} of {repeats}'})")
    return samples


def progress(text: str) -> None:
    """Print progress to stderr; stdout is reserved for the result."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Report:
    """Results of one benchmark.

    Attributes:
        title: Name of what is measured.
        settings: Settings of the measurement (games, network, batch, steps).
    """

    title: str
    settings: Mapping[str, Any]
    figures: dict[str, tuple[str, list[float]]] = field(default_factory=dict)
    ratios: dict[str, tuple[list[float], float | None, bool]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, unit: str, samples: Sequence[float]) -> None:
        """Add one measured figure with all its repetitions."""
        self.figures[name] = (unit, list(samples))

    def ratio(
        self,
        name: str,
        over: Sequence[float],
        under: Sequence[float],
        *,
        target: float | None = None,
        at_most: bool = False,
    ) -> None:
        """Add a ratio taken within each repetition. `target` is its minimum or, with `at_most`, its maximum."""
        self.ratios[name] = ([a / b for a, b in zip(over, under, strict=True)], target, at_most)

    def plain(self) -> dict[str, Any]:
        """Return the report as plain data for --json."""
        return {
            "title": self.title,
            "command": command(),
            "hardware": hardware(),
            "settings": dict(self.settings),
            "figures": {name: {"unit": unit, **_spread(values)} for name, (unit, values) in self.figures.items()},
            "ratios": {
                name: {**_spread(values), "target": target, "met": _met(values, target, at_most)}
                for name, (values, target, at_most) in self.ratios.items()
            },
            "notes": self.notes,
        }

    def text(self) -> str:
        """Format the report as a table."""
        machine = hardware()
        lines = [
            self.title,
            f"  {command()}",
            f"  {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB, load "
            f"{machine['load']:.2f}; Python {machine['python']}, torch {machine['torch']}",
            "  " + ", ".join(f"{key} {value}" for key, value in self.settings.items()),
            "",
            f"  {'':<44}{'median':>12}{'lowest':>12}{'highest':>12}{'n':>4}  unit",
        ]
        for name, (unit, values) in self.figures.items():
            lines.append(f"  {name:<44}{_columns(values)}  {unit}")
        for name, (values, target, at_most) in self.ratios.items():
            goal = "" if target is None else f"  {'at most' if at_most else 'at least'} {target:g}: "
            met = "" if target is None else ("yes" if _met(values, target, at_most) else "NO")
            lines.append(f"  {name:<44}{_columns(values)}  ratio{goal}{met}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def show(self, as_json: bool) -> None:
        """Print the table, or one JSON object if `as_json` is true."""
        print(json.dumps(self.plain(), indent=1) if as_json else self.text())


def parser(description: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks share."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--repeats", type=int, default=repeats, help=f"repetitions of each arm (default {repeats})")
    result.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return result


def command() -> str:
    """Return the command line that repeats this measurement."""
    module = getattr(sys.modules["__main__"].__spec__, "name", None)
    return shlex.join(["python", *(["-m", module] if module else sys.argv[:1]), *sys.argv[1:]])


def hardware() -> dict[str, Any]:
    """Describe the machine without its host name."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else ())
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(values),
        "lowest": min(values),
        "highest": max(values),
        "samples": list(values),
    }


def _columns(values: Sequence[float]) -> str:
    spread = _spread(values)
    figures = "".join(f"{_short(spread[key]):>12}" for key in ("median", "lowest", "highest"))
    return f"{figures}{len(values):>4}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


def _met(values: Sequence[float], target: float | None, at_most: bool) -> bool | None:
    if target is None:
        return None
    median = statistics.median(values)
    return median <= target if at_most else median >= target
