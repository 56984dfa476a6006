"""The pictures of a run: progress.png, which is drawn from the ledger alone, the heat map of agreement, and a text."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator

from leap_dist.config import registry
from leap_dist.config.registry import ERROR, RETURN, Metric
from leap_dist.envs.games import reference_scores
from leap_dist.storage.atomic import write_atomic

_HEATMAP_DPI = 100
_MOST_NUMBERS = 12
"""Largest number of games for which each cell shows its number."""
_NO_MARKS = str.maketrans("", "", "*`")


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
    figure = Figure((side + 0.9, side), dpi=_HEATMAP_DPI, layout="constrained")
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
    return _encode(figure)


def draw_text(markdown: str) -> Picture:
    """Draw a heading and the paragraphs below it for a card of TensorBoard. The marks of Markdown are left out.

    A heading of more than 90 characters and a paragraph of more than 480 are cut.
    """
    heading, *paragraphs = [line.translate(_NO_MARKS) for line in markdown.splitlines() if line]
    heading = textwrap.fill(textwrap.shorten(heading, 90, placeholder=" …"), 40)
    shortened = (textwrap.shorten(text, 480, placeholder=" …") for text in paragraphs)
    body = "\n\n".join(textwrap.fill(text, 50, break_on_hyphens=False) for text in shortened)
    lines = 2 + (heading + body).count("\n")
    # TensorBoard scales pictures without smoothing, so this one is as wide as a card.
    figure = Figure((3.4, 0.2 + 0.145 * lines), dpi=_HEATMAP_DPI)
    FigureCanvasAgg(figure)
    figure.text(0.02, 0.98, heading, va="top", fontsize=_NORMAL, weight="bold", parse_math=False)
    figure.text(0.02, 0.02, body, va="bottom", fontsize=_SMALL, parse_math=False)
    return _encode(figure)


# Colors of Okabe and Ito, which people with color blindness can tell apart. Yellow is too faint, black is the mean's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "p", "h")
_RANDOM_PLAY: dict[str, Any] = {"color": "0.55", "linestyle": "--", "linewidth": 1.0}
_ONE_TASK: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4.5, "markeredgewidth": 0, "alpha": 0.5}
_SCORES_LEGEND = (
    Line2D([], [], color="0.3", label="one task", **_ONE_TASK),
    Line2D([], [], color="0.3", linewidth=1.2, label="mean of a meta-update"),
)
_RANDOM_PLAY_LEGEND = Line2D([], [], label="random play", **_RANDOM_PLAY)


class _Format(NamedTuple):
    """Sizes of a chart, for text that can still be read where people see it."""

    panel: tuple[float, float]
    """Width and height of a game's panel in inches."""
    width: float
    """Smallest width of the chart in inches."""
    dots_per_inch: int
    columns: tuple[int, int, int]
    """Most panels side by side, for up to 12, up to 30, and more games."""
    legend_below: bool
    """Whether the legend of the lengths is below the panel instead of beside it."""


SCREEN = _Format((2.1, 1.9), 6.3, 155, (4, 6, 8), legend_below=False)
"""A chart that can be read at half its size, as on a web page."""
PHONE = _Format((2.2, 1.7), 4.5, 240, (2, 2, 2), legend_below=True)
"""A tall chart of 1,080 pixels across."""
_PATHS = "Below: length of the path that training takes from the initialization (shorter is better)."
_CAPTION = {
    RETURN: f"Points: return of one task, over its second half (more is better). {_PATHS}",
    ERROR: f"Points: training error of one task (less is better). {_PATHS}",
}
_SMALL, _NORMAL, _LARGE = 8, 9, 11
"""Sizes of text in points."""


class _Task(NamedTuple):
    """The part of a ledger line that the chart shows."""

    version: int
    score: float | None
    length: float
    steps: int


def progress_picture(lines: Iterable[dict[str, Any]], path: Path, title: str, format: _Format = SCREEN) -> None:
    """Draw the returns (or training errors) of all tasks, one panel for each game, and the lengths of their paths.

    Returns are means over the second half of a task, errors over all its batches. The PNG replaces `path` atomically.
    Raises OSError if it cannot be written; then the old file stays.
    """
    rest = iter(lines)
    first: list[dict[str, Any]] = []
    while (not first or not first[-1]["curve"]) and (line := next(rest, None)) is not None:
        first.append(line)  # until a curve shows what is measured
    drawn = registry.for_ledger(first)
    tasks: defaultdict[str, list[_Task]] = defaultdict(list)
    for line in itertools.chain(first, rest):
        if line["final"]:
            score = drawn.task_score(line["curve"])
            steps = line["curve"][-1]["steps"] if line["curve"] else 0
            tasks[line["game"]].append(_Task(line["version_after"], score, line["path"]["length"], steps))
    by_name = {game: tasks[game] for game in sorted(tasks)}
    figure = _draw(by_name, drawn, title, format) if tasks else _empty(title, format)
    _save(figure, path)


def _draw(tasks: dict[str, list[_Task]], drawn: Metric, title: str, format: _Format) -> Figure:
    few, some, many = format.columns
    columns = min(len(tasks), few if len(tasks) <= 12 else some if len(tasks) <= 30 else many)
    rows = math.ceil(len(tasks) / columns)
    legend_rows = math.ceil((len(tasks) + 1) / 2) if format.legend_below else 0
    heights = format.panel[1] * rows + 0.4, 2.8 + 0.17 * legend_rows
    width = max(format.width, format.panel[0] * columns)
    caption = textwrap.fill(_CAPTION[drawn], round(14 * width))
    size = width, 0.5 + sum(heights) + 0.15 * caption.count("\n")
    figure = Figure(figsize=size, dpi=format.dots_per_inch, layout="constrained")
    figure.suptitle(title, fontsize=_LARGE, parse_math=False)
    # Two subfigures, so that the legend beside the lower one takes no space from the upper one.
    (upper,), (lower,) = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
    last = max(task.version for of_game in tasks.values() for task in of_game)
    for index, (game, of_game) in enumerate(tasks.items()):
        axes = upper.add_subplot(rows, columns, index + 1)
        _draw_scores(axes, game, of_game, drawn, COLOURS[index % len(COLOURS)], last)
    legend = _SCORES_LEGEND if tasks.keys().isdisjoint(reference_scores()) else (*_SCORES_LEGEND, _RANDOM_PLAY_LEGEND)
    upper.legend(handles=legend, loc="outside lower center", ncols=3, fontsize=_SMALL, frameon=False, columnspacing=1)
    _draw_lengths(lower.add_subplot(), tasks, last, format)
    lower.supxlabel(caption, fontsize=_SMALL, color="0.35")
    return figure


def _draw_scores(axes: Axes, game: str, tasks: list[_Task], drawn: Metric, color: str, last: int) -> None:
    axes.set_title(game, fontsize=_NORMAL)
    _label(axes, drawn.axis_label, last, ticks=5)
    ended = [(task.version, drawn.scale * task.score) for task in tasks if task.score is not None]
    random_play = reference_scores().get(game, {}).get("random")
    if not ended:
        axes.set_yticks([])
        text = drawn.no_score_text.format(steps=max(task.steps for task in tasks))
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=_SMALL)
        return
    if random_play is not None:
        axes.axhline(random_play, **_RANDOM_PLAY)
    axes.plot(*zip(*ended, strict=True), color=color, **_ONE_TASK)
    axes.plot(*_means(ended), color=color, linewidth=1.2)
    if drawn.minimum is not None:  # so that panels can be compared
        axes.update_datalim([(last, drawn.minimum)])
        axes.autoscale_view()
        axes.set_ylim(bottom=drawn.minimum)


def _draw_lengths(axes: Axes, tasks: dict[str, list[_Task]], last: int, format: _Format) -> None:
    axes.set_title("path length", fontsize=_NORMAL)
    _label(axes, "path length (log scale)", last, ticks=10)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())  # labels these only if the axis spans less than a decade
    # A diverged task has no finite length, and a logarithmic axis cannot show 0.
    drawn = {
        game: [(task.version, task.length) for task in of_game if 0 < task.length < math.inf]
        for game, of_game in tasks.items()
    }
    every = max(1, last // 20)
    for index, (game, points) in enumerate(drawn.items()):
        if points:
            axes.plot(*_means(points), label=game, alpha=0.8, markevery=every, **_style(index))
    everything = [point for points in drawn.values() for point in points]
    if everything and len(tasks) > 1:  # the mean of one game is the game
        axes.plot(
            *_means(everything), label="mean of all tasks", color="black", linewidth=2.2, marker=".", markevery=every
        )
    if len(axes.lines) > 1 and format.legend_below:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=_SMALL, frameon=False)
    elif len(axes.lines) > 1:
        columns = math.ceil(len(axes.lines) / 13)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=columns, fontsize=_SMALL, frameon=False)


def _means(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Return versions in ascending order, and the mean of the values at each."""
    by_version: defaultdict[int, list[float]] = defaultdict(list)
    for version, value in points:
        by_version[version].append(value)
    versions = sorted(by_version)
    return versions, [sum(by_version[version]) / len(by_version[version]) for version in versions]


def _style(index: int) -> dict[str, Any]:
    """Return color and marker for a game by its number. The combinations are distinct for 60 games."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": _MARKERS[index // len(COLOURS) % len(_MARKERS)],
        "markersize": 4,
        "linewidth": 1.2,
    }


def _label(axes: Axes, values: str, last: int, ticks: int) -> None:
    axes.set_xlabel("meta-update", fontsize=_SMALL)
    axes.set_ylabel(values, fontsize=_SMALL)
    axes.tick_params(which="both", labelsize=_SMALL)
    axes.set_xlim(0.5, last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=ticks, integer=True, min_n_ticks=1))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _empty(title: str, format: _Format) -> Figure:
    figure = Figure(figsize=(format.width, 3.0), dpi=format.dots_per_inch)
    figure.suptitle(title, fontsize=_LARGE, parse_math=False)
    figure.text(0.5, 0.45, "no meta-update has been made yet", ha="center", va="center", fontsize=_LARGE, color="0.4")
    return figure


def png(figure: Figure) -> bytes:
    """Return the figure as a PNG file. The same content gives the same bytes.

    Characters that the font lacks are drawn as boxes, without a warning in the user's terminal.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure.savefig(buffer, format="png", metadata={"Software": None})  # without the version of the library
    return buffer.getvalue()


def _encode(figure: Figure) -> Picture:
    width, height = figure.canvas.get_width_height()
    return Picture(png(figure), width, height)


def _save(figure: Figure, path: Path) -> None:
    write_atomic(path, png(figure), "picture", durable=False)
