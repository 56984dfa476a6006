"""The curves of an evaluation in TensorBoard, as margin charts: the estimate and both ends of its interval.

    iqm/<arm>/{point,low,high}       interquartile mean over all games that count, human-normalized
    <game>/<arm>/{point,low,high}    mean return of the arm's runs

Steps are agent steps. The layout of the custom scalars dashboard has one chart for all arms of a game.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from leap_dist.evaluation.results import Results
from leap_dist.evaluation.scoring import Points
from leap_dist.evaluation.statistics import Band
from leap_dist.storage.atomic import remove
from leap_dist.telemetry.event_file import EventFile

_ALL_GAMES = "iqm"
_FIELDS = Band._fields  # also the last parts of the tags


class _Curve(NamedTuple):
    chart: str
    arm: str
    band: Band

    def tag(self, field: str) -> str:
        return f"{self.chart}/{self.arm}/{field}"


def write(results: Results, folder: Path) -> None:
    """Write the curves as a run of TensorBoard, replacing the event files in `folder`. Raises OSError."""
    for old in folder.glob("events.out.tfevents.*"):
        remove(old)
    curves = list(_curves(results))
    writer = EventFile(folder)
    writer.add(_layout(curves), 0)
    for chart, points in _points(results).items():
        of_chart = [curve for curve in curves if curve.chart == chart]
        for index, step in enumerate(points.at):
            shown = ((one.tag(field), float(getattr(one.band, field)[index])) for one in of_chart for field in _FIELDS)
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in shown if not math.isnan(value)]
            writer.add(Summary(value=values), round(step))
    writer.flush()
    writer.close()


def _points(results: Results) -> dict[str, Points]:
    """Return the points of each chart that has curves."""
    overall = {} if results.all_points is None else {_ALL_GAMES: results.all_points}
    return {**overall, **results.points}


def _curves(results: Results) -> Iterator[_Curve]:
    for arm, overall in results.overall.items():
        yield _Curve(_ALL_GAMES, arm, overall.curve)
    for game, cells in results.cells.items():
        for arm, cell in cells.items():
            yield _Curve(game, arm, cell.curve)


def _layout(curves: list[_Curve]) -> Summary:
    """Return the layout: one chart for all games and one for each game, with a series for each arm."""
    charts: dict[str, layout_pb2.Chart] = {}
    for curve in curves:
        chart = charts.setdefault(curve.chart, layout_pb2.Chart(title=curve.chart))
        value, lower, upper = (curve.tag(field) for field in _FIELDS)
        chart.margin.series.add(value=value, lower=lower, upper=upper)
    categories = [
        layout_pb2.Category(title=title, chart=found)
        for title, found in (
            ("all games, human-normalized IQM", [chart for name, chart in charts.items() if name == _ALL_GAMES]),
            ("return, by game", [chart for name, chart in charts.items() if name != _ALL_GAMES]),
        )
        if found
    ]
    # TensorBoard's own function for this requires TensorFlow.
    tensor = TensorProto(
        dtype="DT_STRING",
        string_val=[layout_pb2.Layout(category=categories).SerializeToString()],
        tensor_shape=TensorShapeProto(),
    )
    value = Summary.Value(tag=metadata.CONFIG_SUMMARY_TAG, tensor=tensor, metadata=metadata.create_summary_metadata())
    return Summary(value=[value])
