"""The pictures of an evaluation: learning curves, performance profiles, aggregates, probability of improvement."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from leap_dist.envs.games import reference_scores
from leap_dist.evaluation.report.canvas import DASHES, draw_band, legend, new_figure, png, style
from leap_dist.evaluation.results.games import AGGREGATES, MEASURES, Results
from leap_dist.evaluation.statistics import Interval
from leap_dist.telemetry.pictures import COLOURS

_RANDOM_PLAY: dict[str, Any] = {"color": "0.6", "linestyle": "-", "linewidth": 0.8}
_MEASURES = {"final": "final return", "auc": "area under the curve"}
_AGGREGATES = {"median": "median", "iqm": "IQM", "mean": "mean", "optimality_gap": "optimality gap (less is better)"}


def pictures(results: Results) -> dict[str, bytes]:
    """PNGs by file name; of what is over all games, and of comparisons, only where there is any."""
    drawn = {"curves.png": _curves(results)}
    if results.overall:
        drawn["profiles.png"] = _profiles(results)
        drawn["aggregates.png"] = _aggregates(results)
    if results.against:
        drawn["improvement.png"] = _improvement(results)
    return {name: png(figure) for name, figure in drawn.items()}


def _curves(results: Results) -> Figure:
    """A panel for every game, and one for all."""
    panels: list[Callable[[Axes], None]] = [
        lambda axes, game=game: _draw_game(axes, results, game)  # type: ignore[misc]
        for game in results.cells
    ]
    if results.overall:
        panels.append(lambda axes: _draw_all_games(axes, results))
    columns = min(len(panels), 3 if len(panels) <= 9 else 4 if len(panels) <= 16 else 5)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(max(6.0, 3.4 * columns), 2.6 * rows + 0.7)
    for index, draw in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        style(axes)
        axes.set_xlim(0, results.budget)
        axes.set_xlabel("agent steps", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        draw(axes)
    extra = [Line2D([], [], label="random play", **_RANDOM_PLAY)] if _any_reference(results) else []
    _legend(figure, results, extra)
    return figure


def _draw_game(axes: Axes, results: Results, game: str) -> None:
    axes.set_title(game, fontsize=10)
    axes.set_ylabel("return", fontsize=8)
    cells = results.cells[game]
    if not cells:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no episode ended", transform=axes.transAxes, ha="center", va="center", fontsize=9)
        return
    if (random_play := reference_scores().get(game, {}).get("random")) is not None:
        axes.axhline(random_play, **_RANDOM_PLAY)
    for arm, cell in cells.items():
        draw_band(axes, results.grid, cell.curve, _look(results, arm))


def _draw_all_games(axes: Axes, results: Results) -> None:
    count = len(results.counted)
    axes.set_title(f"IQM of {count} game{'s' if count > 1 else ''}", fontsize=10, fontweight="bold")
    axes.set_ylabel("human-normalized return", fontsize=8)
    for arm, overall in results.overall.items():
        draw_band(axes, results.grid, overall.curve, _look(results, arm))


def _profiles(results: Results) -> Figure:
    figure = new_figure(9.0, 3.8)
    for index, measure in enumerate(MEASURES):
        axes = figure.add_subplot(1, 2, index + 1)
        style(axes)
        axes.set_title(_MEASURES[measure], fontsize=10)
        axes.set_xlabel("human-normalized score τ", fontsize=9)
        axes.set_ylabel("fraction of runs above τ", fontsize=9)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlim(results.thresholds[measure][0], results.thresholds[measure][-1])
        for arm, overall in results.overall.items():
            draw_band(axes, results.thresholds[measure], overall.profiles[measure], _look(results, arm))
    _legend(figure, results)
    return figure


def _aggregates(results: Results) -> Figure:
    height = max(1.6, 0.9 + 0.26 * len(results.arms))  # inches of a row; its label needs as much
    figure = new_figure(11.0, 2 * height + 0.4)
    for row, measure in enumerate(MEASURES):
        for column, name in enumerate(AGGREGATES):
            axes = figure.add_subplot(len(MEASURES), len(AGGREGATES), row * len(AGGREGATES) + column + 1)
            intervals = {arm: overall.aggregates[measure][name] for arm, overall in results.overall.items()}
            _draw_intervals(axes, intervals, results, named=column == 0)
            axes.set_title(_AGGREGATES[name], fontsize=10)
            if column == 0:
                axes.set_ylabel(_MEASURES[measure], fontsize=9)
            if row == len(MEASURES) - 1:
                axes.set_xlabel("human-normalized", fontsize=9)
    return figure


def _improvement(results: Results) -> Figure:
    figure = new_figure(8.0, 1.1 + 0.3 * len(results.against))
    for index, measure in enumerate(MEASURES):
        axes = figure.add_subplot(1, 2, index + 1)
        _draw_intervals(
            axes, {arm: found.improvement[measure] for arm, found in results.against.items()}, results, named=index == 0
        )
        axes.axvline(0.5, color="0.4", linewidth=1, zorder=0)
        axes.set_xlim(-0.03, 1.03)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_title(_MEASURES[measure], fontsize=10)
        axes.set_xlabel(f"P(better than {results.baseline})", fontsize=9)
    return figure


def _draw_intervals(axes: Axes, intervals: dict[str, Interval], results: Results, *, named: bool) -> None:
    """One line per arm, from above; the bar is the interval, the diamond the estimate."""
    style(axes)
    axes.grid(visible=False, axis="y")
    for place, (arm, interval) in enumerate(intervals.items()):
        colour = _look(results, arm)["color"]
        axes.barh(place, interval.high - interval.low, left=interval.low, height=0.55, color=colour, alpha=0.45)
        axes.plot(interval.point, place, marker="D", markersize=6, color=colour, markeredgecolor="black")
    axes.set_ylim(len(intervals) - 0.4, -0.6)
    axes.set_yticks(range(len(intervals)), list(intervals) if named else [""] * len(intervals))
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.use_sticky_edges = False  # or bars would begin at the panel's edge
    axes.margins(x=0.08)


def _look(results: Results, arm: str) -> dict[str, Any]:
    """Colour and dashes of an arm, together different for 30."""
    index = results.arms.index(arm)
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}


def _any_reference(results: Results) -> bool:
    return any(game in reference_scores() and cells for game, cells in results.cells.items())


def _legend(figure: Figure, results: Results, extra: list[Line2D] | None = None) -> None:
    handles = [Line2D([], [], linewidth=1.8, label=arm, **_look(results, arm)) for arm in results.arms]
    legend(figure, handles + (extra or []))
