"""The pictures of a study, and the curves of an evaluation of supervised tasks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter, NullLocator, ScalarFormatter

from leap_dist.evaluation.report.canvas import DASHES, draw_band, legend, new_figure, png, style
from leap_dist.evaluation.results.measures import Points
from leap_dist.evaluation.statistics import Band
from leap_dist.study import published
from leap_dist.study.meta_training import Evolution
from leap_dist.study.results import Results
from leap_dist.study.spec import ARMS
from leap_dist.telemetry.pictures import COLOURS

_NONE = "0.35"  # nothing was learned, so no colour
_MARKERS = ("o", "s", "^", "D", "v", "X")
_PUBLISHED: dict[str, Any] = {"linestyle": "--", "linewidth": 0.9, "alpha": 0.75}
# From blue to red over violet: neither end nor the middle fades on white, as it does in most such maps.
_BLUE_TO_RED = LinearSegmentedColormap.from_list("blue_to_red", ["#0057B8", "#8A4FA3", "#D1182B"])


class Panel(NamedTuple):
    """Training error of several arms while they learned."""

    title: str
    points: Points
    curves: dict[str, Band]
    """By arm, parts of 1."""


def pictures(results: Results) -> dict[str, bytes]:
    """PNGs by file name, of what there is."""
    drawn: dict[str, Figure] = {}
    if results.study.tasks == "omniglot":
        drawn["figure3.png"] = figure3(results)
        if results.cells:
            drawn["test_error.png"] = error_by_pretraining(results)
    if results.cells:
        of = "pretraining alphabets: " if results.study.tasks == "omniglot" else "held out: "
        panels = [
            Panel(f"{of}{group}", results.points[group], {arm: cell.curve for arm, cell in arms.items()})
            for group, arms in results.cells.items()
        ]
        drawn["curves.png"] = curves(panels, {arm: look(arm) for arm in results.study.arms})
    return {name: png(figure) for name, figure in drawn.items()}


def look(arm: str) -> dict[str, Any]:
    """Colour and dashes of a meta-learner: the same in every study, whatever others there are."""
    index = ARMS.index(arm)
    return {"color": _NONE if arm == "none" else COLOURS[index], "linestyle": DASHES[index % len(DASHES)]}


def figure3(results: Results) -> Figure:
    """Figure 3 of the paper: how training curves evolve over meta-training, and the area under them by group."""
    figure = new_figure(10.5, 4.3)
    figure.set_layout_engine("constrained", wspace=0.06)  # keeps the colour bar's label from the right panel's
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        style(axes)
    _draw_evolution(figure, left, results.evolution)
    right.set_title("area under the training-error curve, held-out alphabets", fontsize=10)
    right.set_ylabel("area (0–100)", fontsize=9)
    _draw_by_pretraining(right, results, "auc")
    _legend(figure, results)
    return figure


def error_by_pretraining(results: Results) -> Figure:
    """Test error by number of pretraining alphabets, beside the paper's."""
    figure = new_figure(7.5, 4.8)
    axes = figure.add_subplot()
    style(axes)
    axes.set_title("test error on held-out alphabets", fontsize=10)
    axes.set_ylabel("test error (%)", fontsize=9)
    for arm in results.study.arms:
        axes.plot(
            [int(group) for group in published.PRETRAINING],
            list(published.OMNIGLOT[arm].values()),
            color=look(arm)["color"],
            **_PUBLISHED,
        )
    _draw_by_pretraining(axes, results, "test_error")
    axes.set_xticks(sorted({int(published.PRETRAINING[0]), *axes.get_xticks(), int(published.PRETRAINING[-1])}))
    drawn = [value for line in axes.lines for value in np.asarray(line.get_ydata(), float)]
    if min(drawn) > 0:  # from 2 % to 44 %: on an even scale the best arms would lie on one another
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_yticks([tick for tick in (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100) if min(drawn) < 1.3 * tick])
        axes.set_ylim(min(drawn) / 1.3, max(drawn) * 1.3)
        axes.yaxis.set_major_formatter(ScalarFormatter())
    _legend(figure, results, [Line2D([], [], color="0.3", label="the paper's table 2", **_PUBLISHED)])
    return figure


def curves(panels: list[Panel], looks: dict[str, dict[str, Any]]) -> Figure:
    """A panel for each, all with the same arms."""
    columns = min(len(panels), 3 if len(panels) <= 9 else 4)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(max(6.0, 3.5 * columns), 2.7 * rows + 0.7)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        style(axes)
        axes.set_title(panel.title, fontsize=10)
        axes.set_ylabel("training error (%)", fontsize=8)
        if panel.points.logarithmic:
            axes.set_xlabel("examples (log scale)", fontsize=8)
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_xlabel("examples", fontsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlim(panel.points.at[0] if panel.points.logarithmic else 0, panel.points.at[-1])
        for arm, band in panel.curves.items():
            draw_band(axes, panel.points.at, Band(*(100 * values for values in band)), looks[arm])
        axes.set_ylim(bottom=0)
    legend(figure, [Line2D([], [], linewidth=1.8, label=arm, **found) for arm, found in looks.items()])
    return figure


def _draw_evolution(figure: Figure, axes: Axes, evolution: Evolution | None) -> None:
    axes.set_xlabel("inner step", fontsize=9)
    axes.set_ylabel("training loss", fontsize=9)
    if evolution is None:
        axes.set_title("training curves over meta-training", fontsize=10)
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no meta-update of leap yet", transform=axes.transAxes, ha="center", va="center")
        return
    alphabets = f"{evolution.group} alphabet{'' if evolution.group == '1' else 's'}"
    axes.set_title(f"training curves of leap over meta-training, {alphabets}", fontsize=10)
    shade = ScalarMappable(Normalize(1, max(2, evolution.stretches[-1].last)), _BLUE_TO_RED)
    for stretch in evolution.stretches:
        middle = np.array((stretch.first + stretch.last) / 2)
        colour = shade.to_rgba(middle)
        axes.plot(stretch.updates, stretch.loss, color=colour, linewidth=1.3)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    bar = figure.colorbar(shade, ax=axes, pad=0.02, aspect=30)
    bar.set_label("meta-update", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_by_pretraining(axes: Axes, results: Results, measure: str) -> None:
    """A line per arm, in %; shaded, a standard deviation over seeds to both sides."""
    groups = sorted(results.study.groups, key=int)
    axes.set_xlabel("pretraining alphabets", fontsize=9)
    axes.set_xticks([int(group) for group in groups])
    for arm in results.study.arms:
        at = [group for group in groups if arm in results.cells.get(group, {})]
        if not at:
            continue
        spreads = [results.cells[group][arm].values[measure].over_seeds for group in at]
        mean = 100 * np.array([spread.mean for spread in spreads])
        deviation = 100 * np.nan_to_num([spread.deviation for spread in spreads])
        x = np.array([int(group) for group in at])
        draw_band(axes, x, Band(mean, mean - deviation, mean + deviation), _marked(arm))


def _legend(figure: Figure, results: Results, extra: list[Line2D] | None = None) -> None:
    handles = [Line2D([], [], linewidth=1.8, label=arm, **_marked(arm)) for arm in results.study.arms]
    legend(figure, handles + (extra or []))


def _marked(arm: str) -> dict[str, Any]:
    """Where there are few points to a line."""
    return {**look(arm), "marker": _MARKERS[ARMS.index(arm)], "markersize": 5}
