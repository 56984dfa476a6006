"""Heat map of the cosines between the games' meta-gradients."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_DOTS_PER_INCH = 100
_MOST_NUMBERS = 12
"""Largest number of games for which each cell shows its number."""


class Picture(NamedTuple):
    """An encoded image."""

    png: bytes
    width: int
    """Width in pixels."""
    height: int
    """Height in pixels."""


def draw(games: list[str], cosines: list[list[float]], version: int) -> Picture:
    """Draw the cosines (N, N) between the meta-gradients of N games: red for agreement, blue for opposition."""
    count, values = len(games), np.array(cosines)
    side = max(4.0, 1.8 + (0.55 if count <= _MOST_NUMBERS else 0.27) * count)  # inches
    figure = Figure((side + 0.9, side), dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = axes.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)  # red and blue: distinguishable with color blindness
    axes.set_xticks(range(count), games, rotation=90, fontsize=8)
    axes.set_yticks(range(count), games, fontsize=8)
    axes.set_title(f"cosine between the games' pulls\nafter meta-update {version}", fontsize=9)
    if count <= _MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(values):
            color = "white" if abs(value) > 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(shown, ax=axes, shrink=0.8).ax.tick_params(labelsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    width, height = figure.canvas.get_width_height()
    return Picture(file.getvalue(), width, height)
