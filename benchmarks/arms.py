"""The arms of benchmarks/scale.py: what is taken from the server, or off the wire, to serve more workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Arm:
    """Settings, by dotted name with __ for the dot, and what else the workers do."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    load: Mapping[str, Any] = field(default_factory=dict)
    """Fields of Load."""
    point: Mapping[str, Any] = field(default_factory=dict)
    """Fields of Point."""


GATHER_SECONDS = 5.0
_OLD = {"paced": False, "polls_paced": False}
_TOGETHER: dict[str, Any] = {"server__gather_seconds": GATHER_SECONDS}
ARMS: Mapping[str, Arm] = {
    "before": Arm(load=_OLD, point={"bare": False}),
    "bare": Arm(load=_OLD),
    "rarer polls": Arm(load={"paced": False}, point={"bare": False}),
    "paced": Arm(load={"polls_paced": False}, point={"bare": False}),
    "int8": Arm({"worker__wire": "int8"}, _OLD, {"bare": False}),
    "together": Arm(_TOGETHER, _OLD, {"bare": False}),
    "bare + paced": Arm(),
    "bare + paced + int8": Arm({"worker__wire": "int8"}),
    "all": Arm({"worker__wire": "int8", **_TOGETHER}),
}
"""What is meant:

    bare          partial contributions have no vector where nobody would read it
    rarer polls   the driver asks for the status less often where that takes long
    paced         the server says how often to report
    int8          contributions have eight bits a number
    together      what the workers of a node report is gathered, and delivered in one call

`before` has none of them.
"""


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Busy share and what workers wait, over the number of workers, a row for each mode."""
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(row["mode"] for row in found))
    figure = Figure(figsize=(8.5, 3.0 * len(modes)), layout="constrained")
    axes = figure.subplots(len(modes), 2, squeeze=False)
    for (left, right), mode in zip(axes, modes, strict=True):
        for arm in dict.fromkeys(row["arm"] for row in found):
            rows = [row for row in found if (row["mode"], row["arm"]) == (mode, arm)]
            workers = [row["workers"] for row in rows]
            left.plot(workers, [row["busy"] for row in rows], marker="o", markersize=3, label=arm)
            right.plot(workers, [100 * row["time waiting"] for row in rows], marker="o", markersize=3)
        left.axhline(1.0, color="0.5", linestyle=":")
        left.set(xscale="log", xlabel="workers", ylabel="busy share of the server", title=f"mode {mode}")
        right.set(xscale="log", xlabel="workers", ylabel="workers' time spent waiting, %", title=f"mode {mode}")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
