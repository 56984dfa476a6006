"""The pictures of a study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from leap_dist.evaluation.report.figures import (
    Panel,
    Style,
    draw_band,
    draw_curves,
    draw_legend,
    new_figure,
    style_axes,
    style_of,
)
from leap_dist.evaluation.scoring import ERRORS
from leap_dist.evaluation.statistics import Band, Spread, spread
from leap_dist.study import published
from leap_dist.study.results import Evolution, Results
from leap_dist.study.spec import ARMS
from leap_dist.telemetry.pictures import png

NAMES = ("figure3.png", "test_error.png", "validation.png", "curves.png")
_GRAY = "0.35"  # for arm none, which learns no initialization
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_PUBLISHED: dict[str, Any] = {"linestyle": "--", "linewidth": 0.9, "alpha": 0.75}
# From blue to red via violet: neither end nor the middle fades on white, as it does in most such maps.
_BLUE_TO_RED = LinearSegmentedColormap.from_list("blue_to_red", ["#0057B8", "#8A4FA3", "#D1182B"])


def pictures(results: Results) -> dict[str, bytes]:
    """Return PNG files by name, for everything that the study has results for."""
    drawn: dict[str, Figure] = {}
    if results.study.tasks == "omniglot":
        drawn["figure3.png"] = figure3(results)
        if results.cells:
            drawn["test_error.png"] = error_by_pretraining(results)
    if results.validation:
        drawn["validation.png"] = error_during_meta_training(results)
    if results.cells:
        drawn["curves.png"] = draw_curves(panels(results), styles(results), ERRORS.metric)
    return {name: png(figure) for name, figure in drawn.items()}


def panels(results: Results) -> list[Panel]:
    """Return a panel with training-error curves for each group."""
    of = "pretraining alphabets" if results.study.tasks == "omniglot" else "held out"
    return [
        Panel(
            f"{of}: {group}",
            ERRORS.metric.axis_label,
            results.points[group],
            {arm: cell.curve for arm, cell in arms.items()},
        )
        for group, arms in results.cells.items()
    ]


def style_of_arm(arm: str) -> Style:
    """Return the color and the dashes of a meta-learner, which are the same in every study."""
    style = style_of(ARMS.index(arm))
    return {**style, "color": _GRAY} if arm == "none" else style


def styles(results: Results, *, markers: bool = False) -> dict[str, Style]:
    """Return the styles of all arms, with markers for lines that have few points."""
    return {arm: _marked(arm) if markers else style_of_arm(arm) for arm in results.study.arms}


def figure3(results: Results) -> Figure:
    """Return the counterpart of the paper's figure 3: training curves during meta-training, and the area under them."""
    figure = new_figure(10.5, 4.3)
    figure.set_layout_engine("constrained", wspace=0.06)  # keeps the label of the color bar off the right panel
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        style_axes(axes)
    _draw_evolution(figure, left, results.evolution)
    right.set_title("area under the training-error curve, held-out alphabets", fontsize=10)
    right.set_ylabel("area (0–100)", fontsize=9)
    _draw_by_pretraining(right, results, "auc")
    _draw_legend(figure, results)
    return figure


def error_by_pretraining(results: Results) -> Figure:
    """Return a figure of the test error by number of pretraining alphabets, with the paper's for comparison."""
    figure = new_figure(7.5, 4.8)
    axes = figure.add_subplot()
    style_axes(axes)
    axes.set_title("test error on held-out alphabets", fontsize=10)
    axes.set_ylabel("test error (%)", fontsize=9)
    for arm in results.study.arms:
        axes.plot(
            [int(group) for group in published.PRETRAINING],
            list(published.OMNIGLOT[arm].values()),
            color=style_of_arm(arm)["color"],
            **_PUBLISHED,
        )
    _draw_by_pretraining(axes, results, "test_error")
    axes.set_xticks(sorted({int(published.PRETRAINING[0]), *axes.get_xticks(), int(published.PRETRAINING[-1])}))
    drawn = [value for line in axes.lines for value in np.asarray(line.get_ydata(), float)]
    if min(drawn) > 0:  # errors range from 2 % to 44 %: on a linear scale the best arms would overlap
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_yticks([tick for tick in (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100) if min(drawn) < 1.3 * tick])
        axes.set_ylim(min(drawn) / 1.3, max(drawn) * 1.3)
        axes.yaxis.set_major_formatter(ScalarFormatter())
    _draw_legend(figure, results, [Line2D([], [], color="0.3", label="the paper's table 2", **_PUBLISHED)])
    return figure


def error_during_meta_training(results: Results) -> Figure:
    """Return a figure of the error on the validation alphabets over meta-updates, with a panel for each group."""
    figure = new_figure(max(6.5, 4.2 * len(results.validation)), 3.8)
    row = figure.subplots(1, len(results.validation), sharey=True, squeeze=False)[0]
    for axes, (group, arms) in zip(row, results.validation.items(), strict=True):
        style_axes(axes)
        axes.set_title(f"validation alphabets, {group} pretraining alphabets", fontsize=10)
        axes.set_xlabel("meta-updates", fontsize=9)
        axes.set_ylabel("error (%)", fontsize=9)
        for arm, errors in arms.items():
            at = sorted(errors)
            _draw_spreads(axes, at, [spread(dict(enumerate(errors[one]))) for one in at], arm)
    measured = set[str]().union(*results.validation.values())
    draw_legend(figure, {arm: _marked(arm) for arm in results.study.arms if arm in measured})
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
        color = shade.to_rgba(middle)
        axes.plot(stretch.updates, stretch.loss, color=color, linewidth=1.3)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    bar = figure.colorbar(shade, ax=axes, pad=0.02, aspect=30)
    bar.set_label("meta-update", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_by_pretraining(axes: Axes, results: Results, name: str) -> None:
    """Draw a line for each arm, in %, and one standard deviation over seeds to both sides."""
    groups = sorted(results.study.groups, key=int)
    axes.set_xlabel("pretraining alphabets", fontsize=9)
    axes.set_xticks([int(group) for group in groups])
    for arm in results.study.arms:
        at = [group for group in groups if arm in results.cells.get(group, {})]
        if not at:
            continue
        spreads = [results.cells[group][arm].values[name].over_seeds for group in at]
        _draw_spreads(axes, [int(group) for group in at], spreads, arm)


def _draw_spreads(axes: Axes, at: Sequence[int], spreads: Sequence[Spread], arm: str) -> None:
    """Draw the means over seeds in %, and one standard deviation to both sides, which is 0 for one seed."""
    mean = 100 * np.array([one.mean for one in spreads])
    deviation = 100 * np.nan_to_num([one.deviation for one in spreads])
    draw_band(axes, np.array(at), Band(mean, mean - deviation, mean + deviation), _marked(arm))


def _draw_legend(figure: Figure, results: Results, extra: Sequence[Line2D] = ()) -> None:
    draw_legend(figure, styles(results, markers=True), extra)


def _marked(arm: str) -> Style:
    return {**style_of_arm(arm), "marker": _MARKERS[ARMS.index(arm)], "markersize": 5}
