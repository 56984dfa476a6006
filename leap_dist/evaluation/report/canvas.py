"""What all pictures of an evaluation have in common."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from leap_dist.evaluation.statistics import Band

DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
"""That lines are told apart without colours too."""
_DOTS_PER_INCH = 120


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH)
    figure.set_layout_engine("constrained", h_pad=0.08)  # inches, so that a title keeps its distance from what is above
    return figure


def style(axes: Axes) -> None:
    """A light grid, no box."""
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def draw_band(axes: Axes, at: np.ndarray, band: Band, look: dict[str, Any]) -> None:
    """A line at the points `at`, and the interval around it. `look` has at least a colour."""
    axes.fill_between(at, band.low, band.high, color=look["color"], alpha=0.18, linewidth=0)
    axes.plot(at, band.point, linewidth=1.6, **look)


def legend(figure: Figure, handles: list[Line2D]) -> None:
    """Below all panels, in as many columns as there is room for."""
    inches = 0.9 + 0.085 * max(len(str(handle.get_label())) for handle in handles)  # of the longest entry
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=max(1, int(figure.get_figwidth() / inches)),
        fontsize=9,
        frameon=False,
        handlelength=3,
    )


def png(figure: Figure) -> bytes:
    """The picture."""
    buffer = io.BytesIO()
    # Without the library's version in it, the same results give the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
