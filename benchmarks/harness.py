"""What all benchmarks share: arms measured in turn, the hardware, and one table or one JSON object at the end."""

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
"""Measures once and returns the figure."""


def interleaved(arms: Mapping[str, Arm], repeats: int, *, warmup: bool = False) -> dict[str, list[float]]:
    """Measures every arm once, then every arm once more, and so on, so that all share the machine's moods.

    Every other round runs backwards: what warms or tires the machine favours none. `warmup` adds a round that does
    not count.
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
    """Says on stderr what goes on; stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Report:
    """The outcome of one benchmark.

    `title` says what is measured, `settings` on what (games, network, batch, steps).
    """

    title: str
    settings: Mapping[str, Any]
    figures: dict[str, tuple[str, list[float]]] = field(default_factory=dict)
    ratios: dict[str, tuple[list[float], float | None, bool]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, unit: str, samples: Sequence[float]) -> None:
        """One measured figure, with all its repetitions."""
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
        """A ratio taken within each repetition; `target` is the least (or, with `at_most`, the largest) wanted."""
        self.ratios[name] = ([a / b for a, b in zip(over, under, strict=True)], target, at_most)

    def plain(self) -> dict[str, Any]:
        """Everything as plain data, for --json."""
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
        """The table for people."""
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
        """Prints the table, or with `as_json` one JSON object."""
        print(json.dumps(self.plain(), indent=1) if as_json else self.text())


def parser(description: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """A command line with what every benchmark understands."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--repeats", type=int, default=repeats, help=f"repetitions of each arm (default {repeats})")
    result.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return result


def command() -> str:
    """The command that runs this again."""
    module = getattr(sys.modules["__main__"].__spec__, "name", None)
    return shlex.join(["python", *(["-m", module] if module else sys.argv[:1]), *sys.argv[1:]])


def hardware() -> dict[str, Any]:
    """The machine, in words and numbers; no host name."""
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
