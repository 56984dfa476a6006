"""The pictures of an evaluation: learning curves, performance profiles, aggregates, probability of improvement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from leap_dist.config.plurals import counted
from leap_dist.config.registry import Metric
from leap_dist.envs.games import reference_scores
from leap_dist.evaluation.results import Results
from leap_dist.evaluation.scoring import Points
from leap_dist.evaluation.statistics import Band, Interval
from leap_dist.telemetry.pictures import COLOURS, png

DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
"""Line styles, so that lines can be told apart without colors."""
NAMES = ("curves.png", "profiles.png", "aggregates.png", "improvement.png")
_DOTS_PER_INCH = 120
_RANDOM_PLAY: dict[str, Any] = {"color": "0.6", "linestyle": "-", "linewidth": 0.8}
_AGGREGATES = {"median": "median", "iqm": "IQM", "mean": "mean", "optimality_gap": "optimality gap (less is better)"}

Style = Mapping[str, Any]
"""Keyword arguments of matplotlib for a line, with at least a color."""


class Panel(NamedTuple):
    """Learning curves of several arms."""

    title: str
    y_title: str
    points: Points | None
    """None if there are no curves."""
    curves: Mapping[str, Band]
    """By arm."""
    random_play: float | None = None
    """Return of random play."""
    bold: bool = False
    by_share: bool = False
    """Whether the points are percentages of the training."""


# Building blocks --------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of the given size in inches."""
    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH)
    figure.set_layout_engine("constrained", h_pad=0.08)  # inches: keeps titles apart from the panels above
    return figure


def style_axes(axes: Axes) -> None:
    """Give a panel a light grid and no box."""
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def style_of(index: int) -> Style:
    """Return the color and the dashes of the arm at an index; they are distinct for 30 arms."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}


def styles(arms: Sequence[str]) -> dict[str, Style]:
    """Return the styles of all arms."""
    return {arm: style_of(index) for index, arm in enumerate(arms)}


def draw_band(axes: Axes, at: np.ndarray, band: Band, style: Style) -> None:
    """Draw a line through the points `at`, and the interval around it."""
    axes.fill_between(at, band.low, band.high, color=style["color"], alpha=0.18, linewidth=0)
    axes.plot(at, band.point, linewidth=1.6, **style)


def draw_legend(figure: Figure, lines: Mapping[str, Style], extra: Sequence[Line2D] = ()) -> None:
    """Draw a legend below all panels, with as many columns as fit."""
    handles = [*(Line2D([], [], linewidth=1.8, label=label, **style) for label, style in lines.items()), *extra]
    inches = 0.9 + 0.085 * max(len(str(handle.get_label())) for handle in handles)  # width of the longest entry
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=max(1, int(figure.get_figwidth() / inches)),
        fontsize=9,
        frameon=False,
        handlelength=3,
    )


# Learning curves --------------------------------------------------------------------------------------------------


def draw_curves(panels: Sequence[Panel], lines: Mapping[str, Style], metric: Metric) -> Figure:
    """Return a figure with a panel for each game, and one legend."""
    columns = _columns(len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(max(6.0, 3.4 * columns), 2.6 * rows + 0.7)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        style_axes(axes)
        axes.set_title(panel.title, fontsize=10, fontweight="bold" if panel.bold else None)
        axes.set_ylabel(panel.y_title, fontsize=8)
        _draw_panel(axes, panel, lines, metric)
    shows_random_play = any(panel.random_play is not None for panel in panels)
    draw_legend(figure, lines, [Line2D([], [], label="random play", **_RANDOM_PLAY)] if shows_random_play else [])
    return figure


def _columns(panels: int) -> int:
    """Return the number of columns of a grid: the one of those that suit its size which leaves the fewest gaps."""
    suitable = (panels,) if panels <= 3 else (3, 4) if panels <= 9 else (4,) if panels <= 16 else (5,)
    return min(suitable, key=lambda columns: -panels % columns)


def _draw_panel(axes: Axes, panel: Panel, lines: Mapping[str, Style], metric: Metric) -> None:
    axes.set_xlabel("share of the training (%)" if panel.by_share else metric.step_unit, fontsize=8)
    if panel.points is None:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no episode ended", transform=axes.transAxes, ha="center", va="center", fontsize=9)
        return
    if panel.points.logarithmic:
        axes.set_xlabel(f"{metric.step_unit} (log scale)", fontsize=8)
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(panel.points.at[0] if panel.points.logarithmic else 0, panel.points.at[-1])
    if panel.random_play is not None:
        axes.axhline(panel.random_play, **_RANDOM_PLAY)
    for arm, band in panel.curves.items():
        draw_band(axes, panel.points.at, Band(*(metric.scale * values for values in band)), lines[arm])
    if metric.minimum is not None:
        axes.set_ylim(bottom=metric.minimum)


def panels(results: Results) -> list[Panel]:
    """Return a panel for each game, and one for all games that count."""
    scoring, found = results.scoring, []
    for game, cells in results.cells.items():
        random_play = reference_scores().get(game, {}).get("random") if scoring.human_normalized and cells else None
        curves = {arm: cell.curve for arm, cell in cells.items()}
        found.append(Panel(game, scoring.metric.axis_label, results.points.get(game), curves, random_play))
    curves = {arm: overall.curve for arm, overall in results.overall.items()}
    count = len(results.counted)
    if scoring.human_normalized and curves:
        title = f"IQM of {counted(count, 'game')}"
        found.append(Panel(title, "human-normalized return", results.all_points, curves, bold=True))
        found[-1] = found[-1]._replace(by_share=results.by_share)
    elif count > 1:
        found.append(Panel("mean of all tasks", scoring.metric.axis_label, results.all_points, curves, bold=True))
    return found


# All pictures -----------------------------------------------------------------------------------------------------


def pictures(results: Results) -> dict[str, bytes]:
    """Return PNG files by name: always the curves, the others if there is anything for them to show."""
    drawn = {"curves.png": draw_curves(panels(results), styles(results.arms), results.scoring.metric)}
    if results.thresholds:
        drawn["profiles.png"] = draw_profiles(results)
        drawn["aggregates.png"] = draw_aggregates(results)
    if results.improvements and results.against:
        drawn["improvement.png"] = draw_improvement(results)
    return {name: png(figure) for name, figure in drawn.items()}


def draw_profiles(results: Results) -> Figure:
    """Return a figure with the performance profiles of all arms."""
    figure = new_figure(9.0, 3.8)
    for index, (name, title) in enumerate(results.scoring.values.items()):
        axes = figure.add_subplot(1, 2, index + 1)
        style_axes(axes)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("human-normalized score τ", fontsize=9)
        axes.set_ylabel("fraction of runs above τ", fontsize=9)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlim(results.thresholds[name][0], results.thresholds[name][-1])
        for arm, style in styles(results.arms).items():
            draw_band(axes, results.thresholds[name], results.overall[arm].profiles[name], style)
    draw_legend(figure, styles(results.arms))
    return figure


def draw_aggregates(results: Results) -> Figure:
    """Return a figure of the aggregates over all games: a row for each value, a column for each aggregate."""
    values, aggregates = results.scoring.values, results.scoring.aggregates
    height = max(1.6, 0.9 + 0.26 * len(results.arms))  # inches of a row, whose label must fit
    figure = new_figure(11.0, 2 * height + 0.4)
    for row, (value, title) in enumerate(values.items()):
        for column, name in enumerate(aggregates):
            axes = figure.add_subplot(len(values), len(aggregates), row * len(aggregates) + column + 1)
            intervals = {arm: overall.aggregates[value][name] for arm, overall in results.overall.items()}
            _draw_intervals(axes, intervals, results, named=column == 0)
            axes.set_title(_AGGREGATES[name], fontsize=10)
            if column == 0:
                axes.set_ylabel(title, fontsize=9)
            if row == len(values) - 1:
                axes.set_xlabel("human-normalized", fontsize=9)
    return figure


def draw_improvement(results: Results) -> Figure:
    """Return a figure of the probability of improvement over the baseline, for all other arms."""
    figure = new_figure(8.0, 1.1 + 0.3 * len(results.against))
    for index, (name, title) in enumerate(results.scoring.values.items()):
        axes = figure.add_subplot(1, 2, index + 1)
        intervals = {arm: against.improvement[name] for arm, against in results.against.items()}
        _draw_intervals(axes, intervals, results, named=index == 0)
        axes.axvline(0.5, color="0.4", linewidth=1, zorder=0)
        axes.set_xlim(-0.03, 1.03)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(f"P(better than {results.baseline})", fontsize=9)
    return figure


def _draw_intervals(axes: Axes, intervals: dict[str, Interval], results: Results, *, named: bool) -> None:
    """Draw a row for each arm, from the top: the bar is the interval, the diamond the estimate."""
    style_axes(axes)
    axes.grid(visible=False, axis="y")
    lines = styles(results.arms)
    for place, (arm, interval) in enumerate(intervals.items()):
        color = lines[arm]["color"]
        axes.barh(place, interval.high - interval.low, left=interval.low, height=0.55, color=color, alpha=0.45)
        axes.plot(interval.point, place, marker="D", markersize=6, color=color, markeredgecolor="black")
    axes.set_ylim(len(intervals) - 0.4, -0.6)
    axes.set_yticks(range(len(intervals)), list(intervals) if named else [""] * len(intervals))
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.use_sticky_edges = False  # otherwise bars would begin at the edge of the panel
    axes.margins(x=0.08)
