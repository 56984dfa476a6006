"""Arms of benchmarks/scale.py: optimizations that spare the server or the network, so that it serves more workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Arm:
    """One arm: settings (dotted names, with __ for the dot) and changes to the workers' behavior."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    load: Mapping[str, Any] = field(default_factory=dict)
    """Values for fields of `Load`."""
    point: Mapping[str, Any] = field(default_factory=dict)
    """Values for fields of `Point`."""


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
"""Arms by name. `before` has no optimization; the names of the others combine these:

    bare          partial contributions have no vector if nobody would read it
    rarer polls   the driver polls the status less often when a poll takes long
    paced         the server tells workers how often to report
    int8          contributions use eight bits per number
    together      the reports of a node's workers are batched and delivered in one call
"""


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the server's busy share and the workers' waiting time over the number of workers, one row for each mode."""
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
