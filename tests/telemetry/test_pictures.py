"""The picture of a run: that it is a whole PNG, and that its panels show what the ledger says."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import event_files
import numpy as np
import pytest
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from leap_dist.config.loading import resolve
from leap_dist.config.registry import ALPHABETS, ERROR, RETURN
from leap_dist.envs.games import SETS, reference_scores
from leap_dist.telemetry import pictures
from leap_dist.telemetry.overview import about
from leap_dist.telemetry.pictures import progress_picture

THREE = ("freeway", "pong", "up_n_down")


def point(steps: int, episodes: int, score: float | None) -> dict[str, Any]:
    return {"steps": steps, "episodes": episodes, "score": score, "means": {}}


def line(game: str, version: int, score: float | None = 1.0, length: float = 3.0) -> dict[str, Any]:
    curve = [point(100, 0, None), point(200, 0 if score is None else 2, score)]
    return {"game": game, "version_after": version, "final": True, "curve": curve, "path": {"length": length}}


def supervised(alphabet: str, version: int, error: float = 0.5) -> dict[str, Any]:
    """A line of a run whose tasks are alphabets, with a mean error of `error` over all its batches."""
    curve = [(100, 1.5 * error), (200, 0.5 * error)]
    points = [{**point(steps, 5, value), "means": {"loss": 1.0, "error": value}} for steps, value in curve]
    return {**line(alphabet, version), "curve": points}


def figure_of(lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, *format: Any) -> Figure:
    """What would have been saved."""
    saved: list[Figure] = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: saved.append(figure))
    progress_picture(lines, Path("unused"), "a run", *format)
    return saved[0]


def texts(artist: Artist) -> list[str]:
    return [text.get_text() for text in artist.findobj(Text)]


def panel(figure: Figure, title: str) -> Axes:
    (found,) = [axes for axes in figure.axes if axes.get_title() == title]
    return found


def curve(axes: Axes, colour: str | None = None, label: str | None = None) -> tuple[list[float], list[float]]:
    """The one solid line in a panel of that colour or label."""
    (found,) = [
        drawn
        for drawn in axes.lines
        if drawn.get_linestyle() == "-" and colour in (None, drawn.get_color()) and label in (None, drawn.get_label())
    ]
    return list(found.get_xdata()), list(found.get_ydata())


def coloured(path: Path) -> tuple[tuple[int, ...], int]:
    """Height and width of a PNG, and how many of its pixels are neither white, black nor gray."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return pixels.shape[:2], int((pixels.max(axis=2) - pixels.min(axis=2) > 60).sum())


@pytest.mark.parametrize(("games", "least"), [(THREE, (800, 960)), (SETS["seed24"], (1200, 1800))])
def test_it_is_a_png_with_curves(tmp_path: Path, games: tuple[str, ...], least: tuple[int, int]) -> None:
    progress_picture([line(game, version) for version in (1, 2, 3) for game in games], tmp_path / "run.png", "a run")
    size, ink = coloured(tmp_path / "run.png")
    assert size >= least
    assert size[1] >= least[1]
    assert ink > 300 * len(games)
    assert [path.name for path in tmp_path.iterdir()] == ["run.png"]


def test_every_game_has_a_panel_with_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figure_of([line(game, 1) for game in SETS["seed24"]], monkeypatch)
    for game in SETS["seed24"]:
        assert panel(figure, game).get_ylabel() == "return (points)"
    assert len(figure.axes) == 25
    assert all(axes.get_xlabel() == "meta-update" for axes in figure.axes)
    lengths = panel(figure, "path length")
    assert lengths.get_yscale() == "log"
    assert "length" in lengths.get_ylabel()
    legend = lengths.get_legend()
    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} == {*SETS["seed24"], "mean of all tasks"}


@pytest.mark.parametrize("games", [THREE, SETS["seed24"]])
def test_text_can_be_read_where_people_see_it(monkeypatch: pytest.MonkeyPatch, games: tuple[str, ...]) -> None:
    """At 480 pixels across for up to three games, and on a phone at 360 points for any number: letters of 9 pixels."""
    lines = [line(game, version) for version in (1, 2) for game in games]
    for format, across in ((pictures.SCREEN, 480), (pictures.PHONE, 360)):
        if format is pictures.SCREEN and len(games) > 3:
            continue
        figure = figure_of(lines, monkeypatch, format)
        scale = across / figure.get_size_inches()[0] / 72
        sizes = [text.get_fontsize() * scale for text in figure.findobj(Text) if text.get_text()]
        assert min(sizes) >= 8.2
        figure.draw_without_rendering()
        titles = [panel(figure, game).title.get_window_extent() for game in games]
        assert not [1 for at, one in enumerate(titles) for other in titles[at + 1 :] if one.overlaps(other)]


def test_the_picture_explains_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for lines, words in (([line("pong", 1)], "more is better"), ([supervised("greek", 1)], "less is better")):
        caption = " ".join(" ".join(texts(figure_of(lines, monkeypatch))).split())
        assert words in caption
        assert "shorter is better" in caption


def test_of_one_game_there_is_no_mean_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = panel(figure_of([line("pong", version) for version in (1, 2)], monkeypatch), "path length")
    assert len(lengths.lines) == 1
    assert lengths.get_legend() is None


def test_a_phone_gets_a_tall_picture(tmp_path: Path) -> None:
    progress_picture([line(game, 1) for game in SETS["seed24"]], tmp_path / "run.png", "a run", pictures.PHONE)
    (height, width), ink = coloured(tmp_path / "run.png")
    assert width == 1080
    assert height > 2 * width
    assert ink > 300 * 24


def test_games_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = panel(figure_of([line(game, 1) for game in SETS["seed24"]], monkeypatch), "path length")
    looks = {(drawn.get_color(), drawn.get_marker()) for drawn in lengths.lines}
    assert len(looks) == 25


def test_curves_show_means_of_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        line("pong", 1, -20.0, 2.0),
        line("pong", 1, -10.0, 4.0),
        line("freeway", 1, 1.0, 9.0),
        line("pong", 3, -5.0, 7.0),
    ]
    figure = figure_of(lines, monkeypatch)
    assert curve(panel(figure, "pong")) == ([1, 3], [-15.0, -5.0])
    lengths = panel(figure, "path length")
    assert curve(lengths, label="pong") == ([1, 3], [3.0, 7.0])
    assert curve(lengths, colour="black") == ([1, 3], [5.0, 7.0])


def test_of_alphabets_the_panels_show_training_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [supervised("greek", 1, 0.5), supervised("greek", 1, 0.25), supervised("greek", 3, 0.125)]
    figure = figure_of([*lines, supervised("n_ko", 2), {**supervised("ulog", 2), "curve": []}], monkeypatch)
    greek = panel(figure, "greek")
    assert greek.get_ylabel() == "training error (%)"
    assert curve(greek) == ([1, 3], [37.5, 12.5])
    assert "no batch yet" in texts(panel(figure, "ulog"))
    for alphabet in ("greek", "n_ko"):  # from 0 on, with room above the highest point
        assert panel(figure, alphabet).get_ylim() == (0, pytest.approx(1.05 * 50))
    words = texts(figure)
    assert "one task" in words
    for word in ("random play", "return", "episode"):
        assert not [text for text in words if word in text], word


def test_of_games_the_legend_has_random_play_where_it_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "random play" in texts(figure_of([line("pong", 1), line("air_raid", 1)], monkeypatch))
    assert "random play" not in texts(figure_of([line("air_raid", 1)], monkeypatch))


def test_thirty_five_alphabets_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    names = sorted(ALPHABETS, key=len)[-35:]  # the longest ones
    figure = figure_of([supervised(name, version) for version in range(1, 4) for name in names], monkeypatch)
    figure.draw_without_rendering()  # which lays it out
    panels = [panel(figure, name) for name in names]
    titles = [axes.title.get_window_extent() for axes in panels]
    assert not [1 for at, one in enumerate(titles) for other in titles[at + 1 :] if one.overlaps(other)]
    assert all(axes.get_window_extent().width > 150 and axes.get_window_extent().height > 100 for axes in panels)
    lengths = panel(figure, "path length")
    legend = lengths.get_legend()
    assert legend is not None
    box = legend.get_window_extent()
    assert not box.overlaps(lengths.get_window_extent())
    assert box.x1 <= figure.bbox.x1
    assert box.y0 >= figure.bbox.y0


@pytest.mark.parametrize("updates", [1, 2, 7, 1000])
def test_meta_updates_are_counted_in_whole_numbers(monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    figure = figure_of([line("pong", version) for version in (1, updates)], monkeypatch)
    for axes in figure.axes:
        ticks = [tick for tick in axes.get_xticks() if 0.5 <= tick <= updates + 0.5]
        assert 1 <= len(ticks) <= 12
        assert all(tick == int(tick) for tick in ticks)


def test_random_play_is_drawn_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figure_of([line("pong", 1), line("air_raid", 1)], monkeypatch)
    dashed = {
        game: [drawn.get_ydata()[0] for drawn in panel(figure, game).lines if drawn.get_linestyle() == "--"]
        for game in ("pong", "air_raid")
    }
    assert dashed == {"pong": [reference_scores()["pong"]["random"]], "air_raid": []}


def test_games_without_an_episode_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [event_files.line("pong", 1, [event_files.point(steps, None)]) for steps in (400, 10_000)]
    figure = figure_of([*tasks, line("freeway", 1)], monkeypatch)
    assert "no episode ended\nwithin 10,000 steps" in texts(panel(figure, "pong"))
    assert not [text for text in texts(panel(figure, "freeway")) if "no episode" in text]


@pytest.mark.parametrize("length", [0.0, float("nan"), float("inf")])
def test_lengths_that_a_logarithm_cannot_show_are_left_out(tmp_path: Path, length: float) -> None:
    progress_picture([line("pong", 1, None, length)], tmp_path / "run.png", "a run")
    assert coloured(tmp_path / "run.png")[1] == 0


def test_an_empty_ledger_gives_a_picture_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress_picture([], tmp_path / "run.png", "a run")
    size, _ = coloured(tmp_path / "run.png")
    assert size >= (300, 900)
    assert texts(figure_of([], monkeypatch)) == ["a run", "no meta-update has been made yet"]


def test_characters_that_the_font_lacks_are_drawn_as_boxes_without_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.draw_text("**leap**\n\n- started with `launch.py --run-dir /データ/$x_y^z`")
        progress_picture([line("pong", 1)], tmp_path / "progress.png", "実行")


@pytest.mark.parametrize("tasks", ["atari", "omniglot"])
def test_a_description_fits_into_its_picture(monkeypatch: pytest.MonkeyPatch, tasks: str) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(pictures, "_encode", lambda figure: drawn.append(figure))
    games = {"games": ["seed24"]} if tasks == "atari" else {}
    command = ["launch.py", "train", *("--meta.learning-rate=0.1" for _ in range(30))]
    pictures.draw_text(about(resolve("fast" if games else "quick", {"tasks": tasks, **games}), command))
    (figure,) = drawn
    figure.draw_without_rendering()
    heading, body = (text.get_window_extent() for text in figure.texts)
    assert heading.y0 > body.y1
    for box in (heading, body):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    text = "".join(shown.get_text() for shown in figure.texts)
    assert "how to read the charts" in text.lower().replace("\n", " ")
    assert "should fall" in text.replace("\n", " ")
    assert not {"*", "`"} & set(text)


def test_a_title_is_text_and_no_formula(tmp_path: Path) -> None:
    progress_picture([], tmp_path / "run.png", r"runs/$\nonsense$")
    assert coloured(tmp_path / "run.png")[1] == 0


def test_whoever_reads_the_old_picture_still_does(tmp_path: Path) -> None:
    path = tmp_path / "run.png"
    path.write_bytes(b"the old one")
    with path.open("rb") as reader:
        progress_picture([], path, "a run")
        assert reader.read() == b"the old one"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_failed_save_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.png"
    path.write_bytes(b"the old one")

    def half(self: Figure, part: io.BytesIO, **_: Any) -> None:
        part.write(b"half a pict")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="No space"):
        progress_picture([line("pong", 1)], path, "a run")
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], None),
        ([point(100, 0, None)], None),
        ([point(100, 3, 5.0)], 5.0),
        ([point(100, 9, 100.0), point(200, 1, 10.0), point(300, 3, 20.0)], 17.5),  # the second half, by episodes
        ([point(100, 1, 10.0), point(200, 3, 20.0), point(300, 0, None), point(400, 0, None)], 17.5),  # no second half
    ],
)
def test_the_score_of_a_task(points: list[dict[str, Any]], expected: float | None) -> None:
    assert RETURN.task_score(points) == expected


def test_the_error_of_a_task_is_the_area_under_its_curve() -> None:
    points = [point(100, 1, 1.0), point(200, 2, 0.25), point(300, 1, 0.0)]
    assert ERROR.task_score(points) == 0.375
    assert ERROR.task_score([]) is None
